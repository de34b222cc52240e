"""Depth zones: which layers get the edge, near-edge and middle cells of a tier.

Models of 24 trunk layers and more use the published absolute rule; shallower ones use widths that scale with
depth, since the absolute rule would leave no middle. NextN/MTP blocks lie beyond the trunk and are edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

ExpertZone = Literal["edge", "near", "middle"]
AttentionZone = Literal["edge", "middle"]

PUBLISHED_FROM: Final = 24
"""The fewest trunk layers the published rule was used on."""


@dataclass(frozen=True, slots=True)
class ZoneRule:
    """Widths in layers, counted from either end of a trunk of `n_trunk` layers.

    `expert_edge` layers at each end are edge, the next `expert_near` are near-edge; attention and SSM have
    an edge of `attention_edge` layers.
    """

    name: Literal["published", "scaled"]
    n_trunk: int
    expert_edge: int
    expert_near: int
    attention_edge: int

    def _depth(self, layer: int) -> int:
        """Layers between this one and the nearer end; negative beyond the trunk."""
        return min(layer, self.n_trunk - 1 - layer)

    def expert_zone(self, layer: int) -> ExpertZone:
        """Zone of routed and shared experts and feed-forwards in `layer`."""
        depth = self._depth(layer)
        if depth < self.expert_edge:
            return "edge"
        return "near" if depth < self.expert_edge + self.expert_near else "middle"

    def attention_zone(self, layer: int) -> AttentionZone:
        """Zone of attention and SSM in `layer`."""
        return "edge" if self._depth(layer) < self.attention_edge else "middle"

    def __str__(self) -> str:
        return (
            f"{self.name} zones for {self.n_trunk} layers: expert edge {self.expert_edge}, "
            f"near-edge {self.expert_near}, attention edge {self.attention_edge} at each end"
        )


def zone_rule(n_trunk: int) -> ZoneRule:
    """The rule for a trunk of `n_trunk` layers (block count minus NextN blocks)."""
    if n_trunk >= PUBLISHED_FROM:
        return ZoneRule("published", n_trunk, expert_edge=5, expert_near=5, attention_edge=3)
    # halves round up: floor(n/8 + 1/2) and floor(3n/40 + 1/2) in whole numbers
    edge = max(1, (n_trunk + 4) // 8)
    attention = max(1, (3 * n_trunk + 20) // 40)
    return ZoneRule("scaled", n_trunk, expert_edge=edge, expert_near=edge, attention_edge=attention)
