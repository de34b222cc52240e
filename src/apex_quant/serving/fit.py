"""`apex fit`: which file, which types of KV cache and how much context fit into the memory there is.

    fit("models/", vram="16GB", ram="32GB", ctx=32768)

Weights and cache are exact; compute buffers are what the installed library says for this processor, for each model
and pair of types, or an estimate where it cannot be asked; `reserve` is kept free for what nobody can know from here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from apex_quant.errors import ApexError, InputError, UsageError
from apex_quant.evaluation.kv_types import Pair, require_offered, stock_pair
from apex_quant.gguf import open_model
from apex_quant.gguf.reader import SHARD_NAME, GGUFModel
from apex_quant.model.facts import NOT_MODELS, ModelFacts, facts
from apex_quant.model.kv_cache import PAD, KVCache, LayerCache, kv_cache
from apex_quant.model.patterns import PROJECTOR_ARCHITECTURES
from apex_quant.serving.memory import MIB, LibraryMemory, MemoryQuestion, library_memory
from apex_quant.serving.offload import Placement, Use, Weights, placements, use, weights

if TYPE_CHECKING:
    from apex_quant.serving.joint import Joint, Measured

PAIRS: Final = (("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"))
"""Tried in this order: those for which every build of llama.cpp has fast attention."""
SAFE_PAIRS: Final = (("f16", "f16"), ("q8_0", "q8_0"))
"""Chosen without a measurement of the model; 4-bit caches break some models."""
RESERVE: Final = 1 << 30
"""Bytes of the device left free; llama-server's own --fit-target has the same default."""
FORMULA_ERROR: Final = 0.45
"""Of the estimate of compute buffers: within this share of the library's figure for six architectures at real sizes."""
DEVICE_ERROR: Final = 0.3
"""An allowance, not measured: compute buffers of a device against those of the processor; `reserve` covers it."""
CACHE_ERROR: Final = 0.02
"""MiB of each cache by which the library's figure, which it prints to 0.01, may be another."""
MAX_SEQUENCES: Final = 256
"""LLAMA_MAX_SEQ: more at a time than this no context takes."""


