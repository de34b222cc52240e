"""`apex fit`: which file, which types of KV cache and how much context fit into the memory there is.

    fit("models/", vram="16GB", ram="32GB", ctx=32768)

Weights and cache are exact; compute buffers are what the installed library says for this processor, or an estimate
where it cannot be asked; `reserve` is kept free for what nobody can know from here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from apex_quant.errors import ApexError, InputError, UsageError
from apex_quant.gguf import open_model
from apex_quant.gguf.reader import SHARD_NAME, GGUFModel
from apex_quant.model.facts import NOT_MODELS, ModelFacts, facts
from apex_quant.model.kv_cache import PAD, KVCache, kv_cache
from apex_quant.model.patterns import PROJECTOR_ARCHITECTURES
from apex_quant.serving.memory import MIB, MemoryQuestion, library_memory
from apex_quant.serving.offload import Placement, Use, Weights, placements, use, weights

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
MIN_CTX: Final = 512


@dataclass(frozen=True, slots=True)
class Compute:
    """Compute buffers in bytes, linear in the context between two measured points."""

    low_ctx: int
    low: int
    high_ctx: int
    high: int
    source: str
    error: float
    """As a share of the value."""

    def at(self, ctx: int) -> int:
        """The larger end outside the two points on that side, never less than the smaller one."""
        if self.high_ctx == self.low_ctx or ctx <= self.low_ctx:
            return self.low if ctx <= self.low_ctx else self.high
        slope = (self.high - self.low) / (self.high_ctx - self.low_ctx)
        return max(min(self.low, self.high), round(self.low + max(slope, 0.0) * (ctx - self.low_ctx)))


@dataclass(frozen=True, slots=True)
class Option:
    """One file with one pair of cache types. `ctx_left`: the longest context of this placement, tokens for each of
    the sequences; 0 where not even the smallest fits. `missing`: bytes by which it does not fit."""

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
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits. `choice` is None where nothing does; `reason` says why it was chosen."""

    vram: int
    ram: int | None
    ctx: int
    parallel: int
    reserve: int
    options: tuple[Option, ...]
    choice: Option | None
    reason: str
    compute: Compute
    warnings: tuple[str, ...] = ()
    joint: Any = field(default=None)

    def to_json(self) -> dict[str, Any]:
        return {
            "vram": self.vram, "ram": self.ram, "ctx": self.ctx, "parallel": self.parallel, "reserve": self.reserve,
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
    ctx: int = 32768,
    parallel: int = 1,
    type_k: str | None = None,
    type_v: str | None = None,
    pairs: Sequence[tuple[str, str]] | None = None,
    ubatch: int = 512,
    reserve: int | None = None,
    joint: str | os.PathLike[str] | None = None,
    results: Sequence[str | os.PathLike[str]] = (),
    offload_experts: bool = True,
) -> Fit:
    """Every file in `places` (files, or folders of them) with every pair of cache types, placed so that it fits.

    `vram`, `ram`: bytes of the device and of main memory (0 and None: no device; main memory not checked); `ctx`:
    tokens for each of `parallel` sequences; `reserve`: bytes of the device to leave free (default 1 GiB). `type_k` and
    `type_v` fix one pair. `joint` is a kv.json of `apex kv`, `results` those of `apex eval`: with both, `joint` of the
    answer says whether more memory is better spent on weights or on the cache. Without `offload_experts` only whole
    layers leave the device (for servers that cannot place experts). Raises InputError for files that are no
    models, UsageError for types that the library refuses for all of them.
    """
    if vram < 0 or (ram is not None and ram < 0):
        raise UsageError("memory is not negative")
    kept = (RESERVE if vram else 0) if reserve is None else reserve
    files = find_models([places] if isinstance(places, str | os.PathLike) else places)
    if joint is not None and pairs is None:
        from apex_quant.serving.joint import read_pairs

        pairs = list(read_pairs(joint))
    wanted = list(pairs or PAIRS)
    if type_k or type_v:
        wanted = [(type_k or type_v or "f16", type_v or type_k or "f16")]
    warnings: list[str] = []
    options: list[Option] = []
    compute: Compute | None = None
    for path in files:
        with open_model(path) as model:
            known = facts(model)
            if not known.block_count:
                warnings.append(f"{path.name}: holds no language model")
                continue
            if compute is None:
                compute = compute_buffers(
                    model, known, ctx=ctx, parallel=parallel, ubatch=ubatch, pair=wanted[0], device=vram > 0
                )
            question = _Question(vram, ram, ctx, parallel, ubatch, kept, offload_experts)
            where = weights(model)
            refused: UsageError | None = None
            for k, v in wanted:
                try:
                    options.append(_option(model, known, where, k, v, compute, question))
                except UsageError as error:
                    refused = error
                    warnings.append(f"{path.name}: {k}/{v}: {error.message}")
            if refused is not None and not any(one.path == path for one in options):
                raise refused
            if known.context_length and ctx > known.context_length:
                warnings.append(f"{path.name}: was trained on {known.context_length} tokens at once, not {ctx}")
    if compute is None:
        raise InputError("no language model among the files given")
    if ram is None and any(not one.all_on_device for one in options):
        warnings.append("main memory was not given, so it is not checked")
    choice, reason = _choose(options, vram > 0)
    found = Fit(vram, ram, ctx, parallel, kept, tuple(options), choice, reason, compute, tuple(dict.fromkeys(warnings)))
    if joint is not None:
        from dataclasses import replace

        from apex_quant.serving.joint import weigh

        found = replace(found, joint=weigh(found, joint, results))
    return found


