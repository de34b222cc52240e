"""Sums over activations, as llama-imatrix takes them, and what it does not take: means, routers, expert coverage.

Sums are float32 and taken row by row in llama-imatrix's order (tools/imatrix/imatrix.cpp), so that they equal its
sums to the bit where the library computes the same activations. Weights that multiply the same input (attn_q and
attn_k, gate and up) share their sums while a model runs on one backend: the input is read once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import InputError, NativeError
from apex_quant.runtime.observe import Product
from apex_quant.runtime.tensors import F32, I32

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]

HEADS = ("output.weight", "token_embd.weight")  # the latter where the head is tied to the embedding
_MIN_ROWS = 16  # llama-imatrix leaves smaller multiplications out
_BLOCK_FLOATS = 1 << 16  # rows squared and added together: 256 KiB stay in a core's cache
_LAYER = re.compile(r"\bblk\.([0-9]+)\.")
_NODE = re.compile(r"-([0-9]+)$")


@dataclass(eq=False)
class Sums:
    """What one weight's inputs added up to. `counts` has one value, or one for each expert."""

    squares: F32  # [rows, n]
    plain: F32
    counts: I64


@dataclass(eq=False)
class Router:
    """One layer's router: probability mass by expert, and the margin between the last chosen and the next one."""

    mass: F64
    margin: float = 0.0
    tokens: int = 0


