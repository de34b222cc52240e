"""The embedded model as a Hugging Face checkpoint, made from the GGUF by undoing what the converter does.

Safetensors files are written by hand (a JSON header and bytes), so that nothing but NumPy and PyPI gguf is needed.
Converting the directory must give the embedded model's tensors back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from apex_quant import embedded_model
from tools.embedded_model.config import ModelConfig

CONFIG = ModelConfig()
REGEX = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PLAIN = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ssm_norm": "linear_attn.norm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
# value heads are tiled in the GGUF: stem -> (new name, axis, rows of a head, rows before the values)
_WIDTH, _KEYS = CONFIG.linear_head_dim, 2 * CONFIG.key_width
_HEADS = {
    "attn_qkv.weight": ("linear_attn.in_proj_qkv.weight", 0, _WIDTH, _KEYS),
    "ssm_conv1d.weight": ("linear_attn.conv1d.weight", 0, _WIDTH, _KEYS),
    "attn_gate.weight": ("linear_attn.in_proj_z.weight", 0, _WIDTH, 0),
    "ssm_beta.weight": ("linear_attn.in_proj_b.weight", 0, 1, 0),
    "ssm_alpha.weight": ("linear_attn.in_proj_a.weight", 0, 1, 0),
    "ssm_dt.bias": ("linear_attn.dt_bias", 0, 1, 0),
    "ssm_a": ("linear_attn.A_log", 0, 1, 0),
    "ssm_out.weight": ("linear_attn.out_proj.weight", 1, _WIDTH, 0),
}
Array = npt.NDArray[Any]


def save_safetensors(path: Path, tensors: dict[str, Array]) -> None:
    """uint16 arrays are BF16, float32 F32, uint8 U8."""
    kinds = {"uint16": "BF16", "float32": "F32", "uint8": "U8"}
    header: dict[str, Any] = {}
    end = 0
    for name, values in tensors.items():
        header[name] = {
            "dtype": kinds[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": [end, end + values.nbytes],
        }
        end += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values).tobytes())


def _untile(values: Array, axis: int, width: int) -> Array:
    repeat = CONFIG.num_value_heads // CONFIG.num_key_heads
    shape = values.shape
    split = values.reshape(*shape[:axis], repeat, CONFIG.num_key_heads, width, *shape[axis + 1 :])
    return np.ascontiguousarray(split.swapaxes(axis, axis + 1).reshape(shape))


def _layer(values: dict[str, Array], layer: int) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for name, array in values.items():
        stem = name.removesuffix(".weight")
        if stem in _PLAIN:
            found[_PLAIN[stem] + ".weight"] = array
        elif stem in _NORMS:
            found[_NORMS[stem] + ".weight"] = array - np.float32(1)
        elif name in _HEADS:
            target, axis, width, start = _HEADS[name]
            array = (
                np.concatenate([array[:start], _untile(array[start:], axis, width)])
                if start
                else _untile(array, axis, width)
            )
            array = np.log(-array) if name == "ssm_a" else array
            found[target] = array[:, None, :] if name.startswith("ssm_conv1d") else array
    found["mlp.experts.gate_up_proj"] = np.concatenate(
        [values["ffn_gate_exps.weight"], values["ffn_up_exps.weight"]], axis=1
    )
    found["mlp.experts.down_proj"] = values["ffn_down_exps.weight"]
    return {f"model.layers.{layer}.{name}": array for name, array in found.items()}


def hf_tensors() -> dict[str, Array]:
    """All parameters under transformers' names; BF16 as uint16."""
    stored: dict[str, Array] = {}
    for tensor in gguf.GGUFReader(embedded_model()).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        bf16 = tensor.tensor_type == gguf.GGMLQuantizationType.BF16
        stored[tensor.name] = np.array(tensor.data).view(np.uint16 if bf16 else np.float32).reshape(shape)
    found = {
        "model.embed_tokens.weight": stored["token_embd.weight"],
        "model.norm.weight": stored["output_norm.weight"] - np.float32(1),
    }
    for layer in range(CONFIG.num_layers):
        prefix = f"blk.{layer}."
        found |= _layer({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}, layer)
    return found


def hf_config() -> dict[str, Any]:
    """config.json of the same model."""
    c = CONFIG
    full = [c.is_full_attention(layer) for layer in range(c.num_layers)]
    return {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "dtype": "bfloat16",
        "full_attention_interval": c.full_attention_interval,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "layer_types": ["full_attention" if is_full else "linear_attention" for is_full in full],
        "linear_conv_kernel_dim": c.conv_kernel,
        "linear_key_head_dim": c.linear_head_dim,
        "linear_num_key_heads": c.num_key_heads,
        "linear_num_value_heads": c.num_value_heads,
        "linear_value_head_dim": c.linear_head_dim,
        "max_position_embeddings": c.context_length,
        "moe_intermediate_size": c.expert_size,
        "num_attention_heads": c.num_heads,
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.num_experts_used,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "rms_norm_eps": c.rms_eps,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": list(c.rope_sections[:3]),
            "partial_rotary_factor": c.rotary_dim / c.head_dim,
            "rope_theta": c.rope_theta,
            "rope_type": "default",
        },
        "shared_expert_intermediate_size": c.shared_expert_size,
        "tie_word_embeddings": True,
        "vocab_size": c.vocab_size,
    }


def _tokenizer() -> tuple[dict[str, Any], dict[str, Any]]:
    fields = gguf.GGUFReader(embedded_model()).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = [text.split(" ", 1) for text in fields["tokenizer.ggml.merges"].contents()]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": REGEX}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags}
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == gguf.TokenType.CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[0],
        "eos_token": tokens[0],
        "pad_token": tokens[0],
        "add_bos_token": False,
        "chat_template": fields["tokenizer.chat_template"].contents(),
    }
    return document, settings


def write_checkpoint(folder: Path, *, shards: int = 2) -> Path:
    """The whole directory, with an index when there are several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = hf_tensors()
    names = list(tensors)
    index: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_safetensors(folder / file, {name: tensors[name] for name in part})
        index |= dict.fromkeys(part, file)
    if shards > 1:
        total = sum(values.nbytes for values in tensors.values())
        document = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    tokenizer, settings = _tokenizer()
    for name, document in (
        ("config.json", hf_config()),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", settings),
    ):
        (folder / name).write_text(json.dumps(document))
    return folder
