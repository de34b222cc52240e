"""Sparse GGUF files of every architecture that the library knows, made to test decisions about types.

They are no models: the metadata holds whatever the loaders ask for, the tensors have names of every category
whichever architecture it is, and the data is a hole. PyPI gguf writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.helpers.random_models import ALIGNMENT

LAYERS = 18
"""Even, for hrm_text; enough that an eighth and a sixteenth of it are not zero."""

_ARCHITECTURES = """
    afmoe apertus arcee arctic arwkv7 baichuan bailingmoe bailingmoe2 bailingmoe3 bert bitnet bloom chameleon
    chatglm clip codeshell cogvlm cohere2 cohere2moe command-r dbrx deci deepseek deepseek2 deepseek2-ocr
    deepseek32 deepseek4 dflash dots1 dots3note dream eagle3 ernie4_5 ernie4_5-moe eurobert exaone exaone-moe
    exaone4 falcon falcon-h1 gemma gemma-embedding gemma2 gemma3 gemma3n gemma4 gemma4-assistant glm-dsa glm4
    glm4moe glm5-next gpt-oss gpt2 gptj gptneox granite granite_swa granitehybrid granitemoe graniteswitch grok
    grovemoe hrm_text hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 hy_v4 internlm2 jais jais2 jamba jina-bert-v2
    jina-bert-v3 kimi-k3 kimi-linear laguna lfm2 lfm2moe llada llada-moe llama llama-embed llama4 maincoder
    mamba mamba2 maple mellum mimo2 minicpm minicpm3 minimax-01 minimax-m2 minimax-m3 mistral3 mistral4
    modern-bert mpt muse-glimmer nanbeige nemotron nemotron_h nemotron_h_moe neo-bert nomic-bert nomic-bert-moe
    olmo olmo2 olmoe openelm orion paddleocr pangu-embedded phi2 phi3 phimoe plamo plamo2 plamo3 plm pockettts
    qwen qwen2 qwen2moe qwen2vl qwen3 qwen35 qwen35moe qwen3moe qwen3next qwen3tts qwen3vl qwen3vlmoe qwen4exp
    refact rnd1 rwkv6 rwkv6qwen2 rwkv7 seed_oss smallthinker smollm3 spark2_5 stablelm starcoder starcoder2
    step35 t5 t5encoder talkie wavtokenizer-dec xverse
