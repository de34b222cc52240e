"""Sensitivities that were not measured, from those that were: a budget that ended early leaves holes between layers.

A group without probes gets the geometric mean of the KLD per weighted error of the nearest measured groups of its role
and part before and after it: kind 'estimated', with the neighbours' spread as error. Where no layer has such a group,
its error is all that is known: kind 'guessed', at the geometric mean of KLD per error over all measured groups of
layers. Embeddings never stand for layers: theirs is another scale.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from apex_quant.allocation.sensitivity import Group, Probe

_TINY: Final = 1e-12
_LEAST_SPREAD: Final = 0.3  # of an estimate, in logarithms: neighbours may agree by chance
_UNKNOWN_SPREAD: Final = 1.0

Errors = Mapping[str, Mapping[str, Mapping[str, Any]]]


def estimated(groups: Sequence[Group], errors: Errors) -> list[Group]:
    """The same groups, with a probe that says what it is in each that has none. Without any measured group they stay
    as they are."""
    measured = [group for group in groups if group.probes]
    return [group if group.probes or not measured else _filled(group, measured, errors) for group in groups]


def _filled(group: Group, measured: Sequence[Group], errors: Errors) -> Group:
    like = [one for one in measured if (one.role, one.part) == (group.role, group.part)]
    if like and group.layer is not None:
        kind, found = "estimated", _nearest(group.layer, like)
    else:
        kind, found = "guessed", [one for one in measured if one.layer is not None] or list(measured)
    logs = [_log_per_error(one) for one in found]
    spread = statistics.stdev(logs) if len(logs) > 1 else _UNKNOWN_SPREAD
    type_ = found[0].probes[0].type
    mean = _mean_error(group, type_, errors)
    kld = math.exp(statistics.fmean(logs)) * mean * len(group.tensors)
    error = kld * max(spread, _LEAST_SPREAD)
    probe = Probe.model_validate(
        {"type": type_, "kind": kind, "kld": kld, "error": error, "n": 0, "weighted_error": mean}
    )
    return group.model_copy(update={"probes": [probe]})


def _nearest(layer: int, like: Sequence[Group]) -> list[Group]:
    """The nearest group before, or at, a layer and the nearest after it."""
    placed = sorted(((one.layer, one) for one in like if one.layer is not None), key=lambda pair: pair[0])
    below = [one for place, one in placed if place <= layer]
    above = [one for place, one in placed if place > layer]
    return [*below[-1:], *above[:1]]


def _log_per_error(group: Group) -> float:
    """Logarithm of KLD per summed error of the group's tensors."""
    probe = group.probes[0]
    return math.log(max(probe.kld, _TINY) / (len(group.tensors) * max(probe.weighted_error, _TINY)))


def _mean_error(group: Group, kind: str, errors: Errors) -> float:
    rows = [errors[name].get(kind) or next(iter(errors[name].values())) for name in group.tensors]
    return sum(float(row["weighted"]) for row in rows) / len(rows)
