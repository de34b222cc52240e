"""The exact choice of one option for every group under limits: a multiple-choice knapsack.

min sum cost(g, option of g)  where  sum bytes <= limit  (and sum seconds <= limit)

is a small mixed-integer programme (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, chapter 11), solved by
HiGHS through scipy.optimize.milp. Bytes are whole numbers and every answer is checked with whole numbers, so that no
tolerance of the solver passes a limit. The relaxation gives the price of a byte; any price gives a bound that a
reader can check by hand (`lagrangian_bound`).
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apex_quant.allocation.problem import Group, InfeasibleError, Limits
from apex_quant.errors import ApexError
from apex_quant.gguf import GGMLType

SECONDS: Final = 60.0
"""How long HiGHS may search before it answers with what it has, and with how far that may be from the best."""
RELATIVE_GAP: Final = 1e-7
_SCALE: Final = 1e3  # objective at the relaxation's optimum: HiGHS stops at an absolute gap of 1e-6 too
_SLACK: Final = 1e4
_TOLERANCE: Final = 1e-12  # of sums of floats
_NOTHING: Final = 1e-100  # a size below which there is nothing to divide by
_TRIES: Final = 8
_WHAT: Final = ("bytes", "cost", "seconds")

Objective = Literal["cost", "bytes"]


@dataclass(frozen=True)
class Solution:
    """The choice of `solve`, one option for each group.

    `bound`: no choice within the limits has a lower objective. `gap` = (objective - bound) / objective; 0 is proved
    optimal. `price`: how much the objective falls for one more unit of the limit (cost per byte when the cost is
    minimised), from the relaxation's dual; 0 where the limit does not bind. `seconds_price` likewise.
    """

    picks: tuple[int, ...]
    bytes: int
    cost: float
    seconds: float
    bound: float
    gap: float
    price: float
    seconds_price: float
    proved: bool
    solve_seconds: float

    def types(self, groups: Sequence[Group]) -> dict[str, GGMLType]:
        """The type of every tensor."""
        return {
            name: group.options[pick].type
            for group, pick in zip(groups, self.picks, strict=True)
            for name in group.tensors
        }


class SolverError(ApexError):
    """HiGHS answered what cannot be."""


def solve(
    groups: Sequence[Group],
    limits: Limits,
    *,
    objective: Objective = "cost",
    seconds: float = SECONDS,
    relative_gap: float = RELATIVE_GAP,
) -> Solution:
    """The choice with the least `objective` within `limits`.

    Raises InfeasibleError with the least value of the limit that cannot be kept, ValueError for an empty group or
    costs that are not finite.
    """
    started = time.monotonic()
    problem = _Problem(groups, limits, objective)
    relaxed = problem.relaxation()
    problem.reduce(relaxed)
    picks, bound, proved = problem.integral(relaxed, seconds, relative_gap)
    value = problem.value(picks)
    bound = min(value, max(bound, relaxed.value))
    gap = (value - bound) / abs(value) if abs(value) > _NOTHING else 0.0
    rows = [group.options[pick] for group, pick in zip(groups, picks, strict=True)]
    return Solution(
        picks=picks,
        bytes=sum(o.bytes for o in rows),
        cost=math.fsum(o.cost for o in rows),
        seconds=math.fsum(o.seconds for o in rows),
        bound=bound,
        gap=gap,
        price=relaxed.prices.get("cost" if objective == "bytes" else "bytes", 0.0),
        seconds_price=relaxed.prices.get("seconds", 0.0),
        proved=proved,
        solve_seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Relaxed:
    """The linear relaxation: optimal value in the objective's own unit, prices of the limits, shares of options."""

    value: float
    prices: dict[str, float]
    shares: NDArray[np.float64]


class _Row(NamedTuple):
    """One limit: how much more than its group's least an option uses, and how much more may be used in all.

    `excess` and `slack` are whole numbers of `unit` for bytes; else scaled so that `slack` is _SLACK, far above the
    solver's tolerance of 1e-6.
    """

    what: str
    excess: NDArray[np.float64]
    slack: float
    unit: float


