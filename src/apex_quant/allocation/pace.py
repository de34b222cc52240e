"""How long probes will take: encoding of their weights and a pass over the text, corrected by what probes took.

A joint probe of a large model encodes every weight, in types of which some take ten times as long as others: what the
last probe took says nothing of it.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np

from apex_quant.allocation.patches import Disturber
from apex_quant.gguf import ggml_type

_TIMED: Final = 1 << 14  # weights: some milliseconds in the slowest type
_RECENT: Final = 8


class Pace:
    """`per_weight`: seconds of all threads together for encoding one weight in a type. `pass_seconds` of the text."""

    def __init__(self, per_weight: Mapping[str, float]) -> None:
        self.per_weight = dict(per_weight)
        self.pass_seconds = 0.0
        self._ratios: deque[float] = deque(maxlen=_RECENT)

    @classmethod
    def timed(cls, kinds: Iterable[str], disturber: Disturber) -> Pace:
        """By encoding a few random weights in each type."""
        rows = np.random.default_rng(0).standard_normal((_TIMED // 256, 256), np.float32)
        ones = np.ones(256, np.float32)
        found = {}
        for kind in kinds:
            started = time.monotonic()
            disturber.quantized(ggml_type(kind), rows, ones)
            found[kind] = (time.monotonic() - started) / rows.size / disturber.threads
        return cls(found)

    def encoding(self, weights: Mapping[str, int]) -> float:
        """Seconds for `weights` by type, before any correction."""
        return sum(count * self.per_weight[kind] for kind, count in weights.items())

    def encoded(self, weights: Mapping[str, int]) -> float:
        """Seconds that encoding these weights is expected to take."""
        return self.encoding(weights) * self._correction

    def of(self, weights: Mapping[str, int]) -> float:
        """Seconds that a probe with these weights is expected to take."""
        return (self.pass_seconds + self.encoding(weights)) * self._correction

    def learn(self, weights: Mapping[str, int], seconds: float) -> None:
        """A probe took this."""
        plain = self.pass_seconds + self.encoding(weights)
        if plain > 0:
            self._ratios.append(seconds / plain)

    @property
    def _correction(self) -> float:
        return statistics.median(self._ratios) if self._ratios else 1.0
