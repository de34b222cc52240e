"""Disk: room before a phase starts, links instead of copies, and files that have served their purpose."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

from apex_quant.errors import ResourceError, UsageError
from apex_quant.pipeline.phases import Need
from apex_quant.pipeline.state import located

_SPARE: Final = 16 << 20  # bytes left over on every file system


def require(phase: str, needs: Iterable[Need]) -> None:
    """Refuse a phase that would fill a disk. Raises ResourceError, which names the bytes."""
    by_device: dict[int, tuple[Path, int]] = {}
    for need in needs:
        if need.bytes <= 0:
            continue
        folder = next(one for one in (need.where, *need.where.absolute().parents) if one.is_dir())
        where, total = by_device.get(folder.stat().st_dev, (folder, 0))
        by_device[folder.stat().st_dev] = where, total + need.bytes
    for where, total in by_device.values():
        free = shutil.disk_usage(where).free
        if free < total + _SPARE:
            raise ResourceError(
                f"{phase}: {where}: {total + _SPARE} bytes needed, {free} free",
                hint="free some space, or give another --work folder; what is finished is kept",
            )


def link(source: Path, target: Path) -> Path:
    """The same file under another name: a hard link, or a copy on another file system. Raises ResourceError."""
    source = source.resolve()
    partial = target.with_name(f".{target.name}.linking")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and target.samefile(source):
            return target
        partial.unlink(missing_ok=True)
        try:
            partial.hardlink_to(source)
        except OSError:
            require("link", [Need(target.parent, source.stat().st_size)])
            shutil.copyfile(source, partial)
        partial.replace(target)
    except OSError as error:
        raise ResourceError(f"{target}: cannot be made of {source}: {error.strerror}") from None
    return target


def symlink(source: Path, target: Path) -> Path:
    """The same file under another name, for reading only: a hard link where that is possible, else a symbolic one."""
    if target.exists() and target.samefile(source):
        return target
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        target.symlink_to(source.resolve())
    return target


def clear(work: Path, path: Path, *, keep: Collection[Path] = ()) -> None:
    """Delete what a run made at `path`, with everything that begins with this name and a dot: journals, states,
    notes. Files in `keep` (as located() has them) stay. Only below WORK; UsageError for anything else."""
    path, work = located(path), work.resolve()
    if not path.is_relative_to(work) or path == work:
        raise UsageError(f"{path} does not lie in {work}: nothing is deleted there")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path not in keep:
        path.unlink(missing_ok=True)
    if path.parent.is_dir():
        for other in path.parent.iterdir():
            if other.name.startswith(f"{path.name}.") and other.is_file() and other not in keep:
                other.unlink(missing_ok=True)
