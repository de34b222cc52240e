"""`status`: what a WORK folder holds, what is in hand, and what the same run would do now and why. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_quant.errors import ApexError, InputError
from apex_quant.pipeline.config import make_config
from apex_quant.pipeline.context import Context
from apex_quant.pipeline.look import Look, look
from apex_quant.pipeline.results import FileResult, files
from apex_quant.pipeline.state import STATE, Record, State, busy
from apex_quant.pipeline.table import PHASES


@dataclass(frozen=True)
class PhaseStatus:
    """One phase: finished items with seconds and bytes of their files, those begun, and what a run would do now."""

    name: str
    does: str
    finished: dict[str, dict[str, Any]]
    started: tuple[str, ...]
    next: str

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "started": list(self.started)}


@dataclass(frozen=True)
class Status:
    """A folder: `running` names the process that works in it now, or is None."""

    work: Path
    source: str
    running: str | None
    phases: tuple[PhaseStatus, ...]
    files: tuple[FileResult, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "work": str(self.work),
            "source": self.source,
            "running": self.running,
            "phases": [one.to_json() for one in self.phases],
            "files": [one.to_json() for one in self.files],
        }


def status(directory: str | Path) -> Status:
    """Read a folder's state. Raises InputError when no run was ever there."""
    work = Path(directory).resolve()
    if not (work / STATE).is_file():
        raise InputError(f"{directory}: no run has been here", hint="apex run --work names the folder of a run")
    state = State(work).load()
    config = make_config(state.about.get("config", {}), where=str(work / STATE))
    context = Context(config, work, state)
    running = busy(work)
    looks: dict[str, str] = {}
    if running is None:
        looks = {one.phase.name: _said(one) for one in _looks(context)}
    phases = tuple(
        PhaseStatus(
            phase.name,
            phase.does,
            {name: _told(record) for name, record in state.records.get(phase.name, {}).items()},
            tuple(state.started.get(phase.name, {})),
            looks.get(phase.name, "a run is working here" if running else ""),
        )
        for phase in PHASES
    )
    return Status(work, config.source, running, phases, tuple(files(context)))


def _looks(context: Context) -> list[Look]:
    try:
        return look(context, PHASES, [phase.name for phase in PHASES])
    except ApexError as error:  # the source is gone, say: what is here is told all the same
        return [Look(phase, skipped=f"cannot be told: {error.message}") for phase in PHASES]


def _said(one: Look) -> str:
    return f"would run: {one.reason}" if one.due else one.reason


def _told(record: Record) -> dict[str, Any]:
    stored = [file for every in record.outputs.values() for file in every]
    return {
        "finished": record.finished,
        "seconds": record.seconds,
        "files": [file.path for file in stored],
        "bytes": sum(file.bytes for file in stored),
        "released": record.released,
    }
