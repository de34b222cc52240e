"""Near-optimal recipes of the same size: other constraints, smoothed costs, and bytes moved between kinds of tensors.

The optimum of noisy costs is one of many recipes of nearly equal cost. What tells them apart is joint measurement: a
variant solves the same problem with the noise of single probes smoothed away, an exchange with one kind of tensor
(routed down projections, attention, ...) dearer or cheaper than it was measured alone, so that bytes move to it or
away from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from apex_quant.allocation.choices import make_space
from apex_quant.allocation.space import Costs, Space
from apex_quant.model import Role, classify

FACTOR: Final = 1.6
"""How much dearer or cheaper a kind of tensor is made in an exchange."""
SMOOTH: Final = 0.5
"""Share of a kind's mean in smoothed costs (in logarithms)."""
_TINY: Final = 1e-12

Kind = tuple[str, str]


@dataclass(frozen=True)
class Reweighted:
    """The costs of `of`, each tensor's multiplied by a factor."""

    of: Costs
    factors: Mapping[str, float]

    @property
    def tensors(self) -> Sequence[str]:
        return self.of.tensors

    def types(self, tensor: str) -> Sequence[str]:
        return self.of.types(tensor)

    def cost(self, tensor: str, kind: str) -> float:
        return self.of.cost(tensor, kind) * self.factors.get(tensor, 1.0)

    def corrected(self, total: float) -> float:
        return self.of.corrected(total)


def kinds(space: Space) -> dict[str, Kind]:
    """Tensor -> (role, part), by which sensitivities are alike."""
    found = {}
    for group in space.groups:
        for name in group.tensors:
            role = classify(name, space.model.tensors[name].shape, space.model.architecture)
            found[name] = (str(role.role), role.part if role.role is not Role.embedding else "")
    return found


def reweighted(space: Space, factors: Mapping[str, float]) -> Space:
    """The same choices at other costs."""
    return make_space(
        space.model,
        Reweighted(space.costs, factors),
        importance=space.importance,
        constraints=space.constraints,
        options=space.options,
    )


def smoothed(space: Space, share: float = SMOOTH) -> Space:
    """Each tensor's costs moved by `share` towards the geometric mean of its kind, per weight and type.

    Those that were measured: others have the costs of their like, and move with them.
    """
    known, of_kind = set(space.costs.tensors), dict[Kind, list[str]]()
    for name, kind in kinds(space).items():
        if name in known:
            of_kind.setdefault(kind, []).append(name)
    factors: dict[str, float] = {}
    for names in of_kind.values():
        levels = _levels(space, names)
        mean = math.fsum(levels.values()) / len(names)
        factors |= {name: math.exp(share * (mean - level)) for name, level in levels.items()}
    return reweighted(space, factors)


def parted(space: Space) -> Space:
    """The same choices with siblings decided apart."""
    return make_space(
        space.model,
        space.costs,
        importance=space.importance,
        constraints=replace(space.constraints, equal=()),
        options=space.options,
    )


def exchanges(space: Space, types: Mapping[str, str]) -> Iterator[tuple[str, dict[str, float]]]:
    """(label, factors) of exchanges: the kinds that cost most in the recipe `types` come first, each made dearer, then
    cheaper."""
    of_kind: dict[Kind, list[str]] = {}
    for name, kind in kinds(space).items():
        of_kind.setdefault(kind, []).append(name)
    known = set(space.costs.tensors)

    def cost(kind: Kind) -> float:
        return sum(space.costs.cost(name, types[name]) for name in of_kind[kind] if name in known and name in types)

    for kind in sorted(of_kind, key=cost, reverse=True):
        what = " ".join(word for word in (kind[0].replace("_", " "), kind[1]) if word)
        for factor in (FACTOR, 1 / FACTOR):
            yield f"{'more' if factor > 1 else 'fewer'} bytes for {what}", dict.fromkeys(of_kind[kind], factor)


def _levels(space: Space, names: Sequence[str]) -> dict[str, float]:
    """How dear tensors of one kind are: the mean logarithm of cost per weight, over the types that they all have."""
    shared = set.intersection(*(set(space.costs.types(name)) for name in names))
    levels = {}
    for name in names:
        logs = [math.log(max(space.costs.cost(name, kind), _TINY)) for kind in sorted(shared)]
        levels[name] = math.fsum(logs) / max(len(logs), 1) - math.log(space.model.tensors[name].n_elements)
    return levels
