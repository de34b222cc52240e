"""What a run gives back: what each phase did and why, and every file with its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apex_quant.errors import ApexError
from apex_quant.pipeline.context import Context
from apex_quant.pipeline.estimate import PhaseEstimate
from apex_quant.pipeline.look import Look
from apex_quant.pipeline.proof import proof, quarantined
from apex_quant.pipeline.wanted import wanted


@dataclass(frozen=True)
class PhaseRun:
    """One phase: `ran` and `unchanged` items by name ('' for a phase of one piece), and the line that was said."""

    name: str
    ran: tuple[str, ...]
    unchanged: tuple[str, ...]
    reason: str
    seconds: float = 0.0

    @classmethod
    def of(cls, one: Look, seconds: float = 0.0) -> PhaseRun:
        ran = tuple(item.name for item, _ in one.due)
        return cls(one.phase.name, ran, tuple(item.name for item in one.done), one.reason, seconds)

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "ran": list(self.ran),
            "unchanged": list(self.unchanged),
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class FileResult:
    """A quantized file (the first of its shards). `verified` and `kld` are of the bytes that it has now: `kld` is
    results.json's, None where these were not measured; `quarantined` is the reason, None for a file that passed every
    check it was put to; `ceiling`: what its mean KLD was held against, None where it was not measured."""

    tier: str
    path: Path
    bytes: int
    bpw: float
    sha256: str
    verified: bool
    kld: dict[str, Any] | None
    results: Path | None
    quarantined: str | None
    ceiling: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "results": str(self.results) if self.results else None}


@dataclass(frozen=True)
class RunResult:
    """The whole: `published` is the upload's (or its rehearsal's) JSON, None without one; `estimates` are those of a
    dry run, `disk` the most bytes that it holds at one time and those in the end, None where some are not known."""

    work: Path
    phases: tuple[PhaseRun, ...]
    files: tuple[FileResult, ...]
    report: tuple[Path, ...]
    published: dict[str, Any] | None
    seconds: float
    dry_run: bool
    estimates: tuple[PhaseEstimate, ...] = ()
    disk: tuple[int, int] | None = None

    @property
    def quarantined(self) -> tuple[FileResult, ...]:
        return tuple(file for file in self.files if file.quarantined is not None)

    def to_json(self) -> dict[str, Any]:
        return {
            "work": str(self.work),
            "dry_run": self.dry_run,
            "phases": [one.to_json() for one in self.phases],
            "files": [one.to_json() for one in self.files],
            "quarantined": [one.tier for one in self.quarantined],
            "report": [str(path) for path in self.report],
            "published": self.published,
            "seconds": round(self.seconds, 3),
            **(self._expected() if self.dry_run else {}),
        }

    def _expected(self) -> dict[str, Any]:
        disk = None if self.disk is None else {"peak": self.disk[0], "end": self.disk[1]}
        return {"estimates": [one.to_json() for one in self.estimates], "disk": disk}


def summarize(context: Context, runs: Sequence[PhaseRun], seconds: float, *, dry_run: bool) -> RunResult:
    """The result as the state tells it."""
    report = context.record("report")
    paths = [context.state.where(f) for files in report.outputs.values() for f in files] if report is not None else []
    return RunResult(
        work=context.work,
        phases=tuple(runs),
        files=tuple(files(context)),
        report=tuple(paths),
        published=context.facts("publish").get("published"),
        seconds=seconds,
        dry_run=dry_run,
    )


def files(context: Context) -> list[FileResult]:
    """Every quantized file that the configuration asks for and the state knows, in that order; where a tier file cannot
    be read, all that the state knows."""
    found = []
    records = context.state.records.get("quantize", {})
    try:
        order = [one.name for one in wanted(context.config)]
    except ApexError:
        order = list(records)
    for tier in [name for name in order if name in records]:
        record = records[tier]
        verified, measured = proof(context, "verify", tier), proof(context, "evaluate", tier)
        stored = measured.outputs.get("results", []) if measured is not None else []
        model = record.outputs["model"]
        found.append(
            FileResult(
                tier=tier,
                path=context.state.where(model[0]),
                bytes=sum(file.bytes for file in model),
                bpw=record.facts["bpw"],
                sha256=model[0].sha256,
                verified=verified is not None and bool(verified.facts.get("ok")),
                kld=measured.facts.get("kld") if measured is not None else None,
                results=context.state.where(stored[0]) if stored else None,
                quarantined=quarantined(context, tier),
                ceiling=measured.facts.get("ceiling") if measured is not None else None,
            )
        )
    return found
