"""Shapes and metadata of architectures, as data: what `random_models` writes files from.

To add an architecture, add a row to ARCHITECTURES:
- `tiny` and `real`: sizes by name, and the layers as a string with one letter of kind per layer.
- `keys`: metadata without the architecture prefix. A string is a size expression; numbers and bools stand
  for themselves; Text is a string; a list is an array; a dict is an array with one entry per layer, by kind.
- `model`: (name, dims) of the tensors outside layers; `blocks`: (kinds, name, dims) of those inside, for the
  layers whose letter is in `kinds`, or for all with "*".
Dims are size expressions in ggml order (row length first), separated by spaces; an expression is a sum of
products and whole quotients of sizes and numbers. A tensor with a dimension 0 does not
exist. Names carry their suffix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


class Text(str):
    """A metadata string, as opposed to a size expression."""


Key = str | int | float | bool | list["Key"] | dict[str, "Key"]
Rows = tuple[tuple[str, str], ...]
BlockRows = tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Shape:
    tiny: tuple[str, dict[str, int]]
    real: tuple[str, dict[str, int]]
    blocks: BlockRows
    keys: Mapping[str, Key] = field(default_factory=dict)
    model: Rows = (
        ("token_embd.weight", "embd vocab"),
        ("output_norm.weight", "embd"),
        ("output.weight", "embd vocab"),
    )


TINY = {"embd": 256, "vocab": 512, "heads": 4, "kv": 2, "head": 64, "ff": 512, "ctx": 512}
TINY_MOE = TINY | {"experts": 3, "used": 2, "ff_exp": 256, "shexp": 256, "shared": 1}

BASE: dict[str, Key] = {
    "context_length": "ctx",
    "embedding_length": "embd",
    "vocab_size": "vocab",
    "feed_forward_length": "ff",
    "attention.head_count": "heads",
    "attention.head_count_kv": "kv",
    "attention.key_length": "head",
    "attention.value_length": "head",
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.dimension_count": "head",
    "rope.freq_base": 10000.0,
}
MOE: dict[str, Key] = {
    "expert_count": "experts",
    "expert_used_count": "used",
    "expert_feed_forward_length": "ff_exp",
}


def attention(kinds: str, *, q: str = "heads*head", k: str = "kv*head", v: str = "kv*head") -> BlockRows:
    return (
        (kinds, "attn_q.weight", f"embd {q}"),
        (kinds, "attn_k.weight", f"embd {k}"),
        (kinds, "attn_v.weight", f"embd {v}"),
        (kinds, "attn_output.weight", "heads*head embd"),
    )


def qk_norm(kinds: str, head: str = "head") -> BlockRows:
    return ((kinds, "attn_q_norm.weight", head), (kinds, "attn_k_norm.weight", head))


def norms(kinds: str, *names: str) -> BlockRows:
    return tuple((kinds, f"{name}.weight", "embd") for name in names)


def feed_forward(kinds: str, suffix: str = "", ff: str = "ff") -> BlockRows:
    return (
        (kinds, f"ffn_gate{suffix}.weight", f"embd {ff}"),
        (kinds, f"ffn_up{suffix}.weight", f"embd {ff}"),
        (kinds, f"ffn_down{suffix}.weight", f"{ff} embd"),
    )


def experts(kinds: str, *, fused: bool = False) -> BlockRows:
    halves = (
        ((kinds, "ffn_gate_up_exps.weight", "embd 2*ff_exp experts"),)
        if fused
        else tuple((kinds, f"ffn_{part}_exps.weight", "embd ff_exp experts") for part in ("gate", "up"))
    )
    return (
        (kinds, "ffn_gate_inp.weight", "embd experts"),
        *halves,
        (kinds, "ffn_down_exps.weight", "ff_exp embd experts"),
    )


def nextn(kinds: str = "N") -> BlockRows:
    return (
        (kinds, "nextn.eh_proj.weight", "2*embd embd"),
        *norms(kinds, "nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm"),
    )


ARCHITECTURES: dict[str, Shape] = {
    # dense; the real sizes are those llama.cpp's mixes call 70B
    "llama": Shape(
        tiny=("D" * 6, TINY | {"kv": 1}),
        real=(
            "D" * 80,
            {"embd": 8192, "vocab": 128256, "heads": 64, "kv": 8, "head": 128, "ff": 28672, "ctx": 131072},
        ),
        keys=BASE,
        model=(
            ("token_embd.weight", "embd vocab"),
            ("output_norm.weight", "embd"),
            ("output.weight", "embd vocab"),
            ("rope_freqs.weight", "head/2"),
        ),
        blocks=(*norms("*", "attn_norm", "ffn_norm"), *attention("*"), *feed_forward("*")),
    ),
    "qwen3moe": Shape(
        tiny=("M" * 6, TINY_MOE),
        real=(
            "M" * 48,
            {"embd": 2048, "vocab": 151936, "heads": 32, "kv": 4, "head": 128, "ff": 6144, "ctx": 40960}
            | {"experts": 128, "used": 8, "ff_exp": 768},
        ),
        keys=BASE | MOE,
        blocks=(*norms("*", "attn_norm", "ffn_norm"), *attention("*"), *qk_norm("*"), *experts("*")),
    ),
    # L: gated delta net, F: full attention, N: NextN block (full attention and experts)
    "qwen35moe": Shape(
        tiny=(
            "LLLFLLLFN",
            TINY_MOE | {"nextn": 1, "state": 64, "kheads": 2, "vheads": 4, "inner": 256, "conv": 4},
        ),
        real=(
            "LLLF" * 10 + "N",
            {"embd": 2048, "vocab": 248320, "heads": 16, "kv": 2, "head": 256, "ff": 0, "ctx": 262144}
            | {"experts": 256, "used": 8, "ff_exp": 512, "shexp": 512, "nextn": 1}
            | {"state": 128, "kheads": 16, "vheads": 32, "inner": 4096, "conv": 4},
        ),
        keys=BASE
        | MOE
        | {
            "nextn_predict_layers": "nextn",
            "expert_shared_feed_forward_length": "shexp",
            "rope.dimension_sections": [11, 11, 10, 0],
            "rope.dimension_count": "head/4",
            "full_attention_interval": 4,
            "ssm.conv_kernel": "conv",
            "ssm.inner_size": "inner",
            "ssm.state_size": "state",
            "ssm.time_step_rank": "vheads",
            "ssm.group_count": "kheads",
        },
        blocks=(
            *norms("*", "attn_norm", "post_attention_norm"),
            *attention("FN", q="2*heads*head"),
            *qk_norm("FN"),
            ("L", "attn_qkv.weight", "embd 2*state*kheads+state*vheads"),
            ("L", "attn_gate.weight", "embd state*vheads"),
            ("L", "ssm_conv1d.weight", "conv 2*state*kheads+state*vheads"),
            ("L", "ssm_dt.bias", "vheads"),
            ("L", "ssm_a", "vheads"),
            ("L", "ssm_beta.weight", "embd vheads"),
            ("L", "ssm_alpha.weight", "embd vheads"),
            ("L", "ssm_norm.weight", "state"),
            ("L", "ssm_out.weight", "state*vheads embd"),
            *experts("*"),
            ("*", "ffn_gate_inp_shexp.weight", "embd"),
            *feed_forward("*", "_shexp", "shexp"),
            *nextn(),
        ),
    ),
    # latent attention; D: leading dense layer, M: mixture
    "deepseek2": Shape(
        tiny=(
            "D" + "M" * 5,
            TINY_MOE
            | {"heads": 2, "kv": 1, "lead": 1, "q_lora": 256, "kv_lora": 256}
            | {"nope": 256, "rope": 64, "v_head": 256},
        ),
        real=(
            "DDD" + "M" * 58,
            {"embd": 7168, "vocab": 129280, "heads": 128, "kv": 1, "ff": 18432, "ctx": 163840}
            | {"experts": 256, "used": 8, "ff_exp": 2048, "shexp": 2048, "shared": 1, "lead": 3}
            | {"q_lora": 1536, "kv_lora": 512, "nope": 128, "rope": 64, "v_head": 128},
        ),
        keys=BASE
        | MOE
        | {
            "leading_dense_block_count": "lead",
            "expert_shared_count": "shared",
            "expert_weights_scale": 2.5,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
            "attention.q_lora_rank": "q_lora",
            "attention.kv_lora_rank": "kv_lora",
            "attention.key_length": "kv_lora+rope",
            "attention.value_length": "kv_lora",
            "attention.key_length_mla": "nope+rope",
            "attention.value_length_mla": "v_head",
            "rope.dimension_count": "rope",
        },
        blocks=(
            *norms("*", "attn_norm", "ffn_norm"),
            ("*", "attn_q_a.weight", "embd q_lora"),
            ("*", "attn_q_a_norm.weight", "q_lora"),
            ("*", "attn_q_b.weight", "q_lora heads*nope+heads*rope"),
            ("*", "attn_kv_a_mqa.weight", "embd kv_lora+rope"),
            ("*", "attn_kv_a_norm.weight", "kv_lora"),
            ("*", "attn_k_b.weight", "nope kv_lora heads"),
            ("*", "attn_v_b.weight", "kv_lora v_head heads"),
            ("*", "attn_output.weight", "heads*v_head embd"),
            *feed_forward("D"),
            *experts("M"),
            ("M", "exp_probs_b.bias", "experts"),
            *feed_forward("M", "_shexp", "shexp"),
        ),
    ),
    # S: sliding window, G: global attention, whose keys are its values; dense branch beside fused experts
    "gemma4": Shape(
        tiny=(
            "SSSGSSG",
            TINY_MOE | {"kv_global": 1, "head_global": 128, "per_layer": 256} | {"per_layer_norm": 256},
        ),
        real=(
            "SSSSSG" * 5,
            {"embd": 2816, "vocab": 262144, "heads": 16, "kv": 8, "head": 256, "ff": 2112, "ctx": 262144}
            | {"experts": 128, "used": 8, "ff_exp": 704, "kv_global": 2, "head_global": 512, "per_layer": 0}
            | {"per_layer_norm": 0},
        ),
        keys=BASE
        | MOE
        | {
            "attention.head_count_kv": {"S": "kv", "G": "kv_global"},
            "attention.key_length": "head_global",
            "attention.value_length": "head_global",
            "attention.key_length_swa": "head",
            "attention.value_length_swa": "head",
            "attention.sliding_window": 1024,
            "attention.sliding_window_pattern": {"S": True, "G": False},
            "attention.shared_kv_layers": 0,
            "embedding_length_per_layer_input": "per_layer",
            "final_logit_softcapping": 30.0,
            "rope.dimension_count": "head_global",
            "rope.dimension_count_swa": "head",
            "rope.freq_base_swa": 10000.0,
        },
        model=(
            ("token_embd.weight", "embd vocab"),
            ("output_norm.weight", "embd"),
            ("rope_freqs.weight", "head_global/2"),
            ("per_layer_token_embd.weight", "per_layer*layers vocab"),
            ("per_layer_model_proj.weight", "embd per_layer*layers"),
            ("per_layer_proj_norm.weight", "per_layer"),
        ),
        blocks=(
            *norms("*", "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"),
            *norms("*", "pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"),
            *attention("S"),
            *qk_norm("S"),
            ("G", "attn_q.weight", "embd heads*head_global"),
            ("G", "attn_k.weight", "embd kv_global*head_global"),
            ("G", "attn_output.weight", "heads*head_global embd"),
            *qk_norm("G", "head_global"),
            ("*", "layer_output_scale.weight", "1"),
            *feed_forward("*"),
            *experts("*", fused=True),
            ("*", "ffn_gate_inp.scale", "embd"),
            ("*", "ffn_down_exps.scale", "experts"),
            ("*", "inp_gate.weight", "embd per_layer"),
            ("*", "proj.weight", "per_layer embd"),
            ("*", "post_norm.weight", "per_layer_norm"),
        ),
    ),
    # biases everywhere, per-expert ones included
    "gpt-oss": Shape(
        tiny=("M" * 6, TINY_MOE),
        real=(
            "M" * 24,
            {"embd": 2880, "vocab": 201088, "heads": 64, "kv": 8, "head": 64, "ff": 2880, "ctx": 131072}
            | {"experts": 32, "used": 4, "ff_exp": 2880},
        ),
        keys=BASE | MOE | {"attention.sliding_window": 128},
        blocks=(
            *norms("*", "attn_norm", "post_attention_norm"),
            *attention("*"),
            ("*", "attn_q.bias", "heads*head"),
            ("*", "attn_k.bias", "kv*head"),
            ("*", "attn_v.bias", "kv*head"),
            ("*", "attn_output.bias", "embd"),
            ("*", "attn_sinks.weight", "heads"),
            *experts("*"),
            ("*", "ffn_gate_inp.bias", "experts"),
            ("*", "ffn_gate_exps.bias", "ff_exp experts"),
            ("*", "ffn_up_exps.bias", "ff_exp experts"),
            ("*", "ffn_down_exps.bias", "embd experts"),
        ),
    ),
    # R: mamba 2, A: attention, E: experts without gate, behind a latent projection where `latent` is set
    "nemotron_h_moe": Shape(
        tiny=(
            "RERAERE",
            TINY_MOE
            | {"latent": 256, "moe_embd": 256, "state": 64, "groups": 2, "inner": 512}
            | {"ssm_heads": 4, "conv": 4},
        ),
        real=(
            "RERERAERERERAERERERAERERERAERERERAERERERERAERERERERE",
            {"embd": 2688, "vocab": 131072, "heads": 32, "kv": 2, "head": 128, "ff": 1856, "ctx": 262144}
            | {"experts": 128, "used": 6, "ff_exp": 1856, "shexp": 3712, "shared": 1, "latent": 0}
            | {"moe_embd": 2688, "state": 128, "groups": 8, "inner": 4096, "ssm_heads": 64, "conv": 4},
        ),
        keys=BASE
        | MOE
        | {
            "attention.head_count_kv": {"R": 0, "A": "kv", "E": 0},
            "feed_forward_length": {"R": 0, "A": 0, "E": "ff_exp"},
            "attention.layer_norm_epsilon": 1e-5,
            "expert_shared_feed_forward_length": "shexp",
            "expert_shared_count": "shared",
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "moe_latent_size": "latent",
            "ssm.conv_kernel": "conv",
            "ssm.inner_size": "inner",
            "ssm.state_size": "state",
            "ssm.time_step_rank": "ssm_heads",
            "ssm.group_count": "groups",
        },
        blocks=(
            *norms("*", "attn_norm"),
            ("R", "ssm_in.weight", "embd 2*inner+2*groups*state+ssm_heads"),
            ("R", "ssm_conv1d.weight", "conv inner+2*groups*state"),
            ("R", "ssm_conv1d.bias", "inner+2*groups*state"),
            ("R", "ssm_dt.bias", "ssm_heads"),
            ("R", "ssm_a", "1 ssm_heads"),
            ("R", "ssm_d", "1 ssm_heads"),
            ("R", "ssm_norm.weight", "inner/groups groups"),
            ("R", "ssm_out.weight", "inner embd"),
            *attention("A"),
            ("E", "ffn_gate_inp.weight", "embd experts"),
            ("E", "exp_probs_b.bias", "experts"),
            ("E", "ffn_latent_down.weight", "embd latent"),
            ("E", "ffn_latent_up.weight", "latent embd"),
            ("E", "ffn_up_exps.weight", "moe_embd ff_exp experts"),
            ("E", "ffn_down_exps.weight", "ff_exp moe_embd experts"),
            ("E", "ffn_up_shexp.weight", "embd shexp"),
            ("E", "ffn_down_shexp.weight", "shexp embd"),
        ),
    ),
    # a leading dense layer, attention biases and a NextN block
    "glm4moe": Shape(
        tiny=("D" + "M" * 5 + "N", TINY_MOE | {"lead": 1, "nextn": 1}),
        real=(
            "D" + "M" * 45 + "N",
            {"embd": 4096, "vocab": 151552, "heads": 96, "kv": 8, "head": 128, "ff": 10944, "ctx": 131072}
            | {"experts": 128, "used": 8, "ff_exp": 1408, "shexp": 1408, "shared": 1, "lead": 1, "nextn": 1},
        ),
        keys=BASE
        | MOE
        | {
            "nextn_predict_layers": "nextn",
            "leading_dense_block_count": "lead",
            "expert_shared_count": "shared",
            "expert_weights_scale": 1.0,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
            "rope.dimension_count": "head/2",
        },
        blocks=(
            *norms("*", "attn_norm", "post_attention_norm"),
            *attention("*"),
            ("*", "attn_q.bias", "heads*head"),
            ("*", "attn_k.bias", "kv*head"),
            ("*", "attn_v.bias", "kv*head"),
            *feed_forward("D"),
            *experts("MN"),
            ("MN", "exp_probs_b.bias", "experts"),
            *feed_forward("MN", "_shexp", "shexp"),
            *nextn(),
        ),
    ),
}
