"""From trained weights to a GGUF file, with the names, keys and layout of llama.cpp's converter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .checkpoint import load_weights
from .config import CHAT_TEMPLATE, END_OF_TEXT, SPECIAL_TOKENS, TURN_END, ModelConfig
from .corpus import PRE_TOKENIZER_NAME

ARCHITECTURE = "qwen35moe"
MODEL_NAME = "Apex Tiny MoE"
DESCRIPTION = (
    "A small hybrid mixture-of-experts language model for trying out and testing quantization; "
    "not a model to use for its answers."
)

# Suffixes in the checkpoint -> suffixes in the GGUF file, where no value changes.
_PLAIN_NAMES = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
}
# Norms stored as the difference to one, whose GGUF form is the factor itself.
_OFFSET_NORMS = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
}
# Matrices that llama.cpp keeps in float32.
_FLOAT32_MATRICES = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight")


def _tile_value_heads(config: ModelConfig, t: Tensor, dim: int, width: int) -> Tensor:
    """Reorder value heads from grouped by key head to tiled, as ggml's broadcast expects them."""
    repeat = config.num_value_heads // config.num_key_heads
    shape = list(t.shape)
    split = t.reshape(*shape[:dim], config.num_key_heads, repeat, width, *shape[dim + 1 :])
    return split.transpose(dim, dim + 1).reshape(shape).contiguous()


def _linear_attention_tensor(config: ModelConfig, name: str, value: Tensor) -> tuple[str, Tensor] | None:
    width, keys = config.linear_head_dim, 2 * config.key_width
    if name == "linear_attn.in_proj_qkv.weight":
        values = _tile_value_heads(config, value[keys:], 0, width)
        return "attn_qkv.weight", torch.cat([value[:keys], values])
    if name == "linear_attn.conv1d.weight":
        kernel = value.squeeze(1)
        return "ssm_conv1d.weight", torch.cat([kernel[:keys], _tile_value_heads(config, kernel[keys:], 0, width)])
    if name == "linear_attn.in_proj_z.weight":
        return "attn_gate.weight", _tile_value_heads(config, value, 0, width)
    if name == "linear_attn.in_proj_b.weight":
        return "ssm_beta.weight", _tile_value_heads(config, value, 0, 1)
    if name == "linear_attn.in_proj_a.weight":
        return "ssm_alpha.weight", _tile_value_heads(config, value, 0, 1)
    if name == "linear_attn.dt_bias":
        return "ssm_dt.bias", _tile_value_heads(config, value, 0, 1)
    if name == "linear_attn.A_log":
        return "ssm_a", _tile_value_heads(config, -torch.exp(value), 0, 1)
    if name == "linear_attn.out_proj.weight":
        return "ssm_out.weight", _tile_value_heads(config, value, 1, width)
    return None


def gguf_tensors(config: ModelConfig, parameters: dict[str, Tensor]) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """GGUF names and values of all parameters, layer by layer."""
    yield "token_embd.weight", parameters["model.embed_tokens.weight"].numpy()
    yield "output_norm.weight", (parameters["model.norm.weight"] + 1).numpy()
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for full_name, value in parameters.items():
            if not full_name.startswith(prefix):
                continue
            name = full_name.removeprefix(prefix)
            block = f"blk.{layer}."
            if name in _PLAIN_NAMES:
                yield block + _PLAIN_NAMES[name], value.numpy()
            elif name in _OFFSET_NORMS:
                yield block + _OFFSET_NORMS[name], (value + 1).numpy()
            elif name == "mlp.experts.gate_up_proj":
                gate, up = value.chunk(2, 1)
                yield block + "ffn_gate_exps.weight", gate.contiguous().numpy()
                yield block + "ffn_up_exps.weight", up.contiguous().numpy()
            else:
                converted = _linear_attention_tensor(config, name, value)
                if converted is None:
                    raise ValueError(f"no GGUF name for {full_name}")
                yield block + converted[0], converted[1].numpy()


def storage_type(name: str, dimensions: int) -> gguf.GGMLQuantizationType:
    """BF16, or F32 for what llama.cpp does not quantize."""
    if dimensions <= 1 or not name.endswith(".weight") or name.endswith(("_norm.weight", *_FLOAT32_MATRICES)):
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType.BF16


