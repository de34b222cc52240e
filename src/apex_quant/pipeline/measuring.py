"""Files are measured by whoever works: each file is a job; where machines would be idle, each of its metrics is one.

Metrics that are measured apart have results files of their own in WORK/parts/NAME/, which become one in the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from apex_quant.native import Finished, Job
from apex_quant.native.worker import Json
from apex_quant.pipeline.context import Artifact, Context
from apex_quant.pipeline.jobs import EVALUATE
from apex_quant.pipeline.steps_model import measured

if TYPE_CHECKING:
    from apex_quant.evaluation.results import Results

NATIVE, HARNESS = ("native", "all"), ("harness", "all")
ON_TEXT: Final = ("ppl", "kld", "router")


class Target(NamedTuple):
    """A model's files, and where its results go."""

    paths: Sequence[Path]
    out: Path


@dataclass
class _Part:
    """One job: the number of its target, and its own results file."""

    target: int
    out: Path
    job: Job


def reference(context: Context) -> Artifact | None:
    """The full model's predictions, where files are measured against them."""
    return context.artifact("reference", "reference") if measured(context) is None else None


def request(context: Context, target: Target) -> Json:
    """What evaluate_file() is told of a file, by the configured suite. The same again goes on where it stopped."""
    given, against = context.config.evaluate, reference(context)
    native = given.suite in NATIVE
    only = (list(given.only) or None) if native else []
    whole = context.model().paths
    files = dict(given.task_files) if native else {}
    if context.cluster is not None:  # elsewhere the current folder is another
        files = {kind: str(Path(file).absolute()) if Path(file).is_file() else file for kind, file in files.items()}
    harness = None
    if given.suite in HARNESS:
        harness = given.harness.model_dump(mode="json")
    return {
        "model": str(target.paths[0]),
        "reference": str(against.path) if against is not None else None,
        "source": str(whole[0]) if whole and whole[0].exists() else None,
        "only": only,
        "ctx": context.config.reference.ctx,
        "floor": given.floor and native,
        "tasks": given.tasks,
        "task_files": files,
        "seed": given.seed,
        "speed": native and (only is None or "speed" in only),
        "harness": harness,
        "out": str(target.out),
        "options": context.config.session_options().model_dump(mode="json"),
    }


def parts_of(payload: Json) -> dict[str, Json]:
    """The same measurements one by one: those on text together, each benchmark, speed, each task of the harness."""
    only = payload["only"]
    if only is None:
        plain = ON_TEXT if payload["reference"] is not None else ("ppl",)
        only = [*plain, *payload["task_files"], *(["speed"] if payload["speed"] else [])]
    alone = {**payload, "floor": False, "speed": False, "harness": None}
    parts: dict[str, Json] = {}
    if on_text := [name for name in only if name in ON_TEXT]:
        parts["text"] = {**alone, "only": on_text, "floor": payload["floor"]}
    for name in only:
        if name not in ON_TEXT:
            parts[name] = {**alone, "only": [name], "speed": name == "speed"}
    for name in (payload["harness"] or {}).get("tasks", ()):
        parts[name] = {**alone, "only": [], "harness": {**payload["harness"], "tasks": (name,)}}
    return parts


def parts_folder(context: Context, out: Path) -> Path:
    """Where results of `out` wait that were measured apart."""
    return context.work / "parts" / out.stem


def measure_files(
    context: Context, phase: str, targets: Sequence[Target]
) -> Iterator[tuple[int, Results, float | None]]:
    """(number of the target, its results, seconds of all its jobs where they are known), each when it is finished.

    Raises as evaluate(), and as the workers do.
    """
    from apex_quant.evaluation.results import load, merge_files

    apart = len(targets) < context.workers.places
    parts = [part for number, one in enumerate(targets) for part in _parts(context, number, one, apart=apart)]
    left = [sum(part.target == number for part in parts) for number in range(len(targets))]
    seconds: list[float | None] = [None] * len(targets)
    for done in run_told(context, phase, [part.job for part in parts]):
        number = parts[done.number].target
        left[number] -= 1
        if done.seconds is not None:
            seconds[number] = (seconds[number] or 0.0) + done.seconds
        if left[number]:
            continue
        outs = [part.out for part in parts if part.target == number]
        if outs != [targets[number].out]:
            merge_files(outs, targets[number].out, force=True)
            shutil.rmtree(parts_folder(context, targets[number].out))
            with suppress(OSError):  # others wait there still
                parts_folder(context, targets[number].out).parent.rmdir()
        yield number, load(targets[number].out), seconds[number]


def _parts(context: Context, number: int, target: Target, *, apart: bool) -> Iterator[_Part]:
    payload, name = request(context, target), target.paths[0].name
    folder = parts_folder(context, target.out)
    split = parts_of(payload)
    if len(split) < 2 or not (apart or folder.is_dir()):  # what was begun apart is finished so
        yield _Part(number, target.out, _job(payload, target, f"evaluating {name}"))
        return
    folder.mkdir(parents=True, exist_ok=True)
    for part, own in split.items():
        out = folder / f"{part}.json"
        yield _Part(number, out, _job({**own, "out": str(out)}, target, f"evaluating {name}, {part}"))


def _job(payload: Json, target: Target, step: str) -> Job:
    files = [payload["reference"], payload["source"], *payload["task_files"].values()]
    there = [Path(file) for file in files if file is not None and Path(file).is_file()]
    return Job(EVALUATE, lambda: payload, step, [*target.paths, *there], [Path(payload["out"]).parent])


def run_told(context: Context, phase: str, jobs: Sequence[Job]) -> Iterator[Finished]:
    """Workers.run(), told of: progress where one job runs at a time, else a line for each that is finished."""
    workers = context.workers

    def listen(number: int, event: Any) -> None:
        context.tell(event)

    finished = workers.run(jobs, listen if workers.places == 1 else None)
    for count, done in enumerate(finished, 1):
        if done.where is not None:
            step = jobs[done.number].step
            context.note(phase, f"{step}: {done.seconds:.0f} s on machine {done.where} ({count} of {len(jobs)})")
        yield done


def other_processors(found: Mapping[str, Results]) -> str | None:
    """What to say when speeds of these results, by name of the file, are of different processors."""
    timed = {name: str(one.environment.get("cpu")) for name, one in found.items() if "speed" in one.metrics}
    if len(set(timed.values())) < 2:
        return None
    told = "; ".join(f"{name}: {processor}" for name, processor in timed.items())
    return f"speeds were measured on different processors, and do not compare: {told}"
