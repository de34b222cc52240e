"""Independent jobs and who does them: this machine one by one, or a cluster (pipeline/cluster.py) many at a time.

A job is plain data and the name of a function, so that it can be done elsewhere: function(payload, threads, emit)
gives a JSON object. `threads` are the processors that it may use, None for what the payload says. Jobs write into
files that all machines see, and write the same bytes when they are done again: a lost one is just sent once more.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from apex_quant.errors import ApexError, BusyError, InputError, NativeError, ResourceError, UsageError
from apex_quant.native.worker import Json

Notify = Callable[[Any], None]
Work = Callable[[Json, "int | None", Notify], Json]
OnEvent = Callable[[int, Any], None]

_ERRORS: dict[str, type[ApexError]] = {
    cls.__name__: cls for cls in (ApexError, UsageError, InputError, BusyError, ResourceError, NativeError)
}


@dataclass(frozen=True)
class Job:
    """One piece of work that needs no other.

    `target`: 'module:function'. `payload` is made when the job is sent, so that one that is sent again can leave out
    what was finished. `step` names it for people. `reads`: files that must be the same where it is done; `writes`:
    folders that must be the same folders there.
    """

    target: str
    payload: Callable[[], Json]
    step: str
    reads: Sequence[Path] = ()
    writes: Sequence[Path] = ()


class Finished(NamedTuple):
    """What a job gave: its place in the sequence, its answer, and on a cluster where it was done and how long it took
    (seconds)."""

    number: int
    result: Json
    where: str | None = None
    seconds: float | None = None


class Workers(Protocol):
    """Whoever does jobs."""

    @property
    def places(self) -> int:
        """Jobs that are done at the same time."""

    def run(self, jobs: Sequence[Job], on_event: OnEvent | None = None) -> Iterator[Finished]:
        """Do all jobs and give each when it is finished, in any order.

        `on_event` gets (number of the job, what the job emits). Raises the first error of a job; the others are
        stopped at their next safe point then, as when the caller goes away.
        """


class Local:
    """This process, one job after the other: each starts the children that it needs."""

    places = 1

    def run(self, jobs: Sequence[Job], on_event: OnEvent | None = None) -> Iterator[Finished]:
        for number, job in enumerate(jobs):

            def emit(event: Any, number: int = number) -> None:
                if on_event is not None:
                    on_event(number, event)

            yield Finished(number, find(job.target)(job.payload(), None, emit))


def find(target: str) -> Work:
    """The function that 'module:function' names."""
    module, _, name = target.partition(":")
    function: Work = getattr(importlib.import_module(module), name)
    return function


def error_to_json(error: ApexError) -> Json:
    """An error of a job as plain data."""
    kind = next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _ERRORS)
    return {"type": kind, "message": error.message, "hint": error.hint, "log": getattr(error, "log_tail", "")}


def error_from_json(data: Json, where: str) -> ApexError:
    """The error again; its message says where it happened."""
    cls = _ERRORS.get(data["type"], ApexError)
    message = f"{where}: {data['message']}"
    return cls(message, data["log"], data["hint"]) if cls is NativeError else cls(message, data["hint"])
