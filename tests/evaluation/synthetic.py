"""Results with made-up numbers whose truth is known, as apex eval would leave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apex_quant.evaluation import pertoken
from apex_quant.evaluation.results import update
from apex_quant.evaluation.schema import ModelInfo, Results

Array = NDArray[Any]


def tokens(chunks: int = 40, ctx: int = 64, seed: int = 7) -> Array:
    """Token ids I32 [chunks, ctx]."""
    return np.random.default_rng(seed).integers(0, 1000, (chunks, ctx)).astype(np.int32)


def kld_arrays(ids: Array, *, scale: float = 1.0, seed: int = 0, shared: int = 3) -> dict[str, Array]:
    """The kld arrays of a model whose divergence is `scale` times a text's (drawn by `shared`), with its own noise."""
    chunks, ctx = ids.shape
    first = ctx // 2
    position = np.tile(np.arange(first, ctx - 1, dtype=np.int32), chunks)
    chunk = np.repeat(np.arange(chunks, dtype=np.int32), ctx - 1 - first)
    text, own = np.random.default_rng(shared), np.random.default_rng([1, seed])
    effect = text.gamma(2, 0.5, size=(chunks,))
    base = effect[chunk] * text.lognormal(-0.5, 1, chunk.size)
    reference = text.gamma(2, 1, chunk.size)
    kld = scale * base * own.lognormal(-0.005, 0.1, chunk.size)
    return {
        "chunk": chunk,
        "position": position,
        "token": ids[chunk, position + 1],
        "chunk_hash": pertoken.hash_chunks(ids),
        "nll": (reference + 0.1 * kld).astype(np.float32),
        "ref_nll": reference.astype(np.float32),
        "kld": kld.astype(np.float32),
        "top1": own.random(chunk.size) > 0.2 * scale,
        "domain": (chunk % 2).astype(np.int16),
        "domains": np.array(["chat", "code"]),
    }


def task_arrays(correct: Array, *, seed: int = 5) -> dict[str, Array]:
    """The arrays of a task file's choice, for these answers."""
    hashes = np.random.default_rng(seed).integers(0, 1 << 63, correct.size).astype(np.uint64)
    return {"task": np.arange(correct.size, dtype=np.int32), "correct": correct.astype(bool), "task_hash": hashes}


def base(name: str = "a.gguf", sha256: str = "a" * 64, **more: Any) -> Results:
    return Results(model=ModelInfo(path=name, sha256=sha256, bytes=1000, bpw=4.5), **more)


def write(folder: Path, name: str, *, scale: float = 1.0, seed: int = 0, ids: Array | None = None, **more: Any) -> Path:
    """A results.json about model NAME.gguf with kld and its numbers per token."""
    path = folder / f"{name}.json"
    arrays = kld_arrays(tokens() if ids is None else ids, scale=scale, seed=seed)
    mean = float(arrays["kld"].mean(dtype=np.float64))
    value = {"mean": {"value": mean, "low": None, "high": None, "n": arrays["kld"].size}, "median": 0.1}
    update(path, "kld", value, base=base(f"{name}.gguf", sha256=name * 8, **more), arrays=arrays)
    return path
