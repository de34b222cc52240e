"""Spaces: what may be decided, exact sizes, constraints, targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_quant import embedded_model
from apex_quant.allocation.choices import UNMEASURED, make_space
from apex_quant.allocation.constraints import Constraints, Speeds, as_types, read_speeds
from apex_quant.allocation.cost import CostModel
from apex_quant.allocation.space import Space
from apex_quant.allocation.targets import compute_bytes, target_of
from apex_quant.errors import InputError, UsageError
from apex_quant.gguf import GGUFModel, open_model
from apex_quant.importance import Importance
from apex_quant.model import Role, classify
from apex_quant.model.kv_cache import kv_cache
from apex_quant.recipe.plan import plan
from apex_quant.recipe.planned import PlanOptions
from tests.allocation.costs import drawn
from tests.helpers.imatrix import random_imatrix
from tests.helpers.random_models import write_random_gguf


@pytest.fixture(scope="module")
def model() -> Iterator[GGUFModel]:
    with open_model(embedded_model()) as opened:
        yield opened


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Importance]:
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    random_imatrix(embedded_model()).write(path)
    with Importance.read(path) as read:
        yield read


@pytest.fixture(scope="module")
def costs(model: GGUFModel) -> CostModel:
    return CostModel.from_sensitivities(drawn(model))


@pytest.fixture(scope="module")
def space(model: GGUFModel, matrix: Importance, costs: CostModel) -> Space:
    return make_space(model, costs, importance=matrix)


@settings(max_examples=6, deadline=None)
@given(share=st.floats(0, 1))
def test_the_file_is_at_most_the_target_and_nearly_it(space: Space, share: float) -> None:
    smallest, largest = space.bounds()
    target = smallest + int(share * (largest - smallest))
    fitted = space.fit(target)
    assert fitted.plan.total_bytes <= target
    assert target - fitted.plan.total_bytes < 40_000
    assert fitted.predicted == pytest.approx(space.predicted(fitted.plan).predicted)
    assert fitted.solution.gap <= 1e-6


def test_the_plan_is_that_of_quantize_with_the_recipe(space: Space, model: GGUFModel, tmp_path: Path) -> None:
    fitted = space.fit(12_000_000)
    path = tmp_path / "recipe.txt"
    path.write_text(fitted.plan.recipe.text())
    again = plan(model, None, imatrix=space.importance, options=PlanOptions(recipe=path))
    assert again.total_bytes == fitted.plan.total_bytes
    assert again.recipe.sha256 == fitted.plan.recipe.sha256
    assert [layout.header for layout in again.layouts] == [layout.header for layout in fitted.plan.layouts]
    assert not again.missing_importance


def test_shards_count_too(model: GGUFModel, matrix: Importance, costs: CostModel) -> None:
    options = PlanOptions(split_max_size=3_000_000)
    space = make_space(model, costs, importance=matrix, options=options)
    fitted = space.fit(12_000_000)
    assert len(fitted.plan.layouts) > 3
    assert 11_900_000 < fitted.plan.total_bytes <= 12_000_000


def test_too_small_names_the_nearest_size(space: Space) -> None:
    smallest, _ = space.bounds()
    with pytest.raises(UsageError, match=str(smallest)):
        space.fit(smallest - 1)
    assert space.fit(smallest).plan.total_bytes == smallest


def test_without_importance_no_type_needs_it(model: GGUFModel, costs: CostModel) -> None:
    space = make_space(model, costs)
    kinds = {option.type.name for group in space.groups for option in group.options}
    # rows of the embedding are encoded without importance by stock too, but not in the types that abort
    assert "IQ1_S" not in kinds
    assert "IQ2_XXS" not in kinds
    smallest, _ = space.bounds()
    assert not space.fit(smallest).plan.missing_importance


def test_siblings_have_one_type(space: Space, model: GGUFModel, matrix: Importance, costs: CostModel) -> None:
    types = space.fit(12_000_000).types
    for layer in range(12):
        assert types[f"blk.{layer}.ffn_gate_exps.weight"] is types[f"blk.{layer}.ffn_up_exps.weight"]
        assert types[f"blk.{layer}.ffn_gate_shexp.weight"] is types[f"blk.{layer}.ffn_up_shexp.weight"]
    apart = make_space(model, costs, importance=matrix, constraints=Constraints(equal=()))
    assert len(apart.groups) > len(space.groups)
    assert apart.fit(12_000_000).predicted <= space.fit(12_000_000).predicted * (1 + 1e-9)
    qkv = make_space(model, costs, importance=matrix, constraints=Constraints(equal=("qkv",))).fit(12_000_000).types
    assert len({qkv[f"blk.3.attn_{part}.weight"] for part in "qkv"}) == 1


def test_minimum_and_fixed(model: GGUFModel, matrix: Importance, costs: CostModel) -> None:
    constraints = Constraints(minimum={"attention": "Q5_K"}, fixed={"embedding": "Q6_K", r"blk\.0\.ffn": "Q8_0"})
    fitted = make_space(model, costs, importance=matrix, constraints=constraints).fit(13_000_000)
    for name, kind in fitted.types.items():
        role = classify(name, model.tensors[name].shape, model.architecture).role
        if role is Role.attention:
            assert kind.bpw >= 5.5
        if role is Role.embedding:
            assert kind.name == "Q6_K"
        if name.startswith("blk.0.ffn"):
            assert kind.name == "Q8_0"
    with pytest.raises(UsageError, match="no type is left"):
        make_space(model, costs, constraints=Constraints(types=("Q4_K",), minimum={"ssm": "Q6_K"}))


def test_routers_and_norms_are_never_decided(space: Space) -> None:
    names = {name for group in space.groups for name in group.tensors} | set(space.fixed)
    assert not [name for name in names if "norm" in name or "gate_inp" in name or "conv1d" in name]


def test_least_size_for_a_divergence(space: Space) -> None:
    wanted = space.fit(14_000_000).predicted
    found = space.within(wanted)
    assert found.predicted <= wanted
    assert found.plan.total_bytes <= 14_000_000
    # nothing smaller reaches it
    assert space.fit(found.plan.total_bytes - 64).predicted > wanted
    with pytest.raises(UsageError, match="the least is"):
        space.within(1e-9)


def test_rows_that_no_large_block_divides(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "odd.gguf", "llama", embd=96, ff=160, head=24, dtype="F16")
    with open_model(path) as opened:
        space = make_space(opened, CostModel.from_sensitivities(drawn(opened)))
        for group in space.groups:
            for option in group.options:
                assert all(opened.tensors[name].shape[0] % option.type.block == 0 for name in group.tensors)
        smallest, largest = space.bounds()
        fitted = space.fit((smallest + largest) // 2)
        assert all(tensor.fallback_from is None for tensor in fitted.plan.tensors)


def test_a_fallback_beside_other_types_is_no_choice(tmp_path: Path) -> None:
    """Rows of 48 weights divide into no block at all: F16 is left."""
    path = write_random_gguf(tmp_path / "odd.gguf", "llama", embd=96, ff=48, head=24, dtype="F16")
    with open_model(path) as opened:
        space = make_space(opened, CostModel.from_sensitivities(drawn(opened)))
        assert {str(kind) for name, kind in space.fixed.items() if "ffn_down" in name} <= {"F16"}
        assert space.fit(space.bounds()[1]).plan.total_bytes == space.bounds()[1]


def test_unmeasured_tensors_are_noted(model: GGUFModel, matrix: Importance) -> None:
    measured = drawn(model)
    without = [g for g in measured.groups if "blk.11." not in g.tensors[0] and g.tensors[0] != "token_embd.weight"]
    costs = CostModel.from_sensitivities(measured.model_copy(update={"groups": without}))
    space = make_space(model, costs, importance=matrix)
    assert str(space.fixed["token_embd.weight"]) == UNMEASURED
    assert any("take the costs of their like" in note for note in space.notes)
    assert any("token_embd.weight" in note for note in space.notes)
    assert "blk.11.ffn_down_exps.weight" in {name for group in space.groups for name in group.tensors}


def test_quantized_tensors_stay(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "q.gguf", "qwen3moe", dtype="BF16", expert_dtype="Q8_0")
    with open_model(path) as opened:
        costs = CostModel.from_sensitivities(drawn(opened))
        space = make_space(opened, costs)
        assert all(str(kind) == "Q8_0" for name, kind in space.fixed.items() if "exps" in name)
        assert any("quantized already" in note for note in space.notes)
        again = make_space(opened, costs, options=PlanOptions(allow_requantize=True))
        assert len(again.groups) > len(space.groups)


SPEEDS = Speeds("test", "Q4_K", {"Q8_0": 2.0, "Q6_K": 1.6, "Q5_K": 1.3, "Q4_K": 1.0, "IQ3_S": 2.5, "Q2_K": 0.9})


def test_time_is_a_second_budget(model: GGUFModel, matrix: Importance, costs: CostModel) -> None:
    types = tuple(SPEEDS.seconds)
    free = make_space(model, costs, importance=matrix, constraints=Constraints(types=types)).fit(12_500_000)
    timed = make_space(
        model, costs, importance=matrix, constraints=Constraints(types=types, speeds=SPEEDS, max_slowdown=1.0)
    )
    fitted = timed.fit(12_500_000)
    limit = timed.limits(None).seconds
    assert limit is not None
    assert fitted.solution.seconds <= limit * (1 + 1e-9)
    assert fitted.predicted >= free.predicted
    impossible = replace(timed.constraints, max_slowdown=0.5)
    with pytest.raises(UsageError, match="slowdown"):
        make_space(model, costs, importance=matrix, constraints=impossible).fit(12_500_000)


def test_speed_tables_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "speeds.toml"
    path.write_text('machine = "m"\nreference = "Q4_K"\n[seconds_per_gigaweight]\nQ4_K = 0.1\nq8_0 = 0.2\n')
    assert read_speeds(path).seconds == {"Q4_K": 0.1, "Q8_0": 0.2}
    for text in ("", "[", 'machine = "m"\nreference = "Q4_K"\n[seconds_per_gigaweight]\nQ4_K = -1\n',
                 'machine = "m"\nreference = "Q5_K"\n[seconds_per_gigaweight]\nQ4_K = 1\n',
                 'machine = "m"\nreference = "Q4_K"\n[seconds_per_gigaweight]\nQ4_K = 1\nNope = 1\n'):  # fmt: skip
        path.write_text(text)
        with pytest.raises(InputError):
            read_speeds(path)
    with pytest.raises(InputError):
        read_speeds(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"types": ("Q8_K",)},
        {"types": ()},
        {"types": ("Q4_K",), "minimum": {"atention": "Q4_K"}},
        {"equal": ("gate_down",)},
        {"fixed": {"output": "I32"}},
    ],
)
def test_wrong_constraints(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Constraints(**wrong)  # type: ignore[arg-type]


def test_type_lists() -> None:
    assert as_types("q8_0, Q6_K,q8_0") == ("Q8_0", "Q6_K")
    assert as_types(["q8_0,q6_k", "iq2_s"]) == ("Q8_0", "Q6_K", "IQ2_S")
    with pytest.raises(UsageError):
        as_types("q9_k")


def test_targets(space: Space, tmp_path: Path) -> None:
    assert target_of(space, size=12_000_000).bytes == 12_000_000
    like = tmp_path / "like.gguf"
    like.write_bytes(embedded_model().read_bytes())
    assert target_of(space, like_size=like).bytes == like.stat().st_size
    by_bits = target_of(space, bpw=4.0).bytes
    assert by_bits is not None
    planned = space.fit(by_bits).plan
    assert 3.98 < planned.bpw <= 4.0
    memory = 400 << 20
    fitting = target_of(space, fit=memory, ctx=4096)
    assert fitting.bytes == memory - kv_cache(space.model, ctx=4096).bytes - compute_bytes(space.model)
    assert fitting.said["kv_bytes"] == kv_cache(space.model, ctx=4096).bytes
    assert target_of(space, kld=0.01).kld == 0.01
    with pytest.raises(UsageError, match="exclude"):
        target_of(space, size=1, bpw=3)
    with pytest.raises(UsageError, match="how large"):
        target_of(space)
    with pytest.raises(UsageError, match="do not hold"):
        target_of(space, fit=1 << 20, ctx=4096)
    with pytest.raises(UsageError):
        target_of(space, bpw=-1)


def test_what_is_fixed_alone_may_miss_a_divergence(model: GGUFModel, matrix: Importance, costs: CostModel) -> None:
    """With a float type allowed, the rest can cost nothing: that does not make the target met."""
    constraints = Constraints(types=("BF16", "Q8_0", "Q6_K"), fixed={"ffn_down_exps": "Q2_K"})
    space = make_space(model, costs, importance=matrix, constraints=constraints)
    alone = costs.corrected(space.fixed_cost)
    with pytest.raises(UsageError, match="what is fixed has"):
        space.within(alone / 100)
    assert space.within(alone * 1.5).predicted <= alone * 1.5


def test_a_sibling_has_one_set(model: GGUFModel, matrix: Importance, costs: CostModel) -> None:
    """All of a layer's expert projections are equal where both gate_up and ffn are asked for, in any order."""
    for equal in (("gate_up", "ffn"), ("ffn", "gate_up"), ("ffn",)):
        space = make_space(model, costs, importance=matrix, constraints=Constraints(equal=equal))
        types = space.fit(12_000_000).types
        for layer in range(12):
            assert len({types[f"blk.{layer}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")}) == 1


