"""Depth zones: the published absolute rule from 24 layers on, widths that scale with depth below."""

from __future__ import annotations

import math

import pytest

from apex_quant.model import zone_rule


@pytest.mark.parametrize("n", [24, 27, 40, 62, 94])
def test_published_rule(n: int) -> None:
    rule = zone_rule(n)
    assert rule.name == "published"
    for layer in range(n):
        edge = layer < 5 or layer >= n - 5
        near = 5 <= layer < 10 or n - 10 <= layer < n - 5
        assert rule.expert_zone(layer) == ("edge" if edge else "near" if near else "middle")
        assert rule.attention_zone(layer) == ("edge" if layer < 3 or layer >= n - 3 else "middle")


@pytest.mark.parametrize("n", range(24))
def test_scaled_rule(n: int) -> None:
    rule = zone_rule(n)
    edge = max(1, math.floor(n / 8 + 0.5))
    assert (rule.name, rule.expert_edge, rule.expert_near) == ("scaled", edge, edge)
    assert rule.attention_edge == max(1, math.floor(3 * n / 40 + 0.5))
    zones = [rule.expert_zone(layer) for layer in range(n)]
    assert zones == zones[::-1]
    assert zones[:edge] == ["edge"] * min(edge, n)
    if n >= 5:
        assert "middle" in zones


@pytest.mark.parametrize("n", [0, 6, 46])
def test_nextn_blocks_are_edge(n: int) -> None:
    rule = zone_rule(n)
    assert rule.expert_zone(n) == rule.expert_zone(n + 2) == rule.attention_zone(n) == "edge"


def test_the_rule_says_what_it_is() -> None:
    expected = "scaled zones for 12 layers: expert edge 2, near-edge 2, attention edge 1 at each end"
    assert str(zone_rule(12)) == expected
