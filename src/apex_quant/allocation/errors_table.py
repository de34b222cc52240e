"""How much each type disturbs each tensor: errors of sampled rows, for all types at once.

relative = sum (w - q)^2 / sum w^2; weighted = sum_j h_j (w - q)_j^2 / sum_j h_j w_j^2, where h is the sum of squared
activations of input channel j (of its expert), so that it is the share of the output's energy that is lost, as far as
channels are uncorrelated. A type whose bytes do not depend on chunking gives the same error by any sample of rows, but
for chance; rows are taken evenly from as many slices as there are rows, all of them where that is enough.

What was computed once is kept by content: the hash of the sampled bytes, the importance, the type and the library.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from apex_quant.allocation.patches import Disturber, Sums, Weights
from apex_quant.cache import cache_folder
from apex_quant.gguf import GGMLType, ggml_type
from apex_quant.native import library_info

Row = dict[str, dict[str, float]]  # type -> {"relative", "weighted"}

SAMPLE = 1 << 16  # weights of a tensor
_FORMAT = 2
_LEAST = 1 << 12  # weights, however short the time
_LEAST_ROWS = 8  # of a tensor, however long they are
_GOLDEN = (5**0.5 - 1) / 2  # its multiples are spread evenly over 0 to 1


def sample(weights: Weights, most: int) -> list[int]:
    """Row numbers, evenly spread over all slices, or a row of each of so many; at most about `most` weights, at least
    _LEAST_ROWS rows."""
    slices, length = weights.rows // weights.rows_per_slice, weights.rows_per_slice
    rows = max(_LEAST_ROWS, most // weights.n)
    taken = min(slices, rows)
    each = min(length, max(1, rows // taken))
    places = np.unique(np.linspace(0, slices - 1, taken).round().astype(int))
    found = []
    for number, place in enumerate(places.tolist()):
        shift = (0.5 + number * _GOLDEN) % 1  # not the same rows of every slice
        inside = np.unique(((np.arange(each) + shift) * length / each).astype(int))
        found += [place * length + int(row) for row in inside]
    return found


def errors_of(weights: Weights, types: list[GGMLType], disturber: Disturber, *, most: int = SAMPLE) -> Row:
    """Errors of one tensor in these types, from the cache where it has them."""
    rows = sample(weights, most)
    by_slice: dict[int, list[int]] = {}
    for row in rows:
        by_slice.setdefault(row // weights.rows_per_slice, []).append(row)
    pieces = []
    digest = hashlib.sha256(f"{_FORMAT} {library_info().version} {weights.info.type.name} {weights.n}".encode())
    for place, members in by_slice.items():
        values = np.concatenate([weights.read(row, 1) for row in members])
        encoding, counting = weights.importance_of(place * weights.rows_per_slice)
        pieces.append((values, encoding, counting))
        for array in (values, encoding, counting):
            digest.update(b"-" if array is None else array.tobytes())
    cache = _Cache(digest.hexdigest())
    missing = [kind for kind in types if kind.name not in cache.known]

    def work(kind: GGMLType) -> tuple[str, Sums]:
        sums = Sums()
        for values, encoding, counting in pieces:
            sums.add(values, disturber.quantized(kind, values, encoding), counting)
        return kind.name, sums

    for name, sums in disturber.map(work, missing):
        cache.known[name] = {"relative": sums.relative, "weighted": sums.weighted}
    if missing:
        cache.save()
    return {kind.name: cache.known[kind.name] for kind in types}


def error_table(
    types: Mapping[str, list[GGMLType]],
    weights: Callable[[str], Weights],
    disturber: Disturber,
    each: Callable[[int, str], None],
    *,
    seconds: float | None = None,
) -> tuple[dict[str, Row], int]:
    """(errors of the tensors that `types` names, weights that were sampled of a tensor at least); `each` is told the
    number of finished ones and the name of the next.

    `seconds`: fewer rows are sampled where the table would take longer, but some of every tensor.
    """
    every = sorted({kind.name for kinds in types.values() for kind in kinds})
    disturber.encoder.prepare([ggml_type(name) for name in every])
    table: dict[str, Row] = {}
    most, least, begun = SAMPLE, SAMPLE, time.monotonic()
    for number, (name, kinds) in enumerate(types.items()):
        each(number, name)
        started, least = time.monotonic(), min(least, most)
        table[name] = errors_of(weights(name), kinds, disturber, most=most)
        now, left = time.monotonic(), len(types) - number - 1
        if seconds is not None and left:
            affordable = max(seconds - (now - begun), 0.0) / left
            most = int(min(max(most * affordable / max(now - started, 1e-6), _LEAST), SAMPLE))
    return table, least


class _Cache:
    """One small file for each tensor's sample. Whatever is wrong with it, it is made again."""

    def __init__(self, key: str) -> None:
        self.path: Path = cache_folder() / "errors" / key[:2] / f"{key}.json"
        self.known: Row = {}
        try:
            if self.path.stat().st_size < 1 << 16:
                self.known = _checked(json.loads(self.path.read_bytes()))
        except (OSError, ValueError, RecursionError):
            pass

    def save(self) -> None:
        """A cache that cannot be written costs time and nothing else."""
        scratch = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps(self.known))
            scratch.replace(self.path)
        except OSError:
            scratch.unlink(missing_ok=True)


def _checked(document: Any) -> Row:
    """ValueError unless every entry is two sane numbers."""
    if not isinstance(document, dict):
        raise ValueError("not a table")
    for row in document.values():
        if not isinstance(row, dict) or set(row) != {"relative", "weighted"}:
            raise ValueError("not a row")
        if not all(isinstance(v, int | float) and 0 <= v < 1e6 for v in row.values()):
            raise ValueError("not an error")
    return document
