"""Putting the numbers of two results side by side: the same tokens and tasks, told by their hashes, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import InputError
from apex_quant.evaluation import pertoken
from apex_quant.evaluation.pertoken import Arrays
from apex_quant.evaluation.results import Results
from apex_quant.evaluation.schema import different_references

# Mean distance of two references' nll of the same tokens, above which they are not the same model: rounding to 16
# bits and another batching stay below a tenth of it.
_SAME_REFERENCE = 0.005


@dataclass(frozen=True)
class Side:
    """One of the results: what it is called, where it is from, and its arrays."""

    label: str
    where: str
    results: Results
    arrays: Arrays


def token_hashes(arrays: Arrays, side: Side, group: str) -> NDArray[np.uint64]:
    """What identifies each scored token: U64 [n]."""
    for name, kinds in (("chunk_hash", "u"), ("chunk", "iu"), ("position", "iu")):
        array_of(arrays, name, side, group, kinds)
    if arrays["chunk"].size != arrays["position"].size:
        raise InputError(f"{side.where}: {group}/chunk and {group}/position differ in length")
    return pertoken.token_hashes(arrays["chunk_hash"], arrays["chunk"], arrays["position"])


def task_hashes(arrays: Arrays, side: Side, group: str) -> NDArray[np.uint64]:
    """What identifies each task: U64 [n]."""
    return array_of(arrays, "task_hash", side, group, "u").astype(np.uint64)


def array_of(arrays: Arrays, name: str, side: Side, group: str, kinds: str) -> NDArray[Any]:
    """A flat array of one of these kinds of numbers. Raises InputError."""
    array = arrays.get(name)
    if array is None or array.ndim != 1 or array.dtype.kind not in kinds:
        state = "is missing" if array is None else f"is {array.dtype} of shape {array.shape}"
        raise InputError(f"{side.where}: {group}/{name} of its numbers per token {state}")
    return array


def mc2_hashes(arrays: Arrays, side: Side, group: str) -> NDArray[np.uint64]:
    """What identifies each task that has an mc2: U64 [n]."""
    hashes, rows = task_hashes(arrays, side, group), array_of(arrays, "mc2_place", side, group, "iu")
    if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < hashes.size:
        raise InputError(f"{side.where}: {group}/mc2_place names tasks that are not there")
    found: NDArray[np.uint64] = hashes[rows]
    return found


def values(arrays: Arrays, name: str, side: Side, group: str) -> NDArray[np.float64]:
    """One array of numbers, F64 [n]. Raises InputError unless it has a finite number for each token or task."""
    found = array_of(arrays, name, side, group, "biuf")
    rows = {"correct": "task_hash", "mc2": "mc2_place"}.get(name, "chunk")
    length = array_of(arrays, rows, side, group, "iu").size
    if found.size != length:
        raise InputError(f"{side.where}: {group}/{name} has {found.size} values for {length} rows")
    bad = np.flatnonzero(~np.isfinite(found))
    if bad.size:
        raise InputError(f"{side.where}: {group}/{name} is {found[bad[0]]} in row {bad[0]}")
    return found.astype(np.float64)


def aligned(
    x: NDArray[np.uint64], y: NDArray[np.uint64], a: Side, b: Side, what: str
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Orders that put equal hashes side by side. Raises InputError unless both have the same, equally often."""
    first, second = np.argsort(x, kind="stable"), np.argsort(y, kind="stable")
    if x.size == y.size and np.array_equal(x[first], y[second]):
        return (np.arange(x.size), np.arange(x.size)) if np.array_equal(x, y) else (first, second)
    (names, counts), (others, more) = np.unique(x, return_counts=True), np.unique(y, return_counts=True)
    _, i, j = np.intersect1d(names, others, assume_unique=True, return_indices=True)
    common = int(np.minimum(counts[i], more[j]).sum())
    raise InputError(
        f"{a.where} and {b.where} were not measured on the same {what}: {common:,} of {x.size:,} and {y.size:,} "
        "are the same",
        hint="measure both with the same text, context and choice of tasks, and with equal vocabularies",
    )


def check_references(
    a: Side, b: Side, first: Arrays, second: Arrays, order: tuple[NDArray[np.intp], NDArray[np.intp]]
) -> None:
    """Divergences from different models cannot be compared: told by their hashes, or by what they gave the tokens."""
    known = a.results.reference or {}, b.results.reference or {}
    if different_references(*known):
        raise InputError(f"{a.where} and {b.where} were measured against different references")
    if any(known[0].get(key) and known[0].get(key) == known[1].get(key) for key in ("model_sha256", "sha256")):
        return
    if "ref_nll" in first and "ref_nll" in second:
        x, y = (values(one, "ref_nll", side, "kld") for one, side in ((first, a), (second, b)))
        apart = float(np.mean(np.abs(x[order[0]] - y[order[1]]))) if x.size else 0.0
        if apart > _SAME_REFERENCE:
            raise InputError(
                f"{a.where} and {b.where} were measured against different references: their nll of the same tokens "
                f"are {apart:.3g} apart in the mean"
            )
