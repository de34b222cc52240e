"""`diff`: exactly what differs between two files, nothing when nothing does."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from apex_quant import diff, quantize, split
from apex_quant.errors import GGUFError, InputError
from apex_quant.gguf import open_model
from apex_quant.recipe.planned import PlanOptions
from tests.helpers.cli import apex
from tests.helpers.imatrix import random_imatrix
from tests.helpers.random_models import write_random_gguf


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("diff") / "m-BF16.gguf", "qwen3moe", layers="MM")


def test_equal(source: Path, tmp_path: Path) -> None:
    same = Path(shutil.copy(source, tmp_path / "copy.gguf"))
    found = diff(source, same, values=True)
    assert (found.metadata, found.tensors) == ((), ())
    with open_model(source) as model:
        assert found.tensors_equal == len(model.tensors)
    assert found.bytes_a == found.bytes_b == source.stat().st_size


def test_shards_are_equal(source: Path, tmp_path: Path) -> None:
    shards = split(source, tmp_path / "s", 1_000_000)
    found = diff(source, shards[1])
    assert (found.metadata, found.tensors) == ((), ())
    assert found.bytes_b == sum(path.stat().st_size for path in shards)


def test_a_model_and_something_else(source: Path, tmp_path: Path) -> None:
    matrix = tmp_path / "imatrix.gguf"
    random_imatrix(source).write(matrix)
    for pair in ((source, matrix), (matrix, source)):
        with pytest.raises(InputError, match=r"imatrix\.gguf: a GGUF file of type 'imatrix'"):
            diff(*pair)
    assert diff(matrix, matrix).tensors == ()


def test_one_byte(source: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(source, tmp_path / "copy.gguf"))
    with open_model(other) as model:
        info = model.tensors["blk.1.attn_q.weight"]
    data = bytearray(other.read_bytes())
    data[info.offset + info.nbytes - 1] ^= 0x80  # the sign of the last weight
    other.write_bytes(data)
    (row,) = diff(source, other).tensors
    assert (row.name, row.same_shape, row.same_data, row.error) == (info.name, True, False, None)
    (row,) = diff(source, other, values=True).tensors
    with open_model(source) as model:
        raw = np.frombuffer(model.read(info), np.uint8)
    weights = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.BF16).astype(np.float64)
    assert row.error == pytest.approx(math.sqrt(4 * weights[-1] ** 2 / (weights**2).sum()), rel=1e-9)
    assert diff(source, other, headers_only=True).tensors == ()


def test_types_and_errors(source: Path, tmp_path: Path) -> None:
    """Against PyPI gguf's dequantizers."""
    made = quantize(source, "Q8_0", out=tmp_path / "m.gguf", options=PlanOptions(override=("attn_v=Q4_0",))).outputs[0]
    found = diff(source, made.path, values=True)
    assert {row.name for row in found.tensors} == {t.name for t in made.plan.tensors if t.type is not t.source_type}
    for row in found.tensors:
        assert (row.type_a, row.type_b) == ("BF16", "Q4_0" if "attn_v" in row.name else "Q8_0")
        assert row.same_data is None
        with open_model(source) as a, open_model(made.path) as b:
            x, y = (
                gguf.quants.dequantize(
                    np.frombuffer(m.read(i), np.uint8).reshape(-1, i.row_bytes), gguf.GGMLQuantizationType[i.type.name]
                ).astype(np.float64)
                for m, i in ((a, a.tensors[row.name]), (b, b.tensors[row.name]))
            )
        assert row.error == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-6)
    headers = diff(source, made.path, headers_only=True)
    assert [row.name for row in headers.tensors] == [row.name for row in found.tensors]
    keys = {key: (a, b) for key, a, b in found.metadata}
    assert keys["general.file_type"] == (None, "7")
    assert keys["apex.tier"][0] is None
    assert keys["apex.tier"][1] is not None


def test_missing_and_reshaped(source: Path, tmp_path: Path) -> None:
    fewer = write_random_gguf(tmp_path / "f.gguf", "qwen3moe", layers="M", vocab=256)
    rows = {row.name: row for row in diff(source, fewer, values=True).tensors}
    gone = rows["blk.1.attn_q.weight"]
    assert (gone.type_a, gone.type_b, gone.bytes_b, gone.same_data) == ("BF16", None, 0, None)
    shape = rows["output.weight"]
    assert (shape.same_shape, shape.same_data, shape.error) == (False, None, None)
    back = {row.name: row for row in diff(fewer, source).tensors}
    assert back["blk.1.attn_q.weight"].type_a is None
    assert {"qwen3moe.block_count", "qwen3moe.vocab_size"} <= {key for key, _, _ in diff(source, fewer).metadata}


def test_metadata_of_another_type(tmp_path: Path) -> None:
    """7 as a number and as a string, a long text, and bytes that are no UTF-8."""
    paths = []
    for number, value in enumerate([7, "7"]):
        path = tmp_path / f"{number}.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_key_value("x", value, gguf.GGUFValueType.STRING if number else gguf.GGUFValueType.UINT32)
        writer.add_string("long", "a" * 500 + str(number))
        writer.add_key_value("raw", b"\xff\xfe" + bytes([number + 65]), gguf.GGUFValueType.STRING)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    keys = {key: (a, b) for key, a, b in diff(*paths).metadata}
    assert keys["x"] == ("7", "7")
    assert len(keys["long"][0] or "") == 100
    assert set(keys) == {"x", "long", "raw"}
    text = json.dumps(diff(*paths).to_json(), ensure_ascii=False)
    assert text.encode("utf-8")  # no lone surrogates, which other JSON parsers refuse


def test_values_of_integers(tmp_path: Path) -> None:
    paths = []
    for number in range(2):
        path = tmp_path / f"{number}.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_tensor("ids", np.full((2, 32), number, np.int32))
        writer.add_tensor("zero", np.full((2, 32), number, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    rows = {row.name: row for row in diff(*paths, values=True).tensors}
    assert rows["ids"].same_data is False
    assert rows["ids"].error is None
    assert rows["zero"].error == math.inf
    assert json.loads(json.dumps(diff(*paths, values=True).to_json()))
    result = apex("diff", *paths, "--values", "--json")
    assert result.status == 0, result.err
    assert "Infinity" not in result.out  # no JSON
    assert json.loads(result.out)["tensors"]


def test_unreadable(source: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    with pytest.raises(GGUFError):
        diff(source, tmp_path / "x.gguf")
    assert apex("diff", tmp_path / "x.gguf", source).status == 3