def find_models(places: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """GGUF files, of sharded ones the first shard. Folders give the language models in them: importance matrices,
    adapters and projectors are passed over. Raises InputError, also for a broken file in a folder."""
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            inside = [path for path in sorted(place.glob("*.gguf")) if _first_shard(path) and _is_language_model(path)]
            if not inside:
                raise InputError(f"{place}: no models there", hint="GGUF files, not in folders of that folder")
            found += inside
        else:
            found.append(place)
    return list(dict.fromkeys(found))


def _first_shard(path: Path) -> bool:
    named = SHARD_NAME.fullmatch(path.name)
    return named is None or int(named["no"]) == 1


def _is_language_model(path: Path) -> bool:
    with open_model(path) as model:
        other = model.get("general.type") in NOT_MODELS or model.architecture in PROJECTOR_ARCHITECTURES
        return not other and model.get("{arch}.block_count") is not None


def shown_name(path: Path) -> str:
    """The file name without shard number and suffix."""
    named = SHARD_NAME.fullmatch(path.name)
    return named["prefix"] if named else path.stem


@dataclass(frozen=True, slots=True)
class _Question:
    vram: int
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
    model: GGUFModel, known: ModelFacts, where: Weights, k: str, v: str, compute: Compute, asked: _Question
) -> Option:
    caches: dict[int, KVCache] = {}

    def cache(ctx: int) -> KVCache:
        if ctx not in caches:
            caches[ctx] = kv_cache(model, ctx=ctx, type_k=k, type_v=v, sequences=asked.parallel, ubatch=asked.ubatch)
        return caches[ctx]

    host_compute = 4 * known.n_embd * asked.ubatch  # the embedded tokens, float32

    def at(place: Placement, ctx: int) -> tuple[Use, Use]:
        return use(where, cache(ctx), place, compute.at(ctx), host_compute)

    layers = where.counted
    every = list(placements(layers, experts=asked.experts and where.expert_bytes > 0, device=asked.vram > 0))
    best = min(
        ((asked.missing(*at(place, asked.ctx)), order) for order, place in enumerate(every)),
        key=lambda pair: pair,
    )
    place = every[best[1]]
    device, host = at(place, asked.ctx)
    most = known.context_length or 1 << 20

    def longest(place: Placement) -> int:
        low, high = 0, most // PAD
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if not asked.missing(*at(place, middle * PAD)) else (low, middle - 1)
        return low * PAD

    return Option(
        path=model.path, k=k, v=v, fits=best[0] == 0, placement=place, device=device, host=host,
        ctx_left=longest(place), ctx_device=longest(every[0]) if asked.vram else 0, missing=best[0], layers=layers,
        note=cache(asked.ctx).note,
    )  # fmt: skip


def _choose(options: Sequence[Option], device: bool) -> tuple[Option | None, str]:
    """The largest file that is wholly on the device with a cache type that needs no measurement; else the one that
    leaves the fewest bytes in main memory; without a device the largest that fits."""
    fitting = [one for one in options if one.fits]
    if not fitting:
        if not options:
            return None, "no model"
        nearest = min(options, key=lambda one: one.missing)
        return None, (
            f"nothing fits: {nearest.name} with {nearest.k}/{nearest.v} lacks {nearest.missing / 2**20:,.0f} MiB; "
            "a smaller tier, less context or more main memory would help"
        )

    def rank(one: Option) -> tuple[int, int]:
        pair = (one.k, one.v)
        return one.device.weights + one.host.weights, -(
            SAFE_PAIRS.index(pair) if pair in SAFE_PAIRS else len(SAFE_PAIRS)
        )

    safe = [one for one in fitting if (one.k, one.v) in SAFE_PAIRS] or fitting
    if not device:
        best = max(safe, key=rank)
        return best, f"the largest file that fits into main memory; {best.k}/{best.v} is the best cache that fits"
    on_device = [one for one in safe if one.all_on_device]
    if on_device:
        best = max(on_device, key=rank)
        return best, (
            f"the largest file that is wholly on the device; {best.k}/{best.v} is the best of the cache types that fit"
        )
    best = min(safe, key=lambda one: (one.host.weights, -rank(one)[1]))
    where = best.placement.words(best.layers)
    return best, f"nothing fits wholly on the device; this leaves the fewest bytes in main memory ({where})"


def compute_buffers(
    model: GGUFModel, known: ModelFacts, *, ctx: int, parallel: int, ubatch: int, pair: tuple[str, str], device: bool
) -> Compute:
    """Compute and output buffers at two contexts: the library's own figures, else a formula with its error."""
    low = min(4096, ctx)
    high = max(ctx, min(known.context_length or ctx, 131072))
    try:
        small, large = library_memory(
            model.files[0].path,
            [MemoryQuestion(at, *pair, sequences=parallel, ubatch=min(ubatch, at * parallel)) for at in (low, high)],
        )
    except ApexError as error:
        return Compute(
            low, _formula(model, known, ubatch, low), high, _formula(model, known, ubatch, high),
            f"estimated, the library was not asked: {error.message}", FORMULA_ERROR,
        )  # fmt: skip
    return Compute(
        low, small.compute_bytes, high, large.compute_bytes,
        "the library's figure for this processor" + ("; another device's may differ" if device else ""),
        DEVICE_ERROR if device else 0.0,
    )  # fmt: skip


def _formula(model: GGUFModel, known: ModelFacts, ubatch: int, ctx: int) -> int:
    """Logits of a batch, two activations and the mask of a batch against the context."""
    embedding = model.tensors.get("token_embd.weight")
    vocabulary = embedding.shape[1] if embedding is not None and len(embedding.shape) > 1 else 0
    return ubatch * (4 * (vocabulary + 2 * known.n_embd) + ctx // 2)


__all__ = ["MIB", "PAIRS", "Compute", "Fit", "Option", "compute_buffers", "find_models", "fit", "shown_name"]
