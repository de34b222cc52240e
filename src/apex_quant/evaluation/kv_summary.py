"""Numbers of each token to what kv.json says: intervals, memory, ranks, predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import UsageError
from apex_quant.evaluation.kv_types import Pair, bits_of
from apex_quant.evaluation.statistics import Interval, mean_interval, paired_difference, quantile, quantile_interval
from apex_quant.evaluation.turbo import predict
from apex_quant.evaluation.turbo.codec import TURBO
from apex_quant.gguf import GGUFModel
from apex_quant.model.kv_cache import KVCache, kv_cache

Arrays = dict[str, NDArray[Any]]

_LONG: Final = 1 << 17  # tokens at which the growth of the cache is taken: beyond every sliding window
_ROUNDING: Final = 0.011  # MiB: what the log's two figures are rounded to, each


@dataclass(frozen=True)
class Measured:
    """One context: what the child said of it, and the numbers of each row."""

    about: dict[str, Any]
    arrays: dict[str, Arrays]

    @property
    def ctx(self) -> int:
        return int(self.about["ctx"])

    def facts(self, row: str) -> dict[str, Any]:
        return next((one for one in self.about["rows"] if one["id"] == row), {})


def assemble(
    model: GGUFModel,
    measured: Sequence[Measured],
    rows: Sequence[dict[str, Any]],
    sizes: Sequence[int],
    speeds: Mapping[str, Any],
    notes: Sequence[str],
) -> tuple[dict[str, Any], Arrays]:
    """pairs, unrotated, failed, simulated, ranking and notes of kv.json, and the arrays of its .npz, CTX/ROW/ARRAY.

    `pairs` has each pair once, so that a reader needs no other key: those without llama.cpp's rotation are in
    `unrotated` where they were measured beside the others, those that the library refused in `failed`.
    """
    said = list(notes)
    made = {row["id"]: _row(model, measured, row, sizes, speeds, said) for row in rows}
    real = [row for row in rows if not row["simulated"]]
    failed = [row for row in real if made[row["id"]]["ctx"] is None]
    rotated = {(row["k"], row["v"]) for row in real if row["rotation"]}
    beside = [row for row in real if not row["rotation"] and (row["k"], row["v"]) in rotated and row not in failed]
    kept = [row for row in real if row not in failed and row not in beside]
    simulated = [_simulated(made[row["id"]], row, rows, made, measured) for row in rows if row["simulated"] == "type"]
    document = {
        "pairs": [made[row["id"]] for row in kept],
        "unrotated": [made[row["id"]] for row in beside],
        "failed": [made[row["id"]] for row in failed],
        "simulated": simulated,
        "ranking": _ranking(measured, rows, made),
        "notes": said,
    }
    return document, _archive(measured)


def _row(model: GGUFModel, measured: Sequence[Measured], row: Mapping[str, Any], sizes: Sequence[int],
         speeds: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:  # fmt: skip
    """One pair, whole. `kld_mean` and `kld_p99_9` are those of the longest context with an interval, else of the
    longest; all contexts are in `by_ctx`."""
    pair = Pair(row["k"], row["v"])
    quantized = min(bits_of(pair.k), bits_of(pair.v)) < 16
    by_ctx = [_at(one, row["id"]) for one in measured if row["id"] in one.arrays]
    chosen = next((one for one in reversed(by_ctx) if one["kld_mean"]["low"] is not None), None)
    chosen = chosen or (by_ctx[-1] if by_ctx else None)
    problems = [one.facts(row["id"])["problem"] for one in measured if "problem" in one.facts(row["id"])]
    facts = next((one.facts(row["id"]) for one in measured if row["id"] in one.arrays), {})
    found: dict[str, Any] = {
        "k": pair.k,
        "v": pair.v,
        "bits": pair.bits,
        "rotation": row["rotation"] if quantized else None,
        "rotated": dict(zip("kv", facts["rotated"], strict=True)) if facts.get("rotated") else None,
        "kld_mean": chosen["kld_mean"] if chosen else Interval(None, None, None, 0, "not measured").to_json(),
        "kld_p99_9": chosen["kld_p99_9"] if chosen else Interval(None, None, None, 0, "not measured").to_json(),
        "ctx": chosen["ctx"] if chosen else None,
        "full": chosen.get("full") if chosen else None,
        "by_ctx": by_ctx,
        **_memory(model, pair, sizes, notes),
        "speed": speeds.get(row["id"]),
    }
    if problems:
        found["problem"] = problems[0]
        notes.append(f"{pair.name}: {problems[0]}")
    if not row["simulated"] and row["rotation"]:
        _check_memory(model, pair, measured, row["id"], notes)
    return found


def _at(one: Measured, row: str) -> dict[str, Any]:
    """Divergence of one row at one context."""
    arrays = one.arrays[row]
    kld = arrays["kld"].astype(np.float64)
    chunks, scored = kld.shape
    block = np.repeat(np.arange(chunks), scored)
    made: dict[str, Any] = {
        "ctx": one.ctx,
        "kld_mean": _divergence(kld, block),
        "kld_median": quantile(kld, 0.5).value,
        "kld_p99": quantile(kld, 0.99).value,
        "kld_p99_9": quantile_interval(kld, block, 0.999).to_json(),
        "kld_max": float(kld.max()),
        "top1_agreement": mean_interval(arrays["top1"].astype(np.float64), block).to_json(),
        "chunks": chunks,
    }
    if "kld_full" in arrays:
        full = arrays["kld_full"].astype(np.float64)
        made["full"] = {
            "kld_mean": _divergence(full, block),
            "kld_p99_9": quantile_interval(full, block, 0.999).to_json(),
        }
        if "f16-f16" in one.arrays:
            base = one.arrays["f16-f16"]["kld_full"].astype(np.float64)
            # what the cache adds to the divergence that the weights have
            made["full"]["added"] = paired_difference(full, base, block).interval.to_json()
    return made


def _divergence(kld: NDArray[np.float64], block: NDArray[np.int64]) -> dict[str, Any]:
    """The mean with its interval. No divergence is below zero, whatever rounding and a symmetric interval say."""
    found = mean_interval(kld, block).to_json()
    return found | {key: max(found[key], 0.0) for key in ("value", "low", "high") if found[key] is not None}


# --- memory ---


def _memory(model: GGUFModel, pair: Pair, sizes: Sequence[int], notes: list[str]) -> dict[str, Any]:
    """Bytes that one more token takes in a long context, and MiB of the whole cache of one sequence."""
    try:
        grown, at = (_bytes(model, pair, size) for size in (2 * _LONG, _LONG))
        mib_at = {str(size): round(_bytes(model, pair, size) / 2**20, 4) for size in sizes}
    except UsageError as error:
        note = f"{pair.name}: {error.message}"
        if note not in notes:
            notes.append(note)
        return {"bytes_per_token": None, "mib_at": {str(size): None for size in sizes}}
    return {"bytes_per_token": (grown - at) / _LONG, "mib_at": mib_at}


def _bytes(model: GGUFModel, pair: Pair, ctx: int) -> int:
    return kv_cache(model, ctx=ctx, type_k=pair.k, type_v=pair.v).bytes


def _check_memory(model: GGUFModel, pair: Pair, measured: Sequence[Measured], row: str, notes: list[str]) -> None:
    """A note where the library's log has other megabytes than were computed."""
    for one in measured:
        facts = one.facts(row)
        if "k_mib" not in facts or pair.turbo:
            continue
        found: KVCache = kv_cache(
            model, ctx=one.ctx, type_k=pair.k, type_v=pair.v, sequences=facts["batching"]["sequences"],
            ubatch=max(16, facts["batching"]["tokens"]), swa_full=True,
        )  # fmt: skip
        computed = (found.bytes - found.recurrent_bytes) / 2**20
        logged = facts["k_mib"] + facts["v_mib"]
        if abs(computed - logged) > 2 * _ROUNDING:
            notes.append(f"{pair.name}: the library's cache at {one.ctx} has {logged:.2f} MiB, computed {computed:.2f}")