def test_what_is_fixed_takes_time_too(model: GGUFModel, matrix: Importance, costs: CostModel) -> None:
    """The budget is one of the whole file, whatever was decided beforehand."""
    types, slow = tuple(SPEEDS.seconds), {"attention": "IQ3_S"}

    def space(slowdown: float, fixed: dict[str, str]) -> Space:
        constraints = Constraints(types=types, fixed=fixed, speeds=SPEEDS, max_slowdown=slowdown)
        return make_space(model, costs, importance=matrix, constraints=constraints)

    for slowdown, fixed in ((1.4, slow), (1.05, {"routed_expert": "Q2_K"}), (1.05, {})):
        one = space(slowdown, fixed)
        fitted = one.fit(sum(one.fit_bounds()) // 2)
        assert one.seconds(fitted.types) <= slowdown * one.reference_seconds * (1 + 1e-9)
    everything = space(1.0, {}).reference_seconds
    assert space(1.0, slow).reference_seconds == pytest.approx(everything)
    with pytest.raises(UsageError, match=r"nearest feasible is \d") as refused:
        space(0.95, slow).fit(12_500_000)
    nearest = float(str(refused.value).rpartition(" ")[2])
    least = space(nearest, slow)
    assert least.fit(least.bounds()[1]).plan.total_bytes > 0
    with pytest.raises(UsageError, match="has no Q4_0"):
        space(1.0, {"attention": "Q4_0"})


def test_what_would_be_ignored_is_refused(model: GGUFModel, matrix: Importance, costs: CostModel) -> None:
    """A least type of a role that a tied model lacks, one that a fixed type is below, a slowdown of nothing."""
    with pytest.raises(UsageError, match=r"of the role 'output'"):
        make_space(model, costs, importance=matrix, constraints=Constraints(minimum={"output": "Q8_0"}))
    contradiction = Constraints(minimum={"attention": "Q6_K"}, fixed={"attention": "Q4_K"})
    with pytest.raises(UsageError, match="at least"):
        make_space(model, costs, importance=matrix, constraints=contradiction)
    with pytest.raises(UsageError, match="none is given"):
        Constraints(max_slowdown=1.05)
