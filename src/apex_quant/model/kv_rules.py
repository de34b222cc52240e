"""Which layers of an architecture remember what: sliding windows, recurrent layers and latent attention, as tables.

The facts are those of llama.cpp's `load_arch_hparams` and `create_memory` (vendored with llama-cpp-python 0.3.36).
An architecture without a row is dense attention in every trunk layer. A new architecture is a new row and a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Recurrent = Literal["no_kv_heads", "no_kv_heads_in_trunk", "no_kv_heads_nor_ff", "interval", "all", "both"]
"""How llama.cpp tells recurrent layers: those without KV heads; the same, where blocks for next-token prediction hold
nothing; those without KV heads and feed-forward; a list in the metadata or every layer but each Nth; every layer; every
layer, beside attention."""


@dataclass(frozen=True, slots=True)
class Sliding:
    """Windowed attention. A layer is windowed where `layer % period` < period - 1, or > 0 with `dense_first`; the
    metadata may hold another period, or one flag a layer. `period` None: the flags must be there."""

    period: int | None
    window: int | None = None
    """Where the metadata has no window; None: then nothing is windowed."""
    dense_first: bool = False
    fixed: bool = False
    """The window of the metadata is not believed, only whether there is one: `window` is used."""
    absent_means: Literal["none", "default"] = "none"
    """What a file without a window key has."""
    layers: int | None = None
    """Only models of this many trunk layers are windowed."""


SLIDING: Final[dict[str, Sliding]] = {
    "afmoe": Sliding(4),
    "cohere2": Sliding(4),
    "cohere2moe": Sliding(4, dense_first=True),
    "dots3note": Sliding(None),
    "exaone-moe": Sliding(4, 128, absent_means="default"),
    "exaone4": Sliding(4, 4096, absent_means="default", layers=64),
    "gemma2": Sliding(2, 4096, absent_means="default"),
    "gemma3": Sliding(6),
    "gemma3n": Sliding(5),
    "gemma4": Sliding(None),
    "gpt-oss": Sliding(2),
    "granite_swa": Sliding(None),
    "laguna": Sliding(4, dense_first=True),
    "llama4": Sliding(4, 8192, fixed=True, absent_means="default"),
    "maple": Sliding(None),
    "mellum": Sliding(4),
    "mimo2": Sliding(None),
    "muse-glimmer": Sliding(4),
    "olmo2": Sliding(4),
    "plamo3": Sliding(8),
    "smallthinker": Sliding(4, 4096, dense_first=True, fixed=True),
    "spark2_5": Sliding(None),
    "step35": Sliding(None),
}
ATTENTION_WINDOWED: Final = frozenset({"lfm2"})
"""With a window, every layer that is not recurrent has it."""

RECURRENT: Final[dict[str, Recurrent]] = {
    "arwkv7": "all",
    "bailingmoe3": "no_kv_heads",
    "falcon-h1": "both",
    "glm5-next": "no_kv_heads_in_trunk",
    "granitehybrid": "no_kv_heads",
    "jamba": "no_kv_heads",
    "kimi-k3": "no_kv_heads",
    "kimi-linear": "no_kv_heads",
    "lfm2": "no_kv_heads",
    "lfm2moe": "no_kv_heads",
    "mamba": "all",
    "mamba2": "all",
    "minimax-01": "interval",
    "nemotron_h": "no_kv_heads_nor_ff",
    "nemotron_h_moe": "no_kv_heads_nor_ff",
    "plamo2": "no_kv_heads",
    "qwen35": "interval",
    "qwen35moe": "interval",
    "qwen3next": "interval",
    "qwen4exp": "interval",
    "rwkv6": "all",
    "rwkv6qwen2": "all",
    "rwkv7": "all",
}
INTERVAL: Final = {"minimax-01": 8}
"""Every Nth layer is full attention where the metadata does not say; 4 elsewhere."""
NO_STATE_GROUPS: Final = frozenset(
    {"mamba", "jamba", "bailingmoe3", "glm5-next", "kimi-linear", "kimi-k3", "minimax-01"}
)
"""Recurrent architectures whose loader does not read ssm.group_count."""
LINEAR_STATE: Final = frozenset({"minimax-01"})
"""The recurrent state is key length squared for each head."""

LATENT: Final = frozenset(
    [
        "bailingmoe3",
        "deepseek2",
        "deepseek32",
        "dots3note",
        "glm-dsa",
        "glm5-next",
        "hy_v4",
        "kimi-k3",
        "kimi-linear",
        "mistral4",
    ]
)
"""Latent attention (MLA) where attention.key_length_mla and value_length_mla are set: keys only, no values."""
INDEXED: Final = frozenset({"deepseek32", "dots3note", "glm-dsa", "glm5-next", "hy_v4", "qwen4exp"})
"""A second cache of keys beside the other in layers that attend: one head of attention.indexer.key_length, three (key,
gate and pool) with attention.indexer.kpool."""
INDEXED_BY_TYPE: Final = frozenset({"dots3note", "glm-dsa", "glm5-next", "hy_v4"})
"""Only in layers that attention.indexer.types names, where it is there."""

NO_MEMORY: Final = frozenset(
    [
        "bert",
        "dream",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "llada",
        "llada-moe",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "rnd1",
        "wavtokenizer-dec",
    ]
)
"""Architectures that see the whole text at once and keep nothing."""

FIRST_LAYERS_ONLY: Final = {"gemma3n": 20}
"""Only so many layers at the start have a cache; later ones reuse theirs."""
SHARED_AT_END: Final = frozenset({"gemma4"})
"""attention.shared_kv_layers at the end reuse the caches of earlier layers."""

UNCOUNTED: Final[dict[str, str]] = {
    "deepseek4": "its compressed caches are not counted",
    "dflash": "its caches are views of another model's",
    "eagle3": "its cache belongs to a draft of another model",
    "gemma4-assistant": "its caches are views of another model's",
    "graniteswitch": "the cache of its router layer is not counted",
    "minimax-m3": "its indexer's cache is not counted",
    "t5": "attention to the encoder's output is not counted",
}
"""Architectures for which the sum is an estimate, and why."""
UNCOUNTED_WITH: Final = {"qwen4exp": ("ple.layers", "the history of its n-gram embeddings is not counted")}
"""The same, of files that have this key."""

FORK_TYPES: Final = {"turbo2": (128, 34), "turbo3": (128, 50), "turbo4": (128, 66)}
"""Cache types that forks of llama.cpp have and stock llama.cpp has not: values and bytes of a block."""
