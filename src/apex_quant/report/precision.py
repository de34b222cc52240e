"""Which type each tensor of a file has: by tensor, and as a map of layers and roles.

Read from the GGUF's header, or from what `apex plan --json` said of it; never from the weights.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from apex_quant.errors import ApexError, InputError
from apex_quant.evaluation.pertoken import read_bounded
from apex_quant.gguf import ggml_type, open_model
from apex_quant.model.inspect import inspect
from apex_quant.model.patterns import Role

ROLES: Final = tuple(role.value for role in Role)
_MAX_PLAN = 64 << 20
_MAX_TENSORS = 100_000


@dataclass(frozen=True)
class Tensor:
    """One tensor; `shape` in ggml order (row length first), `layer` None outside the blocks."""

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    type: str
    bytes: int

    @property
    def weights(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.bytes / self.weights if self.weights else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape), "bits": round(self.bits, 4)}


@dataclass(frozen=True)
class Cell:
    """All tensors of a role in a layer: bits per weight over them, types by falling bytes."""

    layer: int | None
    role: str
    bits: float
    bytes: int
    types: tuple[str, ...]
    tensors: int


@dataclass(frozen=True)
class PrecisionMap:
    """`cells` by layer and role; `layers` and `roles` in the order of a map's rows and columns (None: no layer).

    `source`: the file it was read from.
    """

    source: str
    layers: tuple[int | None, ...]
    roles: tuple[str, ...]
    cells: tuple[Cell, ...]
    tensors: tuple[Tensor, ...]

    def to_json(self, *, tensors: bool = True) -> dict[str, Any]:
        made = {
            "source": self.source,
            "layers": list(self.layers),
            "roles": list(self.roles),
            "cells": [asdict(cell) for cell in self.cells],
        }
        return made | ({"tensors": [tensor.to_json() for tensor in self.tensors]} if tensors else {})


def from_gguf(path: Path) -> PrecisionMap:
    """Of a GGUF file or any shard of one, from its header. Raises InputError."""
    with open_model(path) as model:
        report = inspect(model, tensors=True)
    tensors = [
        Tensor(one.name, one.role.value, one.layer, tuple(one.shape), one.type, one.bytes)
        for one in report.tensors or ()
    ]
    return precision_map(path.name, tensors)


def from_plan(path: Path) -> PrecisionMap:
    """Of a document of `apex plan --json`. Raises InputError."""
    try:
        document = json.loads(read_bounded(path, _MAX_PLAN, "the plan"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a whole JSON document: {error}") from None
    rows = document.get("tensors") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not rows or len(rows) > _MAX_TENSORS:
        raise InputError(f"{path}: not a plan: no list of tensors")
    return precision_map(path.name, [_planned(row, path) for row in rows])


def _planned(row: Any, path: Path) -> Tensor:
    try:
        name, role, layer, shape, kind, size = (row[k] for k in ("name", "role", "layer", "shape", "type", "bytes"))
        if not (isinstance(name, str) and role in ROLES and (layer is None or (type(layer) is int and layer >= 0))):
            raise ValueError
        if not (isinstance(shape, list) and all(type(side) is int and 0 < side < 1 << 40 for side in shape)):
            raise ValueError
        if type(size) is not int or not 0 <= size < 1 << 62:
            raise ValueError
        return Tensor(name, role, layer, tuple(shape), ggml_type(kind).name, size)
    except (KeyError, TypeError, ValueError, ApexError):
        raise InputError(f"{path}: not a plan: a tensor lacks its name, role, layer, shape, type or bytes") from None


def precision_map(source: str, tensors: Sequence[Tensor]) -> PrecisionMap:
    """The map of these tensors: roles in the order of the table, layers by number with None last."""
    groups: dict[tuple[int | None, str], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.layer, tensor.role].append(tensor)
    layers = sorted({layer for layer, _ in groups if layer is not None})
    rows: list[int | None] = [*layers, *([None] if any(layer is None for layer, _ in groups) else [])]
    roles = [role for role in ROLES if any(role == known for _, known in groups)]
    cells = [_cell(layer, role, groups[layer, role]) for layer in rows for role in roles if (layer, role) in groups]
    return PrecisionMap(source, tuple(rows), tuple(roles), tuple(cells), tuple(tensors))


def _cell(layer: int | None, role: str, members: Sequence[Tensor]) -> Cell:
    size, weights = sum(one.bytes for one in members), sum(one.weights for one in members)
    by_type: Mapping[str, int] = _bytes_by_type(members)
    types = tuple(sorted(by_type, key=lambda name: (-by_type[name], name)))
    return Cell(layer, role, round(8 * size / weights, 4) if weights else 0.0, size, types, len(members))


def _bytes_by_type(members: Sequence[Tensor]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for one in members:
        found[one.type] += one.bytes
    return found
