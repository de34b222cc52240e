"""The recipes to beat: sizes, the rules they follow, and random ones of equal size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from apex_quant.allocation import baselines
from apex_quant.allocation.choices import make_space
from apex_quant.allocation.cost import CostModel
from apex_quant.allocation.groups import CANDIDATES
from apex_quant.allocation.sensitivity import Sensitivities
from apex_quant.allocation.space import Space
from apex_quant.errors import UsageError
from apex_quant.gguf import TYPES, open_model
from apex_quant.importance import Importance
from tests.allocation.costs import drawn
from tests.helpers.imatrix import random_imatrix
from tests.helpers.random_models import write_random_gguf


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Space, Sensitivities]]:
    folder = tmp_path_factory.mktemp("baselines")
    path = write_random_gguf(folder / "moe.gguf", "qwen3moe", experts=6, sparse=True)
    random_imatrix(path).write(folder / "imatrix.gguf")
    with open_model(path) as model, Importance.read(folder / "imatrix.gguf") as matrix:
        measured = drawn(model)
        yield make_space(model, CostModel.from_sensitivities(measured), importance=matrix), measured


def test_the_optimum_is_below_every_rival(made: tuple[Space, Sensitivities]) -> None:
    """By its own prediction, at no more bytes."""
    space, measured = made
    for tier in ("i-quality", "i-compact", "micro", "Q4_K_M", "IQ2_M"):
        planned = baselines.tier_plan(space, tier)
        size = planned.total_bytes
        best = space.fit(size)
        assert best.plan.total_bytes <= size
        rivals = [planned, baselines.error_only(space, measured, size).plan, baselines.random_recipe(space, size, 0)]
        for rival in rivals:
            assert rival.total_bytes <= size
            assert best.predicted <= space.predicted(rival).predicted * (1 + 1e-6)


def test_hand_recipe(made: tuple[Space, Sensitivities]) -> None:
    """As published, where it fits: Q8_0 whatever is left for the experts."""
    space, _ = made
    for tier in ("i-balanced", "i-compact"):
        size = baselines.tier_plan(space, tier).total_bytes
        for always in ("Q8_0", "Q5_K"):
            planned = baselines.hand_recipe(space, size, always)
            assert planned.total_bytes <= size
            types = {t.name: t.type for t in planned.tensors}
            assert {t.type.name for t in planned.tensors if not t.kept and "exps" not in t.name} == {always}
            for name, kind in types.items():
                if "ffn_down_exps" in name:
                    up = types[name.replace("down", "up")]
                    assert up is types[name.replace("down", "gate")]
                    places = [baselines.LADDER.index(k.name) for k in (up, kind)]
                    assert places[1] == min(places[0] + 1, len(baselines.LADDER) - 1)
    with pytest.raises(UsageError):
        baselines.hand_recipe(space, 1000)


def test_the_best_of_the_hand_recipes_family(made: tuple[Space, Sensitivities]) -> None:
    """No member that fits is predicted to be better, and more bytes are never worse."""
    space, _ = made
    best = []
    for tier in ("micro", "i-compact", "i-balanced"):
        size = baselines.tier_plan(space, tier).total_bytes
        always, file = baselines.hand_family(space, size)
        assert file.plan.total_bytes <= size
        assert {t.type.name for t in file.plan.tensors if not t.kept and "exps" not in t.name} == {always}
        for other in baselines.ALWAYS:
            try:
                member = baselines.hand_recipe(space, size, other)
            except UsageError:
                continue
            assert file.predicted <= space.predicted(member).predicted
        best.append(file.predicted)
    assert best == sorted(best, reverse=True)
    with pytest.raises(UsageError):
        baselines.hand_family(space, 1000)


def test_hand_recipe_without_importance(made: tuple[Space, Sensitivities]) -> None:
    space, measured = made
    plain = make_space(space.model, CostModel.from_sensitivities(measured))
    _, file = baselines.hand_family(plain, int(plain.bounds()[0] * 1.1))
    assert not file.plan.missing_importance


def test_random_recipes_have_one_size_and_differ(made: tuple[Space, Sensitivities]) -> None:
    space, _ = made
    size = baselines.tier_plan(space, "i-compact").total_bytes
    plans = [baselines.random_recipe(space, size, seed) for seed in range(4)]
    assert all((1 - 2e-3) * size <= planned.total_bytes <= size for planned in plans)
    assert len({planned.recipe.sha256 for planned in plans}) == 4
    assert baselines.random_recipe(space, size, 0).recipe.sha256 == plans[0].recipe.sha256


def test_random_recipes_are_drawn_from_all_types(made: tuple[Space, Sensitivities]) -> None:
    """Also from those that our costs beat or that are not allowed by default."""
    space, _ = made
    every = baselines.drawing_space(space)
    offered = {option.type.name for group in every.groups for option in group.options}
    assert offered == set(CANDIDATES)
    assert "Q4_0" not in {option.type.name for group in space.groups for option in group.options}
    assert all(len(group.tensors) == 1 for group in every.groups)
    size = baselines.tier_plan(space, "micro").total_bytes
    plans = [baselines.random_recipe(every, size, seed) for seed in range(4)]
    assert all((1 - 2e-3) * size <= planned.total_bytes <= size for planned in plans)
    used = {kind.name for planned in plans for kind in planned.recipe.types.values()}
    assert {"Q2_K", "Q3_K", "Q4_0"} <= used


def test_spanning_sizes(made: tuple[Space, Sensitivities]) -> None:
    space, _ = made
    sizes = baselines.random_sizes(space, 8, 0)
    assert sizes == sorted(sizes)
    weights = sum(info.n_elements for info in space.model.tensors.values())
    assert 2 <= 8 * sizes[0] / weights < 8 * sizes[-1] / weights <= 8
    for seed, size in enumerate(sizes[::3]):
        assert baselines.random_recipe(space, size, seed, spread=1.0).total_bytes <= size


def test_error_costs_are_the_weighted_errors_of_all_rows(made: tuple[Space, Sensitivities]) -> None:
    space, measured = made
    costs = baselines.ErrorCosts.of(measured, space.model)
    name = space.groups[0].tensors[0]
    info = space.model.tensors[name]
    rows = info.n_elements / info.shape[0]
    assert costs.cost(name, "Q8_0") == measured.errors[name]["Q8_0"].weighted * rows
    assert set(costs.types(name)) <= set(TYPES)


def test_every_ladder_type_exists(tmp_path: Path) -> None:
    bits = [TYPES[name].bpw for name in baselines.LADDER]
    assert bits == sorted(bits)