class _Problem:
    """The programme's arrays. Everything counts from each group's least, so that numbers are of one size."""

    def __init__(self, groups: Sequence[Group], limits: Limits, objective: Objective) -> None:
        from scipy.sparse import csr_array

        if not groups or any(not group.options for group in groups):
            raise ValueError("no groups, or a group without options")
        self.groups, self.limits, self.objective = groups, limits, objective
        sizes = [len(group.options) for group in groups]
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        options = [option for group in groups for option in group.options]
        self.owner = np.repeat(np.arange(len(groups)), sizes)
        self.columns: dict[str, NDArray[Any]] = {
            "bytes": np.array([o.bytes for o in options], dtype=np.int64),
            "cost": np.array([o.cost for o in options], dtype=np.float64),
            "seconds": np.array([o.seconds for o in options], dtype=np.float64),
        }
        if not all(np.isfinite(column).all() for column in self.columns.values()):
            raise ValueError("costs and seconds must be finite")
        self.rows = [self._row(what) for what in _WHAT if getattr(limits, what) is not None]
        self.open = np.ones(len(options), dtype=bool)
        for row in self.rows:  # what alone passes a limit is no option
            self.open &= row.excess <= row.slack
        least = self._least(self.columns[objective])
        self.zero = float(least.sum())
        self.goal = (self.columns[objective] - least[self.owner]).astype(np.float64)
        self.choice = csr_array(
            (np.ones(len(options)), (self.owner, np.arange(len(options)))), shape=(len(groups), len(options))
        )

    def _least(self, column: NDArray[Any]) -> NDArray[Any]:
        return np.minimum.reduceat(column, self.starts[:-1])

    def _row(self, what: str) -> _Row:
        """Raises InfeasibleError where the least of every group is too much."""
        column, limit = self.columns[what], getattr(self.limits, what)
        least = self._least(column)
        rest = column - least[self.owner]
        if what == "bytes":
            base = int(least.sum())
            if base > limit:
                raise InfeasibleError(what, base)
            common = max(1, int(np.gcd.reduce(rest)))
            return _Row(what, (rest // common).astype(np.float64), float((limit - base) // common), common)
        total = math.fsum(least)
        slack = limit - total
        if slack < -_TOLERANCE * abs(total):
            raise InfeasibleError(what, total)
        slack = max(slack, _TOLERANCE * abs(total))
        unit = _unit(slack) / _SLACK
        return _Row(what, rest / unit, slack / unit, unit)

    def value(self, picks: Sequence[int]) -> float:
        """The objective of a choice."""
        return math.fsum(getattr(g.options[pick], self.objective) for g, pick in zip(self.groups, picks, strict=True))

    def relaxation(self) -> _Relaxed:
        """Shares instead of choices: a lower bound, and the prices of the limits. Raises InfeasibleError."""
        from scipy.optimize import linprog

        scale = _norm(self.goal[self.open])
        with _no_output():
            found = linprog(
                self.goal * self.open / scale,
                A_ub=np.array([row.excess * self.open for row in self.rows]) if self.rows else None,
                b_ub=[row.slack for row in self.rows] if self.rows else None,
                A_eq=self.choice,
                b_eq=np.ones(len(self.groups)),
                bounds=np.stack([np.zeros(self.goal.size), self.open], axis=1),
                method="highs",
            )
        if found.status == 2:
            raise InfeasibleError(" and ".join(row.what for row in self.rows), math.nan)
        if found.x is None:
            raise SolverError(f"HiGHS gave no relaxation: {found.message}")
        duals = found.ineqlin.marginals if self.rows else ()
        prices = {
            row.what: max(0.0, -float(dual)) * scale / row.unit for row, dual in zip(self.rows, duals, strict=True)
        }
        return _Relaxed(float(found.fun) * scale + self.zero, prices, found.x)

    def reduce(self, relaxed: _Relaxed) -> None:
        """Close the options that no best choice has: those whose bound, at the relaxation's prices, is above the value
        of a choice that is known (Dyer, Kayal, Walker 1984). Only a few tens of a thousand stay open."""
        picks = self._improved(self._rounded(relaxed))
        if self._over(picks):
            return
        reduced = self.goal.copy()
        for row in self.rows:
            reduced += relaxed.prices[row.what] * row.unit * row.excess
        reduced = np.where(self.open, reduced, np.inf)
        least = self._least(reduced)
        paid = math.fsum(relaxed.prices[row.what] * row.unit * row.slack for row in self.rows)
        bound = math.fsum(least) - paid
        known = math.fsum(self.goal[self.starts[:-1] + np.array(picks)])
        # the margin keeps what float sums cannot tell from the best
        margin = 1e-9 * (abs(known) + abs(paid) + float(np.abs(least).sum()))
        self.open &= bound + reduced - least[self.owner] <= known + margin

    def _improved(self, picks: Sequence[int]) -> list[int]:
        """A choice made better while single options fit into what is left."""
        places = self.starts[:-1] + np.array(picks, dtype=np.int64)
        for _ in range(len(places)):
            gain = np.where(self.open, self.goal[places][self.owner] - self.goal, -np.inf)
            for row in self.rows:
                left = row.slack - math.fsum(row.excess[places])
                gain = np.where(row.excess - row.excess[places][self.owner] <= left, gain, -np.inf)
            best = int(np.argmax(gain))
            if not gain[best] > 0:
                break
            places[self.owner[best]] = best
        return [int(place) for place in places - self.starts[:-1]]

    def integral(self, relaxed: _Relaxed, seconds: float, gap: float) -> tuple[tuple[int, ...], float, bool]:
        """(picks, lower bound of the objective, whether HiGHS proved it to be within `gap`)."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        over_zero = relaxed.value - self.zero
        most = _norm(self.goal[self.open])
        scale = _SCALE / _unit(max(over_zero, 1e-9 * most))
        bound, until = -math.inf, time.monotonic() + seconds
        less = dict.fromkeys((row.what for row in self.rows), 0.0)
        for attempt in range(_TRIES):
            constraints = [LinearConstraint(self.choice, 1, 1)]
            for row in self.rows:
                constraints.append(
                    LinearConstraint((row.excess * self.open)[None, :], -np.inf, row.slack - less[row.what])
                )
            with _no_output():
                found = milp(
                    self.goal * scale * self.open,
                    integrality=np.ones(self.goal.size),
                    bounds=Bounds(0, self.open.astype(float)),
                    constraints=constraints,
                    options={"time_limit": max(1.0, until - time.monotonic()), "mip_rel_gap": gap},
                )
            if not attempt and found.mip_dual_bound is not None:  # of the limits as they are
                bound = float(found.mip_dual_bound) / scale + self.zero
            if found.x is None:
                break
            picks = self._picked(found.x)
            over = self._over(picks)
            if not over:
                return picks, bound, found.status == 0
            for what, amount in over.items():  # the solver's tolerance let a limit pass
                less[what] += amount
        return self._fallback(relaxed), bound, False

    def _picked(self, shares: NDArray[np.float64]) -> tuple[int, ...]:
        pairs = zip(self.starts[:-1], self.starts[1:], strict=True)
        return tuple(int(np.argmax(shares[first:last])) for first, last in pairs)

    def _over(self, picks: Sequence[int]) -> dict[str, float]:
        """By how much a choice passes each limit, in the row's units."""
        places = self.starts[:-1] + np.array(picks)
        over = {}
        for row in self.rows:
            extra = math.fsum(row.excess[places]) - row.slack
            if extra > (0 if row.what == "bytes" else 1e-9):
                over[row.what] = extra
        return over

    def _rounded(self, relaxed: _Relaxed) -> tuple[int, ...]:
        """The relaxation, groups between two options taking the one that uses least of the first limit."""
        use = self.rows[0].excess if self.rows else self.goal
        picks = []
        for first, last in zip(self.starts[:-1], self.starts[1:], strict=True):
            some = np.flatnonzero(relaxed.shares[first:last] > 1e-9)
            picks.append(int(some[np.argmin(use[first:last][some])]))
        return tuple(picks)

    def _fallback(self, relaxed: _Relaxed) -> tuple[int, ...]:
        """Where HiGHS found nothing in time."""
        picks = self._improved(self._rounded(relaxed))
        if self._over(picks):
            raise SolverError("no choice was found in time", hint="give the solver more seconds, or a larger limit")
        return tuple(picks)


def _norm(column: NDArray[np.float64]) -> float:
    """What a column is divided by, so that its largest number is 1."""
    return _unit(float(np.abs(column).max(initial=0.0)))


def _unit(size: float) -> float:
    return size if size > _NOTHING else 1.0


@contextmanager
def _no_output() -> Iterator[None]:
    """Keep what HiGHS prints at times, whatever its options, off standard output, which may carry JSON."""
    if sys.stdout is not None:
        sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
