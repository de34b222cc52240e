"""From simulated and measured divergences to a prediction with its uncertainty, and to words.

A simulation rounds what is written into a cache of f32, so it has the type's errors in K and V and none of its
kernel's (stock attention rounds queries to 8 bits for quantized K, a fork does what it does). How much that matters is
seen where both are known: the same simulation of stock types, beside the measured ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

LEAST_CHECKS: Final = 3
"""Stock pairs below which a prediction has no interval."""
LEVEL: Final = 0.95


@dataclass(frozen=True)
class Check:
    """A stock pair: mean KLD as measured and as simulated."""

    name: str
    measured: float
    simulated: float

    @property
    def log_ratio(self) -> float:
        return math.log(self.measured / self.simulated)


def predict(simulated: float, checks: Sequence[Check], low: float | None = None, high: float | None = None
            ) -> dict[str, Any]:  # fmt: skip
    """Mean KLD of the real thing: `simulated` times the geometric mean of measured / simulated over the checks.

    The interval is a prediction interval for one more log ratio (Student's t over the checks, taken for exchangeable),
    joined in quadrature with the sampling interval `low` to `high` of the simulated mean, where there is one.
    """
    known = [one for one in checks if one.measured > 0 and one.simulated > 0]
    if simulated <= 0 or not known:
        note = "no stock pair was both simulated and measured" if not known else "the simulation shows no damage"
        return {"value": simulated, "low": None, "high": None, "n": 0, "note": note}
    ratios = np.array([one.log_ratio for one in known])
    value = simulated * math.exp(float(ratios.mean()))
    if len(known) < LEAST_CHECKS:
        note = f"too few: {len(known)} stock pairs, an interval takes at least {LEAST_CHECKS}"
        return {"value": value, "low": None, "high": None, "n": len(known), "note": note}
    spread = _t(len(known) - 1) * float(ratios.std(ddof=1)) * math.sqrt(1 + 1 / len(known))
    down = math.log(simulated / low) if low and low > 0 else 0.0
    up = math.log(high / simulated) if high and high > 0 else 0.0
    return {
        "value": value,
        "low": value * math.exp(-math.hypot(spread, down)),
        "high": value * math.exp(math.hypot(spread, up)),
        "n": len(known),
    }


def from_attention(error: float, known: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Another prediction, from errors of attention's output alone: log KLD = a + b log error over stock pairs, `known`
    {name: (error, measured mean KLD)}, with the prediction interval of ordinary least squares, the rank correlation
    over the stock pairs and the typical factor by which it misses a stock pair that it was not fitted to."""
    from scipy.stats import spearmanr

    rows = [pair for pair in known.values() if pair[0] > 0 and pair[1] > 0]
    if len(rows) < LEAST_CHECKS + 1 or error <= 0:
        return {"value": None, "low": None, "high": None, "n": len(rows), "note": "too few stock pairs with an error"}
    x, y = (np.log([pair[i] for pair in rows]) for i in (0, 1))
    value, spread = _line(x, y, math.log(error))
    missed = [y[i] - _line(np.delete(x, i), np.delete(y, i), x[i])[0] for i in range(len(rows))]
    return {
        "value": math.exp(value),
        "low": math.exp(value - spread),
        "high": math.exp(min(value + spread, 700.0)),
        "n": len(rows),
        "rank_correlation": float(spearmanr(x, y).statistic),
        "missed_by": math.exp(float(np.sqrt(np.mean(np.square(missed))))),
        "outside": not float(x.min()) <= math.log(error) <= float(x.max()),
    }


def alike(predicted: Mapping[str, Any], measured: Mapping[str, float]) -> dict[str, Any]:
    """The stock pair with the nearest divergence (by its logarithm), and all that the interval cannot tell apart."""
    positive = {name: value for name, value in measured.items() if value > 0}
    value = predicted["value"]
    if not positive or not value or value <= 0:
        return {"nearest": None, "within": []}
    nearest = min(positive, key=lambda name: abs(math.log(positive[name] / value)))
    low, high = predicted["low"], predicted["high"]
    within = [name for name, kld in positive.items() if low is not None and low <= kld <= high]
    return {"nearest": nearest, "within": within}


def sentence(
    name: str,
    bits: float,
    predicted: Mapping[str, Any],
    like: Mapping[str, Any],
    measured: Mapping[str, float],
    bits_of: Mapping[str, float],
    highs: Mapping[str, float | None],
) -> str:
    """What was found, in words that claim no more than was found. `highs`: upper ends of the measured means."""
    value, low, high = (predicted[key] for key in ("value", "low", "high"))
    said = f"{name} ({bits:g} bits a value): predicted mean KLD {value:.3g}"
    if low is not None:
        said += f" [{low:.3g}, {high:.3g}]"
    nearest = like["nearest"]
    if nearest is None:
        return f"{said}; no stock pair was measured beside it."
    said += f", nearest to {nearest} ({bits_of[nearest]:g} bits, measured {measured[nearest]:.3g})"
    others = [other for other in like["within"] if other != nearest]
    if others:
        said += f"; {', '.join(others)} {'is' if len(others) == 1 else 'are'} within the interval too"
    if low is None:
        return f"{said}; how far off that is, is not known."
    smaller = [
        other for other, kld in measured.items() if bits_of[other] <= bits and 0 < (highs.get(other) or kld) < low
    ]
    if smaller:
        words = "takes no more bits and loses" if len(smaller) == 1 else "take no more bits and lose"
        said += f"; {', '.join(smaller)} {words} less"
    return f"{said}. Its interval covers the simulation's misses of stock pairs and the text, no fork's own mistakes."


def _line(x: Any, y: Any, at: float) -> tuple[float, float]:
    """Least squares at one point: value, and half the width of the prediction interval."""
    n, middle = len(x), float(np.mean(x))
    spread = float(np.sum((x - middle) ** 2))
    slope = float(np.sum((x - middle) * (y - np.mean(y)))) / spread if spread > 0 else 0.0
    value = float(np.mean(y)) + slope * (at - middle)
    left = y - (np.mean(y) + slope * (x - middle))
    if n < 3:
        return value, math.inf
    error = math.sqrt(float(np.sum(left**2)) / (n - 2))
    away = (at - middle) ** 2 / spread if spread > 0 else 0.0
    return value, _t(n - 2) * error * math.sqrt(1 + 1 / n + away)


def _t(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + LEVEL / 2, freedom))
