"""Which tensor plays which role: the table that `roles.classify` walks, first match wins.

A row is (regular expression, role), searched in the tensor's stem: its name without the layer prefix
(`blk.3.`, `enc.blk.3.`, ...) and without the suffix (`.weight`, `.bias`, ...). Order matters: glue and norms
come before the families they are part of. The rows name families (`attn_`, `ssm_`), so that a tensor a later
converter adds to a family lands right. No stem means two things in two architectures; the only thing the
architecture decides is that everything in a projector file is projector.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Final


class Role(StrEnum):
    """What a tensor is for; the axis along which tiers give bits."""

    routed_expert = "routed_expert"
    """Weights of which a token uses n_expert_used of n_expert."""
    shared_expert = "shared_expert"
    """Always active part of a mixture: shared experts and the latent projections around routed ones."""
    dense_ffn = "dense_ffn"
    """Feed-forward of a dense layer, or a dense branch beside the experts."""
    attention = "attention"
    """Attention of any kind, and the small matrices that mix the residual stream between blocks."""
    ssm = "ssm"
    """State-space, linear-attention, RWKV time-mix and short-convolution weights."""
    router = "router"
    norm = "norm"
    """Norms and learned per-layer scales: vectors."""
    embedding = "embedding"
    """Whatever turns ids or positions into vectors, per-layer embeddings included."""
    output = "output"
    """Whatever turns the last hidden state into logits, classes or a sentence vector."""
    nextn = "nextn"
    """Glue of NextN/MTP blocks and of draft models, not the blocks' own attention and experts."""
    projector = "projector"
    """Vision and audio towers and their projectors."""
    other = "other"


LAYER_PREFIX: Final = re.compile(r"^(?:(?:enc|dec)\.)?(?:blk|posnet|convnext)\.([0-9]{1,9})\.")
"""The prefix that names a layer, with its number. Encoder and decoder layers are counted apart."""

SUFFIX: Final = re.compile(r"(?:\.weight(?=\.lora))?\.(weight|bias|scales?|input_scale|lora_[ab])$")
"""How names end; some tensors (`ssm_a`, `d2t`) have no suffix."""

PROJECTOR_PREFIX: Final = re.compile(r"^(?:v|a|mm|resampler|model\.image_newline)(?:\.|$)")
"""Names that only vision and audio towers carry, wherever they are stored."""

PROJECTOR_ARCHITECTURES: Final = frozenset({"clip"})
"""Architectures of which every tensor belongs to a projector file."""

_R = Role

PATTERNS: Final[tuple[tuple[str, Role], ...]] = (
    # NextN/MTP and draft-model glue: before norms, since enorm/hnorm and shared_head_norm are part of it
    (r"^nextn\.", _R.nextn),
    (r"^(fc|d2t|markov_w\d|conf_proj|selector_\w+)$", _R.nextn),
    # norms and per-layer scales, under whichever family's prefix
    (r"(^|[_.])(norm|ln)\d*([_.]|$)", _R.norm),
    (r"^(layer_output_scale|gamma)$", _R.norm),
    # mixture of experts: routers, then experts (fused, chunked, old per-expert names), then the always active
    (r"^(ffn_gate_inp|ffn_gate_tid2eid|exp_probs_b)", _R.router),
    (r"^ffn_\w+_(ch)?exps$", _R.routed_expert),
    (r"^ffn_(gate|up|down)\.\d+$", _R.routed_expert),
    (r"^ffn_\w*shexp$", _R.shared_expert),
    (r"^ffn_(latent|routed)_", _R.shared_expert),
    # recurrent mixers
    (r"^(ssm_|shortconv\.|time_mix_)", _R.ssm),
    # residual-stream mixers: hyper-connections, AltUp, LAuReL, residual scores
    (r"^altup_proj$", _R.embedding),
    (r"^(altup_unembd_proj|output_(hc_|res_))", _R.output),
    (r"^(hc_|altup_|laurel_|(attn|ffn)_res_score$)", _R.attention),
    # attention: plain, latent, cross, indexer, compressor, image-token branch; rope tables are constants
    (r"^attn_rot_embd$", _R.other),
    (r"^(attn_|cross_attn_|vis_attn_|indexer[._])", _R.attention),
    # dense feed-forward: also RWKV channel mix, image-token branch, convolution blocks of decoders
    (r"^(ffn|ffn[_.]\w+|channel_mix_\w+|vis_(gate|up|down)|conv[12]|dw|pw[12])$", _R.dense_ffn),
    # embeddings, per-layer embeddings and initial states
    (r"^(token_embd|per_layer_|position_embd|token_types|ple_|inp_gate$|proj$)", _R.embedding),
    (r"^(masked_embd_|conv1d$|hrm\.)", _R.embedding),
    # heads
    (r"^(output|cls(\.output)?|dense_[23])$", _R.output),
    # constants of the position encoding: one F32 row, never quantized
    (r"^rope_(freqs|factors_long|factors_short)$", _R.other),
)
