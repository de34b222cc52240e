"""What a report can show of a results file: the table of quantities, and numbers that know where they stand.

Every number carries the file and the JSON pointer (RFC 6901) it was read from, so that what a report says can be
checked against what was measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from apex_quant.evaluation.schema import Results

Z95: Final = 1.959963984540054  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Quantity:
    """One row of the table. `place`: keys below `metrics`; `group`: what must be equal for two files to be compared.

    `unit`: "" for plain numbers, "nats", "share" (shown as percent), "tokens/s", "ratio".
    """

    key: str
    title: str
    place: tuple[str, ...]
    unit: str
    better: Literal["lower", "higher", ""]
    group: str
    short: str = ""

    @property
    def axis(self) -> str:
        """Title and unit as an axis says them."""
        unit = {"share": "%", "ratio": ""}.get(self.unit, self.unit)
        return f"{self.title} ({unit})" if unit else self.title


def _task(key: str, title: str, short: str) -> Quantity:
    return Quantity(key, title, (key,), "share", "higher", key, short)


QUANTITIES: Final[dict[str, Quantity]] = {
    row.key: row
    for row in (
        Quantity("kld", "mean KLD", ("kld", "mean"), "nats", "lower", "kld", "KLD"),
        Quantity("kld_median", "median KLD", ("kld", "median"), "nats", "lower", "kld", "median"),
        Quantity("kld_p90", "90 % KLD", ("kld", "p90"), "nats", "lower", "kld", "90 %"),
        Quantity("kld_p95", "95 % KLD", ("kld", "p95"), "nats", "lower", "kld", "95 %"),
        Quantity("kld_p99", "99 % KLD", ("kld", "p99"), "nats", "lower", "kld", "99 %"),
        Quantity("kld_p99_9", "99.9 % KLD", ("kld", "p99_9"), "nats", "lower", "kld", "99.9 %"),
        Quantity("kld_max", "largest KLD", ("kld", "max"), "nats", "lower", "kld", "max"),
        Quantity("kld_reverse", "mean reverse KLD", ("kld", "reverse_mean"), "nats", "lower", "kld", "reverse"),
        Quantity("kld_floor", "mean KLD of a uniform Q8_0", ("kld", "floor", "mean"), "nats", "", "kld", "floor"),
        Quantity("top1", "same top token", ("kld", "top1_agreement"), "share", "higher", "kld", "top-1"),
        Quantity("delta_p", "RMS change of probability", ("kld", "delta_p_rms"), "share", "lower", "kld", "Δp"),
        Quantity("ppl", "perplexity", ("ppl",), "", "lower", "ppl", "PPL"),
        Quantity("ppl_all", "perplexity, every token", ("ppl_all",), "", "lower", "ppl", "PPL all"),
        Quantity("ppl_ratio", "perplexity ratio", ("kld", "ppl_ratio"), "ratio", "lower", "kld", "PPL ratio"),
        Quantity("router", "router choices changed", ("router", "changed"), "share", "lower", "kld", "routers"),
        Quantity("router_moved", "router weight moved", ("router", "mass_moved"), "share", "lower", "kld", "moved"),
        _task("hellaswag", "HellaSwag", "HS"),
        _task("winogrande", "Winogrande", "WG"),
        _task("mmlu", "MMLU", "MMLU"),
        _task("arc", "ARC", "ARC"),
        _task("truthfulqa", "TruthfulQA", "TQA"),
        Quantity("pp", "prompt speed", ("speed", "pp*"), "tokens/s", "higher", "speed", "pp"),
        Quantity("tg", "generation speed", ("speed", "tg*"), "tokens/s", "higher", "speed", "tg"),
    )
}
"""By key. A place that ends in * is the first speed test of that kind; pp512 and tg128 come first."""

TASK_KEYS: Final = ("hellaswag", "winogrande", "mmlu", "arc", "truthfulqa")
_USUAL: Final = {"pp*": "pp512", "tg*": "tg128"}
_TEST = re.compile(r"(?:pp|tg)\d{1,9}(?:@d\d{1,9})?", re.ASCII)


@dataclass(frozen=True)
class Number:
    """A value with its interval as the results file has them, and where it stands there.

    `low`, `high`: the interval of the file. `error`: a standard error, as llama-perplexity states it; `deviation`: a
    standard deviation over `n` repetitions. `file`: name of the results file; `pointer`: JSON pointer of the value;
    the interval's ends stand beside it. `test`: which speed test.
    """

    value: float
    low: float | None
    high: float | None
    n: int | None
    error: float | None
    deviation: float | None
    note: str | None
    file: str
    pointer: str
    test: str | None = None

    def interval(self) -> tuple[float, float, Literal["interval", "error", "deviation"]] | None:
        """Low, high and what they are: the file's interval, 1.96 standard errors, or one standard deviation; None
        where the file says nothing of how sure the value is."""
        if self.low is not None and self.high is not None:
            return self.low, self.high, "interval"
        if self.error is not None:
            return self.value - Z95 * self.error, self.value + Z95 * self.error, "error"
        if self.deviation is not None:
            return self.value - self.deviation, self.value + self.deviation, "deviation"
        return None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Absent:
    """A quantity that a file has no value of; `note` says why in a sentence's part."""

    note: str


