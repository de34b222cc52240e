"""Why an item runs, in words: the exact keys in which it differs from what was made, grouped for one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from apex_quant.pipeline.phases import Item
from apex_quant.pipeline.state import Record

_LONGEST: Final = 60
_MOST: Final = 3


def changes(record: Record, item: Item) -> str | None:
    """What of an item is other than when it was made; None when nothing is.

    >>> changes(Record("", {"tokens": 500}, {}), Item("", {"tokens": 600}, {}))
    'tokens is 600, was 500'
    """
    found = [f"{key} is {now}, was {was}" for key, was, now in _differences("", record.parameters, item.parameters)]
    for label in sorted({*record.inputs, *item.inputs}):
        was, now = record.inputs.get(label), item.inputs.get(label)
        if was != now:
            found.append(_content(label, was, now))
    if not found:
        return None
    more = f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
    return "; ".join(found[:_MOST]) + more


def grouped(due: Sequence[tuple[str, str]], done: int) -> str:
    """'2 of 3: i-quality, i-compact: imatrix changed', one reason for all that share it; '' for none."""
    reasons: dict[str, list[str]] = {}
    for name, why in due:
        reasons.setdefault(why, []).append(name)
    if not due:
        return ""
    total = len(due) + done
    count = f"{len(due)} of {total}: " if done else ""
    if len(reasons) == 1 and not done:
        return next(iter(reasons))
    parts = [f"{', '.join(name or 'it' for name in names)}: {why}" for why, names in reasons.items()]
    return count + "; ".join(parts)


def _content(label: str, was: str | None, now: str | None) -> str:
    if was is None:
        return f"{label} is new"
    if now is None:
        return f"{label} is left out"
    return f"{label} changed (sha256 {now[:8]}, was {was[:8]})"


def _differences(prefix: str, was: Any, now: Any) -> list[tuple[str, str, str]]:
    """(key, what it was, what it is), dotted keys for mappings inside."""
    if isinstance(was, dict) and isinstance(now, dict):
        rows = []
        for key in sorted({*was, *now}):
            name = f"{prefix}.{key}" if prefix else str(key)
            if key in was and key in now:
                rows += _differences(name, was[key], now[key])
            else:
                rows.append((name, _shown(was[key]) if key in was else "unset",
                             _shown(now[key]) if key in now else "unset"))  # fmt: skip
        return rows
    return [] if was == now else [(prefix, _shown(was), _shown(now))]


def _shown(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
