"""What the numbers per token of a results file come to: the distribution of the divergence, and the worst tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import InputError
from apex_quant.evaluation.detokenize import vocabulary as vocabulary

BINS: Final = np.logspace(-7, 2, 91)  # nats: ten bins a decade, from below rounding to what no token has
QUANTILES: Final = (0.5, 0.9, 0.95, 0.99, 0.999)
WORST: Final = 20
CONTEXT: Final = 24  # tokens before a bad one that are shown
LEAST_BEYOND: Final = 100  # tokens beyond a quantile, as evaluation/statistics.py has it for tails


@dataclass(frozen=True)
class Distribution:
    """KLD of `n` tokens: `counts` by bin of `edges` (one more than counts; the first bin takes all below it, the last
    all above), and the share of tokens at or above each edge (`beyond`)."""

    n: int
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    beyond: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {"n": self.n, "edges": [float(f"{edge:.4g}") for edge in self.edges], "counts": list(self.counts)}


@dataclass(frozen=True)
class BadToken:
    """A token with a large divergence. `text` and `context` are None where no vocabulary lies beside the results."""

    chunk: int
    position: int
    token: int
    kld: float
    nll: float | None
    ref_nll: float | None
    domain: str | None
    text: str | None
    context: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def distribution(arrays: Mapping[str, NDArray[Any]]) -> Distribution | None:
    """Of the kld arrays of an archive ("kld/kld"); None where it has none. Raises InputError for other shapes."""
    kld = _flat(arrays, "kld/kld", "f")
    if kld is None or not kld.size:
        return None
    values = np.clip(kld.astype(np.float64), BINS[0], BINS[-1] * (1 - 1e-12))
    counts = np.histogram(values, BINS)[0]
    at_least = np.concatenate([np.cumsum(counts[::-1])[::-1], [0]]) / kld.size
    return Distribution(int(kld.size), tuple(BINS.tolist()), tuple(counts.tolist()), tuple(at_least.tolist()))


def worst_tokens(
    arrays: Mapping[str, NDArray[Any]], decode: Callable[[Sequence[int]], str] | None = None, most: int = WORST
) -> list[BadToken]:
    """The tokens with the largest divergence, largest first; `decode` gives the text of token ids."""
    kld = _flat(arrays, "kld/kld", "f")
    if kld is None or not kld.size:
        return []
    kinds = dict.fromkeys(("chunk", "position", "token", "domain"), "iu") | dict.fromkeys(("nll", "ref_nll"), "f")
    columns = {name: _flat(arrays, f"kld/{name}", kind) for name, kind in kinds.items()}
    chunk, position, token = (columns[name] for name in ("chunk", "position", "token"))
    if chunk is None or position is None or token is None:
        raise InputError("the numbers per token do not say which tokens they are of")
    for name, column in columns.items():
        if column is not None and column.size != kld.size:
            raise InputError(f"kld/{name} has {column.size} values, kld/kld {kld.size}")
    names = arrays.get("kld/domains")
    domains = [str(name) for name in names.reshape(-1)] if names is not None and names.dtype.kind == "U" else []
    found = []
    for at in np.argsort(-kld, kind="stable")[: min(most, kld.size)].tolist():
        row = {name: column[at].item() for name, column in columns.items() if column is not None}
        text = context = None
        if decode is not None:
            before = [at - k for k in range(CONTEXT, 0, -1) if at >= k]
            same = [k for k in before if chunk[k] == chunk[at] and position[at] - position[k] == at - k]
            text, context = decode([int(token[at])]), decode([int(token[k]) for k in same])
        number = row.get("domain", -1)
        found.append(
            BadToken(
                chunk=row["chunk"], position=row["position"], token=row["token"], kld=kld[at].item(),
                nll=row.get("nll"), ref_nll=row.get("ref_nll"), text=text, context=context,
                domain=domains[number] if 0 <= number < len(domains) else None,
            )
        )  # fmt: skip
    return found


def _flat(arrays: Mapping[str, NDArray[Any]], name: str, kinds: str) -> NDArray[Any] | None:
    array = arrays.get(name)
    if array is None:
        return None
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise InputError(f"{name} is {array.dtype} of shape {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"{name} has values that are not finite")
    return array