def _add_parameters(writer: gguf.GGUFWriter, config: ModelConfig, all_float32: bool) -> None:
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_sections(list(config.rope_sections))
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_used)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    file_type = gguf.LlamaFileType.ALL_F32 if all_float32 else gguf.LlamaFileType.MOSTLY_BF16
    writer.add_file_type(file_type)
    writer.add_expert_feed_forward_length(config.expert_size)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_size)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_state_size(config.linear_head_dim)
    writer.add_ssm_group_count(config.num_key_heads)
    writer.add_ssm_time_step_rank(config.num_value_heads)
    writer.add_ssm_inner_size(config.value_width)
    writer.add_array(
        f"{ARCHITECTURE}.attention.recurrent_layers",
        [not config.is_full_attention(layer) for layer in range(config.num_layers)],
    )
    writer.add_uint32(f"{ARCHITECTURE}.full_attention_interval", config.full_attention_interval)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any]) -> None:
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER_NAME)
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    end = vocabulary[END_OF_TEXT]
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(vocabulary[TURN_END])
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def export_gguf(weights: Path, tokenizer_file: Path, target: Path, all_float32: bool = False) -> int:
    """Write the GGUF file; equal inputs give equal bytes.

    Args:
        weights: the trained checkpoint.
        tokenizer_file: the vocabulary.
        target: the file to write; it appears complete or not at all.
        all_float32: store the same values in F32 throughout, for exact comparisons.

    Returns:
        The size of the file in bytes.
    """
    config, parameters = load_weights(weights)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    writer = gguf.GGUFWriter(partial, ARCHITECTURE)
    for name, values in gguf_tensors(config, parameters):
        kind = gguf.GGMLQuantizationType.F32 if all_float32 else storage_type(name, values.ndim)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(MODEL_NAME)
    writer.add_author("The apex-quant authors")
    writer.add_description(DESCRIPTION)
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
    writer.add_license("mit")
    writer.add_languages(["en"])
    _add_parameters(writer, config, all_float32)
    _add_tokenizer(writer, json.loads(tokenizer_file.read_text(encoding="utf-8")))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(target)
    return target.stat().st_size


def transformers_config(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of the same model as a transformers checkpoint."""
    layers = range(config.num_layers)
    return {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dtype": "bfloat16",
        "eos_token_id": 0,
        "full_attention_interval": config.full_attention_interval,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "layer_types": ["full_attention" if config.is_full_attention(i) else "linear_attention" for i in layers],
        "linear_conv_kernel_dim": config.conv_kernel,
        "linear_key_head_dim": config.linear_head_dim,
        "linear_num_key_heads": config.num_key_heads,
        "linear_num_value_heads": config.num_value_heads,
        "linear_value_head_dim": config.linear_head_dim,
        "max_position_embeddings": config.context_length,
        "moe_intermediate_size": config.expert_size,
        "mtp_num_hidden_layers": 0,
        "num_attention_heads": config.num_heads,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_used,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": 0,
        "rms_norm_eps": config.rms_eps,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": list(config.rope_sections[:3]),
            "partial_rotary_factor": config.rotary_dim / config.head_dim,
            "rope_theta": config.rope_theta,
            "rope_type": "default",
        },
        "shared_expert_intermediate_size": config.shared_expert_size,
        "tie_word_embeddings": True,
        "vocab_size": config.vocab_size,
    }


def write_transformers_checkpoint(weights: Path, tokenizer_file: Path, folder: Path) -> None:
    """Write the folder that transformers and llama.cpp's converter read."""
    config, _ = load_weights(weights)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(weights, folder / "model.safetensors")
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(transformers_config(config), indent=2) + "\n", encoding="utf-8")


def compare_gguf(ours: Path, converted: Path) -> dict[str, Any]:
    """Which tensors and keys of two GGUF files differ, in type, shape or value."""
    left, right = gguf.GGUFReader(ours), gguf.GGUFReader(converted)
    tensors = [
        {t.name: (int(t.tensor_type), t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}
        for reader in (left, right)
    ]
    keys = [
        {k: (f.types, f.contents()) for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        for reader in (left, right)
    ]
    return {
        "tensors": len(tensors[0]),
        "differing_tensors": sorted(n for n in {*tensors[0], *tensors[1]} if tensors[0].get(n) != tensors[1].get(n)),
        "keys": len(keys[0]),
        "differing_keys": sorted(k for k in {*keys[0], *keys[1]} if keys[0].get(k) != keys[1].get(k)),
    }