def number(results: Results, key: str, *, file: str) -> Number | Absent:
    """The quantity of QUANTITIES called `key` in these results."""
    quantity = QUANTITIES[key]
    metric, *rest = quantity.place
    found: Any = results.metrics.get(metric)
    if not found:
        return Absent("not measured")
    pointer = f"/metrics/{metric}"
    test = None
    for part in rest:
        if part.endswith("*"):
            test = first_test(found, part)
            if test is None:
                return Absent("not measured")
            part = test
        if not isinstance(found, Mapping) or found.get(part) is None:
            return Absent("not measured")
        beside = f"{part}_interval"  # of a plain number the interval stands beside it, with the value in it
        if isinstance(found.get(beside), Mapping) and finite(found[beside].get("value")) == finite(found[part]):
            part = beside
        found, pointer = found[part], f"{pointer}/{part}"
    return number_at(found, file, pointer, test)


def number_at(found: Any, file: str, pointer: str, test: str | None = None) -> Number | Absent:
    """A number, or an object with `value`, that stands at `pointer`."""
    if not isinstance(found, Mapping):
        value = finite(found)
        if value is None:
            return Absent("not measured")
        return Number(value, None, None, None, None, None, None, file, pointer, test)
    value = finite(found.get("value"))
    note = found.get("note")
    note = note if isinstance(note, str) else None
    if value is None:
        return Absent(note or "not measured")
    low, high, error, deviation = (finite(found.get(name)) for name in ("low", "high", "error", "deviation"))
    n = found.get("n")
    n = n if isinstance(n, int) and not isinstance(n, bool) else None
    return Number(value, low, high, n, error, deviation, note, file, f"{pointer}/value", test)


def first_test(speed: Any, kind: str) -> str | None:
    """The name of the speed test of a kind ("tg*"): the usual one, else the first there is."""
    if not isinstance(speed, Mapping):
        return None
    names = [name for name in speed if isinstance(name, str) and name[:2] == kind[:2] and _TEST.fullmatch(name)]
    usual = _USUAL.get(kind, "")
    return usual if usual in names else next(iter(names), None)


def finite(value: Any) -> float | None:
    """The number, or None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        made = float(value)
    except OverflowError:
        return None
    return made if math.isfinite(made) else None


def shown(key: str, value: float) -> str:
    """A value of a quantity as text without its unit: "0.0114", "6.552", "83.0", "62.3"."""
    unit = QUANTITIES[key].unit
    if unit == "share":
        return f"{100 * value:.1f}" if value >= 0.1 else f"{100 * value:.2f}"
    if unit == "tokens/s":
        return f"{value:.1f}" if value < 1000 else f"{value:.0f}"
    if unit == "nats":
        return f"{value:.3g}" if value >= 1e-4 else f"{value:.1e}"
    return f"{value:.4g}"


def gigabytes(size: int) -> str:
    """Bytes in powers of 1000, as file sizes on the Hub are: "21.3 GB", "15.2 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}" if size < 100 * scale else f"{size / scale:.0f} {unit}"
    return f"{size} B"
