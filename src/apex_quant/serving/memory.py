"""What the installed library itself says that a model would take: KV cache, recurrent state and compute buffers.

    library_memory("MODEL.gguf", [MemoryQuestion(ctx=32768, type_k="q8_0", type_v="q8_0")])

No weight is read and none is allocated; a model of any size takes about a second.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apex_quant.native.worker import run_in_child

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryQuestion:
    """One context: `ctx` tokens for each of `sequences`."""

    ctx: int
    type_k: str = "f16"
    type_v: str = "f16"
    sequences: int = 1
    ubatch: int = 512
    unified: bool = False
    swa_full: bool = False
    flash_attention: str = "auto"


@dataclass(frozen=True, slots=True)
class LibraryMemory:
    """The library's answer, in MiB as its log prints them (to 0.01). `memory`: one entry for each cache, with the keys
    of kv_types.CacheSize; `compute` and `output` by buffer name."""

    memory: tuple[dict[str, Any], ...]
    compute: dict[str, float]
    output: dict[str, float]

    @property
    def kv_mib(self) -> float:
        """All caches and states."""
        return sum(float(one["mib"]) for one in self.memory)

    @property
    def compute_bytes(self) -> int:
        """Compute and output buffers of all devices, to 0.01 MiB each."""
        return round(MIB * (sum(self.compute.values()) + sum(self.output.values())))


def library_memory(
    model: str | os.PathLike[str],
    questions: Sequence[MemoryQuestion],
    *,
    gpu_layers: int = 0,
    overrides: Sequence[tuple[str, str]] = (),
) -> list[LibraryMemory]:
    """Answers in the order of the questions. Raises InputError for a model that the library cannot load,
    ResourceError for a context that it refuses or where the library is missing, NativeError when it aborts."""
    payload = {
        "path": str(Path(model)),
        "gpu_layers": gpu_layers,
        "overrides": [list(pair) for pair in overrides],
        "contexts": [asdict(one) for one in questions],
    }
    answer = run_in_child(
        "apex_quant.serving.memory_job:measure", payload, lambda _: None, step=f"measuring {Path(model).name}"
    )
    return [
        LibraryMemory(tuple(one["memory"]), dict(one["compute"]), dict(one["output"])) for one in answer["contexts"]
    ]