# --- ranks ---


def _ranking(measured: Sequence[Measured], rows: Sequence[Mapping[str, Any]], made: Mapping[str, dict[str, Any]]
             ) -> list[dict[str, Any]]:  # fmt: skip
    """Pairs by mean divergence at the context of their rows; each with the paired difference to the next and whether
    that can be shown, and which pairs take no more bits and are shown to be nearer to f16 (`dominated_by`)."""
    usable = [row for row in rows if not row["simulated"] and made[row["id"]]["ctx"] is not None]
    usable = [row for row in usable if made[row["id"]]["kld_mean"]["value"] is not None]
    ctx = max((made[row["id"]]["ctx"] for row in usable), default=None)
    one = next((found for found in measured if found.ctx == ctx), None)
    if one is None:
        return []
    usable = [row for row in usable if row["id"] in one.arrays]
    klds = {row["id"]: one.arrays[row["id"]]["kld"].astype(np.float64) for row in usable}
    order = sorted(usable, key=lambda row: (klds[row["id"]].mean(), made[row["id"]]["bits"]))
    ranking = []
    for place, row in enumerate(order):
        kld, found = klds[row["id"]], made[row["id"]]
        block = np.repeat(np.arange(kld.shape[0]), kld.shape[1])
        entry: dict[str, Any] = {
            "k": row["k"], "v": row["v"], "rotation": found["rotation"], "rank": place + 1,
            "kld_mean": float(kld.mean()), "bits": found["bits"], "to_next": None, "differs": None,
        }  # fmt: skip
        if place + 1 < len(order):
            interval = paired_difference(kld, klds[order[place + 1]["id"]], block).interval
            entry["to_next"] = interval.to_json()
            entry["differs"] = interval.excludes_zero()
        better = []
        for other in order[:place]:
            smaller = made[other["id"]]["bits"] <= found["bits"] and other["rotation"]
            if smaller and (paired_difference(kld, klds[other["id"]], block).interval.low or 0) > 0:
                better.append(f"{other['k']}/{other['v']}")
        entry["dominated_by"] = better
        ranking.append(entry)
    return ranking


