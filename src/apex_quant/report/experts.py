"""Which experts calibration reached, from an importance matrix: tokens of each expert by layer."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from apex_quant.gguf import open_model

FLOOR: Final = 64  # tokens below which an expert's importance says little, as apex calibrate has it
_COUNTS = re.compile(r"blk\.(\d{1,5})\.ffn_(down|gate|up|gate_up)_exps\.weight\.counts", re.ASCII)
_ORDER = ("down", "gate_up", "up", "gate")
_MOST_EXPERTS = 1 << 16


@dataclass(frozen=True)
class ExpertUse:
    """Of one layer: tokens that the router gave to each expert; `uncovered` are those under the floor."""

    layer: int
    tokens: tuple[int, ...]
    uncovered: tuple[int, ...]


@dataclass(frozen=True)
class Coverage:
    """Of one importance matrix: `source` its file name, `floor` the tokens an expert should have."""

    source: str
    floor: int
    layers: tuple[ExpertUse, ...]
    chunks: int | None
    datasets: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def coverage(path: Path) -> Coverage | None:
    """Of an importance matrix in GGUF form; None for other files and for models without experts. Raises InputError."""
    with open_model(path) as model:
        if model.get("general.type") != "imatrix":
            return None
        found: dict[int, dict[str, Any]] = {}
        for name, info in model.tensors.items():
            place = _COUNTS.fullmatch(name)
            if place and info.type.name == "F32" and 1 < info.n_elements <= _MOST_EXPERTS:
                found.setdefault(int(place[1]), {})[place[2]] = info
        layers = []
        for layer, parts in sorted(found.items()):
            info = next(parts[part] for part in _ORDER if part in parts)
            counts = np.nan_to_num(np.frombuffer(model.read(info), "<f4"), posinf=0, neginf=0)
            tokens = [round(float(count)) for count in counts]
            thin = [expert for expert, count in enumerate(tokens) if count < FLOOR]
            layers.append(ExpertUse(layer, tuple(tokens), tuple(thin)))
        chunks, datasets = model.get("imatrix.chunk_count"), model.get("imatrix.datasets")
    names = tuple(str(name)[:200] for name in datasets) if isinstance(datasets, tuple) else ()
    return (
        Coverage(path.name, FLOOR, tuple(layers), chunks if isinstance(chunks, int) else None, names)
        if layers
        else None
    )
