"""Is the next GiB better spent on weights or on the KV cache? From measured divergences, or not at all.

The damage of a file and of a pair of cache types are both mean KLDs in nats per token: of the file from the full
model, of the pair from an f16 cache of the same weights. Their sum is taken for the damage of both together; that the
two add up is an assumption, stated in the answer and testable by `apex eval --type-k ... --reference ...`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from apex_quant.errors import InputError, UsageError
from apex_quant.evaluation.identity import identity
from apex_quant.gguf import open_model
from apex_quant.serving.fit import shown_name

if TYPE_CHECKING:
    from apex_quant.evaluation.pairing import Side
    from apex_quant.evaluation.results import Results
    from apex_quant.serving.fit import Option

GIB: Final = 1 << 30
Verdict = Literal["weights", "kv", "neither_shown", "nothing_left"]


@dataclass(frozen=True, slots=True)
class Measured:
    """A mean KLD in nats per token with its interval."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """The wider half of the interval."""
        return max(self.high - self.value, self.value - self.low)


@dataclass(frozen=True, slots=True)
class Step:
    """One way to spend more memory: from -> to, `bytes` more, `gain` nats per token less, and that for each GiB."""

    kind: Literal["weights", "kv"]
    name: str
    bytes: int
    gain: float
    low: float
    high: float
    paired: bool

    @property
    def per_gib(self) -> tuple[float, float, float]:
        """Gain for each GiB with its interval."""
        scale = GIB / self.bytes
        return self.gain * scale, self.low * scale, self.high * scale

    def to_json(self) -> dict[str, Any]:
        value, low, high = self.per_gib
        return {**asdict(self), "per_gib": {"value": value, "low": low, "high": high}}


@dataclass(frozen=True, slots=True)
class Combination:
    """A file and a pair, with the sum of their damages. `on_device`: wholly; `shown_worse`: its whole interval is above
    the best one's."""

    name: str
    k: str
    v: str
    bytes: int
    on_device: bool
    kld: Measured
    shown_worse: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Joint:
    """The answer. `start`: where the next GiB would be spent from; `fitting`: what fits, best sum first."""

    start: str
    steps: tuple[Step, ...]
    verdict: Verdict
    sentence: str
    fitting: tuple[Combination, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "start": self.start, "verdict": self.verdict, "sentence": self.sentence,
            "steps": [step.to_json() for step in self.steps], "fitting": [one.to_json() for one in self.fitting],
            "warnings": list(self.warnings),
            "assumption": "the damages of weights and cache add up",
        }  # fmt: skip


@dataclass(frozen=True)
class CacheDamage:
    """What a kv.json says: the file it was measured on, mean KLDs by (K, V), and pairs of which too little was
    measured for an interval."""

    name: str
    sha256: str
    bytes: int
    pairs: dict[tuple[str, str], Measured]
    without: tuple[tuple[str, str], ...]


