"""The file mixes of llama-quantize (Q4_K_M, IQ2_XXS, ...): which type each tensor gets, without the library.

`stock_types` gives what llama_model_quantize of the pinned library decides for a whole model, tensor by
tensor, in its order: the order matters because some rules count the tensors that came before. The tables
are in stock_rules.py; tests compare both with the library's dry run for every architecture it knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol

from apex_quant.errors import InputError, UsageError, did_you_mean
from apex_quant.gguf.reader import stock_order
from apex_quant.gguf.types import TYPES, GGMLType
from apex_quant.gguf.writer import TensorLike
from apex_quant.recipe.patterns import compile_pattern
from apex_quant.recipe.stock_rules import (
    AT_LEAST_Q8_0,
    OUTPUT_Q5_K,
    PER_LAYER_EMBEDDING,
    TINY,
    Situation,
    category,
    kept_because,
    layer_of,
    mix_rule,
)

__all__ = [
    "MIXES",
    "Choice",
    "Mix",
    "MixFacts",
    "Override",
    "TensorLike",
    "allows_quantization",
    "compile_pattern",
    "fallback_type",
    "kept_because",
    "mix_name",
    "requires_imatrix",
    "stock_types",
]


class Mix(NamedTuple):
    """A file mix: llama.cpp's ftype number (general.file_type) and the type its tensors get by default."""

    ftype: int
    default: GGMLType


Override = tuple[str, GGMLType]
"""A pattern searched in tensor names, as in a tensor-type file, and the type it gives."""

_MIX_ROWS: Final = (
    ("Q1_0", 40, "Q1_0"),
    ("Q2_0", 41, "Q2_0"),
    ("Q4_0", 2, "Q4_0"),
    ("Q4_1", 3, "Q4_1"),
    ("MXFP4_MOE", 38, "MXFP4"),
    ("Q5_0", 8, "Q5_0"),
    ("Q5_1", 9, "Q5_1"),
    ("IQ2_XXS", 19, "IQ2_XXS"),
    ("IQ2_XS", 20, "IQ2_XS"),
    ("IQ2_S", 28, "IQ2_XS"),
    ("IQ2_M", 29, "IQ2_S"),
    ("IQ1_S", 24, "IQ1_S"),
    ("IQ1_M", 31, "IQ1_M"),
    ("TQ1_0", 36, "TQ1_0"),
    ("TQ2_0", 37, "TQ2_0"),
    ("Q2_K", 10, "Q2_K"),
    ("Q2_K_S", 21, "Q2_K"),
    ("IQ3_XXS", 23, "IQ3_XXS"),
    ("IQ3_S", 26, "IQ3_S"),
    ("IQ3_M", 27, "IQ3_S"),
    ("IQ3_XS", 22, "IQ3_S"),
    ("Q3_K_S", 11, "Q3_K"),
    ("Q3_K_M", 12, "Q3_K"),
    ("Q3_K_L", 13, "Q3_K"),
    ("IQ4_NL", 25, "IQ4_NL"),
    ("IQ4_XS", 30, "IQ4_XS"),
    ("Q4_K_S", 14, "Q4_K"),
    ("Q4_K_M", 15, "Q4_K"),
    ("Q5_K_S", 16, "Q5_K"),
    ("Q5_K_M", 17, "Q5_K"),
    ("Q6_K", 18, "Q6_K"),
    ("Q8_0", 7, "Q8_0"),
    ("F16", 1, "F16"),
    ("BF16", 32, "BF16"),
    ("F32", 0, "F32"),
    ("COPY", 0, "F32"),
)
_ALIASES: Final = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

MIXES: Final[dict[str, Mix]] = {name: Mix(ftype, TYPES[kind]) for name, ftype, kind in _MIX_ROWS}
"""By the names mix_name gives. COPY quantizes nothing: the library then keeps the source's own ftype."""


def mix_name(name: str) -> str:
    """The proper name of the mix llama-quantize takes for `name`: any case, its aliases, an ftype number.

    Raises UsageError with the nearest name.
    """
    found = name.upper()
    found = _ALIASES.get(found, found)
    if found not in MIXES and name.isascii() and name.isdigit():
        found = next((mix for mix, (ftype, _) in MIXES.items() if str(ftype) == name), name)
    if found not in MIXES:
        known = [*MIXES, *_ALIASES]
        raise UsageError(
            f"no llama.cpp mix is called {name!r}.{did_you_mean(name, known)}",
            hint="the mixes are " + ", ".join(MIXES),
        )
    return found


