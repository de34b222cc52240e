"""Saving, splitting and loading of trained weights (safetensors, BF16) and of training states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import ModelConfig

PART_BYTES = 16_000_000


def save_weights(path: Path, parameters: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Write the parameters rounded to BF16, with the shape in the file's metadata."""
    rounded = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in parameters.items()}
    save_file(rounded, str(path), metadata={"format": "pt", "config": json.dumps(config.to_dict(), sort_keys=True)})


def load_weights(path: Path, device: str = "cpu") -> tuple[ModelConfig, dict[str, Tensor]]:
    """The shape and the parameters, widened to float32."""
    with safe_open(str(path), framework="pt") as file:
        config = ModelConfig.from_dict(json.loads(file.metadata()["config"]))
        return config, {name: file.get_tensor(name).float().to(device) for name in sorted(file.keys())}


def split_file(path: Path, folder: Path, size: int = PART_BYTES) -> list[Path]:
    """Cut a file into ``NAME.part0`` and so on, for transports that limit the size of a file."""
    data = path.read_bytes()
    parts = []
    for number, start in enumerate(range(0, len(data), size)):
        part = folder / f"{path.name}.part{number}"
        part.write_bytes(data[start : start + size])
        parts.append(part)
    return parts


def join_files(parts: Iterable[Path], target: Path) -> None:
    """Undo :func:`split_file`."""
    target.write_bytes(b"".join(part.read_bytes() for part in sorted(parts)))


def file_sha256(path: Path) -> str:
    """Hex digest of a whole file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
