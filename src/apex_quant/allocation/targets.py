"""What is asked of an allocation, as bytes or as a predicted KLD: --size, --bpw, --fit, --kld, --like-size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from apex_quant.allocation.space import Space
from apex_quant.errors import UsageError
from apex_quant.gguf import GGUFModel, open_model
from apex_quant.gguf.limits import DEFAULT_ALIGNMENT
from apex_quant.model import facts
from apex_quant.model.kv_cache import kv_cache

UBATCH: Final = 512
"""Tokens computed at a time: llama.cpp's default."""
RUNTIME_BYTES: Final = 300 << 20
"""What a GPU's context and libraries take before any model: an allowance, not a measurement."""


@dataclass(frozen=True)
class Target:
    """`bytes` of the whole file at most, or the smallest file of a predicted mean KLD of `kld` nats; `said` is how it
    was asked, with the terms it came from."""

    bytes: int | None
    kld: float | None
    said: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "kld": self.kld, **self.said}


def target_of(
    space: Space,
    *,
    size: int | None = None,
    bpw: float | None = None,
    fit: int | None = None,
    ctx: int = 8192,
    kld: float | None = None,
    like_size: str | Path | None = None,
    type_k: str = "f16",
    type_v: str = "f16",
) -> Target:
    """The one target that is given. Raises UsageError for none or several, InputError for a file that cannot be read.

    `bpw` counts tensors alone, as llama-quantize does. `fit`: bytes of memory for weights, the cache of `ctx` tokens
    and the compute buffers.
    """
    given = {"size": size, "bpw": bpw, "fit": fit, "kld": kld, "like_size": like_size}
    asked = [name for name, value in given.items() if value is not None]
    if len(asked) != 1:
        raise UsageError(
            f"{' and '.join(asked)} exclude each other" if asked else "nothing says how large the file may be",
            hint="give one of --size, --bpw, --fit, --kld and --like-size",
        )
    for name in ("size", "bpw", "fit", "kld"):
        value = given[name]
        if value is not None and not 0 < float(str(value)) < 1 << 62:
            raise UsageError(f"a {name} of {value}: it must be above 0 and below 2^62")
    if size is not None:
        return Target(size, None, {"size": size})
    if bpw is not None:
        planned = space.plan(space.extreme(False))
        weights = sum(tensor.weights for tensor in planned.tensors)
        rest = sum(len(layout.header) for layout in planned.layouts)
        return Target(int(bpw * weights / 8) + rest, None, {"bpw": bpw, "weights": weights})
    if fit is not None:
        cache = kv_cache(space.model, ctx=ctx, type_k=type_k, type_v=type_v, ubatch=UBATCH)
        compute = compute_bytes(space.model)
        left = fit - cache.bytes - compute
        said = {"fit": fit, "ctx": ctx, "kv_bytes": cache.bytes, "compute_bytes": compute}
        if left <= DEFAULT_ALIGNMENT:
            raise UsageError(
                f"{fit} bytes do not hold a cache of {ctx} tokens ({cache.bytes}) and the compute buffers ({compute})",
                hint="a shorter --ctx needs less",
            )
        return Target(left, None, said)
    if kld is not None:
        return Target(None, kld, {"kld": kld})
    assert like_size is not None
    with open_model(like_size) as other:
        total = sum(Path(file.path).stat().st_size for file in other.files)
    return Target(total, None, {"like_size": Path(like_size).name})


def compute_bytes(model: GGUFModel) -> int:
    """An allowance for llama.cpp's compute buffers, in bytes: logits and activations of one batch in float32.

    logits: UBATCH x vocabulary; activations: UBATCH x (8 rows of the model's width + gate, up and their product of
    the feed-forward in use). Measured buffers differ by backend; flash attention is assumed.
    """
    known = facts(model)
    embedding = model.tensors.get("token_embd.weight")
    vocabulary = embedding.shape[1] if embedding is not None and len(embedding.shape) > 1 else 0
    used = max(known.n_expert_used, default=0)
    widths = [
        info.shape[1] * (used if len(info.shape) > 2 else 1)
        for name, info in model.tensors.items()
        if "ffn_up" in name and name.endswith(".weight") and len(info.shape) > 1
    ]
    width = 8 * known.n_embd + 3 * max(widths, default=0) + vocabulary
    return RUNTIME_BYTES + 4 * UBATCH * width
