"""The recipes to beat at equal bytes, and random ones of equal size.

- every published tier and llama.cpp mix, as plan() makes them;
- the hand recipe that quant makers publish for mixtures of experts: everything always active in Q8_0, ffn_down of the
  routed experts one step above gate and up; and the best of its family, where the always active part may be smaller;
- allocation by error alone, which the open proposal for llama.cpp minimises by a Lagrangian
  (github.com/ggml-org/llama.cpp, pull request 15550): relative weighted errors of rows, summed over all rows of all
  slices. Here it is solved exactly, which is at least as good by that measure; where the proposal trims outliers from
  the mean over a slice's rows, the errors here are those of all sampled rows, weighted with their energy;
- random recipes of one size, for rank correlations of predicted and measured KLD.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from apex_quant.allocation.choices import make_space
from apex_quant.allocation.constraints import Constraints
from apex_quant.allocation.groups import CANDIDATES
from apex_quant.allocation.problem import Group, Option
from apex_quant.allocation.sensitivity import Sensitivities
from apex_quant.allocation.space import Fitted, Predicted, Space
from apex_quant.errors import UsageError
from apex_quant.gguf import TYPES, GGMLType, GGUFModel
from apex_quant.model import Role, classify
from apex_quant.recipe.plan import plan
from apex_quant.recipe.planned import Plan

LADDER: Final = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0",
)  # fmt: skip
"""Types by size, one step each, that the hand recipe walks."""
ALWAYS: Final = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
"""What the always active part gets: the first one as published, any of them in the family."""
_DRAWS: Final = 20  # of a random recipe, before there is none of a size
_MOVES: Final = 200  # for each group, to come to the size
_PLAIN: Final = {"IQ1_S": "Q2_K", "IQ1_M": "Q2_K", "IQ2_XXS": "Q2_K", "IQ2_XS": "Q2_K", "IQ2_S": "Q2_K",
                 "IQ3_XXS": "Q3_K"}  # fmt: skip


@dataclass(frozen=True)
class ErrorCosts:
    """Costs of error alone: relative weighted errors times `weights`, by tensor."""

    errors: Mapping[str, Mapping[str, float]]
    weights: Mapping[str, float]

    @classmethod
    def of(cls, measured: Sensitivities, model: GGUFModel) -> ErrorCosts:
        """Each tensor counts by its rows in all slices, as in llama.cpp's pull request 15550."""
        errors = {name: {kind: one.weighted for kind, one in row.items()} for name, row in measured.errors.items()}
        rows = {name: model.tensors[name].n_elements / model.tensors[name].shape[0] for name in errors}
        return cls(errors, rows)

    @property
    def tensors(self) -> Sequence[str]:
        return list(self.errors)

    def types(self, tensor: str) -> Sequence[str]:
        return list(self.errors[tensor])

    def cost(self, tensor: str, kind: str) -> float:
        return self.errors[tensor][kind] * self.weights[tensor]

    def corrected(self, total: float) -> float:
        return total


def tier_plan(space: Space, tier: str) -> Plan:
    """The plan of a published tier or of a llama.cpp mix, with the space's importance matrix."""
    return plan(space.model, tier, imatrix=space.importance)


def error_only(space: Space, measured: Sensitivities, target: int) -> Fitted:
    """The recipe of least summed relative weighted error of rows of at most `target` bytes."""
    errors = make_space(
        space.model,
        ErrorCosts.of(measured, space.model),
        importance=space.importance,
        constraints=replace(space.constraints, equal=()),
        options=space.options,
    )
    return errors.fit(target)


def hand_recipe(space: Space, target: int, always: str = ALWAYS[0]) -> Plan:
    """Always active tensors in `always`, down one step above gate and up, as large as fits `target` bytes.

    What is left is spent on one step more for the experts of the outer layers, as such recipes are published. Raises
    UsageError where even the smallest is too large.
    """
    for step in reversed(range(len(LADDER) - 1)):
        planned = space.plan(_hand_types(space, always, step, set()))
        if planned.total_bytes <= target:
            return _with_edges(space, always, step, target, planned)
    raise UsageError(f"no hand recipe of this model with {always} throughout has at most {target} bytes")


def hand_family(space: Space, target: int) -> tuple[str, Predicted]:
    """(type of the always active part, recipe) of the hand recipe with any of ALWAYS of least cost in `space`.

    Raises UsageError where none fits.
    """
    found: dict[str, Predicted] = {}
    for always in ALWAYS:
        try:
            found[always] = space.predicted(hand_recipe(space, target, always))
        except UsageError:
            continue
    if not found:
        raise UsageError(f"no hand recipe of this model has at most {target} bytes")
    best = min(found, key=lambda always: found[always].predicted)
    return best, found[best]


def _with_edges(space: Space, always: str, step: int, target: int, best: Plan) -> Plan:
    """`best` with one step more in as many outer layers as fit: 0, n-1, 1, n-2, ..."""
    layers = sorted(_expert_layers(space))
    order = [layer for pair in zip(layers, reversed(layers), strict=True) for layer in pair]
    edges: set[int] = set()
    for layer in dict.fromkeys(order):
        edges.add(layer)
        planned = space.plan(_hand_types(space, always, step, edges))
        if planned.total_bytes > target:
            break
        best = planned
    return best


