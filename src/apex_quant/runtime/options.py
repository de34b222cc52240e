"""How a model is loaded and run: what a session needs to know, checked before anything is loaded.

SessionOptions(threads=4, gpu_layers=99, cpu_experts=True, ctx=512, sequences=4)
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from apex_quant.gguf.types import CacheType

# llama.cpp's own pattern for routed experts (LLM_FFN_EXPS_REGEX of common/common.h)
EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"


class SessionOptions(BaseModel):
    """Defaults run on the CPU with llama-imatrix's batching: 4 sequences of 512 tokens, 512 tokens at a time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threads: int | None = Field(default=None, ge=1, le=1024)  # None: all processors this process may use
    gpu_layers: int = Field(default=0, ge=-1)  # -1: all
    tensor_split: tuple[float, ...] = ()  # shares of the GPUs
    mmap: bool = True
    cpu_experts: bool = False  # routed experts stay in main memory whatever gpu_layers says
    tensor_buffers: tuple[str, ...] = ()  # REGEX=BUFFER, as llama.cpp's --override-tensor; first match wins
    repack: bool = True  # weights may be rearranged for the processor at load
    ctx: int = Field(default=512, ge=16, le=1 << 24)  # tokens of one sequence
    sequences: int = Field(default=4, ge=1, le=256)  # decoded side by side
    ubatch: int = Field(default=512, ge=16)  # tokens computed together
    decode_tokens: int | None = Field(default=None, ge=1)  # most tokens of one decode; None: ctx * sequences
    unified: bool = False  # one memory for all sequences, so that a token may belong to several
    embeddings: bool = False  # also keep what the output matrix is multiplied with
    type_k: CacheType = "f16"  # of the attention's memory
    type_v: CacheType = "f16"
    flash_attention: Literal["auto", "on", "off"] = "auto"

    @field_validator("tensor_buffers")
    @classmethod
    def _patterns(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for one in given:
            pattern, _, buffer = one.rpartition("=")
            if not pattern or not buffer:
                raise ValueError(f"{one!r} is not of the form REGEX=BUFFER, such as exps=CPU")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return given

    @property
    def capacity(self) -> int:
        """Tokens that all sequences have room for together."""
        return self.ctx * self.sequences

    @property
    def batch(self) -> int:
        """Most tokens of one decode."""
        return min(self.capacity, self.decode_tokens or self.capacity)

    def buffer_overrides(self) -> list[tuple[str, str]]:
        """(pattern, buffer name) in the order in which they count."""
        rows = [one.rpartition("=") for one in self.tensor_buffers]
        overrides = [(pattern, buffer) for pattern, _, buffer in rows]
        return [*overrides, (EXPERTS, "CPU")] if self.cpu_experts else overrides
