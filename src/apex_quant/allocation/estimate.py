"""Sensitivities that were not measured, from those that were: a budget that ended early leaves holes between layers.

A group without probes gets the geometric mean of the KLD per weighted error of the nearest measured groups of its part
(else of its role) before and after it. Such probes say so: kind 'estimated', with the neighbours' spread as error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from apex_quant.allocation.sensitivity import Group, Probe

_TINY = 1e-12


def estimated(groups: Sequence[Group], errors: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Group]:
    """The same groups, with an estimate in each that has no probe. Those that nothing is like stay without."""
    return [group if group.probes else _filled(group, groups, errors) for group in groups]


def _filled(group: Group, groups: Sequence[Group], errors: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Group:
    like = [one for one in groups if one.probes and one.role == group.role]
    like = [one for one in like if one.part == group.part] or like or [one for one in groups if one.probes]
    if not like:
        return group
    layer = group.layer or 0
    below = [one for one in like if (one.layer or 0) <= layer]
    above = [one for one in like if (one.layer or 0) > layer]
    nearest = [
        *sorted(below, key=lambda one: -(one.layer or 0))[:1],
        *sorted(above, key=lambda one: one.layer or 0)[:1],
    ]
    kind = nearest[0].probes[0].type
    mean = _mean_error(group, kind, errors)
    logs = [
        math.log(max(one.probes[0].kld, _TINY) / (len(one.tensors) * max(one.probes[0].weighted_error, _TINY)))
        for one in nearest
    ]
    kld = math.exp(sum(logs) / len(logs)) * mean * len(group.tensors)
    spread = (max(logs) - min(logs)) / 2 if len(logs) > 1 else 1.0
    probe = Probe(type=kind, kind="estimated", kld=kld, error=kld * max(spread, 0.3), n=0, weighted_error=mean)
    return group.model_copy(update={"probes": [probe]})


def _mean_error(group: Group, kind: str, errors: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> float:
    rows = [errors[name].get(kind) or next(iter(errors[name].values())) for name in group.tensors]
    return sum(float(row["weighted"]) for row in rows) / len(rows)
