"""A running model's cache: what is written into it, and other values in its place.

With a cache of float32 the library writes keys and values as they are; `CacheTap` rounds them to another type and back
right after they are written, so that attention sees what a cache of that type would have given it. That needs no build
that has the type. `AttentionTap` keeps keys, values, queries and weights of one decode, for errors layer by layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import UsageError
from apex_quant.evaluation.turbo.codec import BLOCK, TURBO, round_trip
from apex_quant.evaluation.turbo.hadamard import hadamard
from apex_quant.gguf import TYPES
from apex_quant.native import ggml
from apex_quant.runtime.observe import Product
from apex_quant.runtime.tensors import F32, I32

Rounding = Callable[[F32], F32]
"""Rows float32 [n, width] to what a type makes of them."""
LayerRounding = Callable[[int], Rounding | None]
"""That of a layer: heads may be of other lengths there."""

SMALLEST_ROTATION: Final = (
    64  # values that llama.cpp rotates together; larger powers of two for K where heads have them
)
_NAME = re.compile(r"cache_(?:\w*_)?([kv])_l(\d+)")
_REPRODUCED: Final = 0.02  # largest difference of attention weights that are computed here from the library's


def rounding(name: str, part: str, head: int, *, rotated: bool = True) -> Rounding | None:
    """What type `name` makes of a row of K or V (`part` "k" or "v") whose heads have `head` values; None where float32
    says it as well (f32, f16, bf16: flash attention rounds to f16 itself).

    Stock types are llama.cpp's own encoder and decoder, behind its own rotation where it has one (heads of a multiple
    of 64 values; K: the largest power of two that divides them, V: 64). Rows that are no whole turbo blocks have each
    head filled up with zeros, as forks do.
    """
    if name in TURBO:
        kind = TURBO[name]

        def turbo(rows: F32) -> F32:
            if rows.shape[-1] % BLOCK == 0:
                return round_trip(rows, kind)
            if head < 1 or rows.shape[-1] % head:
                raise UsageError(f"{name} takes rows of a multiple of {BLOCK} values, this model has {rows.shape[-1]}")
            padded = np.zeros((len(rows), rows.shape[-1] // head, head + -head % BLOCK), np.float32)
            padded[:, :, :head] = rows.reshape(len(rows), -1, head)
            return round_trip(padded, kind)[:, :, :head].reshape(rows.shape)

        return turbo
    if name in ("f32", "f16", "bf16"):
        return None
    width = 0
    if rotated and head > 0 and head % SMALLEST_ROTATION == 0:
        width = SMALLEST_ROTATION
        while part == "k" and head % (2 * width) == 0:
            width *= 2

    def stock(rows: F32) -> F32:
        if width and rows.shape[-1] % width:  # else tokens would be turned into one another
            raise UsageError(f"rows of {rows.shape[-1]} values are no heads of {head}")
        turned = hadamard(rows.reshape(-1, width)).reshape(rows.shape) if width else rows
        made = stock_round_trip(turned, name)
        return hadamard(made.reshape(-1, width)).reshape(rows.shape) if width else made

    return stock


def layer_rounding(
    name: str, part: str, heads: Mapping[int, tuple[int, int]], *, rotated: bool = True
) -> LayerRounding:
    """rounding() of each layer, whose heads of K and V have `heads` values. What it gives raises UsageError for a layer
    that is not among them."""
    side = "kv".index(part)
    lengths = {pair[side] for pair in heads.values()}
    by_length = {length: rounding(name, part, length, rotated=rotated) for length in lengths}

    def of_layer(layer: int) -> Rounding | None:
        if layer not in heads:
            raise UsageError(f"layer {layer} has a cache whose heads are not known, so it cannot be simulated")
        return by_length[heads[layer][side]]

    return of_layer


def stock_round_trip(rows: F32, name: str) -> F32:
    """Rows float32 [n, width], width a multiple of 32, to a stock type and back with the library's own functions.

    The encoder is the one that writes caches (from_float_ref), which for iq4_nl searches less than ggml_quantize_chunk.
    """
    kind, lib = TYPES[name.upper()], ggml()
    source = np.ascontiguousarray(rows, np.float32)
    raw = np.empty(source.size // kind.block * kind.bytes, np.uint8)
    made = np.empty_like(source)
    lib.to_cache(kind)(source.ctypes.data, raw.ctypes.data, source.size)
    lib.to_float(kind)(raw.ctypes.data, made.ctypes.data, source.size)
    return made


@dataclass
class Distortion:
    """Sums of squares of what was rounded, and of the error."""

    signal: float = 0.0
    error: float = 0.0

    @property
    def share(self) -> float:
        return self.error / self.signal if self.signal else 0.0


class CacheTap:
    """An observer that rounds what is written into caches of float32 in the processor's memory.

    Call begin() whenever the cache was emptied. Cells that changed are found by a sum over each row: where the library
    puts them depends on windows and sequences.
    """

    nodes: ClassVar[Mapping[str, tuple[str, ...]]] = {"SET_ROWS": ("cache_",)}

    def __init__(self, k: LayerRounding, v: LayerRounding) -> None:
        self._rounding = {"k": k, "v": v}
        self._sums: dict[tuple[str, int], NDArray[np.uint64]] = {}
        self.distortion: dict[tuple[str, int], Distortion] = {}

    def begin(self) -> None:
        """The cache holds nothing now."""
        self._sums.clear()

    def wants(self, product: Product) -> bool:
        return False

    def take(self, product: Product, x: F32, ids: I32 | None) -> None:
        raise AssertionError("nothing was asked for")

    def take_node(self, name: str, op: str, value: F32, source: F32 | I32 | None) -> None:
        found = _NAME.match(name)
        if found is None:
            return
        key = (found[1], int(found[2]))
        to_type = self._rounding[key[0]](key[1])
        if to_type is None:
            return
        rows = value.reshape(-1, value.shape[-1])
        if not np.shares_memory(rows, value) or not rows.flags.writeable:
            raise UsageError("a cache can only be changed in main memory: simulate without GPU layers")
        sums = _row_sums(rows)
        old = self._sums.get(key)
        new = np.flatnonzero(sums if old is None or len(old) != len(sums) else sums != old)
        if new.size:
            before = rows[new]
            after = to_type(before)
            rows[new] = after
            sums[new] = _row_sums(after)
            known = self.distortion.setdefault(key, Distortion())
            known.signal += float(np.square(before, dtype=np.float64).sum())
            known.error += float(np.square(after - before, dtype=np.float64).sum())
        self._sums[key] = sums

    def errors(self) -> list[dict[str, Any]]:
        """Relative squared error of K and V by layer."""
        layers = sorted({layer for _, layer in self.distortion})
        empty = Distortion()
        return [
            {"layer": i, **{f"{part}_error": self.distortion.get((part, i), empty).share for part in "kv"}}
            for i in layers
        ]


def _row_sums(rows: F32) -> NDArray[np.uint64]:
    """A number for each row that changes when the row does, but for accidents of 2^-32."""
    words = np.ascontiguousarray(rows).view(np.uint32)
    weights = np.arange(1, 2 * words.shape[1], 2, dtype=np.uint32) * np.uint32(2654435761)
    sums: NDArray[np.uint64] = (words * weights).sum(axis=1, dtype=np.uint64)
    return sums


@dataclass
class LayerAttention:
    """One layer in one decode of one sequence: keys and values float32 [n, width], queries and weights float32
    [heads, tokens, head] and [heads, tokens, n]."""

    k: F32 | None = None
    v: F32 | None = None
    q: F32 | None = None
    weights: F32 | None = None


@dataclass
class AttentionTap:
    """An observer of one decode without flash attention, with a cache of float32 and one sequence of `n` tokens."""

    n: int
    layers: dict[int, LayerAttention] = field(default_factory=dict)

    nodes: ClassVar[Mapping[str, tuple[str, ...]]] = {"SET_ROWS": ("cache_",)}

    def wants(self, product: Product) -> bool:
        return _NAME.match(product.weight) is not None

    def take(self, product: Product, x: F32, ids: I32 | None) -> None:
        found = _NAME.match(product.weight)
        assert found is not None
        layer = self.layers.setdefault(int(found[2]), LayerAttention())
        if found[1] == "k":
            layer.q = x[0].copy()
        else:
            layer.weights = x[0, :, :, : self.n].copy()

    def take_node(self, name: str, op: str, value: F32, source: F32 | I32 | None) -> None:
        found = _NAME.match(name)
        if found is None:
            return
        layer = self.layers.setdefault(int(found[2]), LayerAttention())
        if found[1] == "k":
            layer.k = value.reshape(-1, value.shape[-1])[: self.n].copy()
        else:
            layer.v = value.reshape(-1).copy()  # its rows lie across: see rows_of_v


def rows_of_v(flat: F32, n: int, width: int) -> F32:
    """Values float32 [n, width] of a transposed cache, which holds all cells of one value behind one another."""
    cells = flat.size // width
    return np.ascontiguousarray(flat.reshape(width, cells)[:, :n].T)


def attention_error(layer: LayerAttention, n: int, k: Rounding | None, v: Rounding | None) -> float | None:
    """Relative squared error of softmax(s Q K') V' when K and V are rounded; None where the weights that the library
    had are not those of a softmax of products (soft caps, sinks, position biases).

    The scale s and which cells a token sees are taken from the library's weights.
    """
    if layer.k is None or layer.v is None or layer.q is None or layer.weights is None:
        return None
    heads, _, head = layer.q.shape
    groups = layer.k.shape[1] // head
    if groups < 1 or heads % groups:
        return None
    values = rows_of_v(layer.v, n, layer.v.size // _cells(layer.v.size, n, groups))
    keys, width = layer.k, values.shape[1] // groups
    new_keys = keys if k is None else k(keys)
    new_values = values if v is None else v(values)
    error = signal = 0.0
    for number in range(heads):
        group = number * groups // heads
        where = slice(group * head, (group + 1) * head)
        weights = layer.weights[number]
        products = layer.q[number] @ keys[:, where].T
        scale = _scale(products, weights)
        if scale is None or np.abs(_softmax(scale * products, weights > 0) - weights).max() > _REPRODUCED:
            return None
        rebuilt = _softmax(scale * (layer.q[number] @ new_keys[:, where].T), weights > 0)
        columns = slice(group * width, (group + 1) * width)
        true = weights @ values[:, columns]
        error += float(np.square(rebuilt @ new_values[:, columns] - true, dtype=np.float64).sum())
        signal += float(np.square(true, dtype=np.float64).sum())
    return error / signal if signal else None


def _cells(size: int, n: int, groups: int) -> int:
    """Cells of a cache of `size` values: a multiple of 256 that holds n tokens and leaves whole heads."""
    cells = -(-n // 256) * 256
    while size % (cells * groups) and cells < size:
        cells += 256
    return cells


def _scale(products: F32, weights: F32) -> float | None:
    """s with log weights = s products + constant in each row, by least squares; None where nothing varies."""
    seen = weights > 1e-6
    logs = np.where(seen, np.log(np.maximum(weights, 1e-30)), 0)
    count = np.maximum(seen.sum(axis=1, keepdims=True), 1)
    x = np.where(seen, products - (products * seen).sum(axis=1, keepdims=True) / count, 0).astype(np.float64)
    y = np.where(seen, logs - (logs * seen).sum(axis=1, keepdims=True) / count, 0)
    spread = float(np.sum(x * x))
    return float(np.sum(x * y)) / spread if spread > 0 else None


def _softmax(scores: F32, seen: NDArray[np.bool_]) -> F32:
    masked = np.where(seen, scores, -np.inf)
    made = np.exp(masked - masked.max(axis=1, keepdims=True))
    found: F32 = made / made.sum(axis=1, keepdims=True)
    return found
