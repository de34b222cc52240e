"""The cost model: what a recipe will do to the output, predicted from single probes.

    model = CostModel.from_sensitivities(load("sensitivity.json"))
    model.predict({"blk.3.ffn_down_exps.weight": "Q3_K", ...})   # nats per token
    model.alone("blk.3.ffn_down_exps.weight", "Q3_K")            # of this tensor alone
    model.cost("blk.3.ffn_down_exps.weight", "Q3_K")             # what adds up: the solver's objective

Two laws, with one exponent each. A tensor's KLD alone grows with its weighted error e as e^beta. The KLD of several
tensors is K = (sum of K_i^alpha)^(1/alpha). In a dense model both exponents are 1: KLD is quadratic in a disturbance,
and disturbances of different tensors add up. Where routers choose experts, a part of the KLD comes from choices that
flip; the number of flips grows with the size of the disturbance, not with its square, and so slower than the error,
and flips of several tensors do not add up (alpha > 1, beta < 1). Both exponents are fitted to joint probes, those of
whole recipes; what they leave is a curve by size. Without joint probes both are 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from apex_quant.allocation.sensitivity import Group, Joint, Probe, Sensitivities
from apex_quant.errors import InputError
from apex_quant.gguf import TYPES

F64 = NDArray[np.float64]
Errors = Mapping[str, Mapping[str, float]]

_TINY = 1e-12  # nats: below any noise, so that logarithms exist
_SAME = 0.3  # joint probes whose predictions differ by less than this (in logarithm) are one point of the curve
_ALPHAS = np.arange(0.9, 1.801, 0.04)
_BETAS = np.arange(0.5, 1.201, 0.04)
_RIDGE = 0.02  # squared logarithmic residual that an exponent's distance of 1 from 1 is worth
_LEVEL = 0.2  # how much the common level counts in the fit of the exponents
_LEAST_JOINTS = 4  # for exponents to be fitted


@dataclass(frozen=True)
class Exponents:
    """`alpha`: how tensors combine; `beta`: how KLD grows with the weighted error of one."""

    alpha: float = 1.0
    beta: float = 1.0

    @property
    def of_error(self) -> float:
        """Of the error in what adds up."""
        return self.alpha * self.beta


@dataclass(frozen=True)
class _Scale:
    """What multiplies error^(alpha beta) of a group's tensors: by the logarithm of the error, linear between probes and
    constant beyond them; for types that were probed it is theirs."""

    x: F64
    y: F64  # logarithms
    exact: Mapping[str, float]

    def at(self, kind: str, error: float) -> float:
        log = self.exact.get(kind)
        return math.exp(float(np.interp(math.log(max(error, _TINY)), self.x, self.y)) if log is None else log)


@dataclass(frozen=True)
class CostModel:
    """`errors`: tensor -> type -> relative weighted error. `known`: log of a prediction -> log(measured / prediction)
    of joint probes. `rounding`: nats that a file of quantized tensors diverges by whatever its weights are, since the
    backend rounds activations where weights are quantized; probes disturb weights that are multiplied as floats."""

    errors: Errors
    scales: Mapping[str, _Scale]
    exponents: Exponents = Exponents()
    known: tuple[F64, F64] = field(default=(np.zeros(0), np.zeros(0)))
    rounding: float = 0.0

    @classmethod
    def from_sensitivities(cls, measured: Sensitivities, *, exponents: Exponents | None = None) -> CostModel:
        """`exponents`: these, instead of those that the joint probes show. Groups without a probe have no cost."""
        errors = {name: {kind: row.weighted for kind, row in rows.items()} for name, rows in measured.errors.items()}
        floor = max(measured.floor.kld, 0.0) if measured.floor is not None else 0.0
        groups = [group for group in measured.groups if group.probes]
        joints = [joint for joint in measured.joint if joint.kld > floor]
        found = exponents or _fitted(groups, errors, joints, floor)
        plain = cls(errors, _scales(groups, errors, found, floor), found)
        made = replace(plain, known=_correction(plain, joints, floor))
        file = measured.rounding
        return made if file is None else replace(made, rounding=max(0.0, file.kld - made.predict(file.types)))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Measured tensors."""
        return tuple(self.scales)

    def types(self, tensor: str) -> tuple[str, ...]:
        """Types whose cost is known. Raises InputError for a tensor that was not measured."""
        self._check(tensor)
        return tuple(self.errors[tensor])

    def cost(self, tensor: str, kind: str) -> float:
        """What this tensor in this type adds to `total`, nats^alpha per token. Raises InputError for what is not known.

        Float types without an entry (F32, F16, BF16) cost nothing.
        """
        self._check(tensor)
        kind = kind.upper()
        error = self.errors[tensor].get(kind)
        if error is None:
            if kind in TYPES and TYPES[kind].kind == "float":
                return 0.0
            raise InputError(f"{tensor}: the error of {kind} was not measured", hint="measure again with this type")
        return float(error**self.exponents.of_error * self.scales[tensor].at(kind, error)) if error > 0 else 0.0

    def alone(self, tensor: str, kind: str) -> float:
        """Predicted KLD, nats per token, of this tensor alone in this type. Raises as cost()."""
        return float(self.cost(tensor, kind) ** (1 / self.exponents.alpha))

    def total(self, recipe: Mapping[str, str]) -> float:
        """The sum of the costs; tensors that were not measured count as untouched."""
        return math.fsum(self.cost(name, kind) for name, kind in recipe.items() if name in self.scales)

    def predict(self, recipe: Mapping[str, str]) -> float:
        """Predicted mean KLD, nats per token, of a recipe (tensor -> type)."""
        return self.corrected(self.total(recipe))

    def corrected(self, total: float) -> float:
        """The KLD, nats per token, that a sum of costs comes to; rises with `total`."""
        if total <= 0:
            return 0.0
        plain, (x, y) = float(total ** (1 / self.exponents.alpha)), self.known
        curve = math.exp(float(np.interp(math.log(max(plain, _TINY)), x, y))) if len(x) else 1.0
        return plain * curve + self.rounding

    def _check(self, tensor: str) -> None:
        if tensor not in self.scales:
            raise InputError(f"{tensor}: its sensitivity was not measured")


