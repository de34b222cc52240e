"""Which tensor names share an importance entry: fused and split weights, and layers renumbered by pruning.

Weights that multiply the same input have the same sums of squared activations, so an importance matrix made
on a model with split `ffn_gate_exps`/`ffn_up_exps` (or `attn_q`/`attn_k`/`attn_v`) serves the same model with
the fused tensor, and the other way round. Split siblings never stand in for one another: a matrix that
lacks one of them was made so on purpose, and stock then encodes that tensor without importance.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from apex_quant.errors import UsageError

# (fused, its parts); the suffixes are llama.cpp's for dense, routed, shared and grouped (chunk) experts
FUSED: tuple[tuple[str, tuple[str, ...]], ...] = (
    *((f"ffn_gate_up{s}", (f"ffn_gate{s}", f"ffn_up{s}")) for s in ("", "_exps", "_shexp", "_chexps")),
    ("attn_qkv", ("attn_q", "attn_k", "attn_v")),
)
_SAME_INPUT: dict[str, tuple[str, ...]] = dict(FUSED)
for _fused, _parts in FUSED:
    for _part in _parts:
        _SAME_INPUT[_part] = (_fused,)

_NAME = re.compile(r"^(.*\bblk\.[0-9]+\.)([a-z0-9_]+)(\.weight)$")
_LAYER = re.compile(r"blk\.([0-9]+)\.")  # unanchored, as llama.cpp's own remapping


def same_input(name: str) -> tuple[str, ...]:
    """Names, best first, whose entry is by construction equal to that of tensor `name`; () when none is."""
    match = _NAME.match(name)
    if match is None:
        return ()
    return tuple(match[1] + other + match[3] for other in _SAME_INPUT.get(match[2], ()))


def prune(names: Iterable[str], layers: Collection[int]) -> tuple[dict[str, str], int]:
    """Renumber the layers that stay when `layers` are removed, as llama-quantize --prune-layers does.

    `names` in llama.cpp's order (`stock_order`). Returns ({source name: new name}, without the removed
    tensors, and the new block count). Importance is always looked up by the source name. Raises
    UsageError when a layer to remove does not exist or none would be left.
    """
    names = list(names)
    if not layers:
        raise UsageError("no layers to prune were given")
    first = min(layers)
    renumbered: dict[int, int | None] = {}
    next_id = 0
    kept: dict[str, str] = {}
    for name in names:
        match = _LAYER.search(name)
        if match is None:
            kept[name] = name
            continue
        layer = int(match[1])
        if layer not in renumbered:
            if layer in layers:
                renumbered[layer] = None
            elif layer < first:
                renumbered[layer] = layer
                next_id = layer + 1
            else:
                renumbered[layer] = next_id
                next_id += 1
        new = renumbered[layer]
        if new is not None:
            kept[name] = f"{name[: match.start(1)]}{new}{name[match.end(1) :]}"
    missing = sorted(set(layers) - set(renumbered))
    if missing:
        raise UsageError(f"the model has no layer {', '.join(map(str, missing))} to prune")
    if all(new is None for new in renumbered.values()):
        raise UsageError("pruning would remove every layer of the model")
    return kept, next_id
