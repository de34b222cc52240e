"""What is watched while a model is scored: its routers' choices, and what its output matrix is multiplied with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from apex_quant.runtime.observe import Product
from apex_quant.runtime.tensors import F32, I32

F64 = NDArray[np.float64]
HEADS = ("output.weight", "token_embd.weight")  # the latter where the head is tied to the embedding
_LAYER = re.compile(r"-([0-9]+)$")
_NODES: Mapping[str, tuple[str, ...]] = {
    "ARGSORT": ("ffn_moe_argsort-",),
    **dict.fromkeys(("SOFT_MAX", "UNARY", "SQRT", "MUL_MAT", "ADD"), ("ffn_moe_probs-",)),
}


@dataclass(frozen=True)
class Routing:
    """What the routers chose for some tokens. `layers` [n]; `experts` I32 and `weights` F32 [n, token, k].

    Weights are the chosen experts' probabilities, made to add up to 1.
    """

    layers: tuple[int, ...]
    experts: I32
    weights: F32

    def moved(self, reference: Routing) -> tuple[NDArray[np.bool_], F64]:
        """By layer and token: whether the set of experts is another one, and how much weight went elsewhere, 0 to 1
        (half the sum of absolute differences). The layers and tokens must be the same."""
        ours, theirs = np.sort(self.experts, axis=2), np.sort(reference.experts, axis=2)
        same = self.experts[..., :, None] == reference.experts[..., None, :]
        kept = np.minimum(self.weights[..., :, None], reference.weights[..., None, :])
        share = np.where(same, kept, 0).sum(axis=(2, 3), dtype=np.float64)
        return (ours != theirs).any(axis=2), np.clip(1 - share, 0, 1)


class Watcher:
    """An observer of one session that watches its routers; call `begin` before every decode."""

    nodes: ClassVar[Mapping[str, tuple[str, ...]]] = _NODES

    def __init__(self, *, experts_used: int = 0, head: bool = False) -> None:
        """`experts_used`: how many experts a token goes to; `head`: watch the output matrix too."""
        self._k, self._head = experts_used, head
        self._probabilities: dict[int, F32] = {}
        self._chosen: dict[int, tuple[I32, F32]] = {}
        self.hidden: F32 | None = None  # [outputs, n_embd]
        self.head = ""  # the output matrix's name

    def begin(self) -> None:
        """Forget the last decode."""
        self._probabilities.clear()
        self._chosen.clear()
        self.hidden = None

    def wants(self, product: Product) -> bool:
        return self._head and not product.by_id and product.weight in HEADS

    def take(self, product: Product, x: F32, ids: I32 | None) -> None:
        rows = x.reshape(-1, x.shape[-1])
        self.head = product.weight
        self.hidden = rows.copy() if self.hidden is None else np.concatenate([self.hidden, rows])

    def take_node(self, name: str, op: str, value: F32, source: F32 | I32 | None) -> None:
        match = _LAYER.search(name)
        if match is None:
            return
        layer, rows = int(match[1]), value.reshape(-1, value.shape[-1])
        if op != "ARGSORT":
            if op in ("MUL_MAT", "ADD"):  # the model makes probabilities of the chosen ones only
                rows = np.exp(rows - rows.max(axis=1, keepdims=True))
            self._probabilities[layer] = rows.copy()
            return
        assert source is not None
        order = source.reshape(rows.shape)[:, : self._k].astype(np.int32)
        known = self._probabilities.get(layer)
        weights = np.ones(order.shape, np.float32) if known is None else np.take_along_axis(known, order, axis=1)
        weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-30)
        if layer in self._chosen:  # a decode may be computed in several parts
            before = self._chosen[layer]
            order, weights = np.concatenate([before[0], order]), np.concatenate([before[1], weights])
        self._chosen[layer] = (order, weights)

    def routing(self, outputs: NDArray[np.bool_]) -> Routing | None:
        """The choices for those tokens of the last decode whose `outputs` [tokens] is set, or None without routers.

        The last layer may have been computed for these alone.
        """
        count = int(outputs.sum())
        layers, experts, weights = [], [], []
        for layer, (order, share) in sorted(self._chosen.items()):
            if len(order) == len(outputs):
                order, share = order[outputs], share[outputs]
            if len(order) == count:
                layers.append(layer)
                experts.append(order)
                weights.append(share)
        if not layers:
            return None
        return Routing(tuple(layers), np.stack(experts), np.stack(weights).astype(np.float32))


class HeadWatcher(Watcher):
    """Watches the output matrix of a model without routers."""

    nodes: ClassVar[Mapping[str, tuple[str, ...]]] = {}


def watcher(experts_used: int, *, head: bool = False) -> Watcher | None:
    """What has to be watched, or None when nothing is: a session without observer computes a little faster."""
    if experts_used:
        return Watcher(experts_used=experts_used, head=head)
    return HeadWatcher(head=True) if head else None
