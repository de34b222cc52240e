"""What the metadata says about the architecture: everything that decides types, zones and active parameters.

The rules for missing keys and per-layer arrays are those of llama.cpp's `load_hparams` (vendored with
llama-cpp-python 0.3.36), since its quantization mixes depend on the values it computes. A key of the wrong
type, a negative count or an array of the wrong length is an InputError that names the key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_quant.errors import InputError
from apex_quant.model.patterns import PROJECTOR_ARCHITECTURES

if TYPE_CHECKING:
    from apex_quant.gguf.reader import GGUFModel
    from apex_quant.gguf.values import Value

MAX_LAYERS: Final = 512
"""LLAMA_MAX_LAYERS: llama.cpp aborts above it."""
MAX_EXPERTS: Final = 1024
"""LLAMA_MAX_EXPERTS."""

NOT_MODELS: Final = {"imatrix": "an importance matrix", "adapter": "an adapter"}
"""Values of general.type that stand for files without an architecture of their own."""

_70B_LAYERS: Final = {"llama": 80, "llama-embed": 80, "deci": 80, "olmo": 80, "qwen2": 80, "jais2": 68}
"""Trunk layers at which llama.cpp calls a model of the architecture 70B, which gives attn_v more bits."""
_70B_NEEDS_GQA: Final = frozenset({"llama", "llama-embed"})
"""Of those, the ones that must also have fewer KV heads than heads, and not 8 experts."""
_ONE_EXPERT_IS_DENSE: Final = frozenset({"hunyuan_vl", "hunyuan-dense"})


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Counts of one model. Per-layer tuples have `block_count` entries; 0 means the layer has none."""

    architecture: str
    name: str | None
    block_count: int
    """Layers the file states, NextN/MTP blocks included; 0 for projector files."""
    n_layer_all: int
    """Layers as llama.cpp's mixes count them: `block_count` but for two architectures that add some."""
    nextn_layers: int
    """NextN/MTP blocks, the last of `block_count`."""
    n_embd: int
    n_expert: int
    n_expert_used: tuple[int, ...]
    n_expert_shared: int
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    n_ff: tuple[int, ...]
    context_length: int | None
    file_type: int | None
    """general.file_type: the id of the mix the file was made with."""

    @property
    def trunk_layers(self) -> int:
        """Layers without NextN/MTP blocks; these come first."""
        return self.block_count - self.nextn_layers

    @property
    def is_moe(self) -> bool:
        """Whether there is more than one routed expert."""
        return self.n_expert > 1

    @property
    def n_gqa(self) -> int:
        """Heads per KV head in layer 0, whole number; 0 where there are no KV heads (llama.cpp's n_gqa())."""
        if not self.n_head or self.n_head_kv[0] == 0:
            return 0
        return self.n_head[0] // self.n_head_kv[0]

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp's mixes treat the model as 70B."""
        if self.trunk_layers != _70B_LAYERS.get(self.architecture, -1):
            return False
        if self.architecture not in _70B_NEEDS_GQA:
            return True
        return self.n_expert != 8 and self.n_head[0] != self.n_head_kv[0]

    def experts_used(self, layer: int | None) -> int:
        """Routed experts that one token uses in `layer`; the most of any layer where it is not known."""
        if layer is None or layer >= len(self.n_expert_used):
            return max(self.n_expert_used, default=0)
        return self.n_expert_used[layer]


def facts(model: GGUFModel) -> ModelFacts:
    """The facts of an open model. Raises InputError when a key is missing, mistyped or out of bounds."""
    return facts_of(model.metadata, model.architecture, model.tensors, str(model.path))


def quantized_already(model: GGUFModel) -> tuple[str, ...]:
    """A warning for a file that is to stand for the full-precision model and has quantized tensors; none for others."""
    types = Counter(info.type.name for info in model.tensors.values() if info.type.is_quantized)
    if not types:
        return ()
    return (
        f"{sum(types.values())} of {len(model.tensors)} tensors of {model.path.name} are quantized already (most to "
        f"{types.most_common(1)[0][0]}): what is measured against it is not the distance from full precision",
    )


