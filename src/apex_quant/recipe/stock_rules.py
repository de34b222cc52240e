"""llama-quantize's decisions about single tensors, as tables: what stays as it is, what each mix changes.

The facts are those of llama.cpp's src/llama-quant.cpp as vendored by the pinned llama-cpp-python; the
oracle test compares them with the library for every architecture. `mixes.py` applies the tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from apex_quant.errors import InputError

# ---- tensors that are never quantized: (name contains, what it is) ----------------------------------

_KEPT_NAMES: Final = {
    "position_embd.weight": "position embedding",
    "token_types.weight": "token types",
}
_KEPT_PARTS: Final[tuple[tuple[str, str], ...]] = (
    ("_norm.weight", "norm"),
    ("ffn_gate_inp.weight", "router"),
    ("ffn_gate_tid2eid.weight", "routing table"),
    ("altup", "altup helper"),
    ("laurel", "laurel helper"),
    ("per_layer_model_proj", "per-layer projection"),
    ("ssm_conv1d", "convolution"),
    ("shortconv.conv.weight", "convolution"),
    ("indexer.k_proj.weight", "indexer"),
    ("indexer.q_proj.weight", "indexer"),
    *(
        (f"time_mix_{part}.weight", "time-mix helper")
        for part in (
            "first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2",
            "decay_w1", "decay_w2", "lerp_fused",
        )
    ),
    ("attn_rel_b.weight", "relative position bias"),
    (".position_embd", "position embedding"),
    ("sam.pos_embd", "position embedding"),
    ("sam.neck.", "vision neck"),
    ("sam.net_", "vision net"),
    (".rel_pos", "relative position"),
    (".patch_embd", "patch embedding"),
    (".patch_merger", "patch merger"),
    ("a.rvq.codebook", "audio codebook"),
    ("mm.a.code_embd", "audio code embedding"),
)  # fmt: skip
_KEPT_PARTS_OF: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "glm5-next": (
        ("hc_", "hyper-connection"),
        ("indexer.attn_q_b", "indexer"),
        ("indexer.attn_k", "indexer"),
        ("indexer.proj", "indexer"),
        ("indexer_compressor_gate", "indexer"),
        ("indexer_compressor_ape", "indexer"),
        ("ssm_f_a.weight", "linear-attention gate"),
        ("ssm_f_b.weight", "linear-attention gate"),
        ("ssm_g_a.weight", "linear-attention gate"),
        ("ssm_g_b.weight", "linear-attention gate"),
        ("ssm_beta.weight", "linear-attention gate"),
        ("attn_kv_a_mqa.weight", "latent attention"),
        ("attn_k_b.weight", "latent attention"),
        ("attn_v_b.weight", "latent attention"),
    ),
}  # fmt: skip


def n_dims(shape: Sequence[int]) -> int:
    """Dimensions as ggml_n_dims counts them: trailing ones are not counted, never below 1."""
    dims = len(shape)
    while dims > 1 and shape[dims - 1] == 1:
        dims -= 1
    return max(dims, 1)


def kept_because(name: str, shape: Sequence[int], architecture: str, leave_output: bool = False) -> str | None:
    """Why llama-quantize leaves this tensor at its source type, or None when it quantizes it."""
    if n_dims(shape) < 2:
        return "1-D"
    # five-letter names pass the library's own test for the ending by an underflow; reproduced
    if not name.endswith("weight") and len(name.encode("utf-8", "surrogateescape")) != 5:
        return "not a weight"
    if leave_output and name == "output.weight":
        return "output left as asked"
    if name in _KEPT_NAMES:
        return _KEPT_NAMES[name]
    for part, what in (*_KEPT_PARTS, *_KEPT_PARTS_OF.get(architecture, ())):
        if part in name:
            return what
    return None


# ---- categories: broad, by parts of the name, first hit wins ----------------------------------------

_CATEGORIES: Final[tuple[tuple[str, str], ...]] = (
    ("attn_qkv.weight", "value"),
    ("attn_kv_b.weight", "value"),
    ("attn_v.weight", "value"),
    ("attn_k.weight", "key"),
    ("attn_q.weight", "query"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "up"),
    ("ffn_gate", "gate"),
    ("ffn_down", "down"),
)
PER_LAYER_EMBEDDING: Final = "per_layer_token_embd.weight"
_EMBEDDINGS: Final = frozenset({"token_embd.weight", PER_LAYER_EMBEDDING})


def category(name: str) -> str:
    """output, embedding, value (fused qkv and kv_b too), key, query, attn_output, up, gate, down, other."""
    if name == "output.weight":
        return "output"
    if name in _EMBEDDINGS:
        return "embedding"
    return next((kind for part, kind in _CATEGORIES if part in name), "other")


_BLOCK = re.compile(r"blk\.[ \t\n\v\f\r]*([+-]?[0-9]+)")


def layer_of(name: str) -> int | None:
    """The layer as sscanf("blk.%d.") reads it, or None for a tensor outside the blocks."""
    found = _BLOCK.match(name)
    return int(found[1]) if found else None


# ---- what the mixes change -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Situation:
    """What a rule may look at. `index` of `count` is the layer, or stock's running count of such tensors."""

    architecture: str
    mix: str
    experts: int
    gqa: int | None
    has_imatrix: bool
    index: int = 0
    count: int = 0

    def at(self, index: int, count: int) -> Situation:
        return replace(self, index=index, count=count)

    @property
    def falcon(self) -> bool:
        return self.architecture == "falcon"

    @property
    def gqa4(self) -> bool:
        if self.gqa is None:
            raise InputError(
                f"llama-quantize aborts on {self.mix} for {self.architecture!r} files: they have no layers.",
                hint="keep projector files as they are, or quantize them to Q8_0",
            )
        return self.gqa >= 4

    @property
    def more_bits(self) -> bool:
        """The first and last eighth, and every third layer between."""
        eighth = self.count // 8
        return self.index < eighth or self.index >= 7 * self.count // 8 or (self.index - eighth) % 3 == 2


