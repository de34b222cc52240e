"""What can be decided: the tensors of a model, the types each may have, and what each type costs in bytes and nats.

Sizes are those of recipe/plan.py to the byte: `fit` solves under what is left of the target after the header, plans
the answer, and goes on until the planned file fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from apex_quant.allocation.constraints import Constraints
from apex_quant.allocation.problem import Group, InfeasibleError, Limits
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
    """The groups to decide, what is fixed, and the model they belong to. Made by choices.make_space."""

    model: GGUFModel
    importance: Importance | None
    options: PlanOptions
    costs: Costs
    groups: tuple[Group, ...]
    fixed: Mapping[str, GGMLType]
    constraints: Constraints
    notes: tuple[str, ...]

    def plan(self, types: Mapping[str, GGMLType]) -> Plan:
        """The plan of a choice: that of `apex quantize --recipe` with it."""
        every = {**self.fixed, **types}
        lines = [f"{anchored(name)}={kind.name}" for name, kind in every.items()]
        return plan(self.model, None, imatrix=self.importance, options=replace(self.options, override=lines))

    def extreme(self, largest: bool) -> dict[str, GGMLType]:
        """The choice of the most, or of the fewest bytes."""
        pick = max if largest else min
        return {name: pick(g.options, key=lambda o: o.bytes).type for g in self.groups for name in g.tensors}

    def bounds(self) -> tuple[int, int]:
        """Bytes of the smallest and of the largest file."""
        return self.plan(self.extreme(False)).total_bytes, self.plan(self.extreme(True)).total_bytes

    def total(self, types: Mapping[str, GGMLType]) -> float:
        """The sum of the costs of a choice."""
        known = set(self.costs.tensors)
        return sum(self.costs.cost(name, kind.name) for name, kind in types.items() if name in known)

    def seconds(self, kind: GGMLType) -> float:
        """What all groups would take in one type, where a speed table is given."""
        speeds, facts_ = self.constraints.speeds, facts(self.model)
        if speeds is None:
            return 0.0
        names = [name for group in self.groups for name in group.tensors]
        return sum(active_weights(self.model, facts_, name) * speeds.of(kind) / 1e9 for name in names)

    def limits(self, size: int | None, cost: float | None = None) -> Limits:
        """Limits of a size, with the second budget where there is one."""
        speeds = self.constraints.speeds
        most = self.seconds(ggml_type(speeds.reference)) * self.constraints.max_slowdown if speeds else None
        return Limits(size, cost, most)

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
        try:
            found = solve(
                self.groups, self.limits(None, low), objective="bytes", seconds=seconds, relative_gap=relative_gap
            )
        except InfeasibleError as error:
            if error.what != "cost":
                raise self._infeasible(error, 0) from None
            least = self.costs.corrected(error.least)
            raise UsageError(
                f"no choice of types has a predicted KLD of {predicted:g}: the least is {least:.3g}",
                hint="allow larger types with --types, such as f16",
            ) from None
        # among equal sizes the one of least cost: the bytes were minimised and nothing else
        return self.fit(self.fitted(found).plan.total_bytes, seconds=seconds, relative_gap=relative_gap)

    def fitted(self, solution: Solution) -> Fitted:
        """A solution with its plan."""
        types = solution.types(self.groups)
        return Fitted(self.plan(types), self.costs.corrected(solution.cost), solution)

    def predicted(self, planned: Plan) -> Predicted:
        """A plan of any other origin with its prediction."""
        return Predicted(planned, self.costs.corrected(self.total(planned.recipe.types)))

    def price(self, solution: Solution) -> float:
        """Nats of predicted KLD that one more byte saves, where `solution` minimised the cost under a size."""
        cost, corrected = solution.cost, self.costs.corrected
        if cost <= 0:
            return 0.0
        slope = (corrected(cost * (1 + _STEP)) - corrected(cost * (1 - _STEP))) / (2 * _STEP * cost)
        return solution.price * slope

    def _overhead(self, planned: Plan) -> int:
        """Bytes that are not those of the groups: headers, metadata, what is fixed, padding between shards."""
        own = {name for group in self.groups for name in group.tensors}
        return planned.total_bytes - sum(padded_bytes(t.shape, t.type) for t in planned.tensors if t.name in own)

    def _infeasible(self, error: InfeasibleError | None, target: int) -> UsageError:
        if error is not None and error.what != "bytes":
            return UsageError(
                f"no choice of types keeps all limits ({error.what}): too large, or slower than --max-slowdown allows",
                hint="allow a larger size, or a larger --max-slowdown",
            )
        smallest, _ = self.bounds()
        return UsageError(
            f"no file of this model has at most {target} bytes with these types: the nearest feasible size is "
            f"{smallest} bytes ({smallest / 1e6:.2f} MB)",
            hint="ask for that size, or allow smaller types"
            + ("" if self.importance is not None else "; many need an importance matrix (--imatrix)"),
        )


def padded_bytes(shape: tuple[int, ...], kind: GGMLType) -> int:
    """Bytes of a tensor in a file, padding included."""
    return padded(TensorSpec("", shape, kind).nbytes, DEFAULT_ALIGNMENT)


def active_weights(model: GGUFModel, known: ModelFacts, name: str, role: TensorRole | None = None) -> float:
    """Weights that one token multiplies with."""
    info = model.tensors[name]
    role = role or classify(name, info.shape, model.architecture, trunk_layers=known.trunk_layers)
    if role.role is Role.embedding and "output.weight" in model.tensors:
        return 0.0  # rows are looked up
    if role.role is Role.routed_expert and known.n_expert:
        return info.n_elements * known.experts_used(role.layer) / known.n_expert
    return float(info.n_elements)