class ImportanceObserver:
    """Collects until it is asked for `sums` and `routers`. One per session; call `begin` before every decode."""

    nodes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "ARGSORT": ("ffn_moe_argsort-",),
        **dict.fromkeys(("SOFT_MAX", "UNARY", "SQRT", "MUL_MAT", "ADD"), ("ffn_moe_probs-",)),
    }

    def __init__(self, *, heads: bool = True, share: bool = True) -> None:
        """`share`: weights with the same input share their sums; only when everything runs on one backend."""
        self.sums: dict[str, Sums] = {}
        self.routers: dict[int, Router] = {}
        self.shared: dict[str, str] = {}  # weight -> the one that its sums are taken with
        self._by_expert: dict[int, str] = {}  # layer -> a weight whose counts are those of its experts
        self._heads, self._share = heads, share
        self._seen: set[str] = set()
        self._sources: dict[tuple[int, int, int], str] = {}
        self._selection: dict[int, F32] = {}
        self._buffer: F32 = np.empty(0, np.float32)

    def begin(self) -> None:
        """Forget the graph of the last decode."""
        self._seen.clear()
        self._sources.clear()
        self._selection.clear()

    # --- the observer's side ---

    def wants(self, product: Product) -> bool:
        name = product.weight
        if not product.by_id:
            known = name.startswith("blk.") or (self._heads and name in HEADS)
            if not known or product.input_shape[1] < _MIN_ROWS:
                return False
        if name in self._seen:  # a new graph has begun
            self._seen.clear()
            self._sources.clear()
        self._seen.add(name)
        matrices = product.weight_shape[2] * product.weight_shape[3]
        key = (product.source, product.selector, matrices)
        leader = self._sources.setdefault(key, name) if self._share else name
        if leader != name and name not in self.sums:
            if self.shared.setdefault(name, leader) != leader:
                raise NativeError(f"{name} shared its input with {self.shared[name]} before, and now with {leader}")
            return False
        if name in self.shared:
            raise NativeError(f"{name} shared its input with {self.shared[name]} before, and now with nothing")
        return True

    def take(self, product: Product, x: F32, ids: I32 | None) -> None:
        if ids is None:
            self._take_dense(product, x)
        else:
            self._take_experts(product, x[0], ids)

    def _take_dense(self, product: Product, x: F32) -> None:
        width, inner, outer = x.shape[-1], product.weight_shape[2], product.weight_shape[3]
        sums = self._sums(product.weight, inner * outer, 1, width)
        if inner * outer == 1:
            self._add(product, sums, 0, x.reshape(-1, width))
        else:
            for i3, i2 in np.ndindex(x.shape[:2]):
                self._add(product, sums, (i3 % outer) * inner + i2 % inner, x[i3, i2])
        sums.counts += x.size // width // (inner * outer)

    def _take_experts(self, product: Product, x: F32, ids: I32) -> None:
        """`x` [token, slot, n]; llama-imatrix's order is that of the choice, then of the token."""
        experts = product.weight_shape[2]
        if ids.min() < 0 or ids.max() >= experts:
            raise NativeError(f"{product.weight}: an expert id outside 0..{experts - 1}")
        n_tokens, slots, width = x.shape
        sums = self._sums(product.weight, experts, experts, width)
        flat = ids.T.reshape(-1)
        order = np.argsort(flat, kind="stable")
        counts = np.bincount(flat, minlength=experts)
        start = 0
        for expert in np.flatnonzero(counts).tolist():
            stop = start + int(counts[expert])
            which = order[start:stop]
            self._add(product, sums, expert, x[which % n_tokens, which // n_tokens % slots])
            start = stop
        sums.counts += counts
        layer = layer_of(product.weight)
        if layer is not None:
            self._by_expert.setdefault(layer, product.weight)
            self._take_margin(layer, ids.shape[1])

    def _add(self, product: Product, sums: Sums, row: int, x: F32) -> None:
        """Add the rows of `x` one after the other: the first addend of each block is the sum so far."""
        width = x.shape[1]
        step = max(8, _BLOCK_FLOATS // width)
        if self._buffer.size < (step + 1) * width:
            self._buffer = np.empty((step + 1) * width, np.float32)
        total = sums.squares[row]
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(x), step):
                part = x[start : start + step]
                block = self._buffer[: (len(part) + 1) * width].reshape(-1, width)
                np.multiply(part, part, out=block[1:])
                block[0] = total
                np.add.reduce(block, axis=0, out=total)
                sums.plain[row] += np.add.reduce(part, axis=0)
        if not np.isfinite(total).all():
            layer = layer_of(product.weight)
            where = f"layer {layer}" if layer is not None else "the head"
            raise InputError(
                f"{where}: the input of {product.weight} is not finite (channel "
                f"{int(np.flatnonzero(~np.isfinite(total))[0])}): activations became NaN or infinite there or before",
                hint="the weights are damaged or overflow in this precision; `apex verify` looks for such values",
            )

    def _sums(self, name: str, rows: int, counts: int, width: int) -> Sums:
        found = self.sums.get(name)
        if found is None:
            zeros = np.zeros((2, rows, width), np.float32)
            found = self.sums[name] = Sums(zeros[0], zeros[1], np.zeros(counts, np.int64))
        if found.squares.shape != (rows, width) or len(found.counts) != counts:
            raise InputError(f"{name}: used with inputs of {found.squares.shape} and of {(rows, width)} channels")
        return found

    def take_node(self, name: str, op: str, value: F32, source: F32 | I32 | None) -> None:
        match = _NODE.search(name)
        if match is None:
            return
        layer = int(match[1])
        rows = value.reshape(-1, value.shape[-1])
        if op == "ARGSORT":
            assert source is not None
            self._selection[layer] = np.take_along_axis(rows, source.reshape(rows.shape).astype(np.int64), axis=1)
            return
        share = rows.astype(np.float64)
        if op in ("MUL_MAT", "ADD"):  # the model makes probabilities of the chosen ones only
            share = np.exp(share - share.max(axis=1, keepdims=True))
        share /= np.maximum(share.sum(axis=1, keepdims=True), 1e-30)
        router = self.routers.setdefault(layer, Router(np.zeros(rows.shape[1])))
        router.mass += share.sum(axis=0)
        router.tokens += len(rows)

    def _take_margin(self, layer: int, chosen: int) -> None:
        """How far the last chosen expert was above the next: small margins are choices that noise can turn."""
        selection = self._selection.pop(layer, None)
        router = self.routers.get(layer)
        if selection is None or router is None or chosen >= selection.shape[1]:
            return
        with np.errstate(invalid="ignore"):
            margins = selection[:, chosen - 1].astype(np.float64) - selection[:, chosen]
        router.margin += float(margins[np.isfinite(margins)].sum())

    # --- the collector's side ---

    def expert_counts(self) -> dict[int, I64]:
        """Tokens of each expert by layer."""
        return {layer: self.sums[name].counts for layer, name in sorted(self._by_expert.items())}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything collected, as arrays to be saved."""
        made: dict[str, NDArray[Any]] = {}
        for name, sums in self.sums.items():
            made |= {f"squares/{name}": sums.squares, f"plain/{name}": sums.plain, f"counts/{name}": sums.counts}
        for layer, router in self.routers.items():
            made |= {f"mass/{layer}": router.mass, f"margin/{layer}": np.array([router.margin, router.tokens])}
        return made

    def restore(self, arrays: dict[str, NDArray[Any]], shared: dict[str, str]) -> None:
        """Go on from what `arrays` gave."""
        self.shared = dict(shared)
        for key, value in arrays.items():
            kind, _, name = key.partition("/")
            if kind == "squares":
                self.sums[name] = Sums(value, arrays[f"plain/{name}"], arrays[f"counts/{name}"])
                layer = layer_of(name)
                if layer is not None and len(self.sums[name].counts) > 1:
                    self._by_expert.setdefault(layer, name)
            elif kind == "mass":
                margin, tokens = arrays[f"margin/{name}"]
                self.routers[int(name)] = Router(value, float(margin), int(tokens))


def layer_of(name: str) -> int | None:
    """The number of the layer that a weight belongs to."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None
