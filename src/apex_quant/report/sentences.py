"""What may be said of the files: only differences whose paired interval excludes zero, and whom they were looked for.

A larger file that diverges less is no news. So each file is compared with the best one that is not larger: who has
lower divergence and takes no more bytes is better in a way that can be quoted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from apex_quant.evaluation.compare import NOT_SHOWN, Pair
from apex_quant.report.entry import Entry
from apex_quant.report.gather import Gathered
from apex_quant.report.pairs import Pairs
from apex_quant.report.pareto import front
from apex_quant.report.quantities import QUANTITIES, TASK_KEYS, Number

MOST_PAIRS: Final = 40
"""Compared for the summary; beyond that the nearest in size."""
MOST_QUOTED: Final = 8
EQUAL_SIZE: Final = 1.001
"""Sizes up to this ratio count as equal: headers of files with and without an importance matrix differ by less."""
_ORDER: Final = ("kld", "ppl")
_ALSO: Final = ("kld_p99_9", "top1", "ppl", *TASK_KEYS)


@dataclass(frozen=True)
class Claim:
    """One earned sentence: `winner` has lower divergence (or perplexity) than `loser` and is not larger.

    `also`: what the same two show in other quantities, also where the loser leads and where nothing is shown.
    """

    winner: Entry
    loser: Entry
    pair: Pair
    also: tuple[Pair, ...] = ()

    @property
    def sentence(self) -> str:
        return self.pair.sentence

    def to_json(self) -> dict[str, Any]:
        return {
            "winner": self.winner.label,
            "loser": self.loser.label,
            "sentence": self.sentence,
            "pair": self.pair.to_json(),
            "also": [pair.to_json() for pair in self.also],
        }


@dataclass
class Sentences:
    """`claims` may be quoted, `ties` are pairs without a shown difference, `refused` could not be compared.

    `front`: files with a lower value than every file of at most their size, largest first, by values alone.
    `files`: how many have a value, the reference not counted; `asked`: how many pairs of them there are where one is
    not larger and has the lower value, `made`: how many intervals were looked at.
    """

    key: str | None
    claims: list[Claim] = field(default_factory=list)
    ties: list[Pair] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    front: list[tuple[Entry, Number]] = field(default_factory=list)
    files: int = 0
    asked: int = 0
    made: int = 0
    level: float = 0.95

    @property
    def quoted(self) -> list[str]:
        """The sentences."""
        return [claim.sentence for claim in self.claims]

    @property
    def caution(self) -> str:
        """How many were looked at, which a reader must know: of many intervals some exclude zero by chance."""
        if not self.made:
            return ""
        wrong = 100 * (1 - self.level)
        return (
            f"{self.made} paired interval{'s' if self.made > 1 else ''} at {100 * self.level:g} % each: where there is "
            f"no difference, about {wrong:.3g} % of them exclude zero all the same."
        )


def sentences(gathered: Gathered, pairs: Pairs | None = None) -> Sentences:
    """The claims that the results support, nearest in size first. Reads the numbers per token of those it compares."""
    pairs = pairs or Pairs()
    key = ranked_by(gathered)
    found = Sentences(key)
    if key is None:
        return found
    shown = [one for one in gathered.shown(key) if not one.entry.is_reference]
    found.files = len(shown)
    found.front = [(one.entry, one.number) for one in reversed(front(shown))]
    candidates = _candidates([one.entry for one in shown], key)
    found.asked = len(candidates)
    for a, b in candidates[:MOST_PAIRS]:
        pair = pairs.of(a, b, key)
        if pair is None:
            reason = pairs.refused[a.label, b.label]
            found.refused += [reason] if reason not in found.refused else []
        elif pair.verdict == NOT_SHOWN:
            found.ties.append(pair)
        elif pair.better_result == pair.a and len(found.claims) < MOST_QUOTED:
            found.claims.append(Claim(a, b, pair, _also(pairs, a, b, key)))
    found.made = pairs.made
    return found


def ranked_by(gathered: Gathered) -> str | None:
    """The quantity that says which file is better: mean KLD, else perplexity; None when neither was measured."""
    return next((key for key in _ORDER if gathered.shown(key)), None)


def _candidates(entries: Sequence[Entry], key: str) -> list[tuple[Entry, Entry]]:
    """For each file the one with the lowest value among those that are not larger, nearest in size first."""
    sized = [(entry.bytes, found.value, entry) for entry in entries if entry.bytes and (found := entry.number(key))]
    rows = []
    for size, value, entry in sized:
        other = [row for row in sized if row[0] <= size * EQUAL_SIZE and row[1] < value]
        if other:
            best = min(other, key=lambda row: (row[1], row[0]))
            rows.append((size / best[0], best[2], entry))
    return [(a, b) for _, a, b in sorted(rows, key=lambda row: row[0])]


def _also(pairs: Pairs, a: Entry, b: Entry, key: str) -> tuple[Pair, ...]:
    shared = [one for one in _ALSO if one != key and one in QUANTITIES and a.number(one) and b.number(one)]
    return tuple(pair for one in shared if (pair := pairs.of(a, b, one)) is not None)
