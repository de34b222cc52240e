"""Which choices a model leaves open under constraints: from tensors, types and costs to the groups of a Space."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from apex_quant.allocation.constraints import SIBLINGS, Constraints
from apex_quant.allocation.problem import Group, Option, prune
from apex_quant.allocation.space import Costs, Space, active_weights, padded_bytes
from apex_quant.errors import InputError, UsageError, did_you_mean
from apex_quant.gguf import GGMLType, GGUFModel, TensorInfo, ggml_type
from apex_quant.importance import Importance
from apex_quant.model import Role, classify, facts
from apex_quant.recipe.mixes import allows_quantization, fallback_type, requires_imatrix
from apex_quant.recipe.planned import PlanOptions

UNMEASURED: Final = "Q8_0"
"""The type of a tensor that could be quantized and has no cost."""
_BASE: Final = "Q4_K_M"  # importance is needed by the same types in all mixes but Q2_K_S, which no plan of ours has
_DEFAULTS: Final = PlanOptions()


def make_space(
    model: GGUFModel,
    costs: Costs,
    *,
    importance: Importance | None = None,
    constraints: Constraints | None = None,
    options: PlanOptions = _DEFAULTS,
    pruned: bool = True,
) -> Space:
    """The choices that `model` leaves open under `constraints`; `pruned`: but for types that another one beats.

    Norms, routers and whatever llama-quantize keeps are never decided, nor are tensors that are quantized already
    (unless options.allow_requantize). A tensor without a cost takes that of its like in the nearest layer, as NextN
    blocks do, which no decode reaches; one without any like becomes UNMEASURED. Both are noted.

    Raises UsageError for constraints that leave a tensor without a type.
    """
    constraints = constraints or Constraints()
    return _Builder(model, costs, importance, constraints, options, pruned).space()


class _Builder:
    """One call of make_space."""

    def __init__(
        self,
        model: GGUFModel,
        costs: Costs,
        importance: Importance | None,
        constraints: Constraints,
        options: PlanOptions,
        pruned: bool,
    ) -> None:
        self.model, self.costs, self.importance = model, costs, importance
        self.constraints, self.options, self.pruned = constraints, options, pruned
        self.facts = facts(model)
        trunk = self.facts.trunk_layers
        self.roles = {
            name: classify(name, info.shape, model.architecture, trunk_layers=trunk)
            for name, info in model.tensors.items()
        }
        self.measured = set(costs.tensors)
        self.notes: list[str] = []
        self.skipped: set[str] = set()
        self.matched: set[str] = set()
        self.floored: set[str] = set()
        self._timed_types(self.constraints.allowed(), "allow with --types only " + self._timed_names())

    def space(self) -> Space:
        fixed: dict[str, GGMLType] = {}
        likes: dict[str, str] = {}
        single: dict[str, Group] = {}
        proxies: list[str] = []
        unknown: list[str] = []
        kept: list[str] = []
        uncounted: list[str] = []
        for name, info in self.model.tensors.items():
            if not allows_quantization(name, info.shape, self.model.architecture):
                continue
            if self.roles[name].role is Role.projector:
                fixed[name] = info.type
            elif info.type.is_quantized and not self.options.allow_requantize:
                fixed[name] = info.type
                kept.append(name)
            elif (asked := self._asked(name)) is not None:
                self._high_enough(name, asked)
                fixed[name], like = asked, self._like(name)
                if like is not None and (asked.kind == "float" or asked.name in self.costs.types(like)):
                    likes[name] = like
                else:
                    uncounted.append(name)
            elif (like := self._like(name)) is None:
                fixed[name] = fallback_type(ggml_type(UNMEASURED), info.shape[0])
                unknown.append(name)
            else:
                single[name], likes[name] = self._group(name, info, like), like
                if like != name:
                    proxies.append(name)
        self._all_matched()
        counted = [kind for name, kind in fixed.items() if active_weights(self.model, self.facts, name)]
        self._timed_types(sorted(set(counted), key=lambda kind: kind.name), "leave the time out (--speed-aware)")
        for names, what in (
            (uncounted, "have the type that was asked for, whose cost is not known: the prediction leaves them out"),
            (kept, "are quantized already and stay as they are"),
            (proxies, "were not measured and take the costs of their like in the nearest layer"),
            (unknown, f"were not measured and have no like: they become {UNMEASURED}"),
            (sorted(self.skipped), "were left out for tensors whose error in them was not measured"),
        ):
            if names:
                self.notes.append(f"{len(names)} {'types' if names[0] in self.skipped else 'tensors'} {what}: "
                                  + ", ".join(names[:3]) + (", ..." if len(names) > 3 else ""))  # fmt: skip
        if not single:
            raise UsageError("this model has no tensor whose type could be decided")
        timed = self.constraints.speeds is not None
        groups = tuple(prune(group, timed=timed) if self.pruned else group for group in self._joined(single))
        return Space(
            self.model, self.importance, self.options, self.costs, groups, fixed, likes, self.constraints,
            tuple(self.notes),
        )  # fmt: skip

    def _timed_types(self, kinds: Sequence[GGMLType], cure: str) -> None:
        """Raises UsageError for types that the speed table lacks, all of them at once."""
        speeds = self.constraints.speeds
        lacking = [kind.name for kind in kinds if speeds and kind.name not in speeds.seconds]
        if speeds is not None and lacking:
            raise UsageError(
                f"the speed table of {speeds.machine} has no {', '.join(lacking)}",
                hint=f"measure these too, or {cure}",
            )

    def _timed_names(self) -> str:
        return ", ".join(sorted(self.constraints.speeds.seconds)) if self.constraints.speeds is not None else ""

    def _asked(self, name: str) -> GGMLType | None:
        """The type that the constraints fix for a tensor, by role or by a pattern searched in its name."""
        found = None
        for key, kind in self.constraints.fixed.items():
            if key == str(self.roles[name].role) or (key not in set(Role) and re.search(key, name)):
                self.matched.add(key)
                found = found or fallback_type(ggml_type(kind), self.model.tensors[name].shape[0])
        return found

    def _high_enough(self, name: str, asked: GGMLType) -> None:
        """Raises UsageError where --fix and --minimum contradict each other."""
        least = self._floor(name)
        if least is not None and asked.bpw < ggml_type(least).bpw:
            raise UsageError(f"{name} is fixed to {asked.name} and is to have the bits of {least} at least")

    def _floor(self, name: str) -> str | None:
        """The type whose bits a tensor has at least, by its role."""
        role = str(self.roles[name].role)
        self.floored.add(role)
        return self.constraints.minimum.get(role)

    def _all_matched(self) -> None:
        """Raises UsageError for a fixed or a least type that no tensor has."""
        known = sorted({str(role.role) for role in self.roles.values()})
        unmatched = [
            *(
                (key, "is of the role, or has in its name,")
                for key in self.constraints.fixed
                if key not in self.matched
            ),
            *((role, "is of the role") for role in self.constraints.minimum if role not in self.floored),
        ]
        for key, what in unmatched:
            raise UsageError(
                f"nothing that could be decided {what} {key!r}.{did_you_mean(key, known)}",
                hint="roles of this model: " + ", ".join(known),
            )

    def _like(self, name: str) -> str | None:
        """The tensor whose costs a tensor takes: its own where it was measured."""
        if name in self.measured:
            return name
        mine = self.roles[name]
        if mine.layer is None:
            return None
        alike = [
            (abs(theirs.layer - mine.layer), other)
            for other in self.measured
            if (theirs := self.roles.get(other)) is not None
            and theirs.layer is not None
            and (theirs.role, theirs.part) == (mine.role, mine.part)
        ]
        return min(alike)[1] if alike else None

    def _group(self, name: str, info: TensorInfo, like: str) -> Group:
        """The options of one tensor."""
        least = self._floor(name)
        floor = ggml_type(least).bpw if least else 0.0
        known, weights = set(self.costs.types(like)), active_weights(self.model, self.facts, name, self.roles[name])
        found: dict[str, Option] = {}
        for wanted in self.constraints.allowed():
            try:
                kind = fallback_type(wanted, info.shape[0])
            except InputError:
                continue
            if kind.name in found or kind.bpw < floor:
                continue
            if requires_imatrix(name, kind, _BASE) and (self.importance is None or not self.importance.fits(info)):
                continue
            if kind.kind != "float" and kind.name not in known:
                self.skipped.add(kind.name)
                continue
            if kind.kind == "float" and kind is not wanted and found:
                continue  # a substitute for rows that no block divides, and there are others
            cost = 0.0 if kind.kind == "float" else self.costs.cost(like, kind.name)
            speeds = self.constraints.speeds
            seconds = weights * speeds.of(kind) / 1e9 if speeds else 0.0
            found[kind.name] = Option(kind, padded_bytes(info.shape, kind), cost, seconds)
        if not found:
            raise UsageError(
                f"no type is left for {name}" + (f" (at least {least})" if least else ""),
                hint="allow more types with --types"
                + ("" if self.importance is not None else ", or give an importance matrix (--imatrix)"),
            )
        return Group((name,), tuple(found.values()))

    def _joined(self, single: Mapping[str, Group]) -> list[Group]:
        """Groups of siblings that must have equal types, by layer, role and everything else in the name."""
        asked = [parts for name in self.constraints.equal for parts in SIBLINGS[name]]
        sets = [parts for parts in asked if not any(parts < other for other in asked)]  # a part has one set
        joined: dict[tuple[object, ...], list[Group]] = {}
        for name, group in single.items():
            role = self.roles[name]
            place = next((number for number, parts in enumerate(sets) if role.part in parts), None)
            if place is None or role.layer is None:
                joined[(name,)] = [group]
            else:
                joined.setdefault((place, role.role, name.replace(role.part, "", 1)), []).append(group)
        result = []
        for groups in joined.values():
            one = _sum(groups)
            if one is None:
                self.notes.append(", ".join(g.tensors[0] for g in groups) + " have no type in common: decided apart")
                result += groups
            else:
                result.append(one)
        return result


def _sum(groups: Sequence[Group]) -> Group | None:
    """One group of several: the types they share, with summed bytes, costs and seconds."""
    if len(groups) == 1:
        return groups[0]
    by_type = [{option.type.name: option for option in group.options} for group in groups]
    options = []
    for name, first in by_type[0].items():
        rows = [one[name] for one in by_type if name in one]
        if len(rows) == len(groups):
            total = (sum(o.bytes for o in rows), sum(o.cost for o in rows), sum(o.seconds for o in rows))
            options.append(Option(first.type, *total))
    return Group(tuple(name for g in groups for name in g.tensors), tuple(options)) if options else None
