"""A quantize job on several machines: its tasks in groups of about equal work, each group a job of its own.

A group is the child of executor.py, which writes into partial files on a disk that all machines see. The caller opens
and finishes the files, and keeps the journals by what the groups report as durable; a group that is sent again, because
its machine was lost, leaves those tensors out. What it writes twice are the same bytes at the same place.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from apex_quant.encode.tasks import Task
from apex_quant.errors import ResourceError
from apex_quant.native import Child, Job, Workers
from apex_quant.native.worker import Json
from apex_quant.native.workers import Notify

EXECUTOR: Final = "apex_quant.encode.executor"
EVERY: Final = 1024
"""Threads: as many as each machine has."""
_TARGET: Final = "apex_quant.encode.groups:run"
_PER_PLACE: Final = 3
"""Groups for each machine: a faster one does more of them, and a lost one takes little with it."""

OnEvent = Callable[[dict[str, Any]], None]


def split(tasks: Sequence[Task], count: int) -> list[list[Task]]:
    """At most `count` groups of about equal work, none empty; each keeps the order of `tasks`.

    The largest task goes first to whoever has least, so that the heaviest group is at most 4/3 of the best possible.
    """
    groups: list[list[int]] = [[] for _ in range(min(max(1, count), len(tasks)))]
    loads = [(0.0, number) for number in range(len(groups))]
    for place in sorted(range(len(tasks)), key=lambda place: -tasks[place].work):
        load, number = heapq.heappop(loads)
        groups[number].append(place)
        heapq.heappush(loads, (load + tasks[place].work, number))
    return [[tasks[place] for place in sorted(group)] for group in groups if group]


def encode_groups(
    workers: Workers, tasks: Sequence[Task], payload: Json, reads: Sequence[Path], on_event: OnEvent
) -> Json:
    """Do `tasks` on all machines. `payload` as the executor takes it, without tasks; `reads` are the source's files
    and the matrix.

    `on_event` gets what one child would tell: tensors that are done, and the progress of all together. Gives the sum
    of the counters. Raises as the executor does, and ResourceError when machines have different builds of the library.
    """
    groups = [_Group(group) for group in split(tasks, _PER_PLACE * workers.places)]
    payload = {**payload, "names": [str(Path(name).absolute()) for name in payload["names"]]}
    for key in ("source", "imatrix"):  # elsewhere the current folder is another
        payload[key] = payload[key] and str(Path(payload[key]).absolute())
    folders = sorted({Path(name).parent for name in payload["names"]})
    jobs = [
        Job(_TARGET, group.payload(payload), f"encoding {number + 1} of {len(groups)}", reads, folders)
        for number, group in enumerate(groups)
    ]

    def on_job(number: int, event: dict[str, Any]) -> None:
        groups[number].see(event)
        if event["event"] == "progress":
            event = {**event, **{key: sum(group.reached[key] for group in groups) for key in ("work", "bytes")}}
        on_event(event)

    results = [done.result for done in workers.run(jobs, on_job)]
    libraries = {(result["ggml_version"], result["ggml_commit"]) for result in results}
    if len(libraries) > 1:
        raise ResourceError(
            "the machines have different builds of the library: " + ", ".join(sorted(f"{v} {c}" for v, c in libraries)),
            hint="install the same wheel on each",
        )
    version, commit = libraries.pop()
    counters = {key: sum(result[key] for result in results) for key in ("bytes_read", "rows_encoded")}
    return {**counters, "ggml_version": version, "ggml_commit": commit, "data_sha256": []}


class _Group:
    """One group: what of it is finished, and how far the rest is."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.left = {task.name: task for task in tasks}
        self.reached: dict[str, float] = {"work": 0.0, "bytes": 0}
        self._before = dict(self.reached)
        self._finished = dict(self.reached)

    def payload(self, common: Json) -> Callable[[], Json]:
        """What is still to be done, at the time when it is asked for."""

        def make() -> Json:
            self._before = dict(self._finished)
            return {**common, "tasks": [task.to_json() for task in self.left.values()]}

        return make

    def see(self, event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            self.reached = {key: self._before[key] + event[key] for key in self.reached}
            return
        for done in event["tensors"]:
            task = self.left.pop(done["name"])
            self._finished["work"] += task.work
            self._finished["bytes"] += task.rows * task.source_type.row_bytes(task.row_length)


def run(payload: Json, threads: int | None, emit: Notify) -> Json:
    """The job of a group, on any machine that sees the partial files. `threads`: what the machine has for it, of
    which at most payload["threads"] are used.

    Raises ResourceError when a partial file is not there, and what the executor raises.
    """
    from apex_quant.encode.quantize import usable_cpus

    count = min(payload["threads"], threads or usable_cpus())

    def tell(event: dict[str, Any]) -> None:
        emit({**event, "threads": count})

    files: list[int] = []
    try:
        for name in payload["names"]:
            files.append(_opened(f"{name}.partial"))
        with Child(EXECUTOR, single_blas=True) as child:
            return child.run(
                f"{EXECUTOR}:run",
                {**payload, "threads": count},
                tell,
                step=f"encoding {Path(payload['source']).name}",
                pass_fds=files,
            )
    finally:
        for file in files:
            os.close(file)


def _opened(path: str) -> int:
    """For writing only: a network disk that may read as well writes whole pages, with a neighbour's old bytes in."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be opened: {error.strerror}") from None
