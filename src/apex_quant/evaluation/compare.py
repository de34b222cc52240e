"""Paired comparison of results on the same tokens or tasks: differences with intervals, and a sentence to quote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from apex_quant.errors import InputError, UsageError, did_you_mean
from apex_quant.evaluation import pertoken, statistics
from apex_quant.evaluation.pairing import Side, aligned, check_references, mc2_hashes, task_hashes, token_hashes, values
from apex_quant.evaluation.results import Results, load
from apex_quant.evaluation.statistics import DRAWS, LEVEL, Difference, Interval

A_LOWER: Final = "a_lower"
B_LOWER: Final = "b_lower"
NOT_SHOWN: Final = "no_difference_shown"


class _Metric(NamedTuple):
    """How tokens are compared: the archive's group and array, what it is called, the quantile (None: the mean)."""

    group: str
    array: str
    label: str
    higher_is_better: bool = False
    quantile: float | None = None


_TOKEN_METRICS: Final = {
    "kld": _Metric("kld", "kld", "mean KLD"),
    "p99_9": _Metric("kld", "kld", "99.9 % KLD", quantile=0.999),
    "top1_agreement": _Metric("kld", "top1", "top-1 agreement", higher_is_better=True),
    "ppl": _Metric("ppl", "nll", "mean NLL"),
}
_MC2: Final = "_mc2"
_TASK_NAMES: Final = {
    "hellaswag": "HellaSwag", "winogrande": "Winogrande", "mmlu": "MMLU", "arc": "ARC", "truthfulqa": "TruthfulQA",
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One metric of two results.

    `difference` is a's value minus b's, `low` to `high` its interval: nats for kld and p99_9, nats of the mean nll
    for ppl (the logarithm of the ratio of perplexities), a share for top1_agreement and tasks. `n` counts tokens or
    tasks. `verdict` says whose **value** is lower, whether or not lower is better; `better_result` whose is better.
    `better`, `worse` and `equal` are the shares of tokens or tasks where a's own value is better, worse or equal.
    `p` is McNemar's, of tasks. None where there were too few; `note` says of what.
    """

    a: str
    b: str
    metric: str
    difference: float | None
    low: float | None
    high: float | None
    n: int
    verdict: str
    sentence: str
    better: float | None
    worse: float | None
    equal: float | None
    p: float | None
    better_result: str | None
    note: str | None
    chunks: int | None
    level: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    items: Sequence[Results | str | Path],
    metrics: Sequence[str] | None = None,
    *,
    all_pairs: bool = False,
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Pair]:
    """Compare results on the tokens and tasks that both sides scored: all with the first, or `all_pairs`.

    `metrics`: kld, p99_9, top1_agreement, ppl, the names of tasks, and truthfulqa_mc2; None means all that a pair has
    in common. ppl falls back on the tokens of kld where a side has no tokens of its own.

    Raises UsageError for fewer than two results and metrics that a side does not have; InputError when files cannot
    be read, have no numbers per token, nothing in common, other tokens or tasks, or another reference.
    """
    if len(items) < 2:
        raise UsageError("a comparison takes two results or more")
    sides = _sides([item if isinstance(item, Results) else load(item) for item in items])
    if metrics is not None:
        _check_names(metrics, sides)
    pairs = combinations(sides, 2) if all_pairs else ((sides[0], other) for other in sides[1:])
    found: list[Pair] = []
    for a, b in pairs:
        names = list(dict.fromkeys(metrics)) if metrics is not None else _shared(a, b)
        for name in names:
            if name in _TOKEN_METRICS:
                found.append(_compare_tokens(a, b, name, level, draws, seed))
            elif name.endswith(_MC2):
                found.append(_compare_masses(a, b, name, level, draws, seed))
            else:
                found.append(_compare_tasks(a, b, name, level))
    return found


def _sides(every: list[Results]) -> list[Side]:
    """Called by their models; where those are equal by their files, else by number."""
    labels = [one.name for one in every]
    if len(set(labels)) < len(labels):
        labels = [str(one.path or one.name) for one in every]
    if len(set(labels)) < len(labels):
        labels = [f"{label} ({number})" for number, label in enumerate(labels, 1)]
    sides = []
    for label, one in zip(labels, every, strict=True):
        where = str(one.path or label)
        if one.per_token is None:
            raise InputError(
                f"{where}: no numbers per token, so nothing can be paired",
                hint="measure it with apex eval -o, which keeps them",
            )
        sides.append(Side(label, where, one, one.arrays()))
    return sides


def _available(side: Side) -> list[str]:
    """The metrics its arrays allow, in the order they are shown."""
    names = [name for name, metric in _TOKEN_METRICS.items() if f"{metric.group}/{metric.array}" in side.arrays]
    if "ppl" not in names and "kld/nll" in side.arrays:
        names.append("ppl")
    tasks = [name for name in pertoken.metrics(side.arrays) if f"{name}/correct" in side.arrays]
    tasks += [f"{name}{_MC2}" for name in tasks if f"{name}/mc2" in side.arrays]
    return names + sorted(tasks, key=lambda name: (list(_TASK_NAMES).index(name) if name in _TASK_NAMES else 99, name))


def _shared(a: Side, b: Side) -> list[str]:
    theirs = _available(b)
    names = [name for name in _available(a) if name in theirs]
    if not names:
        raise InputError(
            f"{a.where} has {', '.join(_available(a)) or 'no metric'} and {b.where} "
            f"{', '.join(theirs) or 'none'}: nothing to compare",
            hint="measure the same metrics of both (apex eval --only)",
        )
    return names


def _check_names(metrics: Sequence[str], sides: list[Side]) -> None:
    for side in sides:
        there = _available(side)
        for name in metrics:
            if name not in there:
                known = f"it has {', '.join(there) or 'none'}."
                raise UsageError(f"{side.where} has no numbers for {name!r}: {known}{did_you_mean(name, there)}")


def _compare_tokens(a: Side, b: Side, name: str, level: float, draws: int, seed: int) -> Pair:
    metric = _TOKEN_METRICS[name]
    group = metric.group
    if any(f"{group}/{metric.array}" not in side.arrays for side in (a, b)):
        group = "kld"  # only ppl gets here: its nll is measured with kld too
    first, second = (pertoken.of_metric(side.arrays, group) for side in (a, b))
    order = aligned(token_hashes(first, a, group), token_hashes(second, b, group), a, b, "scored tokens")
    if metric.group == "kld":
        check_references(a, b, first, second, order)
    x, y = (values(one, metric.array, side, group) for one, side in ((first, a), (second, b)))
    x, y, chunk = x[order[0]], y[order[1]], first["chunk"][order[0]]
    pair = statistics.paired_difference(x, y, chunk, level=level, draws=draws, seed=seed)
    interval = pair.interval
    if metric.quantile is not None:
        interval = statistics.quantile_difference(x, y, chunk, metric.quantile, level=level, draws=draws, seed=seed)
    ratio = f" (ratio of perplexities {statistics.exp(interval.value):.4f})" if name == "ppl" and interval.value else ""
    return _pair(a, b, name, metric, interval, pair, None, level, "tokens", ratio)


def _compare_tasks(a: Side, b: Side, name: str, level: float) -> Pair:
    first, second = (pertoken.of_metric(side.arrays, name) for side in (a, b))
    hashes = [task_hashes(one, side, name) for one, side in ((first, a), (second, b))]
    order = aligned(hashes[0], hashes[1], a, b, f"{_TASK_NAMES.get(name, name)} tasks")
    x, y = (values(one, "correct", side, name) != 0 for one, side in ((first, a), (second, b)))
    x, y = x[order[0]], y[order[1]]
    only_a, only_b = int(np.sum(x & ~y)), int(np.sum(~x & y))
    interval = statistics.share_difference(only_a, only_b, x.size, level=level)
    p = statistics.mcnemar(only_a, only_b)
    shares = [count / x.size if x.size else 0.0 for count in (only_b, only_a, x.size - only_a - only_b)]
    metric = _Metric(name, "correct", f"{_TASK_NAMES.get(name, name)} accuracy", higher_is_better=True)
    tested = f" (McNemar p = {p:.2g})"
    return _pair(a, b, name, metric, interval, Difference(interval, *shares), p, level, "tasks", tested)


def _compare_masses(a: Side, b: Side, name: str, level: float, draws: int, seed: int) -> Pair:
    """mc2, the probability given to the true answers of a task: a mean over tasks, each a block of its own."""
    task = name.removesuffix(_MC2)
    label = f"{_TASK_NAMES.get(task, task)} mc2"
    hashes, masses = [], []
    for side in (a, b):
        arrays = pertoken.of_metric(side.arrays, task)
        hashes.append(mc2_hashes(arrays, side, task))
        masses.append(values(arrays, "mc2", side, task))
    order = aligned(hashes[0], hashes[1], a, b, f"{label} tasks")
    x, y = masses[0][order[0]], masses[1][order[1]]
    pair = statistics.paired_difference(x, y, np.arange(x.size), level=level, draws=draws, seed=seed)
    note = pair.interval.note and pair.interval.note.replace("chunks", "tasks")
    interval = pair.interval._replace(note=note, chunks=None)
    return _pair(
        a, b, name, _Metric(task, "mc2", label, higher_is_better=True), interval, pair, None, level, "tasks", ""
    )


def _pair(
    a: Side, b: Side, name: str, metric: _Metric, interval: Interval, pair: Difference, p: float | None,
    level: float, unit: str, more: str,
) -> Pair:  # fmt: skip
    """The verdict: zero is outside the interval, and for tasks McNemar's test agrees."""
    shown = interval.excludes_zero() and (p is None or p < 1 - level)
    verdict = NOT_SHOWN if not shown else A_LOWER if (interval.value or 0.0) < 0 else B_LOWER
    winner = None if not shown else a.label if (verdict == A_LOWER) != metric.higher_is_better else b.label
    better, worse = (pair.higher, pair.lower) if metric.higher_is_better else (pair.lower, pair.higher)
    return Pair(
        a=a.label,
        b=b.label,
        metric=name,
        difference=interval.value,
        low=interval.low,
        high=interval.high,
        n=interval.n,
        verdict=verdict,
        sentence=_sentence(a.label, b.label, metric, interval, verdict, unit, more),
        better=better,
        worse=worse,
        equal=pair.equal,
        p=p,
        better_result=winner,
        note=interval.note,
        chunks=interval.chunks,
        level=level,
    )


def _sentence(a: str, b: str, metric: _Metric, found: Interval, verdict: str, unit: str, more: str) -> str:
    """One that may be quoted: who, what, by how much, how sure, on how much."""
    if found.value is None:
        return f"no difference can be shown: {metric.label} of {a} and {b}, {found.note}"
    if found.low is None or found.high is None:
        value = f"{found.value:.3g} on {found.n:,} {unit}"
        return f"no difference can be shown: {metric.label} of {a} minus that of {b} is {value}, {found.note}"
    if verdict == NOT_SHOWN:
        numbers = _numbers(found.value, found.low, found.high)
        return (
            f"no difference can be shown: {metric.label} of {a} minus that of {b} is {numbers} "
            f"on {found.n:,} {unit}{more}"
        )
    # the better one is named first, and its advantage is a positive number
    a_first = (verdict == A_LOWER) != metric.higher_is_better
    positive = found.value > 0
    numbers = _numbers(*((found.value, found.low, found.high) if positive else (-found.value, -found.high, -found.low)))
    word = "higher" if metric.higher_is_better else "lower"
    x, y = (a, b) if a_first else (b, a)
    if more.startswith(" (ratio") and not a_first:
        more = f" (ratio of perplexities {statistics.exp(-found.value):.4f})"
    return f"{x} has {word} {metric.label} than {y} by {numbers} on {found.n:,} {unit}{more}"


def _numbers(value: float, low: float, high: float) -> str:
    """'0.0021 [0.0017, 0.0025]': as many digits as the interval's width supports, and no bound rounded to zero."""
    half = (high - low) / 2
    scale = half if half > 0 else abs(value)
    if scale == 0:
        return "0 [0, 0]"
    # one digit of the half width from 3.6 on, two below: the Particle Data Group's rule
    places = max(0, -math.floor(math.log10(scale / 3.55)))
    bounds = [abs(x) for x in (low, high) if x != 0]
    while places < 15 and any(float(f"{x:.{places}f}") == 0 for x in bounds) and (low > 0) == (high > 0):
        places += 1
    text = [f"{x:.{places}f}" for x in (value, low, high)]
    text = [one.lstrip("-") if float(one) == 0 else one for one in text]
    return f"{text[0]} [{text[1]}, {text[2]}]"
