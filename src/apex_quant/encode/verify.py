"""`verify`: is this file whole, is it what it says, and does it follow from its source?

The structural part needs no library: the container is parsed with all its bounds, the data is hashed against the
hash in the header, the types against the recipe hash. Values are checked block by block. With the source, tensors
are encoded again and compared byte by byte; that also proves which importance matrix and recipe were used.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from apex_quant.encode.job import JobProgress
from apex_quant.encode.output import content_hash
from apex_quant.encode.quantize import usable_cpus
from apex_quant.encode.tasks import Task, Write, uses_importance
from apex_quant.errors import InputError, UsageError
from apex_quant.gguf import GGUFModel, TensorInfo, open_model, stock_order
from apex_quant.importance import Importance
from apex_quant.importance.fill import NO_PRIOR, parse_prior
from apex_quant.model.inspect import model_roles
from apex_quant.native import ggml, library_info, run_in_child
from apex_quant.recipe.metadata import DATA_HASH, IMATRIX_HASH, IMATRIX_PRIOR, PRUNED_LAYERS, SOURCE_HASH
from apex_quant.recipe.mixes import allows_quantization
from apex_quant.recipe.pruning import pruned_names
from apex_quant.recipe.recipe import Recipe

SAMPLE = 12
_BLOCK = 8 << 20


@dataclass(frozen=True)
class Check:
    """One question and its answer; `ok` None means it could not be asked, and `detail` says why."""

    name: str
    ok: bool | None
    detail: str


@dataclass
class Verification:
    """All checks of one file; `ok` is false as soon as one failed."""

    path: str
    checks: list[Check] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(check.ok is not False for check in self.checks)

    def add(self, name: str, ok: bool | None, detail: str) -> None:
        self.checks.append(Check(name, ok, detail))

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "ok": self.ok,
            "checks": [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in self.checks],
            "differences": self.differences,
        }


def verify(
    path: str | Path,
    *,
    source: str | Path | None = None,
    imatrix: str | Path | None = None,
    everything: bool = False,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[JobProgress], None] | None = None,
) -> Verification:
    """Check a GGUF file or set of shards; with `source`, encode a sample of tensors again (`everything`: all).

    The sample holds at least one tensor of every type in the file. Raises InputError when a file cannot be read as
    GGUF at all; whatever else is wrong is a failed check.
    """
    with ExitStack() as stack:
        model = stack.enter_context(open_model(path))
        result = Verification(str(path))
        total = sum(info.nbytes for info in model.tensors.values())
        result.add("structure", True, f"{len(model.tensors)} tensors, {total} bytes, {len(model.files)} file(s)")
        _check_size(model, result)
        _check_data(model, result, progress or (lambda _: None))
        _check_recipe(model, result)
        if source is not None:
            original = stack.enter_context(open_model(source))
            matrix = stack.enter_context(Importance.read(imatrix)) if imatrix is not None else None
            _check_against_source(model, original, matrix, imatrix, result, everything, seed, threads, progress)
        return result


def _check_size(model: GGUFModel, result: Verification) -> None:
    """Nothing may follow the last tensor but its padding."""
    for number, file in enumerate(model.files):
        ends = [info.offset + info.nbytes for info in model.tensors.values() if info.file == number]
        end = max(ends, default=file.header_bytes)
        extra = file.size - end
        ok = 0 <= extra < file.alignment
        detail = f"{file.size} bytes" if ok else f"{extra} bytes after the last tensor"
        result.add("size" if len(model.files) == 1 else f"size of shard {number + 1}", ok, detail)


def _check_data(model: GGUFModel, result: Verification, report: Callable[[JobProgress], None]) -> None:
    """One pass over all bytes: the data hash of the header and every block's values."""
    stated = model.get(DATA_HASH)
    digest = hashlib.sha256()
    bad: list[str] = []
    done, total = 0, sum(file.size for file in model.files)
    check = _value_check()
    for number, file in enumerate(model.files):
        position = file.header_bytes
        infos = [info for info in model.tensors.values() if info.file == number]
        with Path(file.path).open("rb") as raw:
            for info in sorted(infos, key=lambda info: info.offset):
                _hash_range(digest, raw.fileno(), position, info.offset)
                step = max(info.row_bytes, _BLOCK // info.row_bytes * info.row_bytes)
                for start in range(0, info.nbytes, step):
                    data = np.empty(min(step, info.nbytes - start), np.uint8)
                    model.read_into(info, start, data.data)
                    digest.update(data.data)
                    if info.name not in bad[-1:] and not check(info, data):
                        bad.append(info.name)
                    done += data.nbytes
                    report(JobProgress("verify", done, total, done, total, info.name))
                position = info.offset + info.nbytes
            _hash_range(digest, raw.fileno(), position, file.size)
    names = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
    result.add("values", not bad, f"not finite or not valid blocks: {names}" if bad else "all finite, all blocks valid")
    if not isinstance(stated, str) or not stated.strip():
        result.add("data hash", None, "the file states none (not written by apex)")
    else:
        same = stated == digest.hexdigest()
        result.add("data hash", same, stated if same else f"header says {stated}, data is {digest.hexdigest()}")


def _hash_range(digest: Any, fd: int, start: int, stop: int) -> None:
    while start < stop and (block := os.pread(fd, min(_BLOCK, stop - start), start)):
        digest.update(block)
        start += len(block)


def _value_check() -> Callable[[TensorInfo, Any], bool]:
    """Whether a run of whole rows holds valid blocks: ggml's own check, or dequantizing where it is not installed."""
    if library_info().problem is None:
        lib = ggml()

        def by_ggml(info: TensorInfo, data: Any) -> bool:
            return info.type.kind == "int" or lib.validate(info.type, data.ctypes.data, data.nbytes)

        return by_ggml

    def by_numpy(info: TensorInfo, data: Any) -> bool:
        import gguf

        if info.type.kind == "int":
            return True
        with np.errstate(over="ignore", invalid="ignore"):
            try:
                values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(info.type.id))
            except (NotImplementedError, ValueError):
                return True
            return bool(np.isfinite(values).all())

    return by_numpy