def facts_of(
    metadata: Mapping[str, Value], architecture: str, names: Collection[str] = (), where: str = "metadata"
) -> ModelFacts:
    """As `facts`, from metadata and tensor names alone; `where` begins the error messages."""
    keys = _Keys(metadata, architecture, where)
    kind = keys.text("general.type")
    if kind in NOT_MODELS:
        raise InputError(f"{where}: is {NOT_MODELS[kind]}, not a model")
    if not architecture:
        raise keys.error("general.architecture", "is missing")
    if architecture in PROJECTOR_ARCHITECTURES:
        return _without_layers(keys)
    blocks = keys.count("{arch}.block_count", most=MAX_LAYERS)
    if not blocks:
        raise keys.error("{arch}.block_count", "must be at least 1" if blocks == 0 else "is missing")
    n_embd = keys.count("{arch}.embedding_length")
    if n_embd is None:
        raise keys.error("{arch}.embedding_length", "is missing")
    nextn = keys.count("{arch}.nextn_predict_layers", most=blocks) or 0
    if architecture == "deepseek4" and f"blk.{blocks - nextn}.nextn.eh_proj.weight" not in names:
        nextn = 0
    experts = keys.count("{arch}.expert_count", most=MAX_EXPERTS) or 0
    used = keys.per_layer("{arch}.expert_used_count", blocks) or (0,) * blocks
    if experts <= 1 and architecture in _ONE_EXPERT_IS_DENSE:
        experts, used = 0, (0,) * blocks
    if max(used) > experts or (experts and not max(used)):
        raise keys.error("{arch}.expert_used_count", f"is {max(used)} of {experts} experts")
    heads = keys.per_layer("{arch}.attention.head_count", blocks) or (0,) * blocks
    return ModelFacts(
        architecture=architecture,
        name=keys.text("general.name"),
        block_count=blocks,
        n_layer_all=_layers_counted(keys, architecture, blocks, nextn),
        nextn_layers=nextn,
        n_embd=n_embd,
        n_expert=experts,
        n_expert_used=used,
        n_expert_shared=keys.count("{arch}.expert_shared_count") or 0,
        n_head=heads,
        n_head_kv=keys.per_layer("{arch}.attention.head_count_kv", blocks) or heads,
        n_ff=keys.per_layer("{arch}.feed_forward_length", blocks) or (0,) * blocks,
        context_length=keys.count("{arch}.context_length"),
        file_type=keys.count("general.file_type"),
    )


def _layers_counted(keys: _Keys, architecture: str, blocks: int, nextn: int) -> int:
    """llama.cpp's n_layer_all: Granite-Switch adds a router layer, Nanbeige repeats its layers."""
    if architecture == "graniteswitch":
        return blocks - nextn + 1
    if architecture == "nanbeige":
        loops = keys.count("{arch}.num_loops")
        if loops == 0 or (blocks - nextn) * (loops or 1) > MAX_LAYERS:
            raise keys.error("{arch}.num_loops", f"is {loops} with {blocks - nextn} layers")
        return (blocks - nextn) * loops if loops and loops > 1 else blocks
    return blocks


def _without_layers(keys: _Keys) -> ModelFacts:
    return ModelFacts(
        architecture=keys.architecture,
        name=keys.text("general.name"),
        block_count=0,
        n_layer_all=0,
        nextn_layers=0,
        n_embd=0,
        n_expert=0,
        n_expert_used=(),
        n_expert_shared=0,
        n_head=(),
        n_head_kv=(),
        n_ff=(),
        context_length=None,
        file_type=keys.count("general.file_type"),
    )


@dataclass(frozen=True, slots=True)
class _Keys:
    """Typed look-ups in the metadata; `{arch}` in a key stands for the architecture."""

    metadata: Mapping[str, Value]
    architecture: str
    where: str

    def error(self, key: str, problem: str) -> InputError:
        return InputError(f"{self.where}: metadata key {self._full(key)} {problem}")

    def count(self, key: str, most: int = 0xFFFFFFFF) -> int | None:
        """A whole number from 0 to `most`, None when missing."""
        value = self.metadata.get(self._full(key))
        return None if value is None else self._check(key, value.data, most)

    def text(self, key: str) -> str | None:
        value = self.metadata.get(self._full(key))
        if value is None:
            return None
        if not isinstance(value.data, str):
            raise self.error(key, "must be a string")
        return value.data

    def per_layer(self, key: str, layers: int) -> tuple[int, ...] | None:
        """One whole number for each layer: an array of exactly `layers`, or one value for all."""
        value = self.metadata.get(self._full(key))
        if value is None:
            return None
        data = value.data
        if not isinstance(data, np.ndarray):
            return (self._check(key, data),) * layers
        if data.dtype.kind not in "iub" or data.ndim != 1:
            raise self.error(key, "must be an array of whole numbers")
        if len(data) != layers:
            raise self.error(key, f"has {len(data)} entries for {layers} layers")
        return tuple(self._check(key, int(item)) for item in data)

    def _check(self, key: str, data: object, most: int = 0xFFFFFFFF) -> int:
        if isinstance(data, bool) or not isinstance(data, int):
            raise self.error(key, "must be a whole number")
        if not 0 <= data <= most:
            raise self.error(key, f"is {data}, outside 0 to {most}")
        return data

    def _full(self, key: str) -> str:
        return key.replace("{arch}", self.architecture)
