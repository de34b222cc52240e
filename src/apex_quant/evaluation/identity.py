"""What identifies a model file: a hash of all its bytes for results, one of samples for resuming."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from apex_quant.errors import InputError
from apex_quant.gguf import GGUFModel

_SAMPLES, _SAMPLE_BYTES = 64, 4096
_READ = 4 << 20


class Identity(NamedTuple):
    """`sha256` of the file, or of all shards' bytes in their order; `bytes` of them; `bpw` over all weights."""

    sha256: str
    bytes: int
    bpw: float


def identity(model: GGUFModel) -> Identity:
    """Reads everything once. Raises InputError."""
    digest, size = hashlib.sha256(), 0
    for file in model.files:
        try:
            with Path(file.path).open("rb") as data:
                while part := data.read(_READ):
                    digest.update(part)
                    size += len(part)
        except OSError as error:
            raise InputError(f"{file.path}: cannot be read: {error.strerror}") from None
    weights = sum(info.n_elements for info in model.tensors.values())
    data_bytes = sum(info.nbytes for info in model.tensors.values())
    return Identity(digest.hexdigest(), size, round(8 * data_bytes / max(weights, 1), 4))


def sampled(model: GGUFModel) -> str:
    """A hash of the sizes and of samples of all files: enough to notice that a file is another one."""
    digest = hashlib.sha256()
    for file in model.files:
        path = Path(file.path)
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as data:
            for number in range(_SAMPLES):
                data.seek(size * number // _SAMPLES)
                digest.update(data.read(_SAMPLE_BYTES))
    return digest.hexdigest()
