"""What every importer makes: one model's numbers, put where results.json has them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from apex_quant.errors import InputError
from apex_quant.evaluation.statistics import wilson
from apex_quant.report.quantities import QUANTITIES, TASK_KEYS

_NUMBER = re.compile(r"[-+]?(?:\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})(?:[eE][-+]?\d{1,3})?", re.ASCII)
_PLAIN: Final = {"median", "p90", "p95", "p99", "reverse_mean", "delta_p_rms", "ppl_ratio", "changed", "mass_moved"}
_SPEED = re.compile(r"(pp|tg)\d{1,9}(?:@d\d{1,9})?", re.ASCII)
PARTS: Final = ("low", "high", "n", "error", "deviation")


@dataclass
class Row:
    """One model: `metrics`, `settings` and `reference` as in results.json; `model`: more of its keys; `source`: where
    the numbers are from, as the file states it."""

    name: str
    bytes: int | None = None
    bpw: float | None = None
    tier: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    reference: Mapping[str, Any] | None = None
    source: str | None = None
    warnings: list[str] = field(default_factory=list)

    def put(self, key: str, value: float, **parts: float | int | None) -> None:
        """A quantity of QUANTITIES, or a speed test (pp512), with parts of PARTS. Raises InputError for impossible
        numbers."""
        known = {name: part for name, part in parts.items() if part is not None}
        if _SPEED.fullmatch(key):
            place: tuple[str, ...] = ("speed", key)
        elif key in QUANTITIES:
            place = QUANTITIES[key].place
        else:
            raise InputError(f"{key[:40]!r} is no quantity")
        limit = 1.0 if place[-1] in (*TASK_KEYS, "top1_agreement", "changed", "mass_moved") else 1e12
        if not (math.isfinite(value) and 0 <= value <= limit):
            raise InputError(f"{self.name}: {key} cannot be {value:g}")
        if not all(math.isfinite(part) and part >= 0 for part in known.values()):
            raise InputError(f"{self.name}: {key} has an impossible uncertainty")
        inside = self.metrics.setdefault(place[0], {})
        for name in place[1:-1]:
            inside = inside.setdefault(name, {})
        if len(place) == 1:
            inside.update({"value": value, **known})
        else:
            inside[place[-1]] = value if place[-1] in _PLAIN else {"value": value, **known}

    def put_task(self, key: str, share: float, n: int | None, digits: int | None = None) -> None:
        """An accuracy of `n` tasks, with its Wilson interval when a whole number of them gives the share. `digits`:
        decimals of the percentage as it was stated (None: as exact as a float)."""
        hits = None if n is None else round(share * n)
        slack = 1e-6 if digits is None else 0.6 * 10 ** (-digits - 2)
        if n is None or hits is None or n < 1 or not 0 <= hits <= n or abs(hits / n - share) > slack:
            self.put(key, share)
            if n is not None:
                self.warnings.append(f"{key}: {100 * share:g} % is no share of {n} tasks, so it has no interval")
            return
        found = wilson(hits, n)
        self.put(key, share, low=found.low, high=found.high, n=n)


def parsed(text: str, what: str) -> float:
    """A number as people and programs write them. Raises InputError; infinities and NaN are none."""
    found = text.strip()
    if not _NUMBER.fullmatch(found):
        raise InputError(f"{what}: {found[:40]!r} is not a number")
    value = float(found)
    if not math.isfinite(value):
        raise InputError(f"{what}: {found[:40]!r} is too large")
    return value


def whole(text: str, what: str) -> int:
    """A whole number from 0 to 2^62."""
    value = parsed(text, what)
    if value != int(value) or not 0 <= value < 1 << 62:
        raise InputError(f"{what}: {text.strip()[:40]!r} is not a number of things")
    return int(value)
