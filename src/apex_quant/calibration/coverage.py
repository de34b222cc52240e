"""Which experts calibration reached, and which kind of text to draw next for those that it did not.

The choice is greedy: every kind is tried once, then the one that fills most of what is missing goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from apex_quant.calibration.observer import I64

FLOOR = 64  # tokens below which an expert's importance says little; the default of --cover and of the list


def uncovered(counts: Mapping[int, I64], floor: int = FLOOR) -> list[dict[str, Any]]:
    """[{"layer", "experts", "tokens"}] of the experts with fewer than `floor` tokens, by layer."""
    rows = []
    for layer, tokens in sorted(counts.items()):
        thin = np.flatnonzero(tokens < floor)
        if len(thin):
            rows.append({"layer": layer, "experts": thin.tolist(), "tokens": tokens[thin].tolist()})
    return rows


def number_uncovered(counts: Mapping[int, I64], floor: int = FLOOR) -> int:
    """Experts with fewer than `floor` tokens, over all layers."""
    return sum(int((tokens < floor).sum()) for tokens in counts.values())


def as_matrix(counts: Mapping[int, I64]) -> I64:
    """Tokens by [layer, expert]; -1 where a layer has fewer experts than another."""
    widest = max((len(tokens) for tokens in counts.values()), default=0)
    matrix = np.full((len(counts), widest), -1, np.int64)
    for row, (_, tokens) in zip(matrix, sorted(counts.items()), strict=True):
        row[: len(tokens)] = tokens
    return matrix


class Cover:
    """Chooses kinds of text until all experts have `floor` tokens or no kind helps."""

    def __init__(self, kinds: Sequence[str], floor: int) -> None:
        self.kinds, self.floor = list(kinds), floor
        self._gains: dict[str, I64] = {}

    def next_kind(self, counts: Mapping[int, I64]) -> str | None:
        """The kind to draw from now, or None when nothing is missing or nothing helps."""
        matrix = as_matrix(counts)
        missing = np.where(matrix >= 0, np.maximum(self.floor - matrix, 0), 0)
        if not missing.any():
            return None
        for kind in self.kinds:
            if kind not in self._gains:
                return kind  # untried
        helps = {kind: int(np.minimum(self._gains[kind], missing).sum()) for kind in self.kinds}
        best = max(helps, key=lambda kind: helps[kind], default=None)
        return best if best is not None and helps[best] > 0 else None

    def learn(self, kind: str, gained: I64) -> None:
        """What the last draw of a kind brought, by [layer, expert]."""
        self._gains[kind] = gained

    def exhausted(self, kind: str) -> None:
        """There is no more of this kind."""
        self.kinds.remove(kind)
