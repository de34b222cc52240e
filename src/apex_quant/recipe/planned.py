"""What a plan is: one output decided tensor by tensor, and what may be asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apex_quant.gguf import GGMLType, Layout
from apex_quant.model import TensorRole, ZoneRule
from apex_quant.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the output. `source` is its name in the source (layers may be pruned and renumbered)."""

    name: str
    source: str
    role: TensorRole
    shape: tuple[int, ...]
    source_type: GGMLType
    type: GGMLType
    wanted: GGMLType
    nbytes: int
    why: str

    @property
    def fallback_from(self) -> str | None:
        """The type the recipe asked for, where the row length does not allow it."""
        return self.wanted.name if self.wanted is not self.type else None

    @property
    def kept(self) -> bool:
        """Whether it stays at the source's type because llama.cpp never quantizes it."""
        return self.why.startswith("kept")

    @property
    def weights(self) -> int:
        n = 1
        for dim in self.shape:
            n *= dim
        return n

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "role": str(self.role.role),
            "layer": self.role.layer,
            "shape": list(self.shape),
            "type": self.type.name,
            "bytes": self.nbytes,
            "fallback_from": self.fallback_from,
            "source_type": self.source_type.name,
            "why": self.why,
        }


@dataclass(frozen=True)
class Plan:
    """One output file (or set of shards), decided in full. Made by `plan`.

    `prior` is how thinly covered experts are filled (importance/fill.py), 'none' without a matrix as well.
    """

    model: str
    title: str
    tier: str
    file_type: int
    zones: ZoneRule | None
    recipe: Recipe
    tensors: tuple[PlannedTensor, ...] = field(repr=False)
    layouts: tuple[Layout, ...] = field(repr=False)
    groups: tuple[int, ...] = field(repr=False)
    importance: bool
    prior: str
    needs_importance: bool
    missing_importance: tuple[str, ...]
    requantized: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Size of the finished file, or of all shards together."""
        return sum(part.total_bytes for part in self.layouts)

    @property
    def tensor_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors, as llama-quantize prints it."""
        return self.tensor_bytes * 8 / max(1, sum(t.weights for t in self.tensors))

    @property
    def file_name(self) -> str:
        """MODEL-APEX-I-Quality.gguf; without the .gguf for shards, which llama.cpp numbers itself."""
        return f"{self.model}-{self.title}.gguf"

    def to_json(self) -> dict[str, Any]:
        """The machine-readable form (docs/json.md)."""
        return {
            "model": self.model,
            "tier": self.tier,
            "total_bytes": self.total_bytes,
            "bpw": self.bpw,
            "base": self.recipe.base,
            "zones": str(self.zones) if self.zones else None,
            "file_name": self.file_name,
            "shards": len(self.layouts),
            "importance": self.importance,
            "recipe_sha256": self.recipe.sha256,
            "tensors": [t.to_json() for t in self.tensors],
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class PlanOptions:
    """What may be asked of a plan beyond the tier; the names are those of the command's flags.

    `fill`: 'prior' shrinks thinly covered experts' importance towards their tensor's mean over experts, 'none' takes
    the matrix as it is, which is what llama-quantize does.
    """

    recipe: Path | None = None
    like: Path | None = None
    override: Sequence[str] = ()
    cell: Sequence[str] = ()
    published: bool = False
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    leave_output_tensor: bool = False
    pure: bool = False
    override_kv: Sequence[str] = ()
    prune_layers: Sequence[int] = ()
    split_max_size: int | None = None
    keep_split: bool = False
    allow_requantize: bool = False
    fill: str = "prior"
