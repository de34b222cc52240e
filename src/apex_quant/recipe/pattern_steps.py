"""The steps that patterns.py compiles patterns to: sets of positions in a name, one bit of an int each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final


class Text:
    """A name's bytes with the positions of character classes found so far."""

    __slots__ = ("classes", "data", "done", "full", "length")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.length = len(data)
        self.full = (2 << self.length) - 1
        self.classes: dict[bytes, int] = {}
        self.done: dict[tuple[Step, int], int] = {}

    def positions(self, table: bytes) -> int:
        """Bits of the positions whose byte the table maps to b'1' (all others to b'0')."""
        found = self.classes.get(table)
        if found is None:
            found = self.classes[table] = int(b"0" + self.data.translate(table)[::-1], 2)
        return found


Step = Callable[[Text, int], int]
"""(text, bits of positions before) -> bits of positions after; bit n is the place before byte n."""


def _table(members: frozenset[int]) -> bytes:
    return bytes(ord("1") if byte in members else ord("0") for byte in range(256))


def literal(wanted: bytes) -> Step:
    def step(text: Text, mask: int) -> int:
        result = 0
        at = text.data.find(wanted)
        while at >= 0:
            if mask >> at & 1:
                result |= 1 << (at + len(wanted))
            at = text.data.find(wanted, at + 1)
        return result

    return step


def one_of(members: frozenset[int]) -> Step:
    table = _table(members)
    return lambda text, mask: (mask & text.positions(table)) << 1


def any_number_of(members: frozenset[int]) -> Step:
    """Closure over single characters by carry propagation (MatchStar of Cameron et al., Parabix)."""
    table = _table(members)

    def step(text: Text, mask: int) -> int:
        run = text.positions(table)
        return (((mask & run) + run) ^ run) | mask

    return step


def sequence(steps: list[Step]) -> Step:
    if len(steps) == 1:
        return steps[0]

    def step(text: Text, mask: int) -> int:
        for part in steps:
            mask = part(text, mask)
            if not mask:
                break
        return mask

    return step


def either(branches: list[Step]) -> Step:
    if len(branches) == 1:
        return branches[0]

    def step(text: Text, mask: int) -> int:
        result = 0
        for branch in branches:
            result |= branch(text, mask)
        return result

    return step


def _remembered(body: Step) -> Step:
    """The same step, done once per set of positions in a search: else nesting would multiply the work."""

    def step(text: Text, mask: int) -> int:
        found = text.done.get((body, mask))
        if found is None:
            found = text.done[body, mask] = body(text, mask)
        return found

    return step


def repeat(body: Step, low: int, high: int | None) -> Step:
    once = _remembered(body)

    def step(text: Text, mask: int) -> int:
        for _ in range(low):
            before, mask = mask, once(text, mask)
            if mask == before:  # positions only move forward, so nothing changes any more
                break
        rounds = text.length + 1 if high is None else high - low
        for _ in range(rounds):
            before, mask = mask, mask | once(text, mask)
            if mask == before:
                break
        return mask

    return step


def lookahead(body: Step, wanted: bool) -> Step:
    ahead = _remembered(body)

    def step(text: Text, mask: int) -> int:
        result = 0
        for at in range(text.length + 1):
            if mask >> at & 1 and bool(ahead(text, 1 << at)) == wanted:
                result |= 1 << at
        return result

    return step


_WORD_TABLE: Final = _table(frozenset(b"0123456789_ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"))


def word_boundary(wanted: bool) -> Step:
    def step(text: Text, mask: int) -> int:
        words = text.positions(_WORD_TABLE)
        edges = words ^ (words << 1)
        return mask & (edges if wanted else text.full & ~edges)

    return step


def at_start(text: Text, mask: int) -> int:
    return mask & 1


def at_end(text: Text, mask: int) -> int:
    return mask & (1 << text.length)
