"""Filling: experts that calibration hardly reached borrow from the other experts of their tensor.

The weight of a channel is the mean square of its activations. From few tokens that is a noisy estimate, and from
none stock takes ones. Here every expert's estimate is shrunk towards the tensor's mean over all experts:

    w_e = (sum_e + K m) / (count_e + K),        m = sum over experts of sum_e / sum over experts of count_e

This is the posterior mean under a conjugate (inverse gamma) prior on each channel's variance that is worth K tokens
drawn from the average expert: an expert with no tokens gets exactly m, one with K tokens lies half way, one with
thousands hardly moves. K = 64, the floor under which an expert counts as uncovered, is a choice that is still to be
measured. Raw files stay raw: a filled one is marked by the key apex.prior and neither filled nor merged again.
"""

from __future__ import annotations

import dataclasses
import math
import re
from contextlib import ExitStack
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import InputError, UsageError
from apex_quant.gguf.values import Value
from apex_quant.importance.imatrix import F32, PRIOR, Entry, Importance
from apex_quant.model import Role, classify

DEFAULT_STRENGTH = 64.0
"""Tokens that the prior is worth."""

RULES = ("prior", "none")
"""What `quantize --fill` takes: this prior with its default strength, or stock's rule (ones without tokens)."""

NO_PRIOR = "none"
_TEXT = re.compile(r"shrink K=([0-9.e+-]{1,32})")


def prior_text(strength: float) -> str:
    """The rule as it stands in files: 'shrink K=64'."""
    return "shrink K=" + repr(float(strength)).removesuffix(".0")


def parse_prior(text: str) -> float | None:
    """The strength in such a text, None for 'none'. Raises InputError."""
    found = _TEXT.fullmatch(text)
    try:
        if found is not None:
            return _valid(float(found[1]))
    except (ValueError, UsageError):
        pass
    if text == NO_PRIOR:
        return None
    raise InputError(f"{text[:80]!r} is no rule for filling an importance matrix that this version knows")


def prior_of(importance: Importance, rule: str) -> str:
    """What has been done, or is to be done, to a matrix under `rule`: the text of a prior, or 'none'.

    A filled matrix is left as it is, whatever the rule; legacy files have no counts per expert to go by.
    Raises UsageError for an unknown rule.
    """
    if rule not in RULES:
        raise UsageError(f"{rule!r} is no rule for filling: choose {' or '.join(RULES)}")
    if importance.prior is not None:
        return importance.prior
    return NO_PRIOR if rule == "none" or importance.legacy else prior_text(DEFAULT_STRENGTH)


def applied(importance: Importance, prior: str) -> Importance:
    """The matrix under a rule that `prior_of` gave: filled, unless it is so already or nothing is to be done."""
    if importance.prior is not None:
        return importance
    strength = parse_prior(prior)
    return importance if strength is None else fill(importance, strength)


def fill(importance: Importance, strength: float = DEFAULT_STRENGTH) -> Importance:
    """A matrix whose expert rows are shrunk towards their tensor's mean over experts, by `strength` tokens.

    Counts stay as they are, but at least 1, and sums are such that sum / count is the new weight, so that stock
    tools read it right. Rows are computed when they are asked for: the given matrix must stay open. Tensors none of
    whose experts has data stay as they are (`blind_tensors`), as do all that have no experts. Raises InputError for
    a legacy or an already filled matrix, UsageError for a strength that is no positive number.
    """
    strength = _valid(strength)
    if importance.prior is not None:
        raise InputError(
            f"{_named(importance)} is filled already ({importance.prior})", hint="fill the raw file it was made from"
        )
    if importance.legacy:
        raise InputError(
            f"{_named(importance)} has no counts per expert, as .dat files do: there is nothing to fill by",
            hint="calibrate into the GGUF form",
        )
    entries = {
        name: _filled(entry, strength) if is_expert(name, entry) and entry.counts.any() else entry
        for name, entry in importance.entries.items()
    }
    metadata = {**importance.metadata, PRIOR: Value.string(prior_text(strength))}
    # the files stay the raw matrix's to close
    return dataclasses.replace(
        importance, entries=entries, metadata=metadata, file_name=None, sha256=None, _files=ExitStack()
    )


def is_expert(name: str, entry: Entry) -> bool:
    """Whether the rows of an entry are routed experts with counts of their own."""
    return entry.n_mat > 1 and classify(name, (entry.n_in, 1, entry.n_mat), "").role is Role.routed_expert


def blind_tensors(importance: Importance) -> list[str]:
    """Expert tensors none of whose experts has data: filling leaves them at ones."""
    return [name for name, entry in importance.entries.items() if is_expert(name, entry) and not entry.counts.any()]


def _valid(strength: float) -> float:
    if not (math.isfinite(strength) and strength > 0):
        raise UsageError(f"a prior worth {strength:g} tokens: must be a positive number")
    return float(strength)


def _filled(entry: Entry, strength: float) -> Entry:
    return Entry(np.maximum(entry.counts, 1), entry.n_in, _Shrunk(entry, strength).read)


class _Shrunk:
    """The sums of a filled entry, computed row by row; only the mean over experts is kept."""

    def __init__(self, entry: Entry, strength: float) -> None:
        self.entry, self.strength = entry, strength

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """Mean square per channel over all tokens of all experts."""
        entry = self.entry
        total = np.zeros(entry.n_in)
        for row in np.flatnonzero(entry.counts > 0):
            total += entry.read(int(row) * entry.n_in, entry.n_in)
        mean: NDArray[np.float64] = total / float(entry.counts.sum())
        return mean

    def read(self, start: int, n: int) -> F32:
        entry, strength = self.entry, self.strength
        first, last = start // entry.n_in, -(-(start + n) // entry.n_in)
        sums = entry.read(first * entry.n_in, (last - first) * entry.n_in).reshape(-1, entry.n_in).astype(np.float64)
        counts = entry.counts[first:last, None].astype(np.float64)
        shrunk = (sums + strength * self.mean) * (counts / (counts + strength))
        filled = np.where(counts > 0, shrunk, self.mean)  # the count is 1 where there was none
        offset = start - first * entry.n_in
        return filled.astype(np.float32).reshape(-1)[offset : offset + n]


def _named(importance: Importance) -> str:
    return importance.file_name or "the importance matrix"
