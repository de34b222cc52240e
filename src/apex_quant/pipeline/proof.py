"""What is proven of a quantized file: which phases have looked at the very bytes that it has now.

A record of verify or evaluate proves a file when its input is the digest of the file; one of bytes that were there
before (`--only quantize`) proves nothing. The table of a run, `apex status` and publishing all ask here.
"""

from __future__ import annotations

from apex_quant.errors import InputError
from apex_quant.pipeline.context import Context
from apex_quant.pipeline.state import Record, digest_of


def proof(context: Context, phase: str, tier: str) -> Record | None:
    """The record of verify or evaluate for a tier's file as `quantize` made it last; None while there is none."""
    file, record = context.record("quantize", tier), context.record(phase, tier)
    if file is None or record is None or ("quantize", tier) in context.pending:
        return None
    return record if record.inputs.get("file") == digest_of(one.sha256 for one in file.outputs["model"]) else None


def quarantined(context: Context, tier: str) -> str | None:
    """Why a tier's file is quarantined, by every phase that says so; None when none does."""
    records = [found for phase in ("verify", "evaluate") if (found := proof(context, phase, tier)) is not None]
    return "; ".join(str(one.facts["quarantined"]) for one in records if one.facts.get("quarantined")) or None


def require_proven(context: Context) -> None:
    """Refuse to publish a file that lies in the release and was not verified, or not measured, as it is now.

    Raises InputError, which names every such file.
    """
    problems = [
        f"{context.state.where(record.outputs['model'][0]).name}: {why}"
        for tier, record in context.state.records.get("quantize", {}).items()
        if (why := _unproven(context, tier, record)) is not None
    ]
    if not problems and (report := context.record("report")) is not None and _of_other_results(context, report):
        problems.append("report and card: of other results than those that are here")
    if problems:
        raise InputError(
            f"not published: {'; '.join(problems)}",
            hint="--from verify checks and measures what is missing; or move the file out of the release",
        )


def _unproven(context: Context, tier: str, record: Record) -> str | None:
    """What speaks against one file; None for one that was moved away."""
    if not any(context.state.where(file).exists() for file in record.outputs["model"]):
        return None
    if (damage := context.state.damage(record)) is not None:
        return damage
    needed = ["verify"] if context.config.evaluate.suite == "none" else ["verify", "evaluate"]
    for phase in ("verify", "evaluate"):
        found = proof(context, phase, tier)
        if found is not None and found.facts.get("quarantined"):
            return f"quarantined: {found.facts['quarantined']}"
        if found is None and context.record(phase, tier) is not None:
            return f"encoded again since phase {phase}"
        if found is None and phase in needed:
            return f"phase {phase} has not run"
    return None


def _of_other_results(context: Context, report: Record) -> bool:
    """Whether the results of a tier have changed since the report was made."""
    for tier, record in context.state.records.get("evaluate", {}).items():
        shown = report.inputs.get(f"results of {tier}")
        if shown is not None and shown != digest_of(file.sha256 for file in record.outputs["results"]):
            return True
    return False
