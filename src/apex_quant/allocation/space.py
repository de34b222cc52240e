"""What can be decided: the tensors of a model, the types each may have, and what each type costs in bytes and nats.

Sizes are those of recipe/plan.py to the byte: `fit` solves under what is left of the target after the header, plans
the answer, and goes on until the planned file fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from apex_quant.allocation.constraints import Constraints
from apex_quant.allocation.problem import Group, InfeasibleError, Limits, Option
from apex_quant.allocation.solver import RELATIVE_GAP, SECONDS, Solution, solve
from apex_quant.errors import UsageError
from apex_quant.gguf import GGMLType, GGUFModel, TensorSpec, ggml_type
from apex_quant.gguf.limits import DEFAULT_ALIGNMENT
from apex_quant.gguf.writer import padded
from apex_quant.importance import Importance
from apex_quant.model import ModelFacts, Role, TensorRole, classify, facts
from apex_quant.recipe.plan import plan
from apex_quant.recipe.planned import Plan, PlanOptions
from apex_quant.recipe.recipe import anchored

_ROUNDS: Final = 8
_STEP: Final = 1e-3  # of differences


class Costs(Protocol):
    """What the solver minimises. `cost`: of a tensor in a type; `corrected`: what a sum of costs comes to."""

    @property
    def tensors(self) -> Sequence[str]: ...
    def types(self, tensor: str) -> Sequence[str]: ...
    def cost(self, tensor: str, kind: str) -> float: ...
    def corrected(self, total: float) -> float: ...


@dataclass(frozen=True)
class Predicted:
    """A whole file, and the mean KLD that the costs predict for it, in nats."""

    plan: Plan
    predicted: float

    @property
    def types(self) -> Mapping[str, GGMLType]:
        """Of all tensors that can be quantized."""
        return self.plan.recipe.types


@dataclass(frozen=True)
class Fitted(Predicted):
    """The file of a solution."""

    solution: Solution


@dataclass(frozen=True)
class Space:
    """The groups to decide, what is fixed, and the model they belong to. Made by choices.make_space.

    `likes`: tensor -> the measured one whose costs it takes, itself where it was measured; without those that nothing
    is known of.
    """

    model: GGUFModel
    importance: Importance | None
    options: PlanOptions
    costs: Costs
    groups: tuple[Group, ...]
    fixed: Mapping[str, GGMLType]
    likes: Mapping[str, str]
    constraints: Constraints
    notes: tuple[str, ...]

    def plan(self, types: Mapping[str, GGMLType]) -> Plan:
        """The plan of a choice: that of `apex quantize --recipe` with it."""
        return plan_of(self.model, {**self.fixed, **types}, self.importance, self.options)

    def extreme(self, largest: bool) -> dict[str, GGMLType]:
        """The choice of the most, or of the fewest bytes."""
        pick = max if largest else min
        return {name: pick(g.options, key=lambda o: o.bytes).type for g in self.groups for name in g.tensors}

    def bounds(self) -> tuple[int, int]:
        """Bytes of the smallest and of the largest file."""
        return self.plan(self.extreme(False)).total_bytes, self.plan(self.extreme(True)).total_bytes

    def fit_bounds(self) -> tuple[int, int]:
        """Bytes of the smallest and of the largest file that keep the second budget. Raises UsageError for none."""
        smallest, largest = self.bounds()
        if self.constraints.speeds is None:
            return smallest, largest
        if (slow := self._too_slow()) is not None:
            raise slow
        limits = self.limits(None)
        least = solve(self.groups, limits, objective="bytes").types(self.groups)
        return self.plan(least).total_bytes, largest

    def cost(self, name: str, kind: GGMLType) -> float:
        """What a tensor in a type adds to the sum: nothing as a float, in its own type, or where nothing is known."""
        like = self.likes.get(name)
        if like is None or kind.kind == "float" or kind == self.model.tensors[name].type:
            return 0.0
        return self.costs.cost(like, kind.name)

    def total(self, types: Mapping[str, GGMLType]) -> float:
        """The sum of the costs of a choice, what is fixed included where `types` names it."""
        return math.fsum(self.cost(name, kind) for name, kind in types.items())

    @property
    def fixed_cost(self) -> float:
        """The part of the sum that is not the solver's to decide."""
        return self.total(self.fixed)

    def option(self, group: Group, kind: GGMLType) -> Option:
        """A type for a group, also one that no solution needs. `seconds` is left out."""
        tensors = self.model.tensors
        size = sum(padded_bytes(tensors[name].shape, kind) for name in group.tensors)
        return Option(kind, size, math.fsum(self.cost(name, kind) for name in group.tensors))

    def taken(self, types: Mapping[str, GGMLType]) -> list[GGMLType] | None:
        """The type of each group in a choice; None where tensors of a group differ."""
        found = []
        for group in self.groups:
            kinds = {types[name] for name in group.tensors}
            if len(kinds) != 1:
                return None
            found.append(kinds.pop())
        return found

    def seconds(self, types: Mapping[str, GGMLType]) -> float:
        """What these tensors take for a token, where a speed table is given. Raises UsageError for a type it lacks."""
        speeds, known = self.constraints.speeds, facts(self.model)
        if speeds is None:
            return 0.0
        return math.fsum(active_weights(self.model, known, n) * speeds.of(kind) / 1e9 for n, kind in types.items())

    @property
    def fixed_seconds(self) -> float:
        """The part of the time that is not the solver's to decide."""
        return self.seconds(self.fixed)

    @property
    def reference_seconds(self) -> float:
        """What everything would take in the speed table's reference type, what is fixed included; 0 without one."""
        if self.constraints.speeds is None:
            return 0.0
        names = [*self.fixed, *(name for group in self.groups for name in group.tensors)]
        return self.seconds(dict.fromkeys(names, ggml_type(self.constraints.speeds.reference)))

    def limits(self, size: int | None, cost: float | None = None) -> Limits:
        """Limits of what is left to decide: of a size, with the second budget where there is one."""
        if self.constraints.speeds is None:
            return Limits(size, cost, None)
        return Limits(size, cost, self.reference_seconds * self.constraints.max_slowdown - self.fixed_seconds)

    def fit(self, target: int, *, seconds: float = SECONDS, relative_gap: float = RELATIVE_GAP) -> Fitted:
        """The choice of least cost whose planned file has at most `target` bytes.

        Raises UsageError that names the nearest feasible size where nothing fits.
        """
        overhead = self._overhead(self.plan(self.extreme(False)))
        best: Fitted | None = None
        tried: set[int] = set()
        for _ in range(_ROUNDS):
            if overhead in tried:
                break
            tried.add(overhead)
            try:
                solution = solve(
                    self.groups, self.limits(target - overhead), seconds=seconds, relative_gap=relative_gap
                )
            except InfeasibleError as error:
                if best is not None:
                    break
                raise self._infeasible(error, target) from None
            fitted = self.fitted(solution)
            size = fitted.plan.total_bytes
            if size <= target and (best is None or fitted.solution.cost < best.solution.cost):
                best = fitted
            actual = self._overhead(fitted.plan)
            # the header has the names of the base mix and of what the types need: a few bytes more or less
            overhead = max(actual, overhead + size - target) if size > target else actual
        if best is None:
            raise self._infeasible(None, target)
        return best

    def within(self, predicted: float, *, seconds: float = SECONDS, relative_gap: float = RELATIVE_GAP) -> Fitted:
        """The smallest file whose predicted KLD is at most `predicted` nats. Raises UsageError."""
        low, high = 0.0, predicted
        if self.costs.corrected(high) <= predicted:  # sums are corrected upwards or downwards: find the largest sum
            while self.costs.corrected(high * 2) <= predicted and high < 1e6:
                high *= 2
            low, high = high, high * 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.costs.corrected(middle) <= predicted else (low, middle)
        if low < self.fixed_cost:
            alone = self.costs.corrected(self.fixed_cost)
            raise UsageError(
                f"no choice of types has a predicted KLD of {predicted:g}: what is fixed has {alone:.3g} alone",
                hint="fix less, or in larger types (--fix)",
            )
        try:
            limits = self.limits(None, low - self.fixed_cost)
            found = solve(self.groups, limits, objective="bytes", seconds=seconds, relative_gap=relative_gap)
        except InfeasibleError as error:
            least = self._least_cost(error)
            raise UsageError(
                f"no choice of types has a predicted KLD of {predicted:g}: the least is "
                f"{self.costs.corrected(self.fixed_cost + least):.3g}",
                hint="allow larger types with --types, such as f16"
                + ("" if self.constraints.speeds is None else ", or a larger --max-slowdown"),
            ) from None
        # among equal sizes the one of least cost: the bytes were minimised and nothing else
        return self.fit(self.fitted(found).plan.total_bytes, seconds=seconds, relative_gap=relative_gap)

    def fitted(self, solution: Solution) -> Fitted:
        """A solution with its plan."""
        made = self.predicted(self.plan(solution.types(self.groups)))
        return Fitted(made.plan, made.predicted, solution)

    def predicted(self, planned: Plan) -> Predicted:
        """A plan of any other origin with its prediction."""
        return Predicted(planned, self.costs.corrected(self.total(planned.recipe.types)))

    def price(self, solution: Solution) -> float:
        """Nats of predicted KLD that one more byte saves, where `solution` minimised the cost under a size."""
        cost, corrected = self.fixed_cost + solution.cost, self.costs.corrected
        if cost <= 0:
            return 0.0
        slope = (corrected(cost * (1 + _STEP)) - corrected(cost * (1 - _STEP))) / (2 * _STEP * cost)
        return solution.price * slope

    def _overhead(self, planned: Plan) -> int:
        """Bytes that are not those of the groups: headers, metadata, what is fixed, padding between shards."""
        own = {name for group in self.groups for name in group.tensors}
        return planned.total_bytes - sum(padded_bytes(t.shape, t.type) for t in planned.tensors if t.name in own)

    def _too_slow(self) -> UsageError | None:
        """Where no size is fast enough: with the nearest feasible slowdown."""
        speeds, most = self.constraints.speeds, self.limits(None).seconds
        if speeds is None or most is None:
            return None
        least = math.fsum(min(o.seconds for o in group.options) for group in self.groups)
        if least <= most:
            return None
        factor = math.ceil(1e4 * (least + self.fixed_seconds) / self.reference_seconds - 1e-6) / 1e4
        return UsageError(
            f"no choice of types keeps --max-slowdown {self.constraints.max_slowdown:g} of {speeds.reference}: the "
            f"nearest feasible is {factor:g}",
            hint="ask for that, or allow faster types with --types",
        )

    def _least_cost(self, error: InfeasibleError) -> float:
        """The least sum of costs that the other limits allow. Raises UsageError where they exclude everything."""
        if (slow := self._too_slow()) is not None:
            raise slow from None
        return error.least if error.what == "cost" else solve(self.groups, self.limits(None)).cost

    def _infeasible(self, error: InfeasibleError | None, target: int) -> UsageError:
        """Nothing has at most `target` bytes: with the nearest feasible size."""
        if (slow := self._too_slow()) is not None:
            return slow
        smallest, fast = self.bounds()[0], ""
        if error is not None and error.what != "bytes":  # small enough and fast enough, but not both
            found = solve(self.groups, self.limits(None), objective="bytes")
            smallest = self.plan(found.types(self.groups)).total_bytes
            fast = f" and within --max-slowdown {self.constraints.max_slowdown:g}"
        return UsageError(
            f"no file of this model has at most {target} bytes with these types{fast}: the nearest feasible size is "
            f"{smallest} bytes ({smallest / 1e6:.2f} MB)",
            hint="ask for that size, or allow smaller types"
            + ("" if self.importance is not None else "; many need an importance matrix (--imatrix)"),
        )


def plan_of(
    model: GGUFModel, types: Mapping[str, GGMLType], importance: Importance | None, options: PlanOptions
) -> Plan:
    """The plan of `apex quantize --recipe` with these types."""
    lines = [f"{anchored(name)}={kind.name}" for name, kind in types.items()]
    return plan(model, None, imatrix=importance, options=replace(options, override=lines))


def padded_bytes(shape: tuple[int, ...], kind: GGMLType) -> int:
    """Bytes of a tensor in a file, padding included."""
    return padded(TensorSpec("", shape, kind).nbytes, DEFAULT_ALIGNMENT)


def active_weights(model: GGUFModel, known: ModelFacts, name: str, role: TensorRole | None = None) -> float:
    """Weights that one token multiplies with."""
    info = model.tensors[name]
    role = role or classify(name, info.shape, model.architecture, trunk_layers=known.trunk_layers)
    if role.role is Role.embedding and "output.weight" in model.tensors:
        return 0.0  # rows are looked up
    if role.role is Role.projector:
        return 0.0  # images are not tokens that are generated
    if role.role is Role.routed_expert and known.n_expert:
        return info.n_elements * known.experts_used(role.layer) / known.n_expert
    return float(info.n_elements)