"""
ARCHITECTURES = tuple(_ARCHITECTURES.split())
UNLOADABLE = {"gptj": "unsupported model architecture: 'gptj'"}
"""Architectures that the library names but cannot load, with what it says."""

PER_LAYER = "per layer"
"""Stands for an array with one entry for each layer."""

KEYS: dict[str, Any] = {
    "context_length": 512,
    "embedding_length": 512,
    "vocab_size": 512,
    "feed_forward_length": 512,
    "attention.head_count": 8,
    "attention.head_count_kv": 2,
    "attention.layer_norm_epsilon": 1e-6,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.group_norm_epsilon": 1e-6,
    "attention.group_norm_groups": 2,
    "attention.clamp_kqv": 1.0,
    "attention.relative_buckets_count": 2,
    "attention.sliding_window": 64,
    "attention.q_lora_rank": 64,
    "attention.kv_lora_rank": 64,
    "attention.key_length_mla": 64,
    "attention.value_length_mla": 64,
    "attention.decay_lora_rank": 2,
    "attention.iclr_lora_rank": 2,
    "attention.value_residual_mix_lora_rank": 2,
    "attention.indexer.head_count": 2,
    "attention.indexer.key_length": 128,
    "attention.indexer.top_k": 2,
    "attention.indexer.kpool": 2,
    "attention.indexer.block_size": 2,
    "attention.indexer.local_blocks": 2,
    "expert_feed_forward_length": 256,
    "expert_shared_count": 1,
    "expert_gating_func": 2,
    "expert_group_scale": 1.0,
    "experts_per_group": 2,
    "leading_dense_block_count": 1,
    "interleave_moe_layer_step": 2,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "rope.dimension_sections": [16, 16, 16, 16],
    "shortconv.l_cache": 4,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 512,
    "ssm.state_size": 64,
    "ssm.time_step_rank": 8,
    "ssm.group_count": 2,
    "kda.head_dim": 64,
    "kda.gate_lower_bound": -1.0,
    "time_decay_extra_dim": 2,
    "time_mix_extra_dim": 2,
    "token_shift_count": 2,
    "use_parallel_residual": True,
    "wkv.head_size": 64,
    "activation.situ_beta": 1.0,
    "activation.situ_linear_beta": 1.0,
    "attn_res.block_size": 2,
}

_HYPER = {
    "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 2,
    "hyper_connection.epsilon": 1e-6,
    "hyper_connection.magnitude": 1.0,
    "hyper_connection.low_rank": 2,
}
_SLIDING = {"attention.sliding_window_pattern": [PER_LAYER, True]}
_GEMMA = {
    **_SLIDING,
    "attention.key_length_swa": 64,
    "attention.value_length_swa": 64,
    "embedding_length_per_layer_input": 64,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "apertus": {f"/xielu.{part}": 1.0 for part in ("alpha_n", "alpha_p", "beta", "eps")},
    "deepseek4": {
        **_HYPER,
        "expert_gating_func": 4,
        "expert_weights_norm": True,
        "expert_weights_scale": 1.0,
        "swiglu_clamp_exp": 1.0,
        "hash_layer_count": 2,
        "attention.output_group_count": 2,
        "attention.output_lora_rank": 2,
        "attention.compress_rope_freq_base": 1.0,
        "attention.compress_ratios": [PER_LAYER, 1],
    },
    "dflash": {**_SLIDING, "target_layers": [0, 1, 2]},
    "dots3note": {
        **_SLIDING,
        "attention.indexer.types": [PER_LAYER, True],
        "attention.key_length_mla_swa": 64,
        "attention.value_length_mla_swa": 64,
        "attention.kv_lora_rank_swa": 64,
        "rope.freq_base_swa": 1e4,
    },
    "eagle3": {"target_layers": [0, 1, 2], "target_hidden_size": 512},
    "gemma4": _GEMMA,
    "gemma4-assistant": _GEMMA,
    "glm5-next": _HYPER,
    "granite_swa": _SLIDING,
    "graniteswitch": {
        "adapters.count": 1,
        "adapters.lora_rank": 2,
        "adapters.token_ids_activate": [1],
        "adapters.token_ids_substitute": [2],
    },
    "hrm_text": {"hrm.layers_per_stack": LAYERS // 2, "hrm.h_cycles": 1, "hrm.l_cycles": 1},
    "hy_v4": {**_HYPER, "attention.indexer.types": [PER_LAYER, True]},
    "maple": {**_SLIDING, "swiglu_clamp_exp": 1.0},
    "mimo2": _SLIDING,
    "qwen4exp": _HYPER,
    "spark2_5": _SLIDING,
    "step35": _SLIDING,
    "wavtokenizer-dec": {
        "features_length": 512,
        "embedding_length": 512,
        "posnet.embedding_length": 512,
        "posnet.block_count": 2,
        "convnext.embedding_length": 512,
        "convnext.block_count": 2,
    },
}
"""What single architectures want else; a leading slash marks a key without the architecture's prefix."""

Tensors = dict[str, tuple[tuple[int, ...], str]]
"""Name -> (ggml shape, type)."""