When = Callable[[Situation], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """In `mixes`, a tensor of `category` gets `type` when `when` holds; the first such rule wins."""

    category: str
    mixes: frozenset[str]
    type: str
    when: When


def _always(_: Situation) -> bool:
    return True


def _first(parts: int) -> When:
    return lambda s: s.index < s.count // parts


_eighth, _sixteenth = _first(8), _first(16)


def _eight_experts(s: Situation) -> bool:
    return s.experts == 8


def _middle(s: Situation) -> bool:
    return s.count // 8 <= s.index < 7 * s.count // 8


def _rule(category: str, mixes: str, wanted: str, when: When = _always) -> Rule:
    return Rule(category, frozenset(mixes.split()), wanted, when)


_TINY_12: Final = "IQ1_S IQ1_M IQ2_XXS IQ2_XS"
_TINY_2S: Final = "IQ2_S IQ2_M"
# these six have rules of their own; they ignore 70B and most of what the others look at
TINY: Final = frozenset(f"{_TINY_12} {_TINY_2S}".split())
_OTHERS: Final = (
    "Q1_0 Q2_0 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q2_K_S Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K "
    "IQ3_XXS IQ3_XS IQ3_S IQ3_M IQ4_NL IQ4_XS TQ1_0 TQ2_0"
)

_RULES: Final[tuple[Rule, ...]] = (
    _rule("embedding", _TINY_12, "Q2_K"),
    _rule("embedding", f"{_TINY_2S} IQ3_XXS", "IQ3_S"),
    _rule("embedding", "TQ1_0 TQ2_0 Q2_0", "Q4_K"),
    # the tiny mixes
    _rule("value", f"{_TINY_12} {_TINY_2S}", "Q4_K", lambda s: s.gqa4 or s.experts >= 4),
    _rule("value", _TINY_2S, "IQ3_S"),
    _rule("value", _TINY_12, "Q2_K"),
    _rule("key", f"{_TINY_12} {_TINY_2S}", "Q4_K", _eight_experts),
    _rule("down", _TINY_2S, "IQ3_S", _eighth),
    _rule("down", _TINY_12, "Q2_K", _eighth),
    _rule("attn_output", f"{_TINY_12} {_TINY_2S}", "Q5_K", _eight_experts),
    _rule("attn_output", "IQ1_S IQ1_M", "IQ2_XXS"),
    _rule("attn_output", _TINY_2S, "IQ3_S"),
    # attention values, fused qkv and latent kv_b
    _rule("value", _OTHERS, "Q8_0", _eight_experts),
    _rule("value", "Q2_K", "Q4_K", lambda s: s.gqa4),
    _rule("value", "Q2_K", "Q3_K"),
    _rule("value", "Q2_K_S IQ3_XXS IQ3_XS IQ3_S", "Q4_K", lambda s: s.gqa4),
    _rule("value", "IQ3_XXS", "IQ3_S", lambda s: not s.has_imatrix),
    _rule("value", "IQ3_M", "Q4_K"),
    _rule("value", "Q3_K_M", "Q5_K", lambda s: s.index < 2),
    _rule("value", "Q3_K_M", "Q4_K"),
    _rule("value", "Q3_K_L", "Q5_K"),
    _rule("value", "IQ4_NL IQ4_XS", "Q5_K", lambda s: s.gqa4),
    _rule("value", "Q4_K_M Q5_K_M", "Q6_K", lambda s: s.more_bits),
    _rule("value", "Q4_K_S", "Q5_K", lambda s: s.index < 4),
    _rule("key", _OTHERS, "Q8_0", _eight_experts),
    _rule("key", "IQ3_XS", "IQ3_XXS"),
    _rule("key", "IQ3_XXS", "IQ2_S"),
    _rule("query", "IQ3_XS", "IQ3_XXS"),
    _rule("query", "IQ3_XXS", "IQ2_S"),
    # feed-forward, experts or not
    _rule("down", "Q2_K", "Q3_K"),
    _rule("down", "Q2_K_S", "Q4_K", _eighth),
    _rule("down", "IQ3_XXS", "Q4_K", lambda s: not s.has_imatrix and _eighth(s)),
    _rule("down", "IQ3_XXS", "Q3_K", lambda s: not s.has_imatrix),
    _rule("down", "Q3_K_M", "Q5_K", _sixteenth),
    _rule("down", "Q3_K_M", "Q4_K", lambda s: not s.falcon or s.more_bits),
    _rule("down", "IQ3_M", "Q4_K", lambda s: _eighth(s) or (_eight_experts(s) and s.more_bits)),
    _rule("down", "Q3_K_L", "Q4_K", lambda s: s.falcon),
    _rule("down", "Q3_K_L", "Q5_K"),
    _rule("down", "Q4_K_M", "Q6_K", lambda s: _sixteenth(s) if s.falcon else s.more_bits),
    _rule("down", "Q4_K_M", "Q5_K", lambda s: s.falcon and s.more_bits),
    _rule("down", "IQ4_NL IQ4_XS", "Q5_K", lambda s: not s.has_imatrix and _eighth(s)),
    _rule("down", "Q5_K_M", "Q6_K", lambda s: s.more_bits),
    _rule("down", "Q4_K_S", "Q5_K", lambda s: not s.falcon and _eighth(s)),
    _rule("down", "Q4_0", "Q4_1", lambda s: s.has_imatrix and _eighth(s)),
    _rule("down", "Q5_0", "Q5_1", lambda s: s.has_imatrix and _eighth(s)),
    _rule("gate", "IQ3_XS", "IQ3_XXS", _middle),
    _rule("up", "IQ3_XS", "IQ3_XXS", _middle),
    # attention output
    _rule("attn_output", "Q3_K_L", "Q4_K", lambda s: s.falcon),
    _rule(
        "attn_output",
        "Q2_K Q3_K_S Q3_K_M Q4_K_S Q4_K_M IQ3_XXS IQ3_XS IQ3_S IQ3_M IQ4_NL IQ4_XS",
        "Q5_K",
        lambda s: _eight_experts(s) and not s.falcon,
    ),
    _rule("attn_output", "Q2_K", "Q3_K", lambda s: not s.falcon),
    _rule("attn_output", "IQ3_XXS", "IQ3_S", lambda s: not s.falcon),
    _rule("attn_output", "Q3_K_M IQ3_M", "Q4_K", lambda s: not s.falcon),
    _rule("attn_output", "Q3_K_L", "Q5_K", lambda s: not s.falcon and not _eight_experts(s)),
)
_BY_CELL: Final[dict[tuple[str, str], tuple[Rule, ...]]] = {
    (kind, mix): tuple(rule for rule in _RULES if rule.category == kind and mix in rule.mixes)
    for kind in {rule.category for rule in _RULES}
    for mix in {mix for rule in _RULES for mix in rule.mixes}
}


def mix_rule(kind: str, situation: Situation) -> str | None:
    """The type the mix wants for a tensor of category `kind` here, or None for the mix's default type."""
    rules = _BY_CELL.get((kind, situation.mix), ())
    return next((rule.type for rule in rules if rule.when(situation)), None)


# output.weight, and a token embedding that stands in for it
OUTPUT_Q5_K: Final = TINY | {"IQ3_XXS"}

# at least Q8_0 for these parts of these architectures, whatever the mix
AT_LEAST_Q8_0: Final = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}
