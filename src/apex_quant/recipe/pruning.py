"""--prune-layers: which tensors stay under which names, and what the metadata says of them.

llama-quantize renumbers the layers and corrects their number, and nothing else; a model with a value for each layer
in its metadata then does not load, and one with leading dense or NextN layers is misread. Here these are corrected.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import numpy as np

from apex_quant.errors import UsageError
from apex_quant.gguf import Value
from apex_quant.importance.mapping import prune
from apex_quant.model import ModelFacts

_NOT_BY_LAYER: Final = (".dimension_sections", ".target_layers", ".token_ids_activate", ".token_ids_substitute")
"""Arrays whose length is not the number of layers, even where it happens to be equal."""


def pruned_names(order: Sequence[str], layers: Collection[int]) -> dict[str, str]:
    """Source name -> new name of the tensors that stay, for names in llama.cpp's order. Raises UsageError."""
    if any(name.startswith(("enc.blk.", "dec.blk.")) for name in order):
        raise UsageError("--prune-layers cannot be used on models with an encoder and a decoder")
    return prune(order, layers)[0]


def pruned_metadata(metadata: Mapping[str, Value], whole: ModelFacts, layers: Collection[int]) -> dict[str, Value]:
    """The metadata of the model without `layers`; `whole` are the facts with them."""
    arch, result = whole.architecture, dict(metadata)
    kept = [layer for layer in range(whole.block_count) if layer not in layers]
    first = {
        "block_count": whole.block_count,
        "leading_dense_block_count": _number(metadata.get(f"{arch}.leading_dense_block_count")),
    }
    for key, layers_before in first.items():
        if layers_before is not None:
            result[f"{arch}.{key}"] = Value.u32(sum(layer < layers_before for layer in kept))
    if whole.nextn_layers:
        result[f"{arch}.nextn_predict_layers"] = Value.u32(sum(layer >= whole.trunk_layers for layer in kept))
    for key, value in metadata.items():
        by_layer = key.startswith(f"{arch}.") and not key.endswith(_NOT_BY_LAYER) and value.count == whole.block_count
        if by_layer and value.element is not None and isinstance(value.data, np.ndarray):
            result[key] = Value.array(value.element, value.data[kept])
    return result


def _number(value: Value | None) -> int | None:
    return value.data if value is not None and isinstance(value.data, int) else None
