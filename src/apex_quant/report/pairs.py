"""Paired comparisons between the files of a report: each made once, and refusals kept with their reason."""

from __future__ import annotations

import re
from collections.abc import Sequence

from apex_quant.errors import ApexError
from apex_quant.evaluation.compare import NOT_SHOWN, Pair, compare
from apex_quant.evaluation.schema import Results
from apex_quant.report.entry import Entry

METRIC = {"kld": "kld", "kld_p99_9": "p99_9", "top1": "top1_agreement", "ppl": "ppl"}
"""What evaluation.compare calls a quantity."""


class Pairs:
    """`of` compares two files; `made` counts the comparisons, `refused` says of whom none was possible and why."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str], Pair | None] = {}
        self.refused: dict[tuple[str, str], str] = {}

    @property
    def made(self) -> int:
        """Intervals that were looked at."""
        return sum(pair is not None and pair.low is not None for pair in self._known.values())

    def of(self, a: Entry, b: Entry, key: str) -> Pair | None:
        """a against b in a quantity; None where they cannot be paired (`refused` says why)."""
        where = a.label, b.label, key
        if where not in self._known:
            self._known[where] = self._compare(a, b, key)
        return self._known[where]

    def shown(self, a: Entry, b: Entry, key: str) -> bool | None:
        """Whether a difference is shown; None where they cannot be paired."""
        pair = self.of(a, b, key)
        return None if pair is None else pair.verdict != NOT_SHOWN

    def _compare(self, a: Entry, b: Entry, key: str) -> Pair | None:
        if any(entry.source_of(key).per_token is None for entry in (a, b)):
            whose = " and ".join(entry.label for entry in (a, b) if entry.source_of(key).per_token is None)
            self.refused.setdefault((a.label, b.label), f"no numbers per token of {whose}, so nothing can be paired")
            return None
        try:
            return compare([_called(a, key), _called(b, key)], [METRIC.get(key, key)])[0]
        except ApexError as error:
            self.refused.setdefault((a.label, b.label), _without_folders(error.message, (a, b), key))
            return None


def _called(entry: Entry, key: str) -> Results:
    """The results with the label of this report as their name, which sentences use."""
    source = entry.source_of(key)
    label = re.sub(r"[/\\]", "-", entry.label)
    return source.model_copy(update={"model": source.model.model_copy(update={"path": label})})


def _without_folders(message: str, entries: Sequence[Entry], key: str) -> str:
    """Reports are published: no folder of this machine in them."""
    for entry in entries:
        path = entry.source_of(key).path
        if path is not None:
            message = message.replace(str(path.parent) + "/", "")
    return message
