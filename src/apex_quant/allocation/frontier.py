"""`frontier`: the least predicted KLD of every size, as a curve, and where the published tiers stand beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from apex_quant.allocation.beforehand import BESIDE, check_choices, refuse_options
from apex_quant.allocation.choices import make_space
from apex_quant.allocation.constraints import EQUAL, Constraints, Speeds, as_types, read_speeds
from apex_quant.allocation.cost import CostModel
from apex_quant.allocation.inputs import OptimizeProgress, sensitivities_of
from apex_quant.allocation.sensitivity import Sensitivities
from apex_quant.allocation.space import Space
from apex_quant.errors import ApexError, UsageError
from apex_quant.gguf import open_model
from apex_quant.importance import Importance
from apex_quant.recipe.metadata import display_name
from apex_quant.recipe.plan import plan
from apex_quant.recipe.planned import PlanOptions
from apex_quant.recipe.tiers import published_tiers
from apex_quant.runtime.options import SessionOptions

POINTS: Final = 24


@dataclass(frozen=True)
class Point:
    """One size: bytes of the whole file, predicted mean KLD in nats, and nats that one more megabyte saves."""

    target_bytes: int
    total_bytes: int
    bpw: float
    predicted_kld: float
    shadow_price: float
    gap: float
    types: Mapping[str, int]
    """Tensor bytes by type."""

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "types": dict(self.types)}


@dataclass(frozen=True)
class Frontier:
    """Points from the smallest file to the largest; `tiers` are the published ones, predicted by the same costs.

    `needs_imatrix`: tiers that are left out for want of an importance matrix.
    """

    model: str
    points: tuple[Point, ...]
    tiers: tuple[dict[str, Any], ...]
    left_out: tuple[str, ...]
    plot: Path | None = None
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "points": [point.to_json() for point in self.points],
            "tiers": list(self.tiers),
            "left_out": list(self.left_out),
            "plot": str(self.plot) if self.plot else None,
            "notes": list(self.notes),
        }


def frontier(
    model: str | Path,
    *,
    sensitivity: str | Path | Sensitivities | None = None,
    imatrix: str | Path | None = None,
    types: str | Sequence[str] | None = None,
    minimum: Mapping[str, str] | None = None,
    fixed: Mapping[str, str] | None = None,
    equal: Sequence[str] = EQUAL,
    speeds: str | Path | Speeds | None = None,
    max_slowdown: float = 1.0,
    points: int = POINTS,
    session: SessionOptions | None = None,
    measuring: Mapping[str, Any] | None = None,
    options: PlanOptions | None = None,
    progress: Callable[[OptimizeProgress], None] | None = None,
) -> Frontier:
    """The whole curve of size against least predicted KLD, at `points` sizes, evenly spread in bits per weight.

    report.plot_frontier draws it. `progress`: while sensitivities are measured, where none are given. The other
    arguments are those of optimize(); predictions are not measurements, and the ends of the curve are further from the
    truth than its middle (docs/method.md).
    """
    if points < 2:
        raise UsageError(f"{points} points make no curve: at least 2")
    plan_options = options or PlanOptions()
    refuse_options(plan_options, BESIDE, "frontier")
    constraints = Constraints(
        types=as_types(list(types) if types is not None and not isinstance(types, str) else types),
        minimum=dict(minimum or {}),
        fixed=dict(fixed or {}),
        equal=tuple(equal),
        speeds=read_speeds(speeds) if isinstance(speeds, str | Path) else speeds,
        max_slowdown=max_slowdown,
    )
    with ExitStack() as held:
        opened = held.enter_context(open_model(model))
        matrix = held.enter_context(Importance.read(imatrix)) if imatrix is not None else None
        if sensitivity is None:
            check_choices(opened, matrix, constraints, plan_options)
        measured, said = sensitivities_of(
            opened, sensitivity, imatrix, fill=plan_options.fill, session=session, measuring=measuring, report=progress
        )
        costs = CostModel.from_sensitivities(measured)
        space = make_space(opened, costs, importance=matrix, constraints=constraints, options=plan_options)
        smallest, largest = space.fit_bounds()
        sizes = [smallest + (largest - smallest) * place // (points - 1) for place in range(points)]
        found = tuple(_point(space, size) for size in sizes)
        tiers, left_out = _tiers(space)
        return Frontier(display_name(opened), found, tiers, left_out, None, (*said, *space.notes))


def _point(space: Space, target: int) -> Point:
    fitted = space.fit(target)
    by_type: dict[str, int] = {}
    for tensor in fitted.plan.tensors:
        by_type[tensor.type.name] = by_type.get(tensor.type.name, 0) + tensor.nbytes
    return Point(
        target,
        fitted.plan.total_bytes,
        fitted.plan.bpw,
        fitted.predicted,
        space.price(fitted.solution) * 1e6,
        fitted.solution.gap,
        dict(sorted(by_type.items(), key=lambda item: -item[1])),
    )


def _tiers(space: Space) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    """The published tiers at their own sizes, in the costs' own prediction."""
    rows, left_out = [], []
    for tier in published_tiers():
        if tier.importance == "none" and space.importance is not None:
            continue  # the costs are those of encoding with the matrix
        try:
            planned = plan(space.model, tier, imatrix=space.importance)
            if planned.missing_importance or planned.needs_importance:
                raise UsageError("needs an importance matrix")
            predicted = space.predicted(planned).predicted
        except ApexError as error:
            left_out.append(f"{tier.name}: {error.message}")
            continue
        rows.append({"tier": tier.name, "total_bytes": planned.total_bytes, "predicted_kld": predicted})
    return tuple(rows), tuple(left_out)
