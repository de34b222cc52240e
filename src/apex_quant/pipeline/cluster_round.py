"""Jobs on their way over a Ray cluster: one for each machine, sent again when a machine or its process is lost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from apex_quant.errors import BusyError, NativeError, ResourceError
from apex_quant.native import Finished, Job, library_info
from apex_quant.native.worker import Json
from apex_quant.native.workers import OnEvent, error_from_json
from apex_quant.version import VERSION

_TICK: Final = 0.2  # seconds between looks at what has arrived
_LOOK: Final = 1.0  # and at which machines there are
_REST: Final = 5.0  # that a machine gets no job after it lost one: its death may not be known yet
_PATIENCE: Final = 30.0  # without any machine
_MOST_LOSSES: Final = 5


@dataclass(frozen=True)
class Node:
    """A machine. `name` for people: its host, with the beginning of its id."""

    id: str
    name: str
    cpus: int
    gpus: float


@dataclass(frozen=True)
class _Running:
    number: int
    node: Node
    since: float = field(default_factory=time.monotonic)


def nodes(ray: Any) -> list[Node]:
    """The machines that are alive and have a processor to work with."""
    found = []
    for one in ray.nodes():
        cpus = int(one["Resources"].get("CPU", 0)) if one["Alive"] else 0
        if cpus:
            name = f"{one['NodeManagerHostname']} ({one['NodeID'][:6]})"
            found.append(Node(one["NodeID"], name, cpus, one["Resources"].get("GPU", 0)))
    return found


class Round:
    """One call of RayWorkers.run()."""

    def __init__(
        self,
        ray: Any,
        jobs: Sequence[Job],
        marks: Mapping[Path, Path],
        on_event: OnEvent | None,
        tell: Callable[[str], None],
    ) -> None:
        self.ray, self.jobs, self.marks, self.on_event, self.tell = ray, jobs, marks, on_event, tell
        self.task = ray.remote(_task())
        self.waiting = deque(range(len(jobs)))
        self.running: dict[Any, _Running] = {}
        self.losses = [0] * len(jobs)
        self._resting: dict[str, float] = {}
        self._nodes: list[Node] = []
        self._looked = self._seen = -_PATIENCE

    def run(self) -> Iterator[Finished]:
        """Every job's answer as it comes. What still runs when this ends is killed; its children stop by themselves."""
        self._seen = time.monotonic()
        try:
            while self.waiting or self.running:
                self._send()
                if not self.running:
                    time.sleep(_TICK)
                    continue
                ready, _ = self.ray.wait(list(self.running), num_returns=1, timeout=_TICK)
                for stream in ready:
                    if (done := self._take(stream)) is not None:
                        yield done
        finally:
            for stream in self.running:
                with suppress(Exception):
                    self.ray.cancel(stream, force=True)

    # --- out ---

    def _send(self) -> None:
        """A job to each machine that has none."""
        if not self.waiting:
            return
        now = time.monotonic()
        if now - self._looked >= _LOOK:
            self._nodes, self._looked = nodes(self.ray), now
        if self._nodes:
            self._seen = now
        elif not self.running and now - self._seen > _PATIENCE:
            raise ResourceError("no machine of the Ray cluster is left", hint="finished work is kept: run again")
        busy = {one.node.id for one in self.running.values()}
        for node in self._nodes:
            if self.waiting and node.id not in busy and self._resting.get(node.id, 0.0) <= now:
                number = self.waiting.popleft()
                self.running[self._sent(self.jobs[number], node)] = _Running(number, node)

    def _sent(self, job: Job, node: Node) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        reads = [(str(path.absolute()), path.stat()) for path in job.reads]
        request = {
            "version": VERSION,
            "library": library_info().version,
            "target": job.target,
            "payload": job.payload(),
            "threads": node.cpus,
            "events": self.on_event is not None,
            "reads": [(path, status.st_size, int(status.st_mtime)) for path, status in reads],
            "marks": [str(self.marks[folder]) for folder in job.writes],
        }
        options = self.task.options(
            name=job.step,
            num_cpus=node.cpus,
            num_gpus=node.gpus,
            num_returns="streaming",
            max_retries=0,  # sent again from here, without what was finished
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        )
        return options.remote(request)

    # --- back ---

    def _take(self, stream: Any) -> Finished | None:
        """The next message of a job; its answer, if it is that. Raises the job's error."""
        one, exceptions = self.running[stream], self.ray.exceptions
        try:
            message: Json = self.ray.get(next(stream))
        except StopIteration:
            self._lost(stream, "it ended without an answer")
            return None
        except exceptions.RayTaskError as error:
            raise NativeError(f"{one.node.name}: {error.cause}", log_tail=str(error)) from None
        except exceptions.RayError as error:
            self._lost(stream, str(error).strip().partition("\n")[0][:200] or type(error).__name__)
            return None
        if message["kind"] == "event":
            assert self.on_event is not None
            self.on_event(one.number, message["event"])
            return None
        if message["kind"] == "result":
            del self.running[stream]
            return Finished(one.number, message["result"], one.node.name, time.monotonic() - one.since)
        problem = error_from_json(message, f"machine {one.node.name}")
        if isinstance(problem, BusyError) and self.losses[one.number]:
            self._lost(stream, problem.message)  # by what is left of the lost process, which will notice
            return None
        del self.running[stream]
        raise problem

    def _lost(self, stream: Any, reason: str) -> None:
        """Send a job again, or raise NativeError when that was done often enough."""
        one = self.running.pop(stream)
        step = self.jobs[one.number].step
        self.losses[one.number] += 1
        if self.losses[one.number] > _MOST_LOSSES:
            raise NativeError(
                f"{step}: lost {self.losses[one.number]} times, the last on machine {one.node.name}: {reason}",
                hint="the machines may have too little memory; finished work is kept, the same command goes on",
            )
        self.tell(f"{step}: lost on machine {one.node.name}, and done again: {reason}")
        self._resting[one.node.id] = time.monotonic() + _REST
        self._looked = -_LOOK
        self.waiting.appendleft(one.number)


def _task() -> Callable[[Json], Iterator[Json]]:
    """What Ray runs. It goes there by value, and so can say that the package is missing."""

    def task(request: Json) -> Iterator[Json]:
        error = {"kind": "error", "type": "ResourceError", "log": ""}
        hint = f"install apex-quant {request['version']} on each machine, for the Python that runs Ray"
        try:
            from apex_quant import version
        except ImportError as missing:
            yield {**error, "message": f"apex-quant is not installed there ({missing})", "hint": hint}
            return
        if request["version"] != version.VERSION:
            message = f"apex-quant {version.VERSION} is installed there, and {request['version']} here"
            yield {**error, "message": message, "hint": hint}
            return
        from apex_quant.pipeline.cluster_node import serve

        yield from serve(request)

    return task
