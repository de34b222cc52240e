"""Random importance matrices for any model file: what calibration would give, without running the model."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from apex_quant.gguf import open_model
from apex_quant.importance import Importance

_SHARED_INPUT = (
    (re.compile(r"ffn_(gate_up|gate|up)(?=[._])"), "ffn_up"),
    (re.compile(r"attn_[qkv]\b"), "attn_qkv"),
)


def random_imatrix(
    model: Path,
    seed: int = 0,
    *,
    uncovered: Mapping[str, Sequence[int]] | None = None,
    skip: str = r"^(?!blk\.)",
    tokens: int = 8192,
) -> Importance:
    """An importance matrix with an entry for every weight matrix of `model`, as llama-imatrix shapes them.

    Routed experts ("_exps.weight") get one row and count each; other 3-D weights one row of all their
    channels. Values are log-normal and depend on `seed` and the name; weights with the same input (gate and
    up, fused or split; q, k and v) get the same ones, whatever the model's form. `uncovered` are experts
    without data by tensor name; names that match the regex `skip` get no entry (by default all outside
    layers, as llama-imatrix leaves out the output and the embedding).
    """
    arrays: dict[str, tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], list[int]]] = {}
    uncovered = uncovered or {}
    with open_model(model) as source:
        for info in source.tensors.values():
            if len(info.shape) < 2 or not info.name.endswith(".weight") or re.search(skip, info.name):
                continue
            experts = info.shape[2] if len(info.shape) > 2 else 1
            key = info.name
            for pattern, same in _SHARED_INPUT:
                key = pattern.sub(same, key)
            rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
            mean = rng.lognormal(sigma=1.5, size=(experts, info.shape[0]))
            counts = [tokens]
            if info.name.endswith("_exps.weight"):
                counts = rng.integers(1, tokens, experts).tolist()
                for expert in uncovered.get(info.name, ()):
                    counts[expert] = 0
            sums = mean.reshape(len(counts), -1) * np.array(counts)[:, None]
            arrays[info.name] = (sums.astype(np.float32), counts)
    missing = set(uncovered) - set(arrays)
    assert not missing, f"no expert tensors: {missing}"
    return Importance.from_arrays(arrays, datasets=("random.txt",), chunk_count=tokens // 512)
