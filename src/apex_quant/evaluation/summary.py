"""Per-token numbers to what results.json says of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from apex_quant.evaluation.state import State
from apex_quant.evaluation.statistics import mean_interval, ppl_error, ppl_interval, quantile, quantile_interval

Json = dict[str, Any]
Arrays = dict[str, NDArray[Any]]
_POSITION_BINS = 8
_WORST = 5


class Tokens:
    """The numbers of all scored tokens in flat arrays, by chunk, then by position."""

    def __init__(self, state: State) -> None:
        first, ctx = int(state.facts["first"]), int(state.facts["ctx"])
        self.arrays, self.facts = state.arrays, state.facts
        chunks, scored = state.arrays["nll"].shape
        self.shape, self.ctx = (chunks, scored), ctx
        self.chunk = np.repeat(np.arange(chunks, dtype=np.int32), scored)
        self.position = np.tile(np.arange(first, first + scored, dtype=np.int32), chunks)
        self.domain = np.repeat(state.arrays["domain"], scored)
        self.domains: list[str] = state.facts["domains"]

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.arrays[name].reshape(-1)

    def per_token(self, *names: str) -> Arrays:
        """What is kept beside results.json."""
        kept: Arrays = {
            "chunk": self.chunk,
            "position": self.position,
            "chunk_hash": self.arrays["chunk_hash"],
            "token": self["token"],
            "domain": self.domain,
            "domains": np.array(self.domains),
        }
        return kept | {name: self[name] for name in names}


def perplexity(tokens: Tokens, *, everything: bool = False) -> tuple[Json, Arrays]:
    """Perplexity over the second half of each chunk, or over all that was scored; by text too."""
    keep = np.ones(tokens.chunk.size, bool) if everything else tokens.position >= tokens.ctx // 2
    nll = tokens["nll"].astype(np.float64)

    def of(where: NDArray[np.bool_]) -> Json:
        value, error = ppl_error(nll[where])
        interval = ppl_interval(nll[where], tokens.chunk[where]).to_json()
        return {**interval, "value": value, "error": _number(error)}

    texts = {name: of(keep & (tokens.domain == i)) for i, name in enumerate(tokens.domains)}
    kept = {k: v[keep] if k not in ("chunk_hash", "domains") else v for k, v in tokens.per_token("nll").items()}
    return {**of(keep), "texts": texts, "chunks": tokens.shape[0]}, kept


def divergence(tokens: Tokens) -> tuple[Json, Arrays]:
    """Everything about the divergence from the reference."""
    kld, chunk = tokens["kld"].astype(np.float64), tokens.chunk
    everything = np.ones(kld.size, bool)
    made = _divergence_of(tokens, everything)
    made |= {name: quantile(kld, q).value for name, q in (("p90", 0.9), ("p95", 0.95))}
    made["p99_9"] = quantile_interval(kld, chunk, 0.999).to_json()
    made["max"] = tokens.facts["largest"]
    difference = np.exp(-tokens["nll"].astype(np.float64)) - np.exp(-tokens["ref_nll"].astype(np.float64))
    made["delta_p_rms"] = float(np.sqrt(np.mean(difference**2)))
    made["delta_p_mean"] = mean_interval(difference, chunk).to_json()
    reverse = tokens["reverse"].astype(np.float64)
    made["reverse_mean"] = _number(float(reverse.mean()))
    made["by_domain"] = {
        name: _divergence_of(tokens, tokens.domain == number) for number, name in enumerate(tokens.domains)
    }
    made["by_position"] = []
    edges = np.linspace(tokens.position.min(), tokens.position.max() + 1, _POSITION_BINS + 1).astype(int)
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        where = (tokens.position >= begin) & (tokens.position < end)
        if where.any():
            row = {"first": begin, "last": end - 1, "mean": float(kld[where].mean()), "n": int(where.sum())}
            made["by_position"].append({**row, "top1_agreement": float(tokens["top1"][where].mean())})
    kept = ("nll", "ref_nll", "kld", "top1")
    return made, tokens.per_token(*kept)


def _divergence_of(tokens: Tokens, where: NDArray[np.bool_]) -> Json:
    kld, chunk = tokens["kld"][where].astype(np.float64), tokens.chunk[where]
    nll, ref_nll = (tokens[name][where].astype(np.float64) for name in ("nll", "ref_nll"))
    return {
        "mean": mean_interval(kld, chunk).to_json(),
        "median": quantile(kld, 0.5).value,
        "p99": quantile(kld, 0.99).value,
        "top1_agreement": mean_interval(tokens["top1"][where], chunk).to_json(),
        "ppl": ppl_error(nll)[0],
        "ppl_reference": ppl_error(ref_nll)[0],
        "ppl_ratio": ppl_interval(nll - ref_nll, chunk).value,
    }


def routers(tokens: Tokens) -> Json | None:
    """How often the routers chose other experts than the reference's; None for a model without routers."""
    if "router_changed" not in tokens.arrays:
        return None
    changed, moved = (tokens.arrays[f"router_{name}"] / tokens.shape[1] for name in ("changed", "moved"))
    rows = [
        {"layer": layer, "changed": float(changed[:, i].mean()), "mass_moved": float(moved[:, i].mean())}
        for i, layer in enumerate(tokens.facts["layers"])
    ]
    chunks = np.arange(len(changed))
    n = tokens.shape[0] * tokens.shape[1]
    made: Json = {"layers": rows, "worst": sorted(rows, key=lambda row: -row["changed"])[:_WORST], "n": n}
    for name, values in (("changed", changed), ("mass_moved", moved)):
        interval = mean_interval(values.mean(axis=1), chunks).to_json() | {"n": n}
        made |= {name: interval["value"], f"{name}_interval": interval}
    return made


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None
