"""What would run and why, told from the state alone: for the run itself, for --dry-run and for `apex status`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from apex_quant.pipeline.context import Context
from apex_quant.pipeline.phases import PENDING, Item, Phase
from apex_quant.pipeline.reasons import changes, grouped
from apex_quant.pipeline.state import key_of

NOT_SELECTED: Final = "not asked for"
RESUMED: Final = "goes on where an earlier run stopped"
FORCED: Final = "asked for with --force"


@dataclass(frozen=True)
class Look:
    """What a phase would do: the items that are due with the reason of each, those that are not, or why it is left
    out as a whole. `freed`: it is done, but its file was deleted to save space."""

    phase: Phase
    due: tuple[tuple[Item, str], ...] = ()
    done: tuple[Item, ...] = ()
    skipped: str | None = None
    freed: bool = False

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

    Raises UsageError when a selected phase needs one that never ran and is not selected.
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
    return [_needed_again(context, one, found[number + 1 :]) for number, one in enumerate(found)]


def look_at(context: Context, phase: Phase, selected: Collection[str], force: Collection[str] = ()) -> Look:
    """One phase alone; those before it are as the context says."""
    if (unused := phase.unused(context)) is not None:
        return Look(phase, skipped=unused)
    if phase.name not in selected:
        return Look(phase, skipped=NOT_SELECTED)
    due, done = [], []
    for item in phase.items(context):
        why = why_due(context, phase, item) or (FORCED if phase.name in force else None)
        if why is None:
            done.append(item)
        else:
            due.append((item, why))
    records = [context.record(phase.name, item.name) for item in done]
    freed = any(record is not None and record.released for record in records)
    return Look(phase, tuple(due), tuple(done), freed=freed)


def why_due(context: Context, phase: Phase, item: Item) -> str | None:
    """Why an item has to be made, None when its record is of the same key and its files are what they were."""
    record = context.record(phase.name, item.name)
    started = context.state.started.get(phase.name, {}).get(item.name)
    waiting = sorted({digest.removeprefix(PENDING) for digest in item.inputs.values() if digest.startswith(PENDING)})
    if started is not None and not waiting and started.key == key_of(item.parameters, item.inputs):
        return RESUMED
    if record is None:
        return "not made yet"
    if waiting:
        return f"after {' and '.join(waiting)}"
    if found := changes(record, item):
        return found
    return None if record.released else context.state.damage(record)


def _needed_again(context: Context, one: Look, later: Sequence[Look]) -> Look:
    """A phase whose file was deleted has to make it again when a later one reads it."""
    if not one.freed:
        return one
    reader = next((other.phase.name for other in later if other.due and other.phase.weights(context)), None)
    if reader is None:
        return one
    why = f"{reader} reads its file, which was deleted to save space"
    released = {item.name for item in one.done if _released(context, one.phase, item)}
    due = [(item, why) for item in one.done if item.name in released]
    return replace(one, due=(*one.due, *due), done=tuple(i for i in one.done if i.name not in released), freed=False)


def _released(context: Context, phase: Phase, item: Item) -> bool:
    record = context.record(phase.name, item.name)
    return record is not None and record.released