def _errors_of(group: Group, probe: Probe, errors: Errors) -> F64:
    """The table's errors of a probe's tensors, so that they cancel; the probe's own where the table lacks its type."""
    used = (probe.model_extra or {}).get("types")
    types = used if isinstance(used, dict) else {}
    found = [errors[name].get(str(types.get(name, probe.type)), probe.weighted_error) for name in group.tensors]
    return np.maximum(np.array(found, np.float64), _TINY)


def _scales(groups: Sequence[Group], errors: Errors, exponents: Exponents, floor: float) -> dict[str, _Scale]:
    """`floor` is taken off: it is there without any disturbance."""
    scales: dict[str, _Scale] = {}
    for group in groups:
        points = []
        for probe in group.probes:
            each = _errors_of(group, probe, errors)
            kld = max(probe.kld - floor, 0.1 * probe.error, _TINY)
            log = exponents.alpha * math.log(kld) - math.log(float((each**exponents.of_error).sum()))
            points.append((math.log(float(each.mean())), log, probe))
        points.sort(key=lambda point: point[0])
        exact = {probe.type: log for _, log, probe in points if probe.kind == "real"}
        scale = _Scale(np.array([p[0] for p in points]), np.array([p[1] for p in points]), exact)
        scales.update(dict.fromkeys(group.tensors, scale))
    return scales


def _fitted(groups: Sequence[Group], errors: Errors, joints: Sequence[Joint], floor: float) -> Exponents:
    """Exponents under which joint probes are predicted best: least squares of the logarithms, drawn a little to 1.

    Mostly of what is left beside a straight line in the prediction's logarithm, since such a line is what the curve
    takes care of: which of two recipes of one size is better must not suffer for the sake of their common level.
    """
    if len(joints) < _LEAST_JOINTS or not groups:
        return Exponents()
    table = _Table(groups, errors, joints, floor)
    target = np.log([joint.kld - floor for joint in joints])

    def loss(one: Exponents) -> float:
        ridge = _RIDGE * ((one.alpha - 1) ** 2 + (one.beta - 1) ** 2) / len(joints)
        got = table.log_kld(one)
        left = target - got
        centred = got - got.mean()
        line = left.mean() + centred * float(centred @ left) / max(float(centred @ centred), _TINY)
        return float(np.square(left - line).mean() + _LEVEL * np.square(left).mean()) + ridge

    return min((Exponents(round(float(a), 2), round(float(b), 2)) for b in _BETAS for a in _ALPHAS), key=loss)


