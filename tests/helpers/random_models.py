"""Random-weight GGUF files of many architectures, for tests of structure (never for quality claims).

Shapes and metadata come from `shapes.ARCHITECTURES`; the container is written with PyPI gguf, so that files
are independent of the code under test. Stock llama_model_quantize accepts them and stock llama.cpp loads the
small ones (there is no vocabulary: `tokenizer.ggml.model` is `none`).
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np

from tests.helpers.shapes import ARCHITECTURES, Key, Shape, Text

ALIGNMENT = 32

Models = Callable[[str], Path]
"""What the fixture `models` gives: architecture -> path of a small random model."""

KEPT_F32 = re.compile(r"_norm|ffn_gate_inp|conv1d|ssm_(a|d)$|\.bias$|\.scale$|rope_freqs|output_scale")
"""Names the converters leave in F32, besides all vectors."""


def evaluate(expression: str, sizes: dict[str, int]) -> int:
    """The value of a sum of products and whole quotients: `2*groups*state+heads`, `head/2`."""
    total = 0
    for term in expression.split("+"):
        value = 1
        for operator, token in re.findall(r"([*/]?)(\w+)", term):
            operand = int(token) if token.isdigit() else sizes[token]
            value = value // operand if operator == "/" else value * operand
        total += value
    return total


def tensor_shapes(shape: Shape, layers: str, sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Name -> dims in ggml order, tensors outside layers first; those with a dimension 0 are left out."""
    rows = list(shape.model)
    for layer, kind in enumerate(layers):
        rows += [(f"blk.{layer}.{name}", dims) for kinds, name, dims in shape.blocks if kinds == "*" or kind in kinds]
    found = {name: tuple(evaluate(dim, sizes) for dim in dims.split()) for name, dims in rows}
    return {name: dims for name, dims in found.items() if 0 not in dims}


def random_shapes(
    architecture: str, *, scale: Literal["tiny", "real"] = "tiny", layers: str | None = None, **overrides: int
) -> dict[str, tuple[int, ...]]:
    """The tensors `write_random_gguf` writes with the same arguments."""
    shape = ARCHITECTURES[architecture]
    kinds, sizes = _sizes(shape, scale, layers, overrides)
    return tensor_shapes(shape, kinds, sizes)


def write_random_gguf(
    path: Path,
    architecture: str,
    *,
    seed: int = 0,
    dtype: Literal["BF16", "F16", "F32", "Q8_0"] = "BF16",
    expert_dtype: str | None = None,
    sparse: bool = False,
    scale: Literal["tiny", "real"] = "tiny",
    layers: str | None = None,
    metadata: dict[str, str | int | float | bool] | None = None,
    vocabulary: Path | None = None,
    **overrides: int,
) -> Path:
    """Write a model of `architecture` to `path` and return it.

    `scale` picks the sizes of the table; `layers` replaces the string of layer kinds and `overrides` single
    sizes (`experts=3`). Matrices have `dtype`, routed experts `expert_dtype` (MXFP4 as gpt-oss ships them) if
    given, vectors and what converters keep are F32. Weights are normal with deviation 1/sqrt(row length); the
    data depends on `seed` and names only. With `sparse` the data is a hole of zeros, so real sizes take no
    disk. `metadata` adds keys with their full names. `vocabulary` is a GGUF whose tokenizer this model gets, with
    unused tokens up to its own size, so that it can read text.
    """
    shape = ARCHITECTURES[architecture]
    kinds, sizes = _sizes(shape, scale, layers, overrides)
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_name(f"random {architecture}")
    if vocabulary is None:
        writer.add_string("tokenizer.ggml.model", "none")
    else:
        copy_metadata(gguf.GGUFReader(vocabulary), writer, sizes["vocab"], only="tokenizer.")
    writer.add_uint32(f"{architecture}.block_count", len(kinds))
    for key, value in shape.keys.items():
        _add(writer, f"{architecture}.{key}", _value(value, kinds, sizes))
    for key, plain in (metadata or {}).items():
        _add(writer, key, plain)

    tensors: list[tuple[str, tuple[int, ...], gguf.GGMLQuantizationType]] = []
    for name, dims in tensor_shapes(shape, kinds, sizes).items():
        kept = len(dims) == 1 or KEPT_F32.search(name)
        wanted = expert_dtype if expert_dtype and name.endswith("_exps.weight") else dtype
        tensors.append((name, dims, gguf.GGMLQuantizationType["F32" if kept else wanted]))
    for name, dims, qtype in tensors:
        writer.add_tensor_info(name, dims[::-1], np.dtype(np.float32), _nbytes(dims, qtype), raw_dtype=qtype)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()

    with path.open("r+b") as file:
        start = _padded(file.seek(0, 2))
        for name, dims, qtype in tensors:
            if not sparse:
                file.seek(start)
                file.write(random_tensor(name, dims, qtype, seed))
            start += _padded(_nbytes(dims, qtype))
        file.truncate(start)
    return path


def copy_metadata(known: gguf.GGUFReader, writer: gguf.GGUFWriter, vocabulary: int, only: str = "") -> None:
    """All keys of a file that begin with `only`, its vocabulary filled up with unused tokens to so many."""
    own = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture")
    for key, field in known.fields.items():
        if key in own or not key.startswith(only):
            continue
        value = field.contents()
        if key == "tokenizer.ggml.tokens":
            writer.add_token_list([*value, *(f"<unused{number}>" for number in range(vocabulary - len(value)))])
        elif key == "tokenizer.ggml.token_type":
            writer.add_token_types([*value, *[gguf.TokenType.UNUSED] * (vocabulary - len(value))])
        elif field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, field.types[0])


def random_tensor(name: str, dims: tuple[int, ...], qtype: gguf.GGMLQuantizationType, seed: int = 0) -> bytes:
    """The bytes of one tensor: normal weights, norms around 1."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = rng.standard_normal(dims[::-1], dtype=np.float32) / np.float32(np.sqrt(dims[0]))
    if "norm" in name:
        values += 1
    data: bytes = gguf.quants.quantize(values, qtype).tobytes()
    return data


def _sizes(
    shape: Shape, scale: Literal["tiny", "real"], layers: str | None, overrides: dict[str, int]
) -> tuple[str, dict[str, int]]:
    kinds, sizes = shape.tiny if scale == "tiny" else shape.real
    unknown = set(overrides) - set(sizes)
    assert not unknown, f"no such size: {unknown}; there are {sorted(sizes)}"
    kinds = kinds if layers is None else layers
    return kinds, sizes | overrides | {"layers": len(kinds)}


def _value(value: Key, kinds: str, sizes: dict[str, int]) -> Any:
    if isinstance(value, Text):
        return str(value)
    if isinstance(value, str):
        return evaluate(value, sizes)
    if isinstance(value, dict):
        return [_value(value[kind], kinds, sizes) for kind in kinds]
    if isinstance(value, list):
        return [_value(item, kinds, sizes) for item in value]
    return value


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """The GGUF type llama.cpp expects: u32, f32, bool, string, arrays of i32 or bool."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _nbytes(dims: tuple[int, ...], qtype: gguf.GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    assert dims[0] % block == 0, f"rows of {dims[0]} do not divide into blocks of {block}"
    return math.prod(dims) // int(block) * int(size)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