def _hand_types(space: Space, always: str, step: int, edges: set[int]) -> dict[str, GGMLType]:
    types = {}
    for group in space.groups:
        for name in group.tensors:
            role = classify(name, space.model.tensors[name].shape, space.model.architecture)
            wanted = always
            if role.role is Role.routed_expert:
                place = step + (role.part == "ffn_down") + (role.layer in edges)
                wanted = LADDER[min(place, len(LADDER) - 1)]
            if wanted in _PLAIN and not _weighted(space, name):
                wanted = _PLAIN[wanted]
            types[name] = TYPES[wanted]
    return types


def _weighted(space: Space, name: str) -> bool:
    return space.importance is not None and space.importance.fits(space.model.tensors[name])


def _expert_layers(space: Space) -> set[int]:
    roles = [
        classify(name, space.model.tensors[name].shape, space.model.architecture)
        for group in space.groups
        for name in group.tensors
    ]
    return {role.layer for role in roles if role.role is Role.routed_expert and role.layer is not None}


def drawing_space(space: Space) -> Space:
    """The choices that random recipes are drawn from: each tensor for itself, in every type that was measured, also
    those that another one beats by the costs of `space`, which would judge by what is to be judged."""
    return make_space(
        space.model,
        space.costs,
        importance=space.importance,
        constraints=Constraints(types=CANDIDATES, equal=()),
        options=space.options,
        pruned=False,
    )


def random_recipe(space: Space, target: int, seed: int, *, spread: float = 1.5, tolerance: float = 2e-3) -> Plan:
    """A random choice whose file has between (1 - tolerance) x target and target bytes.

    Each group draws its bits per weight from a normal distribution of deviation `spread` around a level that makes
    the sum right, and takes the nearest of its types (of types of equal size one by chance); then single groups move
    until the size fits. Where they end in a corner, other bits are drawn. Raises UsageError where none is found.
    """
    chance = random.Random(seed)
    for _ in range(_DRAWS):
        found = _drawn(space, target, chance, spread, tolerance)
        if found is not None:
            return found
    raise UsageError(f"no random recipe of about {target} bytes was found")


def _drawn(space: Space, target: int, chance: random.Random, spread: float, tolerance: float) -> Plan | None:
    ladders = [_ladder(group, chance) for group in space.groups]
    noise = [chance.gauss(0, spread) for _ in ladders]
    low, high = -4.0, 20.0
    picks = [0] * len(ladders)

    def size_of_picks() -> int:
        return sum(ladder[pick].bytes for ladder, pick in zip(ladders, picks, strict=True))

    def planned_picks() -> Plan:
        chosen = zip(space.groups, ladders, picks, strict=True)
        return space.plan({name: ladder[pick].type for group, ladder, pick in chosen for name in group.tensors})

    overhead = planned_picks().total_bytes - size_of_picks()
    for _ in range(40):
        level = (low + high) / 2
        picks = [_nearest(ladder, level + shift) for ladder, shift in zip(ladders, noise, strict=True)]
        low, high = (level, high) if size_of_picks() + overhead <= target else (low, level)
    for _ in range(_MOVES * len(ladders)):
        size = size_of_picks() + overhead
        if (1 - tolerance) * target <= size <= target:
            planned = planned_picks()
            if planned.total_bytes <= target:
                return planned
            overhead = planned.total_bytes - size_of_picks()
        place = chance.randrange(len(ladders))
        pick, ladder = picks[place] + chance.choice((-1, 1)), ladders[place]
        if 0 <= pick < len(ladder):
            moved = size + ladder[pick].bytes - ladder[picks[place]].bytes
            if moved <= target or moved < size:
                picks[place] = pick
    return None


def _ladder(group: Group, chance: random.Random) -> list[Option]:
    """One option of each size, smallest first."""
    by_size: dict[int, list[Option]] = {}
    for option in group.options:
        by_size.setdefault(option.bytes, []).append(option)
    return [chance.choice(by_size[size]) for size in sorted(by_size)]


def _nearest(ladder: Sequence[Option], bits: float) -> int:
    """The place of the type nearest in bits per weight."""
    return min(range(len(ladder)), key=lambda place: abs(ladder[place].type.bpw - bits))


def random_sizes(space: Space, count: int, seed: int, *, least: float = 2.0, most: float = 8.0) -> list[int]:
    """Targets spread evenly over bits per weight of the whole file, from `least` to `most` as far as there are any."""
    weights = sum(info.n_elements for info in space.model.tensors.values())
    smallest, largest = (8 * size / weights for size in space.bounds())
    low, high = max(least, smallest * 1.02), min(most, largest * 0.98)
    chance = random.Random(seed)
    steps = [(place + chance.random()) / count for place in range(count)]
    return [math.floor((low + (high - low) * step) * weights / 8) for step in steps]
