"""What would run and why, told from the state alone: for the run itself, for --dry-run and for `apex status`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from apex_quant.errors import InputError, UsageError
from apex_quant.pipeline.config import anywhere
from apex_quant.pipeline.context import Context
from apex_quant.pipeline.phases import PENDING, Item, Phase
from apex_quant.pipeline.reasons import changes, grouped
from apex_quant.pipeline.state import Record, key_of

NOT_SELECTED: Final = "not asked for"
NEW: Final = "not made yet"
RESUMED: Final = "goes on where an earlier run stopped"
FORCED: Final = "asked for with --force"
NOTHING: Final = "no file is left for it: all are quarantined"


@dataclass(frozen=True)
class Look:
    """What a phase would do: the items that are due with the reason of each, those that are not, or why it is left
    out as a whole. `freed`: it is done, but its file was deleted to save space. Of one that is left out, in words:
    `stale`, what it made is of other settings or content than it would be now; `damaged`, it is not there as it was
    made."""

    phase: Phase
    due: tuple[tuple[Item, str], ...] = ()
    done: tuple[Item, ...] = ()
    skipped: str | None = None
    freed: bool = False
    stale: str | None = None
    damaged: str | None = None

    @property
    def reason(self) -> str:
        """One line: why it runs, or why not."""
        if self.skipped is not None:
            return self.skipped
        unchanged = "unchanged; its file was deleted and nothing needs it" if self.freed else "unchanged"
        return grouped([(item.name, why) for item, why in self.due], len(self.done)) or unchanged

    def to_json(self) -> dict[str, Any]:
        return {
            "phase": self.phase.name,
            "runs": bool(self.due),
            "reason": self.reason,
            "due": [{"item": item.name, "reason": why} for item, why in self.due],
            "done": [item.name for item in self.done],
        }


def look(
    context: Context, phases: Sequence[Phase], selected: Collection[str], *, force: Collection[str] = ()
) -> list[Look]:
    """What these phases would do, in order, without doing it. What an earlier one makes anew counts as changed.

    Raises UsageError when a selected phase needs one that is not selected, and never ran or would make other things.
    """
    found: list[Look] = []
    before = set(context.pending)
    try:
        for phase in phases:
            one = look_at(context, phase, selected, force)
            context.pending |= {(phase.name, item.name) for item, _ in one.due}
            found.append(one)
    finally:
        context.pending = before
    _refuse_stale(context, found)
    for number in reversed(range(len(found))):  # what is made again may read what has to be made again for it
        found[number] = _needed_again(context, found[number], found[number + 1 :])
    return found


def look_at(context: Context, phase: Phase, selected: Collection[str], force: Collection[str] = ()) -> Look:
    """One phase alone; those before it are as the context says."""
    if (unused := phase.unused(context)) is not None:
        return Look(phase, skipped=unused)
    if phase.name not in selected:
        stale, damaged = _left_out(context, phase)
        return Look(phase, skipped=NOT_SELECTED, stale=stale, damaged=damaged)
    due, done = [], []
    for item in phase.items(context):
        why = why_due(context, phase, item)
        if phase.name in force and why in (None, RESUMED):
            why = FORCED
        if why is None:
            done.append(item)
        else:
            due.append((item, why))
    if not due and not done:
        return Look(phase, skipped=NOTHING)
    records = [context.record(phase.name, item.name) for item in done]
    freed = any(record is not None and _freed(context, record) for record in records)
    return Look(phase, tuple(due), tuple(done), freed=freed)


def why_due(context: Context, phase: Phase, item: Item) -> str | None:
    """Why an item has to be made, None when its record is of the same key and its files are what they were."""
    record = context.record(phase.name, item.name)
    started = context.state.started.get(phase.name, {}).get(item.name)
    waiting = _waiting(item)
    if started is not None and waiting is None and started.key == key_of(item.parameters, item.inputs):
        return RESUMED
    if record is None:
        return NEW
    if waiting is not None:
        return waiting
    if found := changes(record, item):
        return found
    return None if _freed(context, record) else context.state.damage(record)


def _waiting(item: Item) -> str | None:
    """'after calibrate' for an item that reads what is still to be made."""
    phases = sorted({digest.removeprefix(PENDING) for digest in item.inputs.values() if digest.startswith(PENDING)})
    return f"after {' and '.join(phases)}" if phases else None


def _left_out(context: Context, phase: Phase) -> tuple[str | None, str | None]:
    """`stale` and `damaged` of a phase that is left out. Raises InputError for another source that cannot be read; one
    that was used and has gone is missed by the phase that reads it."""
    try:
        items = phase.items(context)
    except UsageError:  # of a phase before it that never ran: who reads that says so
        return None, None
    except InputError:
        if phase.name == "source" and context.state.about.get("source") != anywhere(context.config)["source"]:
            raise
        return None, None
    stale, damaged = [], []
    for item in items:
        record = context.record(phase.name, item.name)
        if record is None:
            continue
        if (why := _waiting(item) or changes(record, item)) is not None:
            stale.append((item.name, why))
        elif not _freed(context, record) and (why := context.state.damage(record)) is not None:
            damaged.append((item.name, why))
    return grouped(stale, 0) or None, grouped(damaged, 0) or None


def _refuse_stale(context: Context, looks: Sequence[Look]) -> None:
    """UsageError where a phase that is asked for, even if it finds nothing to do, builds on what one that is left out
    would make in another way now."""
    known = {one.phase.name: one for one in looks}
    for one in looks:
        for other, directly in _needed(known, one.phase) if one.skipped is None else ():
            why = other.stale or (other.damaged if directly and one.due else None)
            if why is not None:
                raise UsageError(
                    f"{one.phase.name} builds on {other.phase.name}, which is left out of this run and out of date: "
                    f"{why}",
                    hint=f"--from {other.phase.name} runs it and what follows; or give the settings it was made with",
                )


def _needed(known: Mapping[str, Look], phase: Phase, directly: bool = True) -> Iterator[tuple[Look, bool]]:
    """The phases whose files one reads, and (directly: False) those that these were made with, the nearest first."""
    for name in phase.needs:
        if (one := known.get(name)) is not None:
            yield one, directly
            # of a GGUF nothing is converted: who would read the converted file reads the source
            through = name == "convert" and one.skipped not in (None, NOT_SELECTED)
            yield from _needed(known, one.phase, directly and through)


def _needed_again(context: Context, one: Look, later: Sequence[Look]) -> Look:
    """A phase whose file was deleted has to make it again when a later one reads it."""
    if not one.freed:
        return one
    reader = next(
        (other.phase.name for other in later if other.due and _reads(context, other.phase, one.phase.name)), None
    )
    if reader is None:
        return one
    why = f"{reader} reads its file, which was deleted"
    records = {item.name: context.record(one.phase.name, item.name) for item in one.done}
    released = {name for name, record in records.items() if record is not None and _freed(context, record)}
    due = [(item, why) for item in one.done if item.name in released]
    return replace(one, due=(*one.due, *due), done=tuple(i for i in one.done if i.name not in released), freed=False)


def lacking(context: Context, phase: Phase) -> str | None:
    """The phase before, source or convert, whose files this one reads although they were deleted."""
    for before in ("source", "convert"):
        record = context.record(before)
        if record is not None and _freed(context, record) and _reads(context, phase, before):
            return before
    return None


def _reads(context: Context, phase: Phase, before: str) -> bool:
    """Whether a phase reads the weights that one before it has, source or convert."""
    if before == "source" and not context.is_gguf:
        return phase.name == "convert"
    return phase.weights(context)


def _freed(context: Context, record: Record) -> bool:
    """Whether files were deleted that can be had again: by converting, or those of the hub's cache by downloading."""
    if not record.released and "commit" not in record.facts:
        return False
    missing = context.state.missing(record)
    return bool(missing) and (record.released or not any(path.is_relative_to(context.work) for path in missing))