class MixFacts(Protocol):
    """What the rules look at in a model; `model.facts` computes it as llama.cpp's loaders do."""

    @property
    def architecture(self) -> str: ...
    @property
    def n_layer_all(self) -> int: ...
    @property
    def n_expert(self) -> int: ...
    @property
    def n_gqa(self) -> int: ...
    @property
    def is_70b(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """The type a tensor gets. `wanted` differs from it when the row length forced a fallback.

    `detail` says more where there is more: why it is kept (at its source type), the override's pattern, the type that
    was given up for want of importance (unreached.py).
    """

    name: str
    type: GGMLType
    wanted: GGMLType
    why: Literal["kept", "mix", "override", "output type", "embedding type", "no importance"]
    detail: str = ""


def allows_quantization(name: str, shape: Sequence[int], architecture: str, *, leave_output: bool = False) -> bool:
    """Whether llama-quantize quantizes this tensor (`shape` in ggml order); `kept_because` says why not."""
    return kept_because(name, shape, architecture, leave_output) is None


def fallback_type(wanted: GGMLType, ne0: int) -> GGMLType:
    """The type llama-quantize takes when rows of `ne0` weights do not divide into blocks of `wanted`.

    `wanted` itself where they do; else its 32-weight substitute; else F16. Raises InputError for the
    types the library has no substitute for (Q1_0, NVFP4, Q8_K), where it stops too.
    """
    if ne0 % wanted.block == 0:
        return wanted
    if wanted.fallback is None and wanted.block > 32:
        raise InputError(
            f"{wanted} needs rows of a multiple of {wanted.block} weights, these have {ne0},"
            " and llama.cpp has no other type for that.",
            hint="choose another type for this tensor",
        )
    substitute = TYPES[wanted.fallback] if wanted.fallback else wanted
    return substitute if ne0 % substitute.block == 0 else TYPES["F16"]


def requires_imatrix(name: str, wanted: GGMLType, mix: str) -> bool:
    """Whether encoding `name` as `wanted` in a file of `mix` needs an importance matrix.

    The union of llama-quantize's refusals (which exempt token embeddings and the output matrix) and of
    ggml's encoders that abort without importance (IQ1_S, IQ2_XXS, IQ2_XS, on any tensor).
    """
    if category(name) in ("embedding", "output"):
        return wanted.name in ("IQ1_S", "IQ2_XXS", "IQ2_XS")
    return wanted.imatrix == "needed" or (wanted.name == "Q2_K" and mix_name(mix) == "Q2_K_S")


def stock_types(
    facts: MixFacts,
    tensors: Sequence[TensorLike],
    mix: str,
    *,
    overrides: Sequence[Override] = (),
    manual: Mapping[str, GGMLType] | None = None,
    has_imatrix: bool = False,
    pure: bool = False,
    output_type: GGMLType | None = None,
    embedding_type: GGMLType | None = None,
    leave_output: bool = False,
    keep_order: bool = False,
) -> list[Choice]:
    """What llama_model_quantize decides for every tensor, in its processing order.

    `overrides` are as in a tensor-type file: ECMAScript searches, the first match wins; `manual` is the
    same already matched, by full name, and comes first. Both are ignored when the mix is F16, BF16, F32
    or COPY. `keep_order` takes the tensors as they come, which is what --keep-split does with (shard,
    offset) order. With --prune-layers pass the renamed tensors and the facts of the whole model. Raises
    UsageError for unknown mixes and bad patterns, and InputError where the library stops (a layer number
    out of range, a shape no type fits).
    """
    chooser = _Chooser(facts, tensors, mix_name(mix), has_imatrix, output_type)
    patterns = [(compile_pattern(pattern), kind) for pattern, kind in overrides]
    by_name = {tensor.name: tensor for tensor in tensors}
    choices = []
    for name in by_name if keep_order else stock_order(by_name):
        override = ("", manual[name]) if manual and name in manual else None
        if override is None:
            override = next(((p.source, kind) for p, kind in patterns if p.search(name)), None)
        choices.append(chooser.choose(by_name[name], override, pure, embedding_type, leave_output))
    return choices


class _Chooser:
    """The state llama-quantize carries from tensor to tensor."""

    def __init__(
        self,
        facts: MixFacts,
        tensors: Sequence[TensorLike],
        mix: str,
        has_imatrix: bool,
        output_type: GGMLType | None,
    ) -> None:
        self.facts = facts
        self.mix = mix
        self.default = MIXES[mix].default
        self.output_type = output_type
        self.layers = facts.n_layer_all
        self.tied = all(tensor.name != "output.weight" for tensor in tensors)
        # projector files have no layers, and asking for their layer 0 makes the library abort
        gqa = facts.n_gqa if self.layers else None
        self.situation = Situation(facts.architecture, mix, facts.n_expert, gqa, has_imatrix)
        # how many of a category there are: all attention values, overridden or not, but layers for the FFN
        self.totals = {
            "value": sum(category(tensor.name) == "value" for tensor in tensors),
            "up": self.layers,
            "gate": self.layers,
            "down": self.layers,
        }
        self.seen = dict.fromkeys(self.totals, 0)

    def choose(
        self,
        tensor: TensorLike,
        override: Override | None,
        pure: bool,
        embedding_type: GGMLType | None,
        leave_output: bool,
    ) -> Choice:
        """One tensor's type, as llama_tensor_get_type decides it."""
        name, shape = tensor.name, tensor.shape
        kept = kept_because(name, shape, self.facts.architecture, leave_output)
        if self.mix == "COPY" or kept is not None:
            return Choice(name, tensor.type, tensor.type, "kept", kept or "copy")
        kind = category(name)
        # asked-for types are taken as they are, without looking at the shape
        named = name == PER_LAYER_EMBEDDING and override is not None
        if embedding_type is not None and kind == "embedding" and not named:
            return Choice(name, embedding_type, embedding_type, "embedding type")
        if self.output_type is not None and kind == "output":
            return Choice(name, self.output_type, self.output_type, "output type")
        if not self.default.is_quantized:
            return Choice(name, self.default, self.default, "mix")
        try:
            if override is not None:
                pattern, wanted = override
                return Choice(name, fallback_type(wanted, shape[0]), wanted, "override", pattern)
            wanted = self.default if pure else self.by_mix(tensor, kind)
            return Choice(name, fallback_type(wanted, shape[0]), wanted, "mix")
        except InputError as error:
            raise InputError(f"tensor {name}: {error.message}", error.hint) from None

    def by_mix(self, tensor: TensorLike, kind: str) -> GGMLType:
        """The mix's own rules (llama_tensor_get_type_impl)."""
        default, mix = self.default, self.mix
        floor = AT_LEAST_Q8_0.get(self.facts.architecture, ())
        if any(part in tensor.name for part in floor):
            return TYPES["Q8_0"]
        if kind == "output" or (self.tied and kind == "embedding"):
            return self.output_rule(tensor.shape[0])
        if mix == "MXFP4_MOE":
            expert = len(tensor.shape) > 2 and tensor.shape[2] > 1
            if self.facts.architecture == "bailingmoe3":  # its latent projections are 3-D too
                expert = expert and kind in ("up", "gate", "down")
            return default if expert else TYPES["Q8_0"]
        situation = self.situation
        if kind in self.totals:
            situation = situation.at(self.index(tensor.name, kind), self.totals[kind])
        ruled = mix_rule(kind, situation)
        wanted = default if ruled is None else TYPES[ruled]
        if self.facts.is_70b and kind == "value" and mix not in TINY and wanted.name in ("Q3_K", "Q4_K"):
            return TYPES["Q5_K"]
        return wanted

    def output_rule(self, ne0: int) -> GGMLType:
        """The output matrix, and the token embedding of a model without one."""
        default, mix = self.default, self.mix
        if self.output_type is not None:
            return self.output_type
        if mix == "MXFP4_MOE" or self.facts.architecture == "falcon" or ne0 % default.block:
            return TYPES["Q8_0"]
        if mix in OUTPUT_Q5_K:
            return TYPES["Q5_K"]
        return default if default.name == "Q8_0" else TYPES["Q6_K"]

    def index(self, name: str, kind: str) -> int:
        """Where the tensor stands among `self.totals[kind]`; counts it."""
        index = self.seen[kind]
        self.seen[kind] += 1
        if kind == "value" or self.mix in TINY or self.facts.n_expert <= 1:
            return index
        # the FFN tensors of models with experts go by the layer in their name
        layer = layer_of(name)
        if layer is None or not 0 <= layer < self.layers:
            shown = "no layer" if layer is None else f"layer {layer}"
            raise InputError(
                f"{shown} in its name, where {self.mix} needs one below {self.layers}.",
                hint="llama-quantize stops at this too: give the tensor a type of its own with an override",
            )
        return layer
