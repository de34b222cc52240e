"""Observing activations: the library's eval callback, shown as matrix multiplications and named nodes.

An observer is asked about every multiplication with a weight (`wants`) and, when it answers yes, handed the input
(`take`). Nodes that are not multiplications are offered by name and operation to observers that list them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from apex_quant.errors import ApexError
from apex_quant.runtime.tensors import F32, I32, NAME_OFFSET, OP_OFFSET, SRC_OFFSET, TYPE_F32, Tensors


@dataclass(frozen=True, slots=True)
class Product:
    """One multiplication of a weight with activations; shapes in ggml order.

    `source` identifies the input within one graph, `selector` the expert ids (0 without): products with equal ones
    multiply the same activations.
    """

    weight: str
    by_id: bool
    weight_shape: tuple[int, int, int, int]
    input_shape: tuple[int, int, int, int]
    source: int
    selector: int


class Observer(Protocol):
    """What looks at activations. Exceptions raised here end the decode and come out of it."""

    nodes: ClassVar[Mapping[str, tuple[str, ...]]]
    """Operation -> beginnings of the names of nodes that are not asked for as products but by name."""

    def wants(self, product: Product) -> bool:
        """Whether the input of this product is to be read. Called before it is computed."""

    def take(self, product: Product, x: F32, ids: I32 | None) -> None:
        """The input in NumPy order [i3, i2, row, n]; for products by id [1, token, slot, n] and ids [token, k]."""

    def take_node(self, name: str, op: str, value: F32, source: F32 | I32 | None) -> None:
        """A node named in `nodes`: its data (for ARGSORT the int32 order) and that of its first source."""


class EvalCallback:
    """The callback of one context; `observer` may be exchanged between decodes."""

    def __init__(self, lib: Any, tensors: Tensors) -> None:
        self.observer: Observer | None = None
        self.error: BaseException | None = None
        self._tensors = tensors
        self._mul_mat, self._by_id = tensors.ops["MUL_MAT"], tensors.ops["MUL_MAT_ID"]
        self._op_names = {number: name for name, number in tensors.ops.items()}
        self._product: Product | None = None
        self._node: tuple[str, str] | None = None
        self.function = lib.ggml_backend_sched_eval_callback(self._call)

    def _call(self, address: int, ask: bool, _: int | None) -> bool:
        """Called twice for every node of a graph that was asked for, once for the others."""
        if self.observer is None or self.error is not None:
            return not ask
        try:
            if ask:
                return self._ask(self.observer, address)
            self._take(self.observer, address)
            return True
        except BaseException as error:  # it must not reach the library: kept, and raised after the decode
            self.error = error
            return False

    def _ask(self, observer: Observer, address: int) -> bool:
        self._product, self._node = None, None
        op = ctypes.c_int.from_address(address + OP_OFFSET).value
        if op in (self._mul_mat, self._by_id):
            product = self._describe(address, op == self._by_id)
            if product is not None and observer.wants(product):
                self._product = product
        prefixes = observer.nodes.get(self._op_names.get(op, ""))
        if prefixes:
            name = ctypes.string_at(address + NAME_OFFSET).decode("utf-8", "replace")
            if name.startswith(prefixes):
                self._node = (name, self._op_names[op])
        return self._product is not None or self._node is not None

    def _describe(self, address: int, by_id: bool) -> Product | None:
        first, second, third = (ctypes.c_void_p * 3).from_address(address + SRC_OFFSET)
        if not first or not second:
            return None
        weight, source = self._tensors.at(first), self._tensors.at(second)
        if source.type != TYPE_F32:
            return None
        name = self._tensors.name(first)
        return Product(name, by_id, tuple(weight.ne), tuple(source.ne), second, third or 0)

    def _take(self, observer: Observer, address: int) -> None:
        tensor = self._tensors.at(address)
        if self._product is not None:
            ids = None
            if self._product.by_id:
                ids = self._tensors.ints(self._product.selector)[0, 0]
            observer.take(self._product, self._tensors.floats(self._product.source), ids)
        if self._node is not None:
            name, op = self._node
            if op == "ARGSORT":
                observer.take_node(name, op, self._tensors.floats(tensor.src[0]), self._tensors.ints(address))
            else:
                observer.take_node(name, op, self._tensors.floats(address), None)

    def raise_error(self) -> None:
        """Raise what an observer raised during the last decode."""
        error, self.error = self.error, None
        if isinstance(error, ApexError):
            raise error
        if error is not None:
            raise RuntimeError(f"while activations were observed: {error}") from error
