"""The solver against brute force, its bounds, and its answers when nothing fits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_quant.allocation.problem import Group, InfeasibleError, Limits, Option, lagrangian_bound, prune
from apex_quant.allocation.solver import solve
from apex_quant.gguf import TYPES

KINDS = list(TYPES.values())


@st.composite
def problems(draw: st.DrawFn) -> list[Group]:
    """Up to 5 groups of up to 5 options; bytes in multiples of 32 as padded tensors have, costs over decades."""
    groups = []
    for number in range(draw(st.integers(1, 5))):
        options = []
        for place in range(draw(st.integers(1, 5))):
            size = 32 * draw(st.integers(1, 10**6))
            cost = draw(st.floats(0, 1)) * 10 ** draw(st.integers(-7, 0))
            options.append(Option(KINDS[place], size, cost, draw(st.floats(0, 1))))
        groups.append(Group((f"t{number}",), tuple(options)))
    return groups


def every_choice(groups: list[Group]) -> list[tuple[int, float, float]]:
    """(bytes, cost, seconds) of all choices."""
    return [
        (sum(o.bytes for o in rows), math.fsum(o.cost for o in rows), math.fsum(o.seconds for o in rows))
        for rows in itertools.product(*(group.options for group in groups))
    ]


@settings(max_examples=80, deadline=None)
@given(problems(), st.floats(0, 1))
def test_least_cost_equals_brute_force(groups: list[Group], share: float) -> None:
    all_ = every_choice(groups)
    smallest, largest = min(row[0] for row in all_), max(row[0] for row in all_)
    limit = smallest + int(share * (largest - smallest))
    best = min(cost for size, cost, _ in all_ if size <= limit)
    found = solve(groups, Limits(bytes=limit))
    assert found.bytes <= limit
    assert found.cost == pytest.approx(best, rel=1e-6, abs=1e-15)
    assert found.bound <= best + 1e-12
    assert 0 <= found.gap <= 1e-6
    assert lagrangian_bound(groups, limit, found.price) <= best + 1e-9 * max(1.0, best)


@settings(max_examples=50, deadline=None)
@given(problems(), st.floats(0, 1), st.floats(0, 1))
def test_two_budgets_equal_brute_force(groups: list[Group], share: float, time_share: float) -> None:
    all_ = every_choice(groups)
    sizes, times = [row[0] for row in all_], [row[2] for row in all_]
    limit = min(sizes) + int(share * (max(sizes) - min(sizes)))
    seconds = min(times) + time_share * (max(times) - min(times))
    within = [cost for size, cost, time in all_ if size <= limit and time <= seconds]
    if not within:
        with pytest.raises(InfeasibleError):
            solve(groups, Limits(bytes=limit, seconds=seconds * (1 - 1e-9)))
        return
    found = solve(groups, Limits(bytes=limit, seconds=seconds))
    assert found.bytes <= limit
    assert found.seconds <= seconds * (1 + 1e-9) + 1e-9
    assert found.cost <= min(within) * (1 + 1e-6) + 1e-12


@settings(max_examples=50, deadline=None)
@given(problems(), st.floats(0, 1))
def test_least_bytes_equal_brute_force(groups: list[Group], share: float) -> None:
    all_ = every_choice(groups)
    costs = [row[1] for row in all_]
    limit = min(costs) + share * (max(costs) - min(costs))
    best = min(size for size, cost, _ in all_ if cost <= limit)
    found = solve(groups, Limits(cost=limit), objective="bytes")
    assert found.cost <= limit * (1 + 1e-9) + 1e-12
    assert found.bytes <= best


@settings(max_examples=50, deadline=None)
@given(problems())
def test_pruning_loses_nothing(groups: list[Group]) -> None:
    pruned = [prune(group) for group in groups]
    front: dict[int, float] = {}
    for size, cost, _ in every_choice(groups):
        front[size] = min(cost, front.get(size, math.inf))
    left = every_choice(pruned)
    for size, cost in front.items():
        assert min(c for s, c, _ in left if s <= size) <= cost + 1e-15


def test_infeasible_says_the_least() -> None:
    groups = [Group((name,), (Option(TYPES["Q8_0"], 320, 0.0), Option(TYPES["Q4_0"], 160, 0.5))) for name in "ab"]
    with pytest.raises(InfeasibleError) as caught:
        solve(groups, Limits(bytes=319))
    assert caught.value.least == 320
    assert solve(groups, Limits(bytes=320)).bytes == 320
    with pytest.raises(InfeasibleError):
        solve(groups, Limits(bytes=480, cost=0.0), objective="cost")


def test_price_of_a_byte() -> None:
    """Two steps of a known slope: the price is the slope of the one the limit falls into."""
    groups = [
        Group(("a",), (Option(TYPES["Q4_0"], 1000, 1.0), Option(TYPES["Q8_0"], 2000, 0.0))),
        Group(("b",), (Option(TYPES["Q4_0"], 1000, 0.1), Option(TYPES["Q8_0"], 2000, 0.0))),
        Group(("c",), (Option(TYPES["Q4_0"], 1000, 1e-9), Option(TYPES["Q8_0"], 1001, 0.0))),
    ]
    assert solve(groups, Limits(bytes=4500)).price == pytest.approx(1e-4)
    assert solve(groups, Limits(cost=1.05), objective="bytes").price == pytest.approx(1e3)
    best = solve(groups, Limits(bytes=9000))
    assert (best.price, best.gap, best.cost) == (0, 0, 0)


def test_a_model_of_real_size() -> None:
    """400 tensors x 14 types of a 35B model: bytes above 2^31, solved to the gap asked for."""
    rng = np.random.default_rng(1)
    kinds = [t for t in KINDS if t.encodable and t.is_quantized and t.block == 256]
    groups = []
    for number in range(400):
        weights = int(rng.integers(1, 2000)) * 256 * 1024
        scale = float(np.exp(rng.normal(-9, 1.5)))
        options = [Option(k, weights // 256 * k.bytes, scale * 4 ** (4 - k.bpw) * float(rng.uniform(0.8, 1.2)))
                   for k in kinds]  # fmt: skip
        groups.append(prune(Group((str(number),), tuple(options))))
    total = sum(g.options[0].bytes for g in groups)
    limit = int(total * 2.1)
    found = solve(groups, Limits(bytes=limit), seconds=20, relative_gap=1e-5)
    assert found.bytes <= limit
    assert found.gap <= 1e-4
    assert lagrangian_bound(groups, limit, found.price) <= found.cost


def test_costs_of_any_size() -> None:
    """A closed option's cost does not decide the scale, and costs below any meaning are no trouble."""
    groups = [
        Group(
            ("a",),
            (Option(TYPES["F32"], 32, 1.0, 1.0), Option(TYPES["F16"], 32, 0.0), Option(TYPES["Q4_0"], 32, 1e-38)),
        ),
        Group(("b",), (Option(TYPES["F32"], 32, 0.0, 1.0), Option(TYPES["F16"], 64, 0.0))),
    ]
    with pytest.raises(InfeasibleError):
        solve(groups, Limits(bytes=64, seconds=0.0))
    assert solve(groups, Limits(bytes=96, seconds=0.0)).cost <= 1e-38
