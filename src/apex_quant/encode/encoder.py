"""How float weights become the blocks of a tensor type.

`Encoder` is what the executor needs; `GgmlEncoder` is llama.cpp's own code on the CPU. Another encoder (on a GPU,
or with better rounding) is another class with the same two methods.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from apex_quant.errors import InputError, NativeError
from apex_quant.gguf import GGMLType
from apex_quant.native import ggml

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class Encoder(Protocol):
    """Rows of weights in, blocks out. Both methods are called from several threads at once."""

    def prepare(self, kinds: list[GGMLType]) -> None:
        """Begin whatever these types need before their first row; must not block."""

    def encode(self, kind: GGMLType, rows: Floats, importance: Floats | None, out: Bytes) -> None:
        """Encode `rows` float32 [n_rows, n] into `out` uint8 [n_rows * kind.row_bytes(n)].

        `importance` float32 [n] is the weight of each input channel, or None.
        Raises InputError when these weights have no valid blocks of that type.
        """


class GgmlEncoder:
    """ggml_quantize_chunk, the function llama-quantize calls: equal input gives equal bytes."""

    def __init__(self) -> None:
        self._lib = ggml()

    def prepare(self, kinds: list[GGMLType]) -> None:
        self._lib.start_grids(kinds)

    def encode(self, kind: GGMLType, rows: Floats, importance: Floats | None, out: Bytes) -> None:
        n_rows, n = rows.shape
        self._lib.wait_grid(kind)
        written = self._lib.quantize_chunk(
            kind.id,
            rows.ctypes.data,
            out.ctypes.data,
            0,
            n_rows,
            n,
            None if importance is None else importance.ctypes.data,
        )
        if written != out.nbytes:
            raise NativeError(f"ggml wrote {written} bytes for {n_rows} rows of {n} weights in {kind.name}")
        if not self._lib.validate(kind, out.ctypes.data, out.nbytes):
            raise InputError(f"weights up to {np.abs(rows).max():.3g} are too large for {kind.name}")


class NotFiniteError(InputError):
    """A NaN or an infinity; `index` is the first one's place among the weights that were decoded."""

    def __init__(self, values: Floats) -> None:
        self.index = int(np.flatnonzero(~np.isfinite(values))[0])
        super().__init__(f"a value is {values[self.index]}")


class Decoder:
    """Source blocks to float32 by ggml's own conversion, with every value checked finite."""

    def __init__(self, kind: GGMLType) -> None:
        self._kind = kind
        self._convert = None if kind.name == "F32" else ggml().to_float(kind)

    def decode(self, raw: Bytes, out: Floats) -> Floats:
        """`raw` blocks of out.size weights to float32, in `out` or (F32 sources) a view of `raw`.

        Raises NotFiniteError for a NaN or an infinity: several IQ encoders abort the process on one.
        """
        if self._convert is None:
            values = raw.view(np.float32)
        else:
            self._convert(raw.ctypes.data, out.ctypes.data, out.size)
            values = out
        # the sum is finite only if all are; it costs a tenth of np.isfinite().all() on 256k weights
        with np.errstate(over="ignore", invalid="ignore"):
            suspicious = not np.isfinite(values.sum())
        if suspicious and not np.isfinite(values).all():
            raise NotFiniteError(values)
        return values
