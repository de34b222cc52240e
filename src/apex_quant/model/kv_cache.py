"""How many bytes a model's memory of past tokens takes in llama.cpp, from its metadata alone.

    with open_model("MODEL.gguf") as model:
        print(kv_cache(model, ctx=32768, type_k="q8_0", type_v="q8_0").bytes)

The arithmetic is that of llama.cpp's llama_kv_cache, llama_kv_cache_iswa and llama_memory_recurrent (vendored with
llama-cpp-python 0.3.36): each layer that attends holds a row of K and one of V for each cell, the cells are a multiple
of 256, windowed layers hold no more cells than their window and a batch need, latent attention holds no V, recurrent
layers hold one float32 state for each sequence whatever the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from apex_quant.errors import InputError, UsageError, did_you_mean
from apex_quant.gguf.types import CACHE_TYPES, ggml_type
from apex_quant.model import kv_rules as rules
from apex_quant.model.facts import ModelFacts, facts

if TYPE_CHECKING:
    from apex_quant.gguf.reader import GGUFModel

PAD: Final = 256
"""Cells come in multiples of this."""
_STATE_BYTES: Final = 4  # recurrent states are float32

Kind = Literal["full", "sliding", "indexer", "recurrent"]


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one layer remembers, for all sequences together. `k_bytes`: keys (recurrent: the convolution's inputs);
    `v_bytes`: values (recurrent: the state). `cells`: tokens of one sequence (recurrent: 1)."""

    layer: int
    kind: Kind
    cells: int
    k_bytes: int
    v_bytes: int

    @property
    def bytes(self) -> int:
        """Both together."""
        return self.k_bytes + self.v_bytes