@dataclass(frozen=True, slots=True)
class Compute:
    """Compute buffers: (context, bytes) in the order of the contexts, the one that was asked for among them. `error`:
    as a share of the value, there. `told`: all that the library said of the context that was asked for, where it was
    asked for these types."""

    points: tuple[tuple[int, int], ...]
    source: str
    error: float
    told: LibraryMemory | None = None

    def at(self, ctx: int) -> int:
        """Bytes at a context: those of a point, a line between two of them, the last point's share of more tokens
        beyond it, and the first point's below."""
        before, (last, most) = self.points[0], self.points[-1]
        if ctx > last:
            return -(-most * ctx // last)
        for after in self.points:
            if ctx <= after[0]:
                if after[0] == before[0]:
                    return after[1]
                return round(before[1] + (after[1] - before[1]) * max(ctx - before[0], 0) / (after[0] - before[0]))
            before = after
        raise AssertionError("no point is at or beyond the last")


@dataclass(frozen=True, slots=True)
class Option:
    """One file with one pair of cache types. `ctx_left`: the longest context of this placement, tokens for each of
    the sequences, up to what the model was trained on or what was asked for; 0 where not even the smallest fits.
    `missing`: bytes by which it does not fit. `cache`: of each layer, at the context that was asked for."""

    path: Path
    k: str
    v: str
    fits: bool
    placement: Placement
    device: Use
    host: Use
    ctx_left: int
    ctx_device: int
    """The longest context with everything on the device."""
    missing: int
    layers: int
    compute: Compute
    cache: tuple[LayerCache, ...]
    note: str | None = None

    @property
    def name(self) -> str:
        """The file, without its shard number."""
        return shown_name(self.path)

    @property
    def all_on_device(self) -> bool:
        """Whether nothing but the input embedding is in main memory."""
        return self.placement.gpu_layers > self.layers and not self.placement.cpu_moe

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path), "name": self.name, "k": self.k, "v": self.v, "fits": self.fits,
            "placement": {**self.placement.to_json(), "words": self.placement.words(self.layers)},
            "device": self.device.to_json(), "host": self.host.to_json(), "ctx_left": self.ctx_left,
            "ctx_device": self.ctx_device, "missing": self.missing, "note": self.note,
            "compute": {"error": self.compute.error, "source": self.compute.source},
            "kv_layers": [asdict(layer) for layer in self.cache],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits. `choice` is None where nothing does; `reason` says why it was chosen."""

    vram: int
    ram: int | None
    devices: int
    ctx: int
    parallel: int
    reserve: int
    options: tuple[Option, ...]
    choice: Option | None
    reason: str
    warnings: tuple[str, ...] = ()
    joint: Joint | None = None

    @property
    def compute(self) -> Compute:
        """Of the choice, or of the first possibility where nothing fits."""
        return (self.choice or self.options[0]).compute

    def to_json(self) -> dict[str, Any]:
        return {
            "vram": self.vram, "ram": self.ram, "devices": self.devices, "ctx": self.ctx,
            "parallel": self.parallel, "reserve": self.reserve,
            "options": [option.to_json() for option in self.options],
            "choice": None if self.choice is None else self.choice.to_json(), "reason": self.reason,
            "compute": {"bytes": self.compute.at(self.ctx), "error": self.compute.error, "source": self.compute.source},
            "warnings": list(self.warnings), "joint": None if self.joint is None else self.joint.to_json(),
        }  # fmt: skip


def fit(
    places: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    vram: int,
    ram: int | None = None,
    devices: int = 1,
    ctx: int = 32768,
    parallel: int = 1,
    type_k: str | None = None,
    type_v: str | None = None,
    pairs: Sequence[tuple[str, str]] | None = None,
    ubatch: int = 512,
    reserve: int | None = None,
    joint: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    results: Sequence[str | os.PathLike[str]] = (),
    offload_experts: bool = True,
    offered: Sequence[str] | None = None,
) -> Fit:
    """Every file in `places` (files, or folders of them) with every pair of cache types, placed so that it fits.

    `vram`, `ram`: bytes of the device and of main memory (0 and None: no device; main memory not checked); `devices`:
    over which the layers and so `vram` are spread, each with compute buffers of its own; `ctx`: tokens for each of
    `parallel` sequences; `reserve`: bytes of the devices to leave free (default 1 GiB of each). `type_k` and `type_v`
    fix one pair. `joint`: kv.json of `apex kv`, one or one for each file; `results`: those of `apex eval`.
    With both the choice is the smallest sum of measured damages, and `joint` of the answer says whether more memory is
    better spent on weights or on the cache. Without `offload_experts` only whole layers leave the device (for servers
    that cannot place experts). `offered`: cache types of the server that is meant, by default those of this user's.

    Raises InputError for files that are no models, UsageError for types that the library refuses for all of them and
    for turbo types that the server has not.
    """
    if vram < 0 or (ram is not None and ram < 0):
        raise UsageError("memory is not negative")
    if not 1 <= parallel <= MAX_SEQUENCES or ctx < 1 or ubatch < 1:
        raise UsageError(
            f"{parallel} sequences of {ctx} tokens, {ubatch} together: at least 1, {MAX_SEQUENCES} sequences"
        )
    if devices < 1:
        raise UsageError("devices: at least 1, with 0 bytes where there is none")
    warnings: list[str] = []
    kept = (RESERVE * devices if vram else 0) if reserve is None else reserve
    device = vram
    if vram and kept >= vram:
        warnings.append(
            f"the device has {vram / MIB:,.0f} MiB and {kept / MIB:,.0f} MiB are to stay free, so it is not used: "
            "--reserve keeps less"
        )
        device = 0
    files = find_models([places] if isinstance(places, str | os.PathLike) else places)
    damages = None
    if joint is not None:
        from apex_quant.serving.joint import read_damages

        damages = read_damages([joint] if isinstance(joint, str | os.PathLike) else joint, results, files)
        pairs = pairs or damages.pairs
    wanted = [Pair(*pair) for pair in pairs or PAIRS]
    if type_k or type_v:
        wanted = [Pair(type_k or type_v or "f16", type_v or type_k or "f16")]
    require_offered(wanted, offered)
    options: list[Option] = []
    asked: dict[_Shape, dict[Pair, Compute]] = {}
    languages = 0
    for path in files:
        with open_model(path) as model:
            known = facts(model)
            if not known.block_count:
                warnings.append(f"{path.name}: holds no language model")
                continue
            languages += 1
            possible, refused = [], None
            for pair in wanted:
                try:
                    kv_cache(model, ctx=ctx, type_k=pair.k, type_v=pair.v, sequences=parallel, ubatch=ubatch)
                    possible.append(pair)
                except UsageError as error:
                    refused = error
                    warnings.append(f"{path.name}: {pair.name}: {error.message}")
            if refused is not None and not possible:
                raise refused
            shape = _shape(model)
            if shape not in asked:
                asked[shape] = compute_buffers(
                    model, known, ctx=ctx, parallel=parallel, ubatch=ubatch, pairs=possible, device=device > 0
                )
            question = _Question(device, devices, ram, ctx, parallel, ubatch, kept, offload_experts)
            where = weights(model)
            made = [_option(model, known, where, pair, asked[shape][pair], question) for pair in possible]
            warnings += [doubt for option in made if (doubt := _doubt(option)) is not None]
            options += made
            if known.context_length and ctx > known.context_length:
                warnings.append(f"{path.name}: was trained on {known.context_length} tokens at once, not {ctx}")
    if not languages:
        raise InputError("no language model among the files given")
    if ram is None and any(not one.all_on_device for one in options):
        warnings.append("main memory was not given, so it is not checked")
    choice, reason = _choose(options, None if damages is None else damages.sum)
    answer = None
    if damages is not None:
        from apex_quant.serving.joint import weigh

        answer = weigh(options, choice, damages)
    return Fit(
        vram, ram, devices, ctx, parallel, kept, tuple(options), choice, reason, tuple(dict.fromkeys(warnings)), answer
    )


def find_models(places: Iterable[str | os.PathLike[str]], unreadable: list[str] | None = None) -> list[Path]:
    """GGUF files, of sharded ones the first shard. Folders give the language models in them: importance matrices,
    adapters and projectors are passed over. Raises InputError, also for a broken file in a folder, unless there is a
    list `unreadable`, to which is added what is wrong with it."""
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            shown = [path for path in sorted(place.glob("*.gguf")) if _first_shard(path)]
            inside = [path for path in shown if _is_language_model(path, unreadable)]
            if not inside and not unreadable:
                raise InputError(f"{place}: no models there", hint="GGUF files, not in folders of that folder")
            found += inside
        else:
            found.append(place)
    return list(dict.fromkeys(found))


def _first_shard(path: Path) -> bool:
    named = SHARD_NAME.fullmatch(path.name)
    return named is None or int(named["no"]) == 1


def _is_language_model(path: Path, unreadable: list[str] | None = None) -> bool:
    try:
        with open_model(path) as model:
            other = model.get("general.type") in NOT_MODELS or model.architecture in PROJECTOR_ARCHITECTURES
            return not other and model.get("{arch}.block_count") is not None
    except InputError as error:
        if unreadable is None:
            raise
        unreadable.append(error.message)
        return False


def shown_name(path: Path) -> str:
    """The file name without shard number and suffix."""
    named = SHARD_NAME.fullmatch(path.name)
    return named["prefix"] if named else path.stem


@dataclass(frozen=True, slots=True)
class _Question:
    vram: int
    devices: int
    ram: int | None
    ctx: int
    parallel: int
    ubatch: int
    reserve: int
    experts: bool

    def missing(self, device: Use, host: Use) -> int:
        """Bytes by which it does not fit."""
        over = max(device.total + self.reserve - self.vram, 0) if device.total else 0
        return over + (max(host.total - self.ram, 0) if self.ram is not None else 0)


def _option(
    model: GGUFModel, known: ModelFacts, where: Weights, pair: Pair, compute: Compute, asked: _Question
) -> Option:
    caches: dict[int, KVCache] = {}

    def cache(ctx: int) -> KVCache:
        if ctx not in caches:
            caches[ctx] = kv_cache(
                model, ctx=ctx, type_k=pair.k, type_v=pair.v, sequences=asked.parallel, ubatch=asked.ubatch
            )
        return caches[ctx]

    host_compute = 4 * known.n_embd * asked.ubatch  # the embedded tokens, float32

    def at(place: Placement, ctx: int) -> tuple[Use, Use]:
        each = asked.devices if place.gpu_layers else 1
        return use(where, cache(ctx), place, compute.at(ctx) * each, host_compute)

    layers = where.counted
    every = list(placements(layers, experts=asked.experts and where.expert_bytes > 0, device=asked.vram > 0))
    best = min(
        ((asked.missing(*at(place, asked.ctx)), order) for order, place in enumerate(every)),
        key=lambda pair: pair,
    )
    place = every[best[1]]
    device, host = at(place, asked.ctx)
    most = max(known.context_length or 1 << 20, asked.ctx + PAD - 1)

    def longest(place: Placement) -> int:
        low, high = 0, most // PAD
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if not asked.missing(*at(place, middle * PAD)) else (low, middle - 1)
        return low * PAD

    return Option(
        path=model.path, k=pair.k, v=pair.v, fits=best[0] == 0, placement=place, device=device, host=host,
        ctx_left=longest(place), ctx_device=longest(every[0]) if asked.vram else 0, missing=best[0], layers=layers,
        compute=compute, cache=cache(asked.ctx).layers, note=cache(asked.ctx).note,
    )  # fmt: skip


def _doubt(option: Option) -> str | None:
    """A cache that the library would make another size than it is counted here: a newer library, or an architecture
    whose rules are not known."""
    told = option.compute.told
    if told is None:
        return None
    counted = sum(layer.bytes for layer in option.cache) / MIB
    if abs(counted - told.kv_mib) <= CACHE_ERROR * len(told.memory):
        return None
    return (
        f"{option.name}: the library makes {told.kv_mib:,.2f} MiB of caches and states with {option.k}/{option.v}, "
        f"counted are {counted:,.2f} MiB"
    )


def _choose(options: Sequence[Option], damage: Callable[[Option], Measured | None] | None) -> tuple[Option | None, str]:
    """Where damages are measured the smallest sum, else the largest file with a cache type that needs no measurement;
    of those wholly on the device, where some are, else of those that leave the fewest bytes in main memory."""
    fitting = [one for one in options if one.fits]
    if not fitting:
        if not options:
            return None, "no model"
        nearest = min(options, key=lambda one: one.missing)
        return None, (
            f"nothing fits: {nearest.name} with {nearest.k}/{nearest.v} lacks {nearest.missing / 2**20:,.0f} MiB; "
            "a smaller tier, less context or more main memory would help"
        )
    on_device = [one for one in fitting if one.all_on_device]
    where = "wholly on the device"
    if not on_device:
        where = "in main memory"
        if any(one.placement.gpu_layers for one in fitting):
            where = "partly on the device, since nothing fits wholly"
    known = [(found, one) for one in on_device or fitting if damage is not None and (found := damage(one)) is not None]
    if known:
        least, best = min(known, key=lambda pair: pair[0].value)
        return best, (
            f"the smallest sum of measured damages of what is {where}: {least.value:.3g} nats per token "
            f"({least.low:.3g} to {least.high:.3g}), weights and {best.k}/{best.v} together"
        )
    safe = [one for one in fitting if (one.k, one.v) in SAFE_PAIRS] or fitting

    def rank(one: Option) -> tuple[int, int]:
        pair = (one.k, one.v)
        return one.device.weights + one.host.weights, -(
            SAFE_PAIRS.index(pair) if pair in SAFE_PAIRS else len(SAFE_PAIRS)
        )

    if safe_on_device := [one for one in safe if one.all_on_device]:
        best = max(safe_on_device, key=rank)
        return best, (
            f"the largest file that is wholly on the device; {best.k}/{best.v} is the best of the cache types that fit"
        )
    if not any(one.placement.gpu_layers for one in safe):
        best = max(safe, key=rank)
        return best, f"the largest file that fits into main memory; {best.k}/{best.v} is the best cache that fits"
    best = min(safe, key=lambda one: (one.host.weights, -rank(one)[1]))
    placed = best.placement.words(best.layers)
    return best, f"nothing fits wholly on the device; this leaves the fewest bytes in main memory ({placed})"


_Shape = tuple[str, frozenset[tuple[str, tuple[int, ...]]], int]


def _shape(model: GGUFModel) -> _Shape:
    """What compute buffers depend on: tiers of one model have the same."""
    return (
        model.architecture, frozenset((name, tuple(info.shape)) for name, info in model.tensors.items()),
        facts(model).context_length or 0,
    )  # fmt: skip


def compute_buffers(
    model: GGUFModel, known: ModelFacts, *, ctx: int, parallel: int, ubatch: int, pairs: Sequence[Pair], device: bool
) -> dict[Pair, Compute]:
    """Compute and output buffers of each pair at `ctx`, and at two contexts around it to look for the longest: the
    library's own figures, else a formula with its error."""
    contexts = sorted({min(4096, ctx), ctx, max(ctx, min(known.context_length or ctx, 131072))})
    # the library here has no turbo types; the cache is not in these buffers, and what is made of it for attention is
    named = {pair: stock_pair(pair) if pair.turbo else pair for pair in pairs}
    asked = list(dict.fromkeys(named.values()))
    try:
        told = library_memory(
            model.files[0].path,
            [
                MemoryQuestion(at, *pair, sequences=parallel, ubatch=min(ubatch, at * parallel))
                for pair in asked
                for at in contexts
            ],
        )
    except ApexError as error:
        points = tuple((at, _formula(model, known, ubatch, at)) for at in contexts)
        guess = Compute(points, f"estimated, the library was not asked: {error.message}", FORMULA_ERROR)
        return dict.fromkeys(pairs, guess)
    answers = iter(told)
    found = {pair: {at: next(answers) for at in contexts} for pair in asked}
    source = "the library's figure for this processor" + ("; another device's may differ" if device else "")
    return {
        pair: Compute(
            tuple((at, one.compute_bytes) for at, one in found[other].items()),
            source + (f", for {other.name}" if other != pair else ""),
            DEVICE_ERROR if device else 0.0,
            found[other][ctx] if other == pair else None,
        )
        for pair, other in named.items()
    }


def _formula(model: GGUFModel, known: ModelFacts, ubatch: int, ctx: int) -> int:
    """Logits of a batch, two activations and the mask of a batch against the context."""
    embedding = model.tensors.get("token_embd.weight")
    vocabulary = embedding.shape[1] if embedding is not None and len(embedding.shape) > 1 else 0
    return ubatch * (4 * (vocabulary + 2 * known.n_embd) + ctx // 2)


__all__ = ["MIB", "PAIRS", "Compute", "Fit", "Option", "compute_buffers", "find_models", "fit", "shown_name"]
