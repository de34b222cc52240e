"""What a tensor is: role, layer, part and expert axis, told from its name.

Names are those of llama.cpp; the table is in `patterns.py`. Shapes are in ggml order (row length first).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from apex_quant.model.patterns import (
    LAYER_PREFIX,
    PATTERNS,
    PROJECTOR_ARCHITECTURES,
    PROJECTOR_PREFIX,
    SUFFIX,
    Role,
)

__all__ = ["Role", "TensorRole", "classify"]

_EXPERT_PART: Final = re.compile(r"_(?:ch)?exps?$|_shexp$|\.\d+$")
_EXPERT_AXIS: Final = {"weight": 2, "lora_a": 2, "lora_b": 2, "bias": 1}
"""Where experts lie, by suffix; per-expert scales have them as their only axis."""


@dataclass(frozen=True, slots=True)
class TensorRole:
    """What `classify` knows of one tensor.

    `part` is the name without layer and suffix, and for expert tensors without `_exps`/`_shexp`
    (`ffn_down`, `attn_k`, `ffn_gate_up`). `fused` marks gate and up halves in one tensor. `nextn` is true
    for every tensor of a NextN/MTP block, whose `role` still says what it is; the glue has role `nextn`.
    `expert_axis` is the axis of `shape` along which routed experts lie, None where there is none.
    """

    role: Role
    layer: int | None
    part: str
    suffix: str = ""
    fused: bool = False
    nextn: bool = False
    expert_axis: int | None = None


def classify(name: str, shape: tuple[int, ...], architecture: str, *, trunk_layers: int | None = None) -> TensorRole:
    """The role of the tensor called `name` with `shape` in a model of `architecture`.

    Never fails: a name that no row knows gets role `other`. With `trunk_layers`, tensors of layers at or
    beyond it are marked `nextn`; without, only the glue is.
    """
    role, layer, stem, suffix = _parse(name, architecture)
    part = _EXPERT_PART.sub("", stem) if role in (Role.routed_expert, Role.shared_expert) else stem
    axis = None
    # one matrix per expert (`ffn_up.7`, the oldest form) has no axis
    if role is Role.routed_expert and not stem[-1].isdigit():
        last = _EXPERT_AXIS.get(suffix, 0)
        axis = last if last < len(shape) else None
    beyond_trunk = trunk_layers is not None and layer is not None and layer >= trunk_layers
    return TensorRole(
        role=role,
        layer=layer,
        part=part,
        suffix=suffix,
        fused=part.startswith("ffn_gate_up"),
        nextn=role is Role.nextn or beyond_trunk,
        expert_axis=axis,
    )


@lru_cache(maxsize=65536)
def _parse(name: str, architecture: str) -> tuple[Role, int | None, str, str]:
    """Role, layer, stem and suffix of a name: all that does not depend on the shape."""
    found = SUFFIX.search(name)
    stem, suffix = (name[: found.start()], found[1]) if found else (name, "")
    if architecture in PROJECTOR_ARCHITECTURES or PROJECTOR_PREFIX.match(name):
        # a tower's own block numbers are not layers of the language model
        return Role.projector, None, stem, suffix
    prefix = LAYER_PREFIX.match(stem)
    layer = int(prefix[1]) if prefix else None
    if prefix:
        stem = stem[prefix.end() :]
    for pattern, role in PATTERNS:
        if re.search(pattern, stem):
            return role, layer, stem, suffix
    return Role.other, layer, stem, suffix