_EVERY_LAYER = "attn_q attn_k attn_v attn_output ffn_up ffn_gate ffn_down"
_EXPERTS = "ffn_up_exps ffn_gate_exps ffn_down_exps ffn_gate_inp ffn_up_shexp ffn_down_shexp"
# a name of every kind of special treatment, and near misses
_SOME_LAYERS = """
    attn_norm attn_qkv attn_kv_b attn_k_b:3 attn_v_b:3 attn_kv_a_mqa attn_q_a attn_q_b attn_gate attn_rel_b
    cross_attn_v cross_attn_k attn_sinks ffn_gate_up_exps:3 ffn_gate_inp_shexp ffn_gate_tid2eid ffn_norm
    exp_probs_b.bias:1 ffn_down_exps.bias ffn_down_exps.scale:1 ffn_latent_down ssm_in ssm_out ssm_x ssm_dt
    ssm_alpha ssm_beta ssm_conv1d ssm_conv1d_q ssm_f_a ssm_f_b ssm_g_a ssm_g_b shortconv.conv shortconv.in_proj
    nextn.eh_proj nextn.shared_head_head nextn.embed_tokens nextn.enorm:1 indexer.k_proj indexer.q_proj
    indexer.attn_k indexer.attn_q_b indexer.proj indexer_compressor_gate indexer_compressor_ape hc_attn_fn
    time_mix_first time_mix_w0 time_mix_w1 time_mix_w2 time_mix_v0 time_mix_v1 time_mix_v2 time_mix_a0
    time_mix_a1 time_mix_a2 time_mix_g1 time_mix_g2 time_mix_decay_w1 time_mix_decay_w2 time_mix_lerp_fused
    time_mix_lerp_w time_mix_key channel_mix_key altup_router laurel_l per_layer_model_proj per_layer_proj
    attn_rel_pos position_embd
"""
_OUTSIDE = """
    token_embd per_layer_token_embd output_norm position_embd token_types token_embd_norm cls cls.output
    per_layer_model_proj altup_proj rope_freqs:1 v.blk.0.attn_v v.blk.0.attn_q v.blk.0.attn_out v.patch_embd
    v.position_embd a.position_embd a.patch_embd.x v.patch_merger.x sam.pos_embd.x sam.neck.0 sam.net_2
    v.blk.0.rel_pos_h v.blk.0.attn.rel_pos_w a.rvq.codebook.1 mm.a.code_embd mm.0 dec.blk.1.attn_v dec.blk.2.attn_k
"""
_BARE = ("abcde", "v.cls", "abcdef", "weight", "xweight", "a.weights", "blk.1.attn_v.weight.x", "blk.0.q")


def generic_tensors(
    *, layers: int = LAYERS, width: int = 512, experts: bool = True, tied: bool = False, odd: bool = True
) -> Tensors:
    """Tensors of every category with rows of `width`; `odd` adds the names that are treated specially."""
    names = [f"blk.{i}.{part}" for i in range(layers) for part in _EVERY_LAYER.split()]
    if experts:
        names += [
            f"blk.{i}.{part}" + ":3" * part.endswith("exps") for i in range(1, layers) for part in _EXPERTS.split()
        ]
    names += _OUTSIDE.split() if odd else ["token_embd", "output_norm"]
    names += [] if tied else ["output"]
    if odd:
        names += [f"blk.{i}.{part}" for i in (0, layers - 1) for part in _SOME_LAYERS.split()]
    shapes = {"1": (width,), "2": (width, 64), "3": (width, 32, 2)}
    tensors: Tensors = {}
    for name in names:
        stem, _, dims = name.partition(":")
        full = stem if stem.endswith((".bias", ".scale")) else f"{stem}.weight"
        tensors[full] = (shapes[dims or "2"], "F32" if dims == "1" else "F16")
    if odd:
        tensors |= dict.fromkeys(_BARE, ((width, 64), "BF16"))
        tensors["blk.0.attn_output.weight"] = ((width, 1, 4), "F32")
        tensors["blk.1.ssm_out.weight"] = ((width, 1), "F16")
        tensors["blk.2.ssm_out.weight"] = ((width, 32, 1, 3), "F16")
    return tensors


def write_generic(
    path: Path,
    architecture: str,
    tensors: Mapping[str, tuple[tuple[int, ...], str]],
    *,
    layers: int = LAYERS,
    **keys: Any,
) -> Path:
    """Write the file; `keys` are further metadata with dots written as double underscores."""
    writer = gguf.GGUFWriter(None, architecture)
    own = {key.replace("__", "."): value for key, value in keys.items()}
    for key, value in {"block_count": layers, **KEYS, **SPECIAL.get(architecture, {}), **own}.items():
        full = key[1:] if key.startswith("/") else f"{architecture}.{key}"
        if isinstance(value, list) and value[0] == PER_LAYER:
            value = value[1:] * layers
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif value is not None:
            writer.add_array(full, value)
    size = 0
    for name, (shape, kind) in tensors.items():
        qtype = gguf.GGMLQuantizationType[kind]
        block, nbytes = gguf.GGML_QUANT_SIZES[qtype]
        nbytes = int(np.prod(shape)) // block * nbytes
        writer.add_tensor_info(name, shape[::-1], np.dtype(np.float32), nbytes, raw_dtype=qtype)
        size += -(-nbytes // ALIGNMENT) * ALIGNMENT
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        start = -(-file.seek(0, 2) // ALIGNMENT) * ALIGNMENT
        file.truncate(start + size)
    return path
