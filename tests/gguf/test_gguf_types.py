"""The type table against the installed library and PyPI gguf."""

from __future__ import annotations

import gguf
import pytest

from apex_quant.errors import UsageError
from apex_quant.gguf import TYPES, TYPES_BY_ID, ggml_type
from tests.gguf.ggml_oracle import ggml

ABORTS_WITHOUT = {"IQ2_XXS", "IQ2_XS", "IQ1_S"}
REFUSED_BY_LLAMA_QUANTIZE = {"IQ3_XXS", "IQ2_S", "IQ1_M"} | ABORTS_WITHOUT


@pytest.mark.parametrize("name", TYPES)
def test_sizes_equal_the_library(name: str) -> None:
    row, lib = TYPES[name], ggml()
    assert lib.ggml_type_name(row.id).decode().upper() == name
    assert lib.ggml_blck_size(row.id) == row.block
    assert lib.ggml_type_size(row.id) == row.bytes
    assert lib.ggml_is_quantized(row.id) == row.is_quantized
    assert lib.ggml_row_size(row.id, row.block * 5) == row.row_bytes(row.block * 5)
    assert lib.ggml_quantize_requires_imatrix(row.id) == (name in ABORTS_WITHOUT)


def test_no_type_of_the_library_is_missing() -> None:
    known = {i for i in range(43) if ggml().ggml_blck_size(i) > 0}
    assert known == set(TYPES_BY_ID)


def test_sizes_equal_pypi_gguf() -> None:
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.name == "Q8_1":
            continue  # only a type of activations; PyPI gguf has its size from before 2024
        assert (TYPES[kind.name].id, TYPES[kind.name].block, TYPES[kind.name].bytes) == (kind, block, size)


def test_need_of_importance() -> None:
    assert {name for name, row in TYPES.items() if row.imatrix == "needed"} == REFUSED_BY_LLAMA_QUANTIZE


@pytest.mark.parametrize("row", [t for t in TYPES.values() if t.fallback], ids=str)
def test_fallback_has_smaller_blocks(row: object) -> None:
    kind = TYPES[str(row)]
    assert kind.fallback is not None
    assert TYPES[kind.fallback].block < kind.block
    assert TYPES[kind.fallback].bpw >= kind.bpw


def test_lookup() -> None:
    assert ggml_type("q4_k") is TYPES["Q4_K"]
    with pytest.raises(UsageError, match=r"Did you mean Q4_K\?"):
        ggml_type("Q4K")
    with pytest.raises(ValueError, match="576 weights"):
        TYPES["Q4_K"].row_bytes(576)
