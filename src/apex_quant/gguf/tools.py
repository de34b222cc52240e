"""split and merge: the same tensors in other files, copied through one bounded buffer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from apex_quant.errors import UsageError
from apex_quant.gguf.atomic import AtomicFile, require_space
from apex_quant.gguf.reader import SHARD_NAME, GGUFModel, open_model, shard_name
from apex_quant.gguf.writer import Layout, layout, shard_layouts

Progress = Callable[[int, int], None]  # bytes done, bytes in all
COPY_BYTES = 8 << 20


def split(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    max_bytes: int,
    progress: Progress | None = None,
    *,
    force: bool = False,
) -> list[Path]:
    """Copies a model into shards `out`-0000i-of-0000N.gguf of at most `max_bytes` tensor bytes each; where `out` is a
    folder, into it, named as the model.

    Cuts where llama-gguf-split --split-max-size does; a tensor larger than that has a shard of its own.
    Returns the paths. UsageError when one exists and `force` is not set; ResourceError for a full disk.
    """
    if max_bytes < 1:
        raise UsageError(f"a shard size of {max_bytes} bytes: must be at least 1")
    with open_model(source) as model:
        named = SHARD_NAME.fullmatch(model.path.name)  # a shard's name goes on as the whole model's
        own = named["prefix"] if named else model.path.name
        prefix = os.fspath(Path(out) / own if Path(out).is_dir() else out).removesuffix(".gguf")
        layouts = shard_layouts(model.metadata, list(model.tensors.values()), max_bytes)
        targets = [Path(shard_name(prefix, i, len(layouts))) for i in range(len(layouts))]
        _copy(model, layouts, targets, progress, force)
    return targets


def merge(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    progress: Progress | None = None,
    *,
    force: bool = False,
) -> Path:
    """Copies a model, given by any of its shards, into the one file `out`. Errors as split()."""
    with open_model(source) as model:
        _copy(model, [layout(model.metadata, list(model.tensors.values()))], [Path(out)], progress, force)
    return Path(out)


def _copy(
    model: GGUFModel,
    layouts: Sequence[Layout],
    targets: Sequence[Path],
    progress: Progress | None,
    force: bool,
) -> None:
    existing = [target for target in targets if target.exists()]
    if existing and not force:
        raise UsageError(f"{existing[0]} exists already", hint="choose another name or use --force")
    total = sum(plan.total_bytes for plan in layouts)
    require_space(targets[0], total)
    buffer = memoryview(bytearray(COPY_BYTES))
    outputs: list[AtomicFile] = []
    done = 0
    try:
        for plan, target in zip(layouts, targets, strict=True):
            output = AtomicFile(target)
            outputs.append(output)
            output.truncate(plan.total_bytes)  # the padding between tensors is never written: zeros
            output.pwrite(plan.header, 0)
            done += plan.data_start
            for name, offset in plan.offsets.items():
                info = model.tensors[name]
                for start in range(0, info.nbytes, COPY_BYTES):
                    part = buffer[: min(COPY_BYTES, info.nbytes - start)]
                    model.read_into(info, start, part)
                    output.pwrite(part, offset + start)
                    done += len(part)
                    if progress is not None:
                        progress(done, total)
            output.sync()
        for output in outputs:
            output.commit()
    finally:
        for output in outputs:
            output.abandon()  # only what was not committed
    if progress is not None:
        progress(total, total)
