"""The table of ggml tensor types: how many weights a block holds and how many bytes it takes.

Ids, block lengths and sizes are those of ggml.h (checked in the tests against the installed library
and against PyPI gguf). `imatrix` says what the type's encoder does with importance: `unused` ignores it,
`used` gives other (better) bytes with it, `needed` must not be encoded without it; `needed` is the union
of ggml_quantize_requires_imatrix and llama-quantize's own refusal. `fallback` is what llama.cpp takes
instead when the row length is not a multiple of the block (F16 when that does not divide either).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from apex_quant.errors import UsageError, did_you_mean

Imatrix = Literal["unused", "used", "needed"]
Kind = Literal["float", "int", "legacy", "k", "iq", "ternary", "fp4"]
CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
CACHE_TYPES: Final[tuple[str, ...]] = get_args(CacheType)
"""Types of K and V that stock llama.cpp's tools offer, as they spell them."""


@dataclass(frozen=True, slots=True)
class GGMLType:
    """One row of the table. `block` in weights, `bytes` per block."""

    id: int
    name: str
    block: int
    bytes: int
    kind: Kind
    imatrix: Imatrix = "unused"
    fallback: str | None = None
    encodable: bool = True

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return self.bytes * 8 / self.block

    @property
    def is_quantized(self) -> bool:
        """As ggml_is_quantized: false for float and integer types."""
        return self.kind not in ("float", "int")

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of n weights; n must be a multiple of `block` (ValueError)."""
        if n % self.block:
            raise ValueError(f"row of {n} weights is not a multiple of {self.name}'s block of {self.block}")
        return n // self.block * self.bytes

    def __str__(self) -> str:
        return self.name


_ROWS: tuple[GGMLType, ...] = (
    GGMLType(0, "F32", 1, 4, "float"),
    GGMLType(1, "F16", 1, 2, "float"),
    GGMLType(2, "Q4_0", 32, 18, "legacy", "used"),
    GGMLType(3, "Q4_1", 32, 20, "legacy", "used"),
    GGMLType(6, "Q5_0", 32, 22, "legacy", "used"),
    GGMLType(7, "Q5_1", 32, 24, "legacy", "used"),
    GGMLType(8, "Q8_0", 32, 34, "legacy"),
    GGMLType(9, "Q8_1", 32, 36, "legacy", encodable=False),
    GGMLType(10, "Q2_K", 256, 84, "k", "used", "Q4_0"),
    GGMLType(11, "Q3_K", 256, 110, "k", "used", "Q4_0"),
    GGMLType(12, "Q4_K", 256, 144, "k", "used", "Q5_0"),
    GGMLType(13, "Q5_K", 256, 176, "k", "used", "Q5_1"),
    GGMLType(14, "Q6_K", 256, 210, "k", "used", "Q8_0"),
    GGMLType(15, "Q8_K", 256, 292, "k", encodable=False),
    GGMLType(16, "IQ2_XXS", 256, 66, "iq", "needed", "IQ4_NL"),
    GGMLType(17, "IQ2_XS", 256, 74, "iq", "needed", "IQ4_NL"),
    GGMLType(18, "IQ3_XXS", 256, 98, "iq", "needed", "IQ4_NL"),
    GGMLType(19, "IQ1_S", 256, 50, "iq", "needed", "IQ4_NL"),
    GGMLType(20, "IQ4_NL", 32, 18, "iq", "used"),
    GGMLType(21, "IQ3_S", 256, 110, "iq", "used", "IQ4_NL"),
    GGMLType(22, "IQ2_S", 256, 82, "iq", "needed", "IQ4_NL"),
    GGMLType(23, "IQ4_XS", 256, 136, "iq", "used", "IQ4_NL"),
    GGMLType(24, "I8", 1, 1, "int", encodable=False),
    GGMLType(25, "I16", 1, 2, "int", encodable=False),
    GGMLType(26, "I32", 1, 4, "int", encodable=False),
    GGMLType(27, "I64", 1, 8, "int", encodable=False),
    GGMLType(28, "F64", 1, 8, "float", encodable=False),
    GGMLType(29, "IQ1_M", 256, 56, "iq", "needed", "IQ4_NL"),
    GGMLType(30, "BF16", 1, 2, "float"),
    GGMLType(34, "TQ1_0", 256, 54, "ternary", "unused", "Q4_0"),
    GGMLType(35, "TQ2_0", 256, 66, "ternary", "unused", "Q4_0"),
    GGMLType(39, "MXFP4", 32, 17, "fp4"),
    GGMLType(40, "NVFP4", 64, 36, "fp4"),
    GGMLType(41, "Q1_0", 128, 18, "legacy"),
    GGMLType(42, "Q2_0", 64, 18, "legacy", "unused", "Q4_0"),
)

TYPES: dict[str, GGMLType] = {row.name: row for row in _ROWS}
TYPES_BY_ID: dict[int, GGMLType] = {row.id: row for row in _ROWS}


def ggml_type(name: str) -> GGMLType:
    """The type called `name`, in any case. Raises UsageError with the nearest known name."""
    found = TYPES.get(name.upper())
    if found is None:
        raise UsageError(
            f"no tensor type is called {name!r}.{did_you_mean(name, [t.name for t in _ROWS if t.encodable])}",
            hint="tensor types are " + ", ".join(t.name for t in _ROWS if t.encodable),
        )
    return found
