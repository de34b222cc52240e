"""The reader against PyPI gguf's writer and reader, and what it does when files change under it."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import gguf
import numpy as np
import pytest

from apex_quant.errors import GGUFError
from apex_quant.gguf import TYPES, Value, layout, open_model, stock_order
from apex_quant.gguf.limits import FIRST_READ
from tests.gguf.ggml_oracle import parse

KINDS = ("F32", "F16", "BF16", "Q4_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4", "I32")


def without_trailing_ones(shape: list[int]) -> list[int]:
    """A shape as ggml_n_dims counts it; PyPI gguf keeps what the file says."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def write_with_gguf(path: Path, seed: int = 0, tokens: int = 50) -> dict[str, bytes]:
    """A model with a vocabulary and a tensor of each type; returns the tensors' bytes."""
    pick = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(4096)
    writer.add_array("tokenizer.ggml.tokens", [f"token {i} é" for i in range(tokens)])
    writer.add_array("tokenizer.ggml.scores", [i / 4 for i in range(tokens)])
    writer.add_array("tokenizer.ggml.token_type", list(range(tokens)))
    writer.add_string("general.name", "a model")
    data: dict[str, bytes] = {}
    for i, name in enumerate(KINDS):
        kind = TYPES[name]
        rows, columns = int(pick.integers(1, 9)), 256 * int(pick.integers(1, 4))
        raw = pick.integers(0, 256, (rows, kind.row_bytes(columns)), dtype=np.uint8)
        key = f"blk.{i}.{name.lower()}.weight"
        writer.add_tensor(key, raw, raw_dtype=gguf.GGMLQuantizationType(kind.id))
        data[key] = raw.tobytes()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return data


def test_reads_what_pypi_gguf_wrote(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    data = write_with_gguf(path)
    oracle = gguf.GGUFReader(path)
    with open_model(path) as model:
        assert model.architecture == "llama"
        assert model.get("{arch}.block_count") == 2
        assert model.get("{arch}.nothing", 9) == 9
        assert model.get("tokenizer.ggml.tokens") == tuple(f"token {i} é" for i in range(50))
        assert model.get("tokenizer.ggml.token_type").tolist() == list(range(50))
        assert model.get("general.name") == "a model"
        assert [(t.name, list(t.shape), t.offset, t.nbytes, t.type.id) for t in model.tensors.values()] == [
            (t.name, without_trailing_ones(t.shape.tolist()), t.data_offset, t.n_bytes, t.tensor_type)
            for t in oracle.tensors
        ]
        for name, raw in data.items():
            info = model.tensors[name]
            assert model.read(info) == raw
            assert model.read(info, 10, 20) == raw[10:30]
            assert info.n_elements == np.prod(info.shape)
            assert info.rows == np.prod(info.shape[1:])
            assert info.row_bytes * info.rows == info.nbytes
        assert model.files[0].header_bytes == oracle.data_offset


def test_reads_as_the_library_does(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_with_gguf(path)
    theirs = parse(path)
    assert theirs is not None
    with open_model(path) as model:
        file = model.files[0]
        assert (file.alignment, file.header_bytes) == (theirs.alignment, theirs.data_start)
        assert {t.name: (t.offset, t.type.id, t.nbytes) for t in model.tensors.values()} == theirs.tensors
        assert {k: (v.type, v.element, v.count) for k, v in file.metadata.items()} == theirs.keys


def test_header_larger_than_the_first_window(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_with_gguf(path, tokens=30_000)
    with open_model(path) as model:
        assert model.files[0].header_bytes > 4 * FIRST_READ
        assert model.get("tokenizer.ggml.tokens")[-1] == "token 29999 é"


def test_values_survive_close(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_with_gguf(path)
    model = open_model(path)
    model.close()
    model.close()
    assert model.get("tokenizer.ggml.scores")[3] == 0.75
    with pytest.raises(ValueError, match="closed"):
        model.read(next(iter(model.tensors.values())))


def test_truncated_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_with_gguf(path)
    with open_model(path) as model:
        last = list(model.tensors.values())[-1]
        os.truncate(path, last.offset + 5)
        with pytest.raises(GGUFError, match="truncated after it was opened") as caught:
            model.read(last)
        assert caught.value.offset == last.offset + 5
        assert caught.value.field == last.name


def test_read_into_fills_any_buffer(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    data = write_with_gguf(path)
    with open_model(path) as model:
        info = model.tensors["blk.0.f32.weight"]
        array = np.zeros(info.shape[::-1], np.float32)
        model.read_into(info, 0, memoryview(array))  # type: ignore[arg-type]
        assert array.tobytes() == data[info.name]
        model.read_into(info, info.nbytes, memoryview(bytearray()))
        for start, size in ((-1, 1), (0, info.nbytes + 1), (info.nbytes, 1)):
            with pytest.raises(ValueError, match=re.escape(info.name)):
                model.read_into(info, start, memoryview(bytearray(size)))
        for start, size in ((-1, 1), (0, -1), (1, info.nbytes)):
            with pytest.raises(ValueError, match=re.escape(info.name)):
                model.read(info, start, size)


def test_read_in_pieces_when_the_kernel_returns_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    data = write_with_gguf(path)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: whole(fd, [buffers[0][:7]], at))
    with open_model(path) as model:
        name = "blk.5.q8_0.weight"
        assert model.read(model.tensors[name]) == data[name]


def test_one_name_for_no_architecture(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(layout({"general.type": Value.string("imatrix")}, []).header)
    with open_model(path) as model:
        assert model.architecture == ""


def test_stock_order() -> None:
    names = ["output.weight", "blk.10.a.weight", "blk.2.b.weight", "blk.2.a.weight", "blk.2x", "blk.y", "Z", "é"]
    names += ["blk. 3.a", "blk.-4.a", "blk.+1.a", "blk.٣.a"]
    random.Random(0).shuffle(names)
    expected = ["blk.-4.a", "Z", "blk.y", "blk.٣.a", "output.weight", "é", "blk.+1.a"]
    expected += ["blk.2.a.weight", "blk.2.b.weight", "blk.2x", "blk. 3.a", "blk.10.a.weight"]
    assert stock_order(names) == expected
