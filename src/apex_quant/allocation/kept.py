"""The undisturbed model's logits of the probe text, kept in memory for the whole measurement.

All of them as float32 where they fit; for large vocabularies of each scored token the likeliest ones, and the rest of
the distribution as one more outcome. Lumping outcomes together never makes a divergence larger (the data-processing
inequality), so what is measured then is a lower bound, short by the rest's probability times the divergence inside it:
with 2,048 tokens kept the rest is about a hundredth of the probability or less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import InputError
from apex_quant.evaluation.scores import NEVER, NotFinite, Scorer

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

MOST_BYTES: Final = 1 << 29
KEPT: Final = 2048
_ROWS = 64  # worked on together


@dataclass(frozen=True)
class _Step:
    """Of one decode: `logits` [rows, k]; `tokens` [rows, k] they are of, None for all; `rest` [rows] log-probability
    of all others; `total` [rows] log sum exp."""

    logits: F32
    tokens: I32 | None
    rest: F64
    total: F64


class KeptLogits:
    """`rows`: scored tokens in all, `vocabulary`: of each; they decide the form."""

    def __init__(self, rows: int, vocabulary: int, scorer: Scorer, *, most_bytes: int = MOST_BYTES) -> None:
        self.whole = 4 * rows * vocabulary <= most_bytes
        self.kept = vocabulary if self.whole else min(vocabulary, KEPT)
        self.rest = 0.0  # mean probability that is lumped together
        self._scorer, self._steps = scorer, list[_Step]()
        self._rows = 0

    def add(self, logits: F32) -> None:
        """The next step's logits [rows, vocabulary]. Raises InputError when some are not finite."""
        if self.whole:
            if not np.isfinite(logits).all():
                raise InputError("the undisturbed model gives logits that are NaN or infinite")
            self._steps.append(_Step(logits.copy(), None, np.zeros(0), np.zeros(0)))
            return
        kept = np.empty((len(logits), self.kept), np.float32)
        tokens = np.empty((len(logits), self.kept), np.int32)
        rest, total = np.empty(len(logits)), np.empty(len(logits))

        def work(rows: slice) -> None:
            part = logits[rows]
            total[rows] = log_sum(part)
            best = np.argpartition(part, part.shape[1] - self.kept, axis=1)[:, -self.kept :]
            tokens[rows], kept[rows] = best, np.take_along_axis(part, best, axis=1)
            rest[rows] = _log_rest(kept[rows], total[rows])

        self._scorer.each(len(logits), logits.shape[1], work)
        if not np.isfinite(total).all():
            raise InputError("the undisturbed model gives logits that are NaN or infinite")
        self._rows += len(logits)
        self.rest += (float(np.exp(rest).sum()) - self.rest * len(logits)) / max(self._rows, 1)
        self._steps.append(_Step(kept, tokens, rest, total))

    def divergence(self, step: int, logits: F32, targets: NDArray[np.integer]) -> F64:
        """KLD of each row of `logits` from step number `step`, float64 [rows]. Raises NotFinite."""
        known = self._steps[step]
        if known.tokens is None:
            return self._scorer.divergence([(0, known.logits)], logits, targets).kld
        tokens = known.tokens
        found, totals = np.empty(len(logits)), np.empty(len(logits))

        def work(rows: slice) -> None:
            part = np.take_along_axis(logits[rows], tokens[rows], axis=1)
            total = totals[rows] = log_sum(logits[rows])
            ours = np.maximum(part, NEVER).astype(np.float64) - total[:, None]
            theirs = np.maximum(known.logits[rows], NEVER).astype(np.float64) - known.total[rows, None]
            share = np.exp(theirs)
            rest, ours_rest = known.rest[rows], _log_rest(part, total)
            found[rows] = (share * (theirs - ours)).sum(axis=1) + np.exp(rest) * (rest - ours_rest)

        with np.errstate(invalid="ignore", over="ignore"):
            self._scorer.each(len(logits), logits.shape[1], work)
        if not np.isfinite(totals).all():
            raise NotFinite(int(np.argmin(np.isfinite(totals))), "the model")
        return found


def log_sum(logits: F32) -> F64:
    """log sum exp of each row."""
    top = logits.max(axis=1, keepdims=True)
    total: F64 = top[:, 0].astype(np.float64) + np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64))
    return total


def _log_rest(kept: F32, total: F64) -> F64:
    """Log of the probability that the kept ones leave; never minus infinity."""
    inside = np.exp(kept.astype(np.float64) - total[:, None]).sum(axis=1)
    rest: F64 = np.log(np.maximum(1 - inside, 1e-9))
    return rest
