"""Shape of the embedded model and the file names its build steps share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

DOMAINS: tuple[str, ...] = ("code", "dialogue", "docs", "prose")
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS: tuple[str, ...] = (END_OF_TEXT, TURN_START, TURN_END)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a hybrid mixture-of-experts model of the qwen35moe family.

    The defaults are the embedded model. Every matrix row length is a multiple of 256, so that
    every llama.cpp quantization type applies to it; six experts avoid the special case that
    llama.cpp's mixes make of exactly eight.
    """

    vocab_size: int = 10240
    hidden_size: int = 256
    num_layers: int = 12
    full_attention_interval: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 100_000.0
    rotary_dim: int = 32
    rope_sections: tuple[int, int, int, int] = (6, 5, 5, 0)
    conv_kernel: int = 4
    linear_head_dim: int = 64
    num_key_heads: int = 4
    num_value_heads: int = 8
    num_experts: int = 6
    num_experts_used: int = 2
    expert_size: int = 256
    shared_expert_size: int = 256
    rms_eps: float = 1e-6
    context_length: int = 2048

    @property
    def key_width(self) -> int:
        """Width of all linear-attention keys (and of all queries) together."""
        return self.num_key_heads * self.linear_head_dim

    @property
    def value_width(self) -> int:
        """Width of all linear-attention values together."""
        return self.num_value_heads * self.linear_head_dim

    def is_full_attention(self, layer: int) -> bool:
        """Whether the layer has softmax attention (every n-th does) instead of a delta rule."""
        return (layer + 1) % self.full_attention_interval == 0

    def to_dict(self) -> dict[str, Any]:
        """The shape as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The shape that :meth:`to_dict` wrote."""
        return cls(**{**values, "rope_sections": tuple(values["rope_sections"])})
