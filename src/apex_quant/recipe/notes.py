"""What a plan warns of: everything in it that its user did not ask for by name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from apex_quant.gguf import TensorInfo
from apex_quant.importance import Importance
from apex_quant.model import Role
from apex_quant.recipe.planned import PlannedTensor


def type_notes(tensors: Sequence[PlannedTensor], missing: Sequence[str], *, allow_requantize: bool) -> list[str]:
    """Fallback types, types that need importance and have none (`missing`), experts kept in FP4."""
    notes = []
    fallen = [t for t in tensors if t.fallback_from]
    if fallen:
        size = sum(t.nbytes for t in fallen)
        pairs = Counter(f"{t.fallback_from} -> {t.type.name}" for t in fallen)
        notes.append(
            f"{len(fallen)} tensors ({size / 1e6:.1f} MB) take a fallback type because their rows are not a "
            "multiple of the block: " + ", ".join(f"{pair} ({n})" for pair, n in pairs.most_common())
        )
    if missing:
        notes.append(f"{len(missing)} tensors need an importance matrix and have none: {listed(missing, 3)}")
    fp4 = [t for t in tensors if t.source_type.kind == "fp4" and t.type is t.source_type and not t.kept]
    if fp4 and not allow_requantize:
        notes.append(
            f"{len(fp4)} tensors that the source has in {fp4[0].type} are kept as they are "
            "(--allow-requantize encodes them again)"
        )
    return notes


def tier_notes(tensors: Sequence[PlannedTensor], *, is_moe: bool, published: bool) -> list[str]:
    """Where a tier's columns do not say it all: towers, dense models, unknown tensors, holes of the old files."""
    if published:
        unnamed = [t.name for t in tensors if t.why == "mix" and t.role.layer is not None]
        no_line = f"{len(unnamed)} tensors have no line in the published files and follow the base mix: "
        return [no_line + listed(unnamed, 3)] if unnamed else []
    notes = []
    towers = [t for t in tensors if t.role.role is Role.projector and t.type is t.source_type and not t.kept]
    if towers:
        notes.append(f"{len(towers)} tensors of vision or audio towers are kept as they are")
    if not is_moe and any(t.role.role is Role.dense_ffn for t in tensors):
        notes.append("a dense model: its feed-forwards follow the routed-expert column")
    other = [t.name for t in tensors if t.role.role is Role.other and not t.kept]
    if other:
        notes.append(f"{len(other)} tensors of unknown role follow the base mix: {listed(other, 3)}")
    return notes


def importance_notes(
    tensors: Sequence[PlannedTensor], sources: Mapping[str, TensorInfo], importance: Importance
) -> list[str]:
    """Tensors and experts the matrix has nothing for. Raises InputError where it was made for other shapes."""
    without, experts = [], {}
    for t in tensors:
        if t.type is t.source_type or t.type.imatrix == "unused":
            continue
        source = sources[t.name]
        name = importance.find(source.name)
        entry = importance.entries[name] if name is not None else None
        if entry is None or (
            # for_tensor refuses sizes that do not fit, unless stock forgives them
            entry.size != math.prod((t.shape[0], *t.shape[2:3])) and importance.for_tensor(source) is None
        ):
            without.append(t.name)
            continue
        rows = [i for i, count in enumerate(entry.counts) if count == 0]
        if rows:
            experts[t.name] = rows
    notes = []
    if without:
        notes.append(f"{len(without)} quantized tensors have no importance: {listed(without, 4)}")
    if experts:
        notes.append(
            f"{sum(map(len, experts.values()))} expert matrices in {len(experts)} tensors had no calibration "
            "tokens and are encoded unweighted: "
            + listed([f"{name}: {rows}" for name, rows in experts.items()], 4, separator="; ")
        )
    return notes


def listed(names: Sequence[str], most: int, *, separator: str = ", ") -> str:
    """The first names, and a mark that there are more."""
    return separator.join(names[:most]) + (f"{separator}..." if len(names) > most else "")
