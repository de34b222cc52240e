"""`estimate`: disk, memory and time of each phase before it runs, for `apex run --dry-run`.

for one in estimate(config): print(one.phase, one.bytes_disk, one.bytes_memory, one.seconds, one.low, one.high)
print(peak_disk(estimate(config), keep=False))

Sizes come from plans where a GGUF is at hand, to the byte; from headers of a checkpoint or sizes of files otherwise.
Seconds are work divided by rates that were measured on one processor (benchmarks/RESULTS.md), times processors: every
one is an estimate with a range. Seconds that earlier phases of the same run took correct them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from apex_quant.encode.quantize import usable_cpus
from apex_quant.pipeline.config import RunConfig
from apex_quant.pipeline.phase_work import WORK, Work
from apex_quant.pipeline.source_facts import SourceFacts, source_facts

SPREAD: Final = {"encode": 2.0, "tokens": 3.0, "network": 6.0, "disk": 3.0, "little": 3.0}
"""A factor up and down, by what a phase spends its time with."""
_ONE_RATE: Final = ("encode", "tokens", "network", "disk")
_KNOWN: Final = 1.25  # where earlier items of the phase were timed on this machine
_RELATED: Final = 1.6  # where those of another phase of the same kind were
_GPU: Final = 50.0  # layers on a GPU may be this much faster than the rate above


@dataclass(frozen=True)
class PhaseEstimate:
    """One phase. `bytes_disk` it writes, `bytes_memory` it wants (what is mapped of the model included: with less it
    reads from the disk again and again); `seconds` with `low` and `high`, None where nothing tells. `items`: seconds
    of each piece. `temporary`: a later phase deletes what it wrote; `scratch`: bytes that it deletes itself."""

    phase: str
    bytes_disk: int | None
    bytes_memory: int
    seconds: float | None
    low: float | None
    high: float | None
    basis: str
    items: Mapping[str, float | None] = field(default_factory=dict)
    temporary: bool = False
    scratch: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the seconds say that they are an estimate."""
        seconds = None
        if self.seconds is not None and self.low is not None and self.high is not None:
            seconds = {"estimate": round(self.seconds, 1), "low": round(self.low, 1), "high": round(self.high, 1)}
        return {
            "phase": self.phase,
            "bytes_disk": self.bytes_disk,
            "bytes_memory": self.bytes_memory,
            "seconds": seconds,
            "basis": self.basis,
        }


def estimate(
    config: RunConfig,
    facts: SourceFacts | None = None,
    *,
    recorded: Mapping[str, Mapping[str, float]] | None = None,
    due: Mapping[str, Collection[str]] | None = None,
    cpus: int | None = None,
    online: bool = True,
) -> list[PhaseEstimate]:
    """Estimates of the phases that the configuration selects, in order.

    `facts` as source_facts gives them (by default it is asked, `online` or not). `recorded`: seconds by phase and item
    of earlier runs. `due`: items by phase that will run, where a look at the state has told; other
    phases are left out. `cpus`: processors, by default those this process may use. Raises what source_facts raises.
    """
    facts = facts or source_facts(config, online=online)
    cores = config.threads or cpus or usable_cpus()
    works = {phase: make(config, facts, cores) for phase, make in WORK.items()}
    found = []
    for phase in config.phases.selected():
        work = works[phase]
        if work is not None and (due is None or phase in due):
            factor, spread, why = _corrected(phase, works, recorded or {})
            gpu = _GPU if config.gpu.layers and work.kind == "tokens" and not why else 1.0
            found.append(_estimated(phase, work, None if due is None else due[phase], factor, spread, gpu, why))
    return found


def _estimated(
    phase: str, work: Work, due: Collection[str] | None, factor: float, spread: float, gpu: float, why: str
) -> PhaseEstimate:
    if due is not None and not set(due) & set(work.seconds):
        due = None  # pieces that are counted in another way: all of them

    def of_due(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if due is None or name in due}

    disk = [*of_due(work.disk).values(), *of_due(work.cached).values()]
    items = {name: None if s is None else s * factor for name, s in of_due(work.seconds).items()}
    known = [seconds for seconds in items.values() if seconds is not None]
    total = sum(known) if len(known) == len(items) else None
    return PhaseEstimate(
        phase=phase,
        bytes_disk=None if None in disk else sum(disk),
        bytes_memory=work.memory,
        seconds=total,
        low=None if total is None else total / spread / gpu,
        high=None if total is None else total * spread,
        basis=work.basis + why,
        items=items,
        temporary=work.temporary,
        scratch=max(of_due(work.scratch).values(), default=0),
    )


def peak_disk(estimates: Sequence[PhaseEstimate], *, keep: bool) -> tuple[int, int] | None:
    """The most bytes that the phases hold at one time, and what is left after the last; None where some are unknown.

    Without `keep` the converted full-precision GGUF goes when the last phase that reads it has run. Downloads stay in
    the hub's cache and count.
    """
    held = peak = 0
    waiting: list[tuple[int, int]] = []  # (place of the last reader, bytes)
    for number, one in enumerate(estimates):
        if one.bytes_disk is None:
            return None
        held += one.bytes_disk
        peak = max(peak, held + one.scratch)
        if one.temporary and not keep:
            readers = [n for n, other in enumerate(estimates) if other.phase in _READERS]
            waiting.append((max([number, *readers]), one.bytes_disk))
        held -= sum(size for last, size in waiting if last == number)
        waiting = [(last, size) for last, size in waiting if last != number]
    return peak, held


_READERS: Final = ("reference", "calibrate", "recipes", "quantize", "verify", "evaluate", "baselines")
"""Phases that read the full-precision GGUF (the last two its output matrix, for a .apexref)."""


def _corrected(
    phase: str, works: Mapping[str, Work | None], recorded: Mapping[str, Mapping[str, float]]
) -> tuple[float, float, str]:
    """Factor on the seconds, spread, and what that rests on: this phase's own items, or those of its kind."""
    mine = works[phase]
    assert mine is not None
    spread = SPREAD[mine.kind]
    others = [name for name in works if name != phase]
    for names, narrow, told in (([phase], _KNOWN, "; as it took before"), (others, _RELATED, "; as other phases took")):
        took = expected = 0.0
        for name in names:
            work = works[name]
            if work is not None and work.kind == mine.kind and mine.kind in _ONE_RATE:
                both = [(recorded.get(name, {}).get(item), s) for item, s in work.seconds.items()]
                took += sum(seconds for seconds, s in both if seconds and s)
                expected += sum(s for seconds, s in both if seconds and s)
        if took and expected:
            return took / expected, min(spread, narrow), told
    return 1.0, spread, ""
