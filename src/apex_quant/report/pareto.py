"""Which files nothing else beats on both counts, and what a rival offers at the same number of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from apex_quant.report.comparable import Shown
from apex_quant.report.family import OURS, REFERENCE
from apex_quant.report.gather import Gathered


@dataclass(frozen=True)
class EqualBytes:
    """A file of ours beside what the rival's files offer at its size.

    `rival`: KLD by linear interpolation of its logarithm over bytes between the rival's files `below` and `above`;
    `low`, `high`: the ratio ours / rival with the ends of both intervals, None where one is unknown. `ratio` < 1: ours
    is lower.
    """

    shown: Shown
    family: str
    rival: float
    ratio: float
    low: float | None
    high: float | None
    below: Shown
    above: Shown


def front(rows: Sequence[Shown]) -> list[Shown]:
    """The files with a lower value than every file of at most their size, smallest first; equal sizes: the lowest.

    By the values alone: the intervals of neighbours may overlap, in which case no order of them is shown.
    """
    best, found = math.inf, []
    for one in sorted(
        (one for one in rows if one.entry.bytes), key=lambda one: (one.entry.bytes or 0, one.number.value)
    ):
        if one.number.value < best:
            best = one.number.value
            found.append(one)
    return found


def rivals(gathered: Gathered, key: str = "kld", *, ours: str | None = None) -> list[EqualBytes]:
    """Each file of ours against each other family that has files below and above its size, in the order of sizes.

    The rival's files are those on its own front, so that it is given its best; nothing is said beyond their range.
    """
    rows = [one for one in gathered.shown(key) if one.entry.bytes and one.number.value > 0]
    mine = ours or (OURS if OURS in gathered.families else next(iter(gathered.families), OURS))
    found = []
    for family in gathered.families:
        if family in (mine, REFERENCE):
            continue
        theirs = front([one for one in rows if one.entry.family == family])
        for one in sorted((one for one in rows if one.entry.family == mine), key=lambda one: one.entry.bytes or 0):
            for below, above in pairwise(theirs):
                if (below.entry.bytes or 0) <= (one.entry.bytes or 0) <= (above.entry.bytes or 0):
                    found.append(_between(one, family, below, above))
                    break
    return found


def _between(one: Shown, family: str, below: Shown, above: Shown) -> EqualBytes:
    first, last, here = (side.entry.bytes or 0 for side in (below, above, one))
    share = (here - first) / (last - first)

    def at(a: float, b: float) -> float:
        return math.exp((1 - share) * math.log(a) + share * math.log(b))

    rival = at(below.number.value, above.number.value)
    ratio = one.number.value / rival
    ends = [side.number.interval() for side in (one, below, above)]
    low = high = None
    known = [end for end in ends if end is not None and end[0] > 0]
    if len(known) == len(ends):
        mine, a, b = known
        low, high = mine[0] / at(a[1], b[1]), mine[1] / at(a[0], b[0])
    return EqualBytes(one, family, rival, ratio, low, high, below, above)