def _check_recipe(model: GGUFModel, result: Verification) -> None:
    stated, base = model.get("apex.recipe.sha256"), model.get("apex.recipe.base")
    if not isinstance(stated, str) or not isinstance(base, str):
        result.add("recipe", None, "the file states no recipe (not written by apex)")
        return
    types = {
        name: info.type
        for name, info in model.tensors.items()
        if allows_quantization(name, info.shape, model.architecture)
    }
    found = Recipe(base, types).sha256
    result.add("recipe", found == stated, stated if found == stated else f"header says {stated}, types give {found}")


def _sampled(model: GGUFModel, everything: bool, seed: int) -> list[str]:
    """Tensors to encode again: all, or one of each (role, type) and random others up to SAMPLE."""
    names = list(model.tensors)
    if everything:
        return names
    roles = model_roles(model)
    random.Random(seed).shuffle(names)
    first = {(roles[name].role, model.tensors[name].type): name for name in reversed(names)}
    chosen = list(dict.fromkeys([*first.values(), *names]))
    return chosen[: max(SAMPLE, len(first))]


def _check_against_source(
    model: GGUFModel,
    original: GGUFModel,
    matrix: Importance | None,
    imatrix: str | Path | None,
    result: Verification,
    everything: bool,
    seed: int,
    threads: int | None,
    progress: Callable[[JobProgress], None] | None,
) -> None:
    stated = model.get(IMATRIX_HASH)
    if stated is not None or matrix is not None:
        given = matrix.sha256 if matrix else None
        detail = f"the file was made with {stated}, " + (f"this one is {given}" if given else "none was given")
        result.add("imatrix", stated == given, str(stated) if stated == given else detail)
    sources = _sources(model, original)
    missing = [n for n, i in model.tensors.items() if n not in sources or sources[n].shape != i.shape]
    result.add(
        "source tensors",
        not missing,
        f"{len(missing)} are not in the source in this shape: {', '.join(missing[:3])}" if missing else "all there",
    )
    chosen = [name for name in _sampled(model, everything, seed) if name not in missing]
    # the matrix counts where the file says that one was used; a file by other tools says it in its stock keys
    weighted = matrix is not None and (stated is not None or model.get("quantize.imatrix.entries_count") is not None)
    usable = matrix if weighted else None
    without = [name for name in chosen if _lacks_importance(sources[name], model.tensors[name], usable)]
    if without:
        names = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
        result.add("importance", None, f"{len(without)} tensors cannot be encoded again without their matrix: {names}")
    chosen = [name for name in chosen if name not in without]
    tasks = [_task(sources[name], model.tensors[name], weighted) for name in chosen]
    prior = _prior(model, result) if usable is not None else NO_PRIOR
    hashes, differences = _compare(model, original, tasks, imatrix if weighted else None, prior, threads, progress)
    result.differences = _by_tensor(model, chosen, differences)
    unequal = [row["tensor"] for row in result.differences]
    result.add(
        "re-encoding",
        not unequal,
        f"{len(unequal)} of {len(chosen)} tensors differ: {', '.join(unequal[:3])}"
        if unequal
        else f"{len(chosen)} of {len(model.tensors)} tensors give the same bytes",
    )
    if everything and not missing and not without:
        rows = {}
        for name in stock_order(hashes):
            info = original.tensors[name]
            rows[name] = (info.type.name, info.shape, hashes[name])
        found, said = content_hash(rows), model.get(SOURCE_HASH)
        ok = None if said is None else said == found
        result.add("source hash", ok, found if ok is not False else f"header says {said}, the source is {found}")


