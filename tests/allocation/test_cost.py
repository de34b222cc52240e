"""The cost model: its two laws, what joint probes teach it, and that predictions behave."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_quant.allocation.cost import CostModel, Exponents
from apex_quant.allocation.sensitivity import SCHEMA, Joint, Sensitivities
from apex_quant.errors import InputError

TYPES = {"Q8_0": 3e-5, "Q6_K": 3e-4, "Q5_K": 1.2e-3, "Q4_K": 5e-3, "Q3_K": 2e-2, "Q2_K": 7e-2}
NAMES = [f"blk.{i}.ffn_down.weight" for i in range(40)]


def world(alpha: float = 1.0, beta: float = 1.0, scale: float = 1.0) -> Any:
    """A model whose truth is the two laws: tensor -> KLD of Q3_K, and the KLD of a recipe."""
    draw = random.Random(1)
    alone = {name: 0.01 * math.exp(draw.gauss(0, 1)) for name in NAMES}
    errors = {name: {kind: e * math.exp(draw.gauss(0, 0.1)) for kind, e in TYPES.items()} for name in NAMES}

    def truth(types: dict[str, str]) -> float:
        each = [alone[n] * (errors[n][k] / errors[n]["Q3_K"]) ** beta for n, k in types.items()]
        return float(scale * sum(x**alpha for x in each) ** (1 / alpha))

    return alone, errors, truth


def measured(
    alpha: float = 1.0, beta: float = 1.0, scale: float = 1.0, joints: int = 12, second: str | None = None
) -> tuple[Sensitivities, Any]:
    alone, errors, truth = world(alpha, beta, scale)
    draw = random.Random(2)
    kinds = list(TYPES)

    def probe(name: str, kind: str) -> dict[str, Any]:
        kld = alone[name] * (errors[name][kind] / errors[name]["Q3_K"]) ** beta
        return {"type": kind, "kld": kld, "error": kld / 10, "n": 8, "weighted_error": errors[name][kind]}

    recipes = []
    for number in range(joints):
        level = 5 * number / max(joints - 1, 1)
        recipes.append({n: kinds[min(max(round(level + draw.gauss(0, 1)), 0), 5)] for n in NAMES})
    document = {
        "schema": SCHEMA,
        "model": {"name": "m", "sha256": "0", "architecture": "llama"},
        "text": {"name": "t", "tokens": 1, "chunks": 1, "scored": 1, "sha256": "0"},
        "groups": [
            {"name": n, "tensors": [n], "role": "dense_ffn", "layer": i,
             "probes": [probe(n, "Q3_K"), *([probe(n, second)] if second else [])]}
            for i, n in enumerate(NAMES)
        ],
        "errors": {n: {k: {"relative": e, "weighted": e} for k, e in row.items()} for n, row in errors.items()},
        "joint": [
            {"name": f"joint {i}", "types": r, "kld": truth(r), "error": truth(r) / 20, "n": 8}
            for i, r in enumerate(recipes)
        ],
    }  # fmt: skip
    return Sensitivities.model_validate(document), truth


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (1.2, 0.9), (1.42, 0.74)])
def test_the_laws_are_found(alpha: float, beta: float) -> None:
    found, truth = measured(alpha, beta)
    model = CostModel.from_sensitivities(found)
    assert model.exponents.alpha == pytest.approx(alpha, abs=0.08)
    assert model.exponents.beta == pytest.approx(beta, abs=0.06)
    draw = random.Random(3)
    for _ in range(30):
        kinds = draw.sample(list(TYPES), 3)
        recipe = {n: draw.choice(kinds) for n in NAMES}
        assert model.predict(recipe) == pytest.approx(truth(recipe), rel=0.1)


def test_without_joint_probes_costs_are_nats_that_add_up() -> None:
    found, _ = measured(joints=0)
    model = CostModel.from_sensitivities(found)
    assert model.exponents == Exponents(1.0, 1.0)
    name, probe = NAMES[3], found.groups[3].probes[0]
    assert model.cost(name, "Q3_K") == pytest.approx(probe.kld)
    ratio = found.errors[name]["Q5_K"].weighted / found.errors[name]["Q3_K"].weighted
    assert model.cost(name, "q5_k") == pytest.approx(probe.kld * ratio)
    recipe = dict.fromkeys(NAMES, "Q3_K")
    assert model.predict(recipe) == pytest.approx(sum(g.probes[0].kld for g in found.groups))


def test_a_constant_factor_becomes_the_curve() -> None:
    found, truth = measured(scale=1.3)
    model = CostModel.from_sensitivities(found, exponents=Exponents())
    recipe = dict.fromkeys(NAMES, "Q4_K")
    assert model.predict(recipe) == pytest.approx(truth(recipe), rel=0.03)


def test_between_and_at_two_types() -> None:
    """With a second type probed, both are met exactly and what lies between lies between."""
    found, _ = measured(1.0, 0.7, joints=0, second="Q5_K")
    model = CostModel.from_sensitivities(found)
    for group in found.groups:
        name = group.tensors[0]
        for probe in group.probes:
            assert model.alone(name, probe.type) == pytest.approx(probe.kld, rel=1e-6)
        assert model.alone(name, "Q5_K") < model.alone(name, "Q4_K") < model.alone(name, "Q3_K")


def test_a_group_is_shared_out_by_error() -> None:
    found, _ = measured(joints=0)
    raw = found.to_json()
    raw["groups"] = [{**raw["groups"][0], "tensors": NAMES[:3]}]
    model = CostModel.from_sensitivities(Sensitivities.model_validate(raw))
    costs = [model.cost(n, "Q3_K") for n in NAMES[:3]]
    assert sum(costs) == pytest.approx(found.groups[0].probes[0].kld)
    errors = [found.errors[n]["Q3_K"].weighted for n in NAMES[:3]]
    np.testing.assert_allclose(np.array(costs) / costs[0], np.array(errors) / errors[0])


def test_what_is_not_known() -> None:
    found, _ = measured(joints=0)
    raw = found.to_json()
    raw["groups"] = raw["groups"][1:]
    model = CostModel.from_sensitivities(Sensitivities.model_validate(raw))
    assert set(model.tensors) == set(NAMES[1:])
    assert model.cost(NAMES[1], "BF16") == model.cost(NAMES[1], "F32") == 0
    for name, kind in ((NAMES[0], "Q3_K"), (NAMES[1], "IQ1_S")):
        with pytest.raises(InputError, match="not measured"):
            model.cost(name, kind)
    assert model.total({NAMES[0]: "Q2_K", "norm": "F32"}) == 0
    assert model.predict({}) == model.corrected(0.0) == 0


def test_rounding_is_added_to_every_quantized_file() -> None:
    """What a Q8_0 file diverges by beyond its prediction."""
    found, _ = measured(joints=0)
    plain = CostModel.from_sensitivities(found)
    types = dict.fromkeys(NAMES, "Q8_0")
    file = Joint(name="Q8_0 file", types=types, kld=plain.predict(types) + 0.003, error=1e-4, n=8)
    model = CostModel.from_sensitivities(found.model_copy(update={"rounding": file}))
    assert model.rounding == pytest.approx(0.003)
    recipe = dict.fromkeys(NAMES, "Q4_K")
    assert model.predict(recipe) == pytest.approx(plain.predict(recipe) + 0.003)
    assert model.corrected(0.0) == 0
    lucky = file.model_copy(update={"kld": 0.0})
    assert CostModel.from_sensitivities(found.model_copy(update={"rounding": lucky})).rounding == 0


def test_one_high_probe_does_not_lift_all_larger_ones() -> None:
    """The curve is the nearest one that never falls, not the highest value so far."""
    found, _ = measured(joints=9)
    klds = [one.kld for one in found.joint]
    order = sorted(range(9), key=lambda i: klds[i])
    high = order[3]
    joint = [one.model_copy(update={"kld": one.kld * (20 if i == high else 1)}) for i, one in enumerate(found.joint)]
    model = CostModel.from_sensitivities(found.model_copy(update={"joint": joint}), exponents=Exponents())
    above = found.joint[order[4]]
    assert model.predict(above.types) < 20 * klds[high]
    last = found.joint[order[-1]]
    assert model.predict(last.types) == pytest.approx(last.kld, rel=0.3)


@settings(max_examples=40, deadline=None)
@given(
    klds=st.lists(st.floats(1e-7, 20), min_size=4, max_size=10),
    totals=st.lists(st.floats(1e-9, 100), min_size=2, max_size=20),
)
def test_predictions_never_fall(klds: list[float], totals: list[float]) -> None:
    """Whatever joint probes say (noise may say anything), a larger sum of costs is a larger prediction."""
    found, _ = measured(joints=len(klds))
    joint = [one.model_copy(update={"kld": kld}) for one, kld in zip(found.joint, klds, strict=True)]
    model = CostModel.from_sensitivities(found.model_copy(update={"joint": joint}))
    values = [model.corrected(total) for total in sorted(totals)]
    assert all(math.isfinite(value) and value >= 0 for value in values)
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(values))