# --- predictions ---


def _simulated(found: dict[str, Any], row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
               made: Mapping[str, dict[str, Any]], measured: Sequence[Measured]) -> dict[str, Any]:  # fmt: skip
    """The row of a type that was simulated, with what is predicted from it at each context."""
    pair = Pair(row["k"], row["v"])
    stock = {f"{one['k']}/{one['v']}": one["id"] for one in rows if not one["simulated"] and one["rotation"]}
    bits = {name: made[identity]["bits"] for name, identity in stock.items()}
    predictions = []
    for one in measured:
        if row["id"] not in one.arrays:
            continue
        values = {name: float(one.arrays[i]["kld"].mean()) for name, i in stock.items() if i in one.arrays}
        values.pop("f16/f16", None)
        highs = {
            name: next((at["kld_mean"]["high"] for at in made[stock[name]]["by_ctx"] if at["ctx"] == one.ctx), None)
            for name in values
        }
        checks = []
        for check in rows:
            name = f"{check['k']}/{check['v']}"
            if check["simulated"] == "check" and check["id"] in one.arrays and name in values:
                checks.append(predict.Check(name, values[name], float(one.arrays[check["id"]]["kld"].mean())))
        own = next(at["kld_mean"] for at in found["by_ctx"] if at["ctx"] == one.ctx)
        predicted = predict.predict(own["value"], checks, own["low"], own["high"])
        like = predict.alike(predicted, values)
        entry: dict[str, Any] = {
            "ctx": one.ctx,
            "simulated": own,
            "predicted": predicted,
            "like": like,
            "checks": [{**vars(check), "ratio": check.measured / check.simulated} for check in checks],
            "sentence": predict.sentence(pair.name, pair.bits, predicted, like, values, bits, highs),
            "layers": _layers(one, row["id"]),
        }
        errors = _attention_errors(one)
        if row["id"] in errors:
            known = {name: (errors[i], values[name]) for name, i in stock.items() if i in errors and name in values}
            entry["attention_error"] = errors[row["id"]]
            entry["from_attention"] = predict.from_attention(errors[row["id"]], known)
        elif "problem" in one.about.get("attention", {}):
            entry["note"] = f"no errors of attention: {one.about['attention']['problem']}"
        predictions.append(entry)
    kept = ("k", "v", "bits", "bytes_per_token", "mib_at", "by_ctx", "problem")
    result = {key: found[key] for key in kept if key in found}
    chosen = next((one for one in predictions if one["ctx"] == found["ctx"]), None)
    result["kld_mean"] = chosen["predicted"] if chosen else found["kld_mean"]
    result["ctx"] = found["ctx"]
    result["sentence"] = chosen["sentence"] if chosen else None
    result["predictions"] = predictions
    result["type_bytes"] = {name: TURBO[name].bytes for name in dict.fromkeys(pair) if name in TURBO}
    return result


def _attention_errors(one: Measured) -> dict[str, float]:
    """Mean over layers of the relative squared error of attention's output, of each row."""
    rows = one.about.get("attention", {}).get("rows", {})
    return {name: fmean(by.values()) for name, by in rows.items() if by}


def _layers(one: Measured, row: str) -> list[dict[str, Any]]:
    """Relative squared errors of K, V and attention's output by layer."""
    attention = one.about.get("attention", {}).get("rows", {}).get(row, {})
    return [
        {**layer, "attention_error": attention.get(str(layer["layer"]))} for layer in one.facts(row).get("layers", [])
    ]


def _archive(measured: Sequence[Measured]) -> Arrays:
    arrays: Arrays = {}
    for one in measured:
        for row, known in one.arrays.items():
            for name, values in known.items():
                key = f"{one.ctx}/{name}" if name in ("chunk_hash", "domain") else f"{one.ctx}/{row}/{name}"
                arrays[key] = values
    return arrays