def _sources(model: GGUFModel, original: GGUFModel) -> dict[str, TensorInfo]:
    """The source's tensors under the names they have in a file that may lack some of its layers."""
    try:
        layers = [int(word) for word in str(model.get(PRUNED_LAYERS)).split(",")]
        names = pruned_names(stock_order(original.tensors), layers)
    except (ValueError, UsageError):  # no such key, or not this source
        return original.tensors
    return {new: original.tensors[name] for name, new in names.items()}


def _prior(model: GGUFModel, result: Verification) -> str:
    """How the file says that its importance matrix was filled; files without a word took it as it was."""
    stated = model.get(IMATRIX_PRIOR)
    if stated is None:
        return NO_PRIOR
    try:
        parse_prior(str(stated))
    except InputError as error:
        result.add("imatrix prior", None, error.message)
        return NO_PRIOR
    result.add("imatrix prior", True, str(stated))
    return str(stated)


def _lacks_importance(source: TensorInfo, target: TensorInfo, matrix: Importance | None) -> bool:
    """Whether ggml would end the process: some encoders do when called without importance."""
    if source.type is target.type or not ggml().requires_imatrix(target.type.id):
        return False
    return matrix is None or not matrix.fits(source)


def _task(source: TensorInfo, target: TensorInfo, weighted: bool) -> Task:
    copied = source.type is target.type
    write = Write(
        target.type.name,
        weighted and not copied and uses_importance(target.type),
        [(target.file, target.offset)],
    )
    return Task(source.name, source.shape, source.type.name, [write])


def _compare(
    model: GGUFModel,
    original: GGUFModel,
    tasks: Sequence[Task],
    imatrix: str | Path | None,
    prior: str,
    threads: int | None,
    progress: Callable[[JobProgress], None] | None,
) -> tuple[dict[str, str], list[list[tuple[int, int, int]]]]:
    """Encode the tasks again against the file's bytes: source hashes by tensor, differences by file."""
    unencodable = [t.name for t in tasks for w in t.writes if w.kind != t.kind and not _encodable(w.kind)]
    if unencodable:
        raise InputError(f"{unencodable[0]} has a type that cannot be encoded here")
    hashes: dict[str, str] = {}
    total = sum(task.work for task in tasks)
    size = sum(original.tensors[task.name].nbytes for task in tasks)

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "done":
            hashes.update({done["name"]: done["sha256"] for done in event["tensors"]})
        elif progress is not None:
            progress(JobProgress("re-encode", event["work"], total, event["bytes"], size, event["tensor"]))

    with ExitStack() as stack:
        files = [stack.enter_context(Path(file.path).open("rb")) for file in model.files]
        payload = {
            "source": str(original.path),
            "imatrix": str(imatrix) if imatrix is not None else None,
            "prior": prior,
            "names": [str(file.path) for file in model.files],
            "tasks": [task.to_json() for task in tasks],
            "threads": threads or usable_cpus(),
            "compare": True,
        }
        answer = run_in_child(
            "apex_quant.encode.executor:run",
            payload,
            on_event,
            step=f"encoding {original.path.name} again",
            pass_fds=[file.fileno() for file in files],
        )
    return hashes, answer["differences"]


def _encodable(kind: str) -> bool:
    from apex_quant.gguf import TYPES

    return TYPES[kind].encodable


def _by_tensor(
    model: GGUFModel, names: Sequence[str], differences: Sequence[Sequence[Sequence[int]]]
) -> list[dict[str, Any]]:
    """Differences of byte ranges, told by tensor: which row is the first, how many bytes."""
    rows = []
    for name in names:
        info = model.tensors[name]
        found = [
            (offset, count)
            for offset, count, _ in differences[info.file]
            if info.offset <= offset < info.offset + info.nbytes
        ]
        if found:
            rows.append(
                {
                    "tensor": name,
                    "type": info.type.name,
                    "bytes_different": sum(count for _, count in found),
                    "bytes": info.nbytes,
                    "first_row": (min(offset for offset, _ in found) - info.offset) // info.row_bytes,
                }
            )
    return rows
