"""What the solver is asked: groups of tensors, what each type costs them, and limits; and a bound to check it by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from apex_quant.errors import UsageError
from apex_quant.gguf import GGMLType


@dataclass(frozen=True, slots=True)
class Option:
    """One type for a group: padded bytes, cost (what adds up in the cost model), seconds per token."""

    type: GGMLType
    bytes: int
    cost: float
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that get one type together, with what each type costs them."""

    tensors: tuple[str, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a solution may use at most; None: as much as it likes."""

    bytes: int | None = None
    cost: float | None = None
    seconds: float | None = None


class InfeasibleError(UsageError):
    """No choice is within the limits. `least`: the smallest value of the broken limit that has one."""

    def __init__(self, what: str, least: float) -> None:
        super().__init__(f"no choice of types keeps {what} under the limit: the least is {least:.12g}")
        self.what, self.least = what, least


def prune(group: Group, *, timed: bool = False) -> Group:
    """Without the options that another one beats or equals in bytes, cost and (`timed`) seconds."""
    kept: list[Option] = []
    for option in sorted(group.options, key=lambda o: (o.bytes, o.cost, o.seconds)):
        if not any(k.cost <= option.cost and (not timed or k.seconds <= option.seconds) for k in kept):
            kept.append(option)
    return replace(group, options=tuple(kept))


def lagrangian_bound(groups: Sequence[Group], limit: int, price: float) -> float:
    """A cost that no choice of at most `limit` bytes is below, by any `price` >= 0 of a byte (Everett 1963).

    sum over groups of min over options (cost + price x bytes), minus price x limit.
    """
    return math.fsum(min(o.cost + price * o.bytes for o in group.options) for group in groups) - price * limit
