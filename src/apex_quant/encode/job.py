"""The quantize job: several planned outputs of one model in one pass, resumable.

The parent plans, opens the outputs and keeps the journals; the child (executor.py) reads, encodes and writes. A
tensor is a task only for the outputs that do not have it yet, and each distinct (tensor, type, importance) of it is
encoded once, whichever outputs want it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apex_quant.encode.groups import encode_groups
from apex_quant.encode.output import Output, content_hash
from apex_quant.encode.tasks import Task, Write, uses_importance
from apex_quant.errors import UsageError
from apex_quant.gguf import GGUFModel, TensorInfo, require_space, stock_order
from apex_quant.importance.fill import NO_PRIOR
from apex_quant.native import Child, Workers, library_info
from apex_quant.recipe.planned import Plan

# Encoders that need a grid table which takes seconds to build come last, the slowest last of all: meanwhile the
# tables are built beside other work.
_GRID_RANK = {"IQ3_XXS": 1, "IQ3_S": 1, "IQ2_XXS": 2, "IQ2_XS": 3, "IQ2_S": 4, "IQ1_S": 5, "IQ1_M": 5}


EXECUTOR = "apex_quant.encode.executor"


@dataclass(frozen=True)
class JobProgress:
    """How far the job is. `work` is estimated thread time, from 0 to `total`."""

    phase: str
    work: float
    total: float
    bytes_read: int
    bytes_total: int
    tensor: str


@dataclass(frozen=True)
class JobResult:
    """Counters of the pass; the files are in the outputs."""

    bytes_read: int
    source_bytes: int
    rows_encoded: int
    rows_distinct: int
    ggml_version: str
    ggml_commit: str
    data_sha256: Mapping[Path, str] = field(default_factory=dict)


def source_identity(model: GGUFModel, importance_sha256: str | None) -> str:
    """What must be unchanged for a journal to count: the source's files by size and time, importance, library.

    Names are left out, so that a folder may be renamed between the runs.
    """
    files = []
    for file in model.files:
        status = Path(file.path).stat()
        files.append([status.st_size, status.st_mtime_ns])
    return json.dumps([files, importance_sha256, library_info().version])


def make_tasks(model: GGUFModel, outputs: Sequence[Output]) -> list[Task]:
    """The tensors that some output still lacks, with every distinct encoding of each, in the order of work."""
    numbers = [0]
    for output in outputs:
        numbers.append(numbers[-1] + len(output.paths))
    writes: dict[str, dict[tuple[str, bool], list[tuple[int, int]]]] = {}
    for first, output in zip(numbers, outputs, strict=False):
        if output.written is not None:
            continue
        for tensor in output.plan.tensors:
            if tensor.name in output.done:
                continue
            copied = tensor.type is tensor.source_type
            weighted = output.plan.importance and not copied and uses_importance(tensor.type)
            group, offset = output.offsets[tensor.name]
            places = writes.setdefault(tensor.source, {}).setdefault((tensor.type.name, weighted), [])
            places.append((first + group, offset))
    tasks = [
        Task(
            name,
            model.tensors[name].shape,
            model.tensors[name].type.name,
            [Write(kind, weighted, places) for (kind, weighted), places in by_type.items()],
        )
        for name, by_type in writes.items()
    ]

    def order(task: Task) -> tuple[int, int, int]:
        info = model.tensors[task.name]
        return max(_GRID_RANK.get(write.kind, 0) for write in task.writes), info.file, info.offset

    return sorted(tasks, key=order)


def run_job(
    model: GGUFModel,
    plans: Sequence[tuple[Plan, Path]],
    *,
    imatrix: Path | None,
    imatrix_sha256: str | None,
    threads: int,
    force: bool = False,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[JobProgress], None] | None = None,
    child: Child | None = None,
    workers: Workers | None = None,
) -> tuple[list[Output], JobResult]:
    """Make all planned files of `model`; `plans` pairs each with its target path. With `workers` they do the encoding,
    in groups of tensors, and all files must be where they see them.

    Raises UsageError (a foreign file in the way), ResourceError (disk, library), InputError (a source value that is
    not finite), NativeError (the library died). Whatever was finished before stays and is not made again.
    """
    report = progress or (lambda _: None)
    prior = _one_prior([plan for plan, _ in plans])
    outputs = [
        Output(plan, target, source_identity(model, imatrix_sha256 if plan.importance else None))
        for plan, target in plans
    ]
    try:
        about = {"source": [str(file.path) for file in model.files], **(about or {})}
        about["shared"] = workers is not None
        for output in outputs:
            _refuse_inputs(output, [*(Path(file.path) for file in model.files), *([imatrix] if imatrix else [])])
            output.look(force=force)
        pending = [output for output in outputs if output.written is None]
        _require_space(pending)
        for output in pending:
            output.open(force=force, about=about)
        if not pending:
            return outputs, JobResult(0, 0, 0, 0, "", "")
        working = [output for output in pending if len(output.done) < len(output.plan.tensors)]
        tasks = make_tasks(model, working)
        result = _encode(model, working, tasks, imatrix, prior, threads, report, child, workers if tasks else None)
        _finish(model, outputs, result, threads, report)
        return outputs, result
    finally:
        for output in outputs:
            output.close()


def _one_prior(plans: Sequence[Plan]) -> str:
    """How the matrix is filled: a tensor is encoded once for all outputs, so they must agree on its importance."""
    priors = {plan.prior for plan in plans if plan.importance} or {NO_PRIOR}
    if len(priors) > 1:
        raise UsageError("outputs of one pass cannot fill the importance matrix in different ways")
    return priors.pop()


def _refuse_inputs(output: Output, inputs: Sequence[Path]) -> None:
    for path in output.paths:
        for given in inputs:
            if path.exists() and path.samefile(given):
                raise UsageError(f"{path} is what is read: {given}", hint="choose another -o")


def _require_space(outputs: Sequence[Output]) -> None:
    """Refuse before starting when the folders lack room for what is still to be written."""
    needed: dict[int, tuple[Path, int]] = {}
    for output in outputs:
        if output.complete:
            continue
        for path, part in zip(output.paths, output.layouts, strict=True):
            partial = path.with_name(path.name + ".partial")
            have = partial.stat().st_blocks * 512 if partial.exists() else 0
            device = path.absolute().parent.stat().st_dev
            _, sum_ = needed.get(device, (path, 0))
            needed[device] = (path, sum_ + max(0, part.total_bytes - have))
    for path, total in needed.values():
        require_space(path, total)


def _encode(
    model: GGUFModel,
    outputs: Sequence[Output],
    tasks: Sequence[Task],
    imatrix: Path | None,
    prior: str,
    threads: int,
    report: Callable[[JobProgress], None],
    child: Child | None,
    workers: Workers | None,
) -> JobResult:
    by_name = {task.name: task for task in tasks}
    names = _names_by_source(outputs)
    total = sum(task.work for task in tasks)
    bytes_total = sum(model.tensors[task.name].nbytes for task in tasks)
    places = [number for number, output in enumerate(outputs) for _ in output.paths]
    sections = [output.section(places.index(number)) for number, output in enumerate(outputs)]

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            report(JobProgress("encode", event["work"], total, event["bytes"], bytes_total, event["tensor"]))
            return
        news: dict[int, list[tuple[str, str, float]]] = {}
        for done in event["tensors"]:
            task = by_name[done["name"]]
            for write, seconds in zip(task.writes, done["seconds"], strict=True):
                for file, _ in write.places:
                    number = places[file]
                    name = names[number][task.name]
                    share = seconds / len(write.places) / event.get("threads", threads)
                    news.setdefault(number, []).append((name, done["sha256"], share))
        for number, entries in news.items():
            outputs[number].journal.add(entries)

    distinct = sum(task.rows for task in tasks for write in task.writes if write.kind != task.kind)
    payload: dict[str, Any] = {
        "source": str(model.path),
        "imatrix": str(imatrix) if imatrix is not None else None,
        "prior": prior,
        "names": [str(path) for output in outputs for path in output.paths],
        "threads": threads,
    }
    if workers is not None:
        reads = [*(Path(file.path) for file in model.files), *([imatrix] if imatrix else [])]
        result = encode_groups(workers, tasks, payload, reads, on_event)
    else:
        payload["tasks"] = [task.to_json() for task in tasks]
        payload["sections"] = [section.to_json() for section in sections]
        with child or Child(EXECUTOR, single_blas=True) as process:
            result = process.run(
                f"{EXECUTOR}:run",
                payload,
                on_event,
                step=f"encoding {model.path.name}",
                pass_fds=[file.fileno() for output in outputs for file in output.files],
            )
    return JobResult(
        bytes_read=result["bytes_read"],
        source_bytes=bytes_total,
        rows_encoded=result["rows_encoded"],
        rows_distinct=distinct,
        ggml_version=result["ggml_version"],
        ggml_commit=result["ggml_commit"],
        # of groups nobody saw the whole: the files are read again for it
        data_sha256={output.target: sha for output, sha in zip(outputs, result["data_sha256"], strict=False)},
    )


def _names_by_source(outputs: Sequence[Output]) -> list[dict[str, str]]:
    return [{tensor.source: tensor.name for tensor in output.plan.tensors} for output in outputs]


def _finish(
    model: GGUFModel,
    outputs: Sequence[Output],
    result: JobResult,
    threads: int,
    report: Callable[[JobProgress], None],
) -> None:
    pending = [output for output in outputs if output.written is None]
    report(JobProgress("finish", 1.0, 1.0, result.bytes_read, result.source_bytes, ""))

    def finish(output: Output) -> None:
        hashed = result.data_sha256.get(output.target)
        output.finish(source_hash(model.tensors, output), result.ggml_commit, hashed)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        list(pool.map(finish, pending))


def source_hash(tensors: Mapping[str, TensorInfo], output: Output) -> str:
    """The content hash of the source tensors that went into an output, in llama.cpp's order of their names."""
    by_source = {tensor.source: tensor.name for tensor in output.plan.tensors}
    rows = {}
    for name in stock_order(by_source):
        info = tensors[name]
        rows[name] = (info.type.name, info.shape, output.done[by_source[name]])
    return content_hash(rows)
