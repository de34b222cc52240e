"""Which numbers may stand on one axis: those measured on the same text, against the same reference, on one machine.

Facts are compared where both files state them. Most files decide what the axis is about; a file that states something
else is set aside with a sentence, and one that does not say is shown as not verified.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apex_quant.report.entry import Entry
from apex_quant.report.quantities import QUANTITIES, Number

Facts = dict[str, Any]

_SAID = {
    "reference": "another reference",
    "texts": "other texts",
    "ctx": "another context",
    "scored": "other positions",
    "n": "another number of tokens or tasks",
    "file_sha256": "other tasks",
    "device": "another device",
    "threads": "another number of threads",
    "test": "another test",
    "source": "another source",
}


@dataclass(frozen=True)
class Shown:
    """A number of a file on an axis; `verified`: its file states the facts that make it comparable."""

    entry: Entry
    number: Number
    verified: bool


@dataclass(frozen=True)
class SetAside:
    """A file whose number is about something else."""

    entry: Entry
    number: Number
    sentence: str


def facts_of(entry: Entry, key: str, found: Number) -> Facts:
    """What the number is about, as far as its file says."""
    group, source = QUANTITIES[key].group, entry.source_of(key)
    value: Mapping[str, Any] = source.metrics.get(QUANTITIES[key].place[0], {})
    facts: Facts = {}
    settings = source.settings
    if group in ("kld", "ppl"):
        facts = {name: settings.get(name) for name in ("texts", "ctx", "scored")} | {
            "n": _tokens(source.metrics, group)
        }
    if group == "kld" and source.reference:
        facts["reference"] = source.reference.get("model_sha256") or source.reference.get("sha256")
    if group == "speed":
        facts = {name: value.get(name) for name in ("device", "threads")} | {"test": found.test}
    if group == key and group not in ("kld", "ppl"):
        facts = {"file_sha256": value.get("file_sha256"), "n": found.n}
    imported = entry.imported
    if imported is not None:
        facts["source"] = imported.get("source")
    return {name: fact for name, fact in facts.items() if fact is not None}


def comparable(entries: Sequence[Entry], key: str) -> tuple[list[Shown], list[SetAside]]:
    """The numbers of `key` that may be shown together, in the order of entries, and those that may not."""
    rows = [
        (entry, found, facts_of(entry, key, found)) for entry in entries if (found := entry.number(key)) is not None
    ]
    if not rows:
        return [], []
    counts = Counter(json.dumps(facts, sort_keys=True, default=str) for _, _, facts in rows)
    most = counts.most_common(1)[0][0]
    usual = next(facts for _, _, facts in rows if json.dumps(facts, sort_keys=True, default=str) == most)
    shown, aside = [], []
    for entry, found, facts in rows:
        other = [name for name in facts if name in usual and facts[name] != usual[name]]
        if other and other != ["source"]:
            what = " and ".join(_SAID.get(name, name) for name in other if name != "source")
            title = QUANTITIES[key].title
            aside.append(
                SetAside(entry, found, f"{entry.label}: {title} is of {what}, so it is not shown with the rest")
            )
        else:
            stated = {name for name in usual if name != "source"}
            shown.append(Shown(entry, found, bool(stated) and stated <= set(facts) and "source" not in facts))
    return shown, aside


def _tokens(metrics: Mapping[str, Any], group: str) -> Any:
    value = metrics.get(group, {})
    if group == "kld":
        value = value.get("mean") if isinstance(value, Mapping) else None
    return value.get("n") if isinstance(value, Mapping) else None