def read_cache_damage(path: str | os.PathLike[str]) -> CacheDamage:
    """Of a kv.json of `apex kv`. f16/f16 is zero where it has no interval: it is what the others are compared with.
    Raises InputError."""
    from apex_quant.evaluation.kv import load_kv

    document = load_kv(Path(path)).document
    try:
        about = document["model"]
        name, digest, size = str(about["path"]), str(about["sha256"]), int(about["bytes"])
        rows = {(str(row["k"]), str(row["v"])): _measured(row["kld_mean"]) for row in document["pairs"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a kv.json of `apex kv`: {type(error).__name__} {error}") from None
    base = ("f16", "f16")
    return CacheDamage(
        name, digest, size,
        {base: Measured(0.0, 0.0, 0.0)} | {pair: kld for pair, kld in rows.items() if kld is not None},
        tuple(pair for pair, kld in rows.items() if kld is None and pair != base),
    )  # fmt: skip


def _measured(row: Any) -> Measured | None:
    if row["value"] is not None and None in (row["low"], row["high"]):
        return None
    value, low, high = (float(row[key]) for key in ("value", "low", "high"))
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"an interval of {low} to {high} around {value}")
    return Measured(value, low, high)


@dataclass(frozen=True)
class FileDamage:
    """What a file's results say: its mean KLD, and the numbers per token, where they have them, to pair."""

    results: Results
    kld: Measured
    tokens: Side | None


@dataclass(frozen=True)
class Damages:
    """What was measured of some files: `weights` by path, `caches` by path."""

    weights: dict[Path, FileDamage]
    caches: dict[Path, CacheDamage]
    warnings: tuple[str, ...]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every pair that was measured on one of the files."""
        return list(dict.fromkeys(pair for cache in self.caches.values() for pair in cache.pairs))

    def cache(self, option: Option) -> Measured | None:
        """Of an option's pair of types."""
        return self.caches[option.path].pairs.get((option.k, option.v))

    def sum(self, option: Option) -> Measured | None:
        """Of the weights and the cache, taken as independent; None where either was not measured."""
        weight, cache = self.weights.get(option.path), self.cache(option)
        if weight is None or cache is None:
            return None
        half = math.hypot(weight.kld.half, cache.half)
        value = weight.kld.value + cache.value
        return Measured(value, value - half, value + half)


class _File:
    """A model file whose bytes say what was measured on it: names change, and tiers of several models share them."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, shown_name(path)
        with open_model(path) as model:
            self._bytes = sum(file.path.stat().st_size for file in model.files)

    @cached_property
    def _sha256(self) -> str:
        with open_model(self.path) as model:
            return identity(model).sha256

    def is_that(self, size: int | None, sha256: str | None) -> bool:
        """Whether something was measured on this file. It is read only where the size is the same."""
        return size == self._bytes and sha256 == self._sha256


def read_damages(
    kv: Sequence[str | os.PathLike[str]], places: Sequence[str | os.PathLike[str]], files: Sequence[Path]
) -> Damages:
    """`kv`: kv.json files; `places`: results of `apex eval`. Results and cache damages belong to the file they were
    measured on, known by its size and sha256; a file without a kv.json of its own has the first one's, with a warning.

    Raises UsageError without results, InputError, also where results of two files cannot be compared: other references
    or other tokens.
    """
    from apex_quant.evaluation.results import find

    if not places:
        raise UsageError("weights can only be weighed with results of apex eval", hint="--results FOLDER")
    known = [read_cache_damage(path) for path in kv]
    if not known:
        raise UsageError("no kv.json of apex kv")
    warnings = [
        f"{k}/{v}: too little was measured for an interval (more --chunks of apex kv)"
        for cache in known
        for k, v in cache.without
    ]
    results, _ = find([Path(place) for place in places])
    caches: dict[Path, CacheDamage] = {}
    weights: dict[Path, FileDamage] = {}
    for file in map(_File, files):
        caches[file.path] = _cache_of(file, known, warnings)
        damage = _damage_of(file, results, warnings)
        if damage is not None:
            weights[file.path] = damage
    for a, b in combinations(weights.values(), 2):
        _require_comparable(a, b)
    return Damages(weights, caches, tuple(dict.fromkeys(warnings)))


def _cache_of(file: _File, known: Sequence[CacheDamage], warnings: list[str]) -> CacheDamage:
    """Which was measured on this file, else the first."""
    for one in known:
        if file.is_that(one.bytes, one.sha256):
            return one
    warnings.append(f"{file.name}: its cache types were not measured; those of {known[0].name} are taken for it")
    return known[0]


def _damage_of(file: _File, results: Sequence[Results], warnings: list[str]) -> FileDamage | None:
    """The mean KLD over the most tokens that was measured on this file with a cache of f16."""
    found: list[tuple[Results, Measured]] = []
    for one in results:
        if not file.is_that(one.model.bytes, one.model.sha256):
            if Path(one.model.path).name == file.path.name:
                warnings.append(f"{_where(one)}: not measured on the {file.path.name} that is here, so left out")
            continue
        if (types := _cache_types(one)) != ("f16", "f16"):
            # its KLD has the cache's damage in it, which would be counted twice
            warnings.append(f"{_where(one)}: measured with a cache of {types[0]}/{types[1]}, so left out")
            continue
        if (kld := _kld(one)) is not None:
            found.append((one, kld))
    if not found:
        warnings.append(f"{file.name}: no mean KLD with an interval among the results")
        return None
    best, kld = max(found, key=lambda pair: _scored(pair[0]) or 0)
    if len(found) > 1:
        warnings.append(f"{file.name}: {len(found)} results are of it; {_where(best)} is taken, with the most tokens")
    return FileDamage(best, kld, _tokens(best, warnings))


def _require_comparable(a: FileDamage, b: FileDamage) -> None:
    """Raises InputError where two results are of other references or other tokens: by the tokens themselves where both
    have them, else by what their settings say."""
    from apex_quant.evaluation.pairing import aligned, check_references, token_hashes
    from apex_quant.evaluation.pertoken import of_metric
    from apex_quant.evaluation.schema import different_references

    both = f"{_where(a.results)} and {_where(b.results)}"
    if different_references(a.results.reference or {}, b.results.reference or {}):
        raise InputError(
            f"{both} were measured against different references", hint="apex eval --reference, one for all"
        )
    if a.tokens is not None and b.tokens is not None:
        x, y = (of_metric(side.arrays, "kld") for side in (a.tokens, b.tokens))
        hashes = token_hashes(x, a.tokens, "kld"), token_hashes(y, b.tokens, "kld")
        check_references(a.tokens, b.tokens, x, y, aligned(*hashes, a.tokens, b.tokens, "scored tokens"))
        return
    said = [{**one.results.settings, "tokens": _scored(one.results)} for one in (a, b)]
    for key in ("ctx", "first_scored", "texts", "tokens"):
        mine, other = (one.get(key) for one in said)
        if None not in (mine, other) and mine != other:
            raise InputError(
                f"{both} were not measured on the same text: {key} {mine} and {other}",
                hint="apex eval with the same --text, --ctx and --chunks for all",
            )


def _where(one: Results) -> str:
    return str(one.path or one.name)


def _cache_types(one: Results) -> tuple[str, str]:
    """Types of K and V; of results that do not say, llama.cpp's default."""
    options = one.settings.get("options")
    said = options if isinstance(options, dict) else {}
    return str(said.get("type_k", "f16")), str(said.get("type_v", "f16"))


def _scored(one: Results) -> int | None:
    """Tokens of the mean KLD."""
    mean = getattr(one.metric("kld"), "mean", None)
    return None if mean is None else mean.n


def _tokens(one: Results, warnings: list[str]) -> Side | None:
    """Its numbers per token, None without; a lost or broken archive is told."""
    from apex_quant.evaluation.pairing import Side

    try:
        arrays = one.arrays()
    except InputError as error:
        warnings.append(f"{error.message}: differences are those of the intervals")
        return None
    return Side(one.name, _where(one), one, arrays) if "kld/kld" in arrays else None


def weigh(options: Sequence[Option], choice: Option | None, damages: Damages) -> Joint:
    """Weigh the steps up from the choice (or from the smallest file with the smallest cache where nothing fits).
    Raises InputError where nothing was measured of these files."""
    measured = [one for one in options if damages.sum(one) is not None]
    if not measured:
        raise InputError(
            "none of these files has both results and measured cache types: " + "; ".join(damages.warnings[:3]),
            hint="an interval takes enough chunks: more --chunks of apex eval and apex kv",
        )
    start = choice if choice in measured else None
    if start is None:
        start = min(measured, key=_total)
    steps = [*_weights_steps(start, measured, damages), *_kv_steps(start, measured, damages)]
    verdict, sentence = _verdict(start, steps)
    fitting = _combinations([one for one in measured if one.fits], damages)
    return Joint(
        f"{start.name} with {start.k}/{start.v}", tuple(steps), verdict, sentence, tuple(fitting), damages.warnings
    )


def _kld(result: Results) -> Measured | None:
    metric = result.metric("kld")
    mean = getattr(metric, "mean", None)
    if mean is None or None in (mean.value, mean.low, mean.high):
        return None
    return Measured(mean.value, mean.low, mean.high)


def _total(option: Option) -> int:
    return option.device.total + option.host.total


def _memory(option: Option) -> int:
    """Bytes of weights and cache, wherever they lie."""
    return sum(side.weights + side.kv + side.recurrent for side in (option.device, option.host))


def _combinations(options: Sequence[Option], damages: Damages) -> list[Combination]:
    rows = [(one, damage) for one in options if (damage := damages.sum(one)) is not None]
    rows.sort(key=lambda row: row[1].value)
    best = rows[0][1] if rows else None
    return [
        Combination(
            one.name, one.k, one.v, _memory(one), one.all_on_device, kld, best is not None and kld.low > best.high
        )
        for one, kld in rows
    ]


def _weights_steps(start: Option, options: Sequence[Option], damages: Damages) -> list[Step]:
    """To each larger file with the same cache types."""
    found = []
    for other in options:
        more = _weight_bytes(other) - _weight_bytes(start)
        if (other.k, other.v) != (start.k, start.v) or more <= 0:
            continue
        gain, low, high, paired = _difference(damages.weights[start.path], damages.weights[other.path])
        found.append(Step("weights", other.name, more, gain, low, high, paired))
    return found


def _weight_bytes(option: Option) -> int:
    return option.device.weights + option.host.weights


def _difference(a: FileDamage, b: FileDamage) -> tuple[float, float, float, bool]:
    """a's KLD minus b's: paired on the same tokens where the numbers per token are there, else from the intervals.
    Raises InputError for numbers per token that cannot be compared."""
    from apex_quant.evaluation.compare import compare

    if a.tokens is not None and b.tokens is not None:
        pair = compare([a.results, b.results], ["kld"])[0]
        if pair.difference is not None and pair.low is not None and pair.high is not None:
            return pair.difference, pair.low, pair.high, True
    gain, half = a.kld.value - b.kld.value, math.hypot(a.kld.half, b.kld.half)
    return gain, gain - half, gain + half, False


def _kv_steps(start: Option, options: Sequence[Option], damages: Damages) -> list[Step]:
    """To each larger cache of the same file."""
    found = []
    here = damages.cache(start)
    for other in options:
        more, there = _memory(other) - _memory(start), damages.cache(other)
        if other.path != start.path or more <= 0 or here is None or there is None:
            continue
        gain, half = here.value - there.value, math.hypot(here.half, there.half)
        found.append(Step("kv", f"{other.k}/{other.v}", more, gain, gain - half, gain + half, False))
    return found


def _verdict(start: Option, steps: Sequence[Step]) -> tuple[Verdict, str]:
    """The best step of each kind, by what each GiB buys; one is better only where the intervals do not meet."""
    best = {
        kind: max((step for step in steps if step.kind == kind), key=lambda step: step.per_gib[0], default=None)
        for kind in ("weights", "kv")
    }
    weights, kv = best["weights"], best["kv"]
    if weights is None and kv is None:
        return "nothing_left", "There is no larger file and no larger cache among what was measured."
    words = [
        f"{'a larger file' if step.kind == 'weights' else 'a larger cache'} ({step.name}, {step.bytes / GIB:.3f} GiB "
        f"more) takes {step.per_gib[0]:.3g} nats per token and GiB off ({step.per_gib[1]:.3g} to {step.per_gib[2]:.3g})"
        for step in (weights, kv)
        if step is not None
    ]
    told = f"From {start.name} with {start.k}/{start.v}: " + "; ".join(words)
    first, second = (weights, kv) if kv is None or (weights and weights.per_gib[0] >= kv.per_gib[0]) else (kv, weights)
    assert first is not None
    above = 0.0 if second is None else max(second.per_gib[2], 0.0)
    if first.per_gib[1] > above:
        return first.kind, f"{told}. The next GiB is better spent on {'weights' if first is weights else 'the cache'}."
    return "neither_shown", f"{told}. Which is better is not shown: the intervals meet, or include no gain."
