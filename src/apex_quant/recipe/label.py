"""The base mix of a plan that names every type itself: it decides nothing there and only labels the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from apex_quant.errors import UsageError
from apex_quant.gguf import GGMLType, TensorInfo, ggml_type
from apex_quant.recipe.mixes import MIXES, allows_quantization
from apex_quant.recipe.planned import PlanOptions
from apex_quant.recipe.stock_rules import category


def base_of_types(
    sources: Mapping[str, TensorInfo], manual: Mapping[str, GGMLType], architecture: str, options: PlanOptions
) -> str:
    """The mix of the most common type in `manual`. Raises UsageError when that leaves a tensor open."""
    common: Counter[str] = Counter()
    rest = []
    for name, info in sources.items():
        if not allows_quantization(name, info.shape, architecture, leave_output=options.leave_output_tensor):
            continue
        if name == "output.weight" and options.output_tensor_type:
            continue
        if category(name) == "embedding" and options.token_embedding_type:
            continue
        if name in manual:
            common[manual[name].name] += info.nbytes
        else:
            rest.append(name)
    if rest:
        raise UsageError(
            f"the recipe names no type for {rest[0]}" + and_more(rest),
            hint="give --tier as well: it decides what the recipe leaves open",
        )
    # a base of F16 and the like would make llama-quantize ignore all types
    quantized = [name for name, _ in common.most_common() if ggml_type(name).is_quantized]
    most = quantized[0] if quantized else next(iter(common), "Q8_0")
    if not quantized and len(common) > 1:
        most = "Q8_0"
    return next((mix for mix, row in MIXES.items() if row.default.name == most), "Q8_0")


def and_more(names: Sequence[str]) -> str:
    """' and 3 more' after the first of some names."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
