"""Writing a matrix in the form that its file name asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_quant.errors import UsageError
from apex_quant.importance.imatrix import Importance


@dataclass(frozen=True)
class Saved:
    """A written matrix; `warnings` name what it does not hold or say."""

    path: Path
    bytes: int
    sha256: str
    entries: int
    chunk_count: int
    prior: str | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path), "warnings": list(self.warnings)}


def save(importance: Importance, path: str | Path, *, force: bool = False) -> Saved:
    """Write `path` in legacy form when it ends in .dat, else (.gguf) as GGUF; whole or not at all.

    Raises UsageError for another suffix, and when the file exists and `force` is not set.
    """
    path = check_target(path, force=force)
    legacy = path.suffix == ".dat"
    sha256 = importance.write_dat(path) if legacy else importance.write(path)
    return Saved(
        path=path,
        bytes=path.stat().st_size,
        sha256=sha256,
        entries=len(importance.entries),
        chunk_count=importance.chunk_count,
        prior=importance.prior,
        warnings=tuple(_lost(importance) if legacy else ()),
    )


def convert(source: str | Path, path: str | Path, *, force: bool = False) -> Saved:
    """Write `source` (either form) in the form that the suffix of `path` names. Raises as `save`, and InputError."""
    check_target(path, force=force)
    with Importance.read(source) as importance:
        return save(importance, path, force=force)


def check_target(path: str | Path, *, force: bool) -> Path:
    """Refuse a name that cannot be written, before any work."""
    path = Path(path)
    if path.suffix not in (".gguf", ".dat"):
        raise UsageError(f"{path}: an importance matrix ends in .gguf, or in .dat for the legacy form")
    if path.exists() and not force:
        raise UsageError(f"{path} exists already", hint="choose another name or use --force")
    return path


def _lost(importance: Importance) -> list[str]:
    """What a .dat file made of this matrix does not say."""
    if importance.legacy:
        return []
    empty = [name for name, entry in importance.entries.items() if not entry.counts.any()]
    rows = sum(entry.n_mat > 1 for entry in importance.entries.values())
    losses = (
        (rows, f"token counts per expert of {rows} entries"),
        (empty, f"{len(empty)} entries without data"),
        (importance.extras, f"{len(importance.extras)} extra tensors"),
        (importance.prior, f"the mark that it is filled ({importance.prior})"),
        (importance.datasets[1:], f"all but the last of {len(importance.datasets)} dataset names"),
    )
    return [f"the legacy form does not hold {text}" for found, text in losses if found]
