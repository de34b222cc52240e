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
from apex_quant.allocation.problem import Option
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
    """Each tensor's costs moved by `share` towards the geometric mean of its kind, per weight and type."""
    scale: dict[str, float] = {}
    of_kind: dict[Kind, list[str]] = {}
    for name, kind in kinds(space).items():
        scale[name] = _level(space, name)
        of_kind.setdefault(kind, []).append(name)
    factors: dict[str, float] = {}
    for names in of_kind.values():
        mean = math.fsum(math.log(scale[name]) for name in names) / len(names)
        factors |= {name: math.exp(share * (mean - math.log(scale[name]))) for name in names}
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


def exchanges(space: Space, types: Mapping[str, str], steps: int) -> Iterator[tuple[str, dict[str, float]]]:
    """(label, factors) of up to `steps` exchanges: the kinds that cost most in the recipe `types` come first, each
    made dearer, then cheaper."""
    of_kind: dict[Kind, list[str]] = {}
    for name, kind in kinds(space).items():
        of_kind.setdefault(kind, []).append(name)
    known = set(space.costs.tensors)

    def cost(kind: Kind) -> float:
        return sum(space.costs.cost(name, types[name]) for name in of_kind[kind] if name in known and name in types)

    ranked = sorted(of_kind, key=cost, reverse=True)
    moves = [(kind, factor) for kind in ranked for factor in (FACTOR, 1 / FACTOR)]
    for (role, part), factor in moves[:steps]:
        what = " ".join(word for word in (role.replace("_", " "), part) if word)
        yield f"{'more' if factor > 1 else 'fewer'} bytes for {what}", dict.fromkeys(of_kind[(role, part)], factor)


def _level(space: Space, name: str) -> float:
    """One number for how dear a tensor is: the geometric mean over its types of cost per weight."""
    group = next(group for group in space.groups if name in group.tensors)
    costs = [_own(space, name, option) for option in group.options]
    return math.exp(math.fsum(math.log(max(c, _TINY)) for c in costs) / len(costs)) / _weights(space, name)


def _own(space: Space, name: str, option: Option) -> float:
    if name not in set(space.costs.tensors) or option.type.kind == "float":
        return _TINY
    return space.costs.cost(name, option.type.name)


def _weights(space: Space, name: str) -> int:
    return space.model.tensors[name].n_elements
