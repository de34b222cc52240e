"""What stands for what was not measured, and how long probes are expected to take."""

from __future__ import annotations

import math
from typing import Any

import pytest

from apex_quant.allocation.estimate import estimated
from apex_quant.allocation.pace import Pace
from apex_quant.allocation.sensitivity import Group


def group(role: str, part: str, layer: int | None, kld: float | None = None, error: float = 0.02) -> Group:
    name = f"{layer}.{part or role}"
    probe = {"type": "Q3_K", "kld": kld, "error": 0.0, "n": 8, "weighted_error": error}
    probes: list[Any] = [] if kld is None else [probe]
    return Group.model_validate(
        {"name": name, "tensors": [name], "role": role, "part": part, "layer": layer, "probes": probes}
    )


def errors(groups: list[Group], value: float = 0.02) -> dict[str, Any]:
    return {g.name: {"Q3_K": {"relative": value, "weighted": value}} for g in groups}


def test_from_the_same_part_of_the_nearest_layers() -> None:
    groups = [
        group("attention", "attn_q", 0, 0.001), group("attention", "attn_q", 4), group("attention", "attn_q", 8, 0.004),
        group("attention", "attn_q", 11, 0.5), group("attention", "attn_v", 4, 0.7),
        group("embedding", "", None, 0.9),
    ]  # fmt: skip
    (probe,) = estimated(groups, errors(groups))[1].probes
    assert probe.kind == "estimated"
    assert probe.kld == pytest.approx(0.002)  # the geometric mean of the one before and the one after
    assert probe.error == pytest.approx(probe.kld * math.log(4) / math.sqrt(2))
    halved = estimated(groups, errors(groups, 0.01))[1].probes[0]
    assert halved.kld == pytest.approx(0.001)


def test_an_embedding_never_stands_for_a_layer() -> None:
    """With nothing alike measured, the error is all that is known, at the scale of layers, and that is said."""
    groups = [
        group("embedding", "", None, 0.9), group("attention", "attn_q", 1, 0.002), group("ssm", "ssm_out", 2, 0.008),
        group("routed_expert", "ffn_down", 3),
    ]  # fmt: skip
    (probe,) = estimated(groups, errors(groups))[3].probes
    assert probe.kind == "guessed"
    assert probe.kld == pytest.approx(0.004)
    only = [groups[0], groups[3]]
    assert estimated(only, errors(only))[1].probes[0].kind == "guessed"
    assert estimated(groups[3:], errors(groups))[0].probes == []


def test_a_joint_probe_of_slow_types_is_known_to_take_long() -> None:
    pace = Pace({"Q3_K": 1e-8, "IQ2_XS": 1e-6})
    pace.pass_seconds = 2.0
    assert pace.of({"Q3_K": 10_000_000}) == pytest.approx(2.1)
    assert pace.of({"Q3_K": 10_000_000, "IQ2_XS": 30_000_000}) == pytest.approx(32.1)
    for _ in range(3):
        pace.learn({"Q3_K": 10_000_000}, 4.2)  # the machine is busy
    assert pace.of({"IQ2_XS": 30_000_000}) == pytest.approx(64)
    assert Pace({}).of({}) == 0