@dataclass(frozen=True, slots=True)
class KVCache:
    """Sums over layers, in bytes. `cells`: tokens that a layer without a window holds of one sequence (of all, when
    unified). `note` says why the sum is not exact for this architecture, None where it is."""

    layers: tuple[LayerCache, ...]
    cells: int
    streams: int
    """Sequences with cells of their own; 1 when unified."""
    type_k: str
    type_v: str
    note: str | None = None

    def _sum(self, *kinds: Kind) -> int:
        return sum(layer.bytes for layer in self.layers if layer.kind in kinds)

    @property
    def bytes(self) -> int:
        """Everything."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def attention_bytes(self) -> int:
        """Layers that see the whole context, and their indexers."""
        return self._sum("full", "indexer")

    @property
    def sliding_bytes(self) -> int:
        """Layers that see a window."""
        return self._sum("sliding")

    @property
    def recurrent_bytes(self) -> int:
        """States, which do not grow with the context."""
        return self._sum("recurrent")

    @property
    def bytes_per_token(self) -> float:
        """What one more token of one sequence takes: a cell of every layer that sees the whole context."""
        return self.attention_bytes / (self.cells * self.streams) if self.cells else 0.0


def kv_cache(
    model: GGUFModel,
    *,
    ctx: int,
    type_k: str = "f16",
    type_v: str = "f16",
    sequences: int = 1,
    ubatch: int = 512,
    unified: bool = False,
    swa_full: bool = False,
    flash_attention: bool = True,
) -> KVCache:
    """The memory of a context for `sequences` texts of `ctx` tokens each.

    `ubatch`: tokens computed together, of which windowed layers hold that many beyond their window; `unified`: one
    memory for all sequences; `swa_full`: windowed layers keep the whole context (the library's own default; its tools
    and `apex serve` do not). Without flash attention V rows of all layers are as long as the longest.

    Raises InputError for metadata that cannot be right, UsageError for types that nobody has, blocks that do not divide
    the heads, or a K and a V that differ where one latent row serves as both.
    """
    if ctx < 1 or sequences < 1 or ubatch < 1:
        raise UsageError("context, sequences and batch are at least 1")
    found, reader = facts(model), _Reader(model)
    layers = _layers(found, reader)
    _check_types(found, reader, layers, type_k, type_v)
    total = _pad(ctx * sequences)
    cells = total if unified else _pad(total // sequences)
    streams = 1 if unified else sequences
    window = layers.window * (sequences if unified else 1)
    windowed = cells if swa_full else _pad(min(cells, window + ubatch))
    longest_v = 0 if flash_attention else max((layers.v_width(i) for i in range(layers.count)), default=0)

    rows: list[LayerCache] = []
    for layer in range(layers.count):
        if layers.attends(layer):
            kind: Kind = "sliding" if layers.sliding[layer] else "full"
            held = windowed if kind == "sliding" else cells
            k_head, v_head = layers.heads(layer)
            k_bytes = held * streams * _row_bytes(layers.k_width(layer), k_head, type_k)
            v_bytes = held * streams * _row_bytes(longest_v or layers.v_width(layer), v_head, type_v)
            rows.append(LayerCache(layer, kind, held, k_bytes, 0 if layers.latent else v_bytes))
        if layers.indexer and layer < found.trunk_layers and layers.indexed[layer]:
            k_bytes = cells * streams * _row_bytes(layers.indexer, layers.indexer, type_k)
            rows.append(LayerCache(layer, "indexer", cells, k_bytes, 0))
        if layer < found.trunk_layers and layers.recurrent[layer]:
            rows.append(LayerCache(layer, "recurrent", 1, *(sequences * part for part in layers.state)))
    return KVCache(tuple(rows), cells, streams, type_k, type_v, layers.note)


def head_lengths(model: GGUFModel) -> dict[int, tuple[int, int]]:
    """Values of a head of K and of V in each layer that attends; they differ between windowed and other layers."""
    layers = _layers(facts(model), _Reader(model))
    return {layer: layers.heads(layer) for layer in range(layers.count) if layers.attends(layer)}


@dataclass(frozen=True, slots=True)
class _Layers:
    """What the metadata says of each layer, as llama.cpp reads it."""

    count: int
    cached: tuple[bool, ...]
    heads_kv: tuple[int, ...]
    sliding: tuple[bool, ...]
    recurrent: tuple[bool, ...]
    head: tuple[int, int]  # lengths of K and V in full layers
    head_sliding: tuple[int, int]
    window: int
    latent: bool
    indexer: int  # length of its keys, 0 without one
    indexed: tuple[bool, ...]
    state: tuple[int, int]  # bytes of the convolution's inputs and of the state, for each sequence
    note: str | None

    def attends(self, layer: int) -> bool:
        return self.cached[layer]

    def heads(self, layer: int) -> tuple[int, int]:
        """Lengths of a head of K and of V."""
        return self.head_sliding if self.sliding[layer] else self.head

    def k_width(self, layer: int) -> int:
        return self.heads(layer)[0] * self.heads_kv[layer]

    def v_width(self, layer: int) -> int:
        return self.heads(layer)[1] * self.heads_kv[layer]


class _Reader:
    """Counts and flags of the architecture."""

    def __init__(self, model: GGUFModel) -> None:
        self._model = model

    def count(self, key: str, default: int = 0) -> int:
        value = self._model.get("{arch}." + key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
            raise self._error(key, "must be a whole number")
        return value

    def has(self, key: str) -> bool:
        return self._model.get("{arch}." + key) is not None

    def flags(self, key: str, layers: int) -> tuple[bool, ...] | None:
        """One for each layer, None where there is no such array (or just a number)."""
        value = self._model.get("{arch}." + key)
        if not isinstance(value, np.ndarray):
            return None
        if value.ndim != 1 or value.dtype.kind not in "iub" or len(value) < layers:
            raise self._error(key, f"must be an array of {layers} flags")
        return tuple(bool(one) for one in value[:layers])

    def _error(self, key: str, problem: str) -> InputError:
        return InputError(f"{self._model.path}: metadata key {self._model.architecture}.{key} {problem}")


def _layers(found: ModelFacts, reader: _Reader) -> _Layers:
    arch, count = found.architecture, found.n_layer_all
    if not found.block_count or arch in rules.NO_MEMORY:
        return _Layers(0, (), (), (), (), (0, 0), (0, 0), 0, False, 0, (), (0, 0), None)
    # nanbeige repeats its layers; a router layer that graniteswitch adds has no entry of its own
    heads_kv = tuple(found.n_head_kv[i % found.block_count] for i in range(count))
    heads = found.n_head[0]
    recurrent = _recurrent(found, reader, heads_kv, count)
    window, sliding = _sliding(found, reader, recurrent, count)
    full = tuple(
        reader.count(f"attention.{part}_length", found.n_embd // heads if heads else 0) if heads else 0
        for part in ("key", "value")
    )
    narrow = tuple(reader.count(f"attention.{part}_length_swa", full[i]) for i, part in enumerate(("key", "value")))
    latent = arch in rules.LATENT and all(reader.count(f"attention.{part}_length_mla") for part in ("key", "value"))
    note = rules.UNCOUNTED.get(arch)
    key, why = rules.UNCOUNTED_WITH.get(arch, ("", ""))
    if key and reader.has(key):
        note = why
    cached = _cached(found, reader, recurrent, count)
    indexed = reader.flags("attention.indexer.types", found.trunk_layers)
    if arch == "glm-dsa" and indexed is None and (found.context_length or 0) >= 1 << 20:
        note = "which of its layers own an indexer is not in the file"
    return _Layers(
        count=count,
        cached=cached,
        heads_kv=heads_kv,
        sliding=sliding,
        recurrent=recurrent,
        head=(full[0], full[1]),
        head_sliding=(narrow[0], narrow[1]),
        window=window,
        latent=latent,
        indexer=_indexer(reader) if arch in rules.INDEXED else 0,
        indexed=tuple(
            cached[i] and (indexed is None or arch not in rules.INDEXED_BY_TYPE or indexed[i])
            for i in range(found.trunk_layers)
        ),
        state=_state(found, reader) if any(recurrent) else (0, 0),
        note=None if note is None else f"{arch}: {note}",
    )


def _recurrent(found: ModelFacts, reader: _Reader, heads_kv: tuple[int, ...], count: int) -> tuple[bool, ...]:
    rule, trunk = rules.RECURRENT.get(found.architecture), found.trunk_layers
    if rule is None:
        return (False,) * count
    if rule in ("all", "both"):
        return (True,) * count
    if rule == "interval":
        given = reader.flags("attention.recurrent_layers", count)
        every = reader.count("full_attention_interval", rules.INTERVAL.get(found.architecture, 4)) or 1
        return given or tuple(i < trunk and (i + 1) % every != 0 for i in range(count))
    no_ff = rule == "no_kv_heads_nor_ff"
    return tuple(i < trunk and heads_kv[i] == 0 and not (no_ff and found.n_ff[i]) for i in range(count))


def _cached(found: ModelFacts, reader: _Reader, recurrent: tuple[bool, ...], count: int) -> tuple[bool, ...]:
    """Which layers hold keys and values."""
    arch, trunk = found.architecture, found.trunk_layers
    rule = rules.RECURRENT.get(arch)
    if rule == "all":
        return (False,) * count
    if rule == "both":
        return (True,) * count
    if rule == "no_kv_heads":
        return tuple(not one for one in recurrent)
    if rule == "no_kv_heads_nor_ff":
        return tuple(not recurrent[i] and found.n_ff[i] == 0 for i in range(count))
    if rule in ("interval", "no_kv_heads_in_trunk"):
        return tuple(i < trunk and not recurrent[i] for i in range(count))
    last = rules.FIRST_LAYERS_ONLY.get(arch, count)
    if arch in rules.SHARED_AT_END:
        last = count - reader.count("attention.shared_kv_layers")
    # layers of next-token prediction belong to a context of their own, except where they are all there is
    end = trunk if 0 < trunk < found.block_count else count
    return tuple(i < min(last, end) for i in range(count))


def _sliding(
    found: ModelFacts, reader: _Reader, recurrent: tuple[bool, ...], count: int
) -> tuple[int, tuple[bool, ...]]:
    """The window, and the layers that have it; 0 and none without one."""
    nothing = 0, (False,) * count
    given = reader.count("attention.sliding_window")
    if found.architecture in rules.ATTENTION_WINDOWED and given:
        return given, tuple(not one for one in recurrent)
    rule = rules.SLIDING.get(found.architecture)
    if rule is None or (rule.layers is not None and found.trunk_layers != rule.layers):
        return nothing
    if not reader.has("attention.sliding_window"):
        if rule.absent_means == "none":
            return nothing
        given = rule.window or 0
    elif given and rule.fixed:
        given = rule.window or 0
    if not given:
        return nothing
    flags = reader.flags("attention.sliding_window_pattern", count)
    if flags is not None:
        return given, flags
    if rule.period is None:
        raise InputError(f"{found.architecture}: metadata without attention.sliding_window_pattern of each layer")
    period = reader.count("attention.sliding_window_pattern", rule.period)
    return given, tuple(
        i < found.trunk_layers and (period == 0 or (i % period != 0 if rule.dense_first else i % period < period - 1))
        for i in range(count)
    )


def _indexer(reader: _Reader) -> int:
    """Values that an indexer keeps of each token."""
    return reader.count("attention.indexer.key_length") * (3 if reader.count("attention.indexer.kpool") else 1)


def _state(found: ModelFacts, reader: _Reader) -> tuple[int, int]:
    """Bytes of the convolution's inputs and of the state of one layer and sequence (llama_hparams::n_embd_r, _s)."""
    arch, heads = found.architecture, found.n_head[0]
    kernel, inner = reader.count("ssm.conv_kernel"), reader.count("ssm.inner_size")
    size = reader.count("ssm.state_size")
    groups = 0 if arch in rules.NO_STATE_GROUPS else reader.count("ssm.group_count")
    if wkv := reader.count("wkv.head_size"):
        inputs, state = reader.count("token_shift_count", 2) * found.n_embd, found.n_embd * wkv
    elif arch in ("lfm2", "lfm2moe"):
        inputs, state = found.n_embd * max(reader.count("shortconv.l_cache") - 1, 0), 0
    elif head := reader.count("kda.head_dim"):
        inputs, state = 3 * (kernel - 1 if kernel else 3) * heads * head, head * head * heads
    elif arch in rules.LINEAR_STATE:
        length = reader.count("attention.key_length", found.n_embd // heads if heads else 0)
        inputs, state = 0, length * length * heads
    else:
        inputs, state = max(kernel - 1, 0) * (inner + 2 * groups * size), size * inner
    return inputs * _STATE_BYTES, state * _STATE_BYTES


def _check_types(found: ModelFacts, reader: _Reader, layers: _Layers, type_k: str, type_v: str) -> None:
    for name in (type_k, type_v):
        if name not in CACHE_TYPES and name not in rules.FORK_TYPES:
            raise UsageError(
                f"no cache type is called {name!r}.{did_you_mean(name, list(CACHE_TYPES))}",
                hint="cache types are " + ", ".join(CACHE_TYPES),
            )
    if layers.latent and type_k != type_v:
        raise UsageError(
            f"{found.architecture} keeps one latent row for K and V: their types must be equal, not {type_k} and "
            f"{type_v}",
            hint=f"{type_k}/{type_k} is possible",
        )
    for side, name in enumerate((type_k, type_v)):
        if name in rules.FORK_TYPES:  # heads are filled up
            continue
        block = ggml_type(name).block
        lengths = {layers.heads(i)[side] for i in range(layers.count) if layers.attends(i)}
        if odd := [length for length in sorted(lengths) if length % block]:
            raise UsageError(
                f"cache type {name} has blocks of {block}, but {'KV'[side]} heads are {odd[0]} long",
                hint="f16 fits every length",
            )


def _row_bytes(width: int, head: int, kind: str) -> int:
    """Of a row of `width` values in heads of `head`. A fork's blocks do not reach over rows: where a row is no
    multiple of them, each head is filled up."""
    if kind not in rules.FORK_TYPES:
        return ggml_type(kind).row_bytes(width)
    block, size = rules.FORK_TYPES[kind]
    if head and width % block:
        width = width // head * -(-head // block) * block
    return width // block * size


def _pad(n: int) -> int:
    return -(-n // PAD) * PAD