class _Table:
    """Joint probes in arrays, so that predictions under other exponents cost milliseconds.

    log cost of a tensor = alpha beta log e + w s[p] + (1 - w) s[q], where s[p] = alpha log K[p] - log of the sum of
    e^(alpha beta) over the group in probe p, and p, q are the probes between whose errors e lies (one twice where it
    is beyond them, or of exactly that type).
    """

    def __init__(self, groups: Sequence[Group], errors: Errors, joints: Sequence[Joint], floor: float) -> None:
        scales = _scales(groups, errors, Exponents(), floor)
        log_kld: list[float] = []
        members: list[F64] = []
        places: dict[str, tuple[list[int], F64, dict[str, int]]] = {}
        for group in groups:
            start = len(log_kld)
            each = [np.log(_errors_of(group, probe, errors)) for probe in group.probes]
            order = sorted(range(len(each)), key=lambda i: float(np.log(np.exp(each[i]).mean())))
            for i in order:
                log_kld.append(math.log(max(group.probes[i].kld - floor, 0.1 * group.probes[i].error, _TINY)))
                members.append(each[i])
            exact = {group.probes[i].type: start + n for n, i in enumerate(order) if group.probes[i].kind == "real"}
            for name in group.tensors:
                places[name] = (list(range(start, start + len(order))), scales[name].x, exact)
        self._log_kld = np.array(log_kld)
        self._members = np.concatenate(members)
        self._starts = np.cumsum([0, *map(len, members[:-1])])
        rows, logs, first, second, weight = [], [], [], [], []
        for number, joint in enumerate(joints):
            for name, kind in joint.types.items():
                error = errors.get(name, {}).get(kind, 0.0)
                if name not in places or error <= 0:
                    continue
                probes, x, exact = places[name]
                place = float(np.interp(math.log(error), x, np.arange(len(x))))
                low = min(int(place), len(probes) - 1)
                high = min(low + 1, len(probes) - 1)
                known = exact.get(kind)
                rows.append(number)
                logs.append(math.log(error))
                first.append(probes[low] if known is None else known)
                second.append(probes[high] if known is None else known)
                weight.append(1 - (place - low))
        self._rows, self._count = np.array(rows, int), len(joints)
        self._logs, self._weight = np.array(logs), np.array(weight)
        self._first, self._second = np.array(first, int), np.array(second, int)

    def log_kld(self, one: Exponents) -> F64:
        """Log of the uncorrected prediction of each joint probe, float64 [joints]."""
        sums = np.logaddexp.reduceat(one.of_error * self._members, self._starts)
        scale = one.alpha * self._log_kld - sums
        log = one.of_error * self._logs + self._weight * scale[self._first] + (1 - self._weight) * scale[self._second]
        total = np.bincount(self._rows, np.exp(log), self._count)
        found: F64 = np.log(np.maximum(total, _TINY)) / one.alpha
        return found


def _correction(plain: CostModel, joints: Sequence[Joint], floor: float) -> tuple[F64, F64]:
    """Points (log prediction, log factor), near ones averaged; of curves along which the corrected prediction never
    falls the nearest one, in least squares of logarithms."""
    rows = sorted(
        (math.log(predicted), math.log((joint.kld - floor) / predicted))
        for joint in joints
        if (predicted := plain.corrected(plain.total(joint.types))) > _TINY
    )
    points: list[list[tuple[float, float]]] = []
    for row in rows:
        if points and row[0] - points[-1][0][0] < _SAME:
            points[-1].append(row)
        else:
            points.append([row])
    if not points:
        return np.zeros(0), np.zeros(0)
    x = np.array([np.mean([row[0] for row in one]) for one in points])
    y = np.array([np.mean([row[1] for row in one]) for one in points])
    rising = isotonic_regression(x + y, weights=[len(one) for one in points]).x
    return x, rising - x
