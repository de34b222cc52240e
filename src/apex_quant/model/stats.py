"""Weight statistics by role and layer: mean, deviation, kurtosis and largest magnitude, in bounded memory.

Tensors are read in chunks, dequantized by PyPI gguf's reference code, and their central moments are merged by
the pairwise formulas of Chan et al. (1979) and Pébay (2008), which lose nothing to cancellation where the
mean is far from zero (norms).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from apex_quant.gguf import GGUFModel, TensorInfo
from apex_quant.model.patterns import Role
from apex_quant.model.roles import TensorRole

CHUNK: Final = 1 << 19
"""Weights per chunk: under 20 MB of temporaries in every dequantizer."""


_OUTSIDE: Final = -1
"""Stands for "no layer" where layers are sorted."""


@dataclass(slots=True)
class Moments:
    """Central moments of a stream of numbers. `m2` to `m4` are sums of powers of the distance to the mean.

    `nonfinite` counts NaN and infinite values, which the rest leaves out.
    """

    n: int = 0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0
    max_abs: float = 0.0
    nonfinite: int = 0

    @classmethod
    def of(cls, values: npt.NDArray[np.floating]) -> Moments:
        """The moments of one array of any shape, in float64."""
        x = np.asarray(values, dtype=np.float64).ravel()
        finite = np.isfinite(x)
        nonfinite = x.size - int(np.count_nonzero(finite))
        if nonfinite:
            x = x[finite]
        if not x.size:
            return cls(nonfinite=nonfinite)
        with np.errstate(over="ignore", invalid="ignore"):  # moments too large for float64 become infinite
            mean = float(x.mean())
            d = x - mean
            d2 = d * d
            return cls(
                n=x.size,
                mean=mean,
                m2=float(d2.sum()),
                m3=float(np.dot(d2, d)),
                m4=float(np.dot(d2, d2)),
                max_abs=float(np.abs(x).max()),
                nonfinite=nonfinite,
            )

    def __add__(self, other: Moments) -> Moments:
        """The moments of both streams together."""
        nonfinite = self.nonfinite + other.nonfinite
        if not self.n or not other.n:
            return replace(self if self.n else other, nonfinite=nonfinite)
        # shares and distance of the means; products instead of powers, since ** raises where * gives infinity
        n = self.n + other.n
        a, b = self.n / n, other.n / n
        d = other.mean - self.mean
        d2 = d * d
        return Moments(
            n=n,
            mean=self.mean + d * b,
            m2=self.m2 + other.m2 + n * d2 * a * b,
            m3=self.m3 + other.m3 + n * d2 * d * a * b * (a - b) + 3 * d * (a * other.m2 - b * self.m2),
            m4=self.m4
            + other.m4
            + n * d2 * d2 * a * b * (a * a - a * b + b * b)
            + 6 * d2 * (a * a * other.m2 + b * b * self.m2)
            + 4 * d * (a * other.m3 - b * self.m3),
            max_abs=max(self.max_abs, other.max_abs),
            nonfinite=nonfinite,
        )

    @property
    def std(self) -> float:
        """Standard deviation of the population; NaN of nothing."""
        return math.sqrt(self.m2 / self.n) if self.n else math.nan

    @property
    def kurtosis(self) -> float:
        """Pearson kurtosis, 3 for a normal distribution; NaN of a constant."""
        square = self.m2 * self.m2
        return self.n * self.m4 / square if square > 0 else math.nan


class Statistics(BaseModel):
    """One row: a tensor, a role in a layer (`layer` None outside layers) or a whole role.

    `kurtosis` is of all weights pooled; `tensor_kurtosis` is the mean of the single tensors' kurtosis by
    their weights: pooling tensors of unlike deviation raises the first, not the second.
    """

    role: Role
    layer: int | None
    name: str | None = None
    n: int
    mean: float
    std: float
    kurtosis: float
    tensor_kurtosis: float
    max_abs: float
    nonfinite: int


class Skipped(BaseModel):
    """A tensor without statistics and why."""

    name: str
    reason: str


class WeightStatistics(BaseModel):
    """What `weight_statistics` measured, in order of role, then layer.

    `roles` and `layers` pool matrices only: the few numbers of a bias or a scale lie on another scale and
    would drown the shape of the weights. `tensors` has every tensor.
    """

    roles: list[Statistics]
    layers: list[Statistics]
    tensors: list[Statistics]
    skipped: list[Skipped]


def weight_statistics(
    model: GGUFModel,
    roles: Mapping[str, TensorRole],
    *,
    progress: Callable[[int], None] | None = None,
) -> WeightStatistics:
    """Statistics of every tensor in `roles` (name -> role), by tensor, by role and layer, and by role.

    Reads each tensor once, in chunks of CHUNK weights; `progress` is told the bytes read since the last
    call. Integer tensors and types that PyPI gguf cannot dequantize are listed in `skipped`.
    """
    measured: dict[str, Moments] = {}
    skipped: list[Skipped] = []
    for name in roles:
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # what dequantizes to infinity is counted
                chunks = weight_chunks(model, model.tensors[name], progress)
                measured[name] = sum((Moments.of(chunk) for chunk in chunks), Moments())
        except NotImplementedError as error:
            skipped.append(Skipped(name=name, reason=str(error)))

    pooled: dict[Role, dict[int, list[Moments]]] = {role: {} for role in Role}
    for name, moments in measured.items():
        role = roles[name]
        if role.suffix == "weight" and len(model.tensors[name].shape) > 1:
            layer = _OUTSIDE if role.layer is None else role.layer
            pooled[role.role].setdefault(layer, []).append(moments)
    return WeightStatistics(
        roles=[_row(role, None, list(chain(*found.values()))) for role, found in pooled.items() if found],
        layers=[
            _row(role, None if layer == _OUTSIDE else layer, found[layer])
            for role, found in pooled.items()
            for layer in sorted(found)
        ],
        tensors=[_row(roles[name].role, roles[name].layer, [found], name) for name, found in measured.items()],
        skipped=skipped,
    )


def _row(role: Role, layer: int | None, tensors: list[Moments], name: str | None = None) -> Statistics:
    pooled = sum(tensors, Moments())
    # a constant tensor (a vector of equal norms) has no kurtosis and takes no part in the mean
    varied = [m for m in tensors if not math.isnan(m.kurtosis)]
    weight = sum(m.n for m in varied)
    return Statistics(
        role=role,
        layer=layer,
        name=name,
        n=pooled.n,
        mean=pooled.mean,
        std=pooled.std,
        kurtosis=pooled.kurtosis,
        tensor_kurtosis=sum(m.kurtosis * m.n for m in varied) / weight if weight else math.nan,
        max_abs=pooled.max_abs,
        nonfinite=pooled.nonfinite,
    )


def weight_chunks(
    model: GGUFModel, info: TensorInfo, progress: Callable[[int], None] | None = None
) -> Iterator[npt.NDArray[np.float32]]:
    """The weights of a tensor in order, CHUNK at a time. NotImplementedError for types without weights."""
    import gguf  # only here: a heavy import that plan and inspect do without

    if info.type.kind == "int":
        raise NotImplementedError(f"{info.type} holds integers")
    try:
        kind = gguf.GGMLQuantizationType(info.type.id)
    except ValueError:
        raise NotImplementedError(f"no dequantizer for {info.type}") from None
    step = CHUNK // info.type.block * info.type.bytes
    buffer = np.empty(min(step, info.nbytes), dtype=np.uint8)
    for start in range(0, info.nbytes, step):
        raw = buffer[: min(step, info.nbytes - start)]
        model.read_into(info, start, raw.data)
        yield raw.view(np.float64) if info.type.name == "F64" else gguf.quants.dequantize(raw, kind)
        if progress is not None:
            progress(raw.size)
