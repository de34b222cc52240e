"""Weights changed in a loaded model: the same logits as a file with these weights, and nothing left after restoring."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from apex_quant import SessionOptions, embedded_model
from apex_quant.errors import InputError, UsageError
from apex_quant.gguf import GGUFModel, open_model
from apex_quant.runtime.patch import Bytes, Patcher
from apex_quant.runtime.session import Session
from apex_quant.runtime.tensors import F32
from tests.helpers.random_models import write_random_gguf

OPTIONS = SessionOptions(threads=1, ctx=64, sequences=2, mmap=False, repack=False)
TOKENS = np.random.default_rng(3).integers(300, 9000, (2, 64)).astype(np.int32)
PATCHED = ("blk.0.ffn_down_exps.weight", "blk.3.attn_v.weight", "blk.5.ssm_out.weight", "token_embd.weight")


@pytest.fixture(scope="module")
def file() -> Iterator[GGUFModel]:
    with open_model(embedded_model()) as opened:
        yield opened


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(embedded_model(), OPTIONS) as one:
        yield one


def logits(session: Session) -> F32:
    session.decode(TOKENS)
    return session.logits().copy()


def rounded(file: GGUFModel, name: str) -> Bytes:
    """The tensor as Q4_0 leaves it, in bfloat16, by PyPI gguf alone."""
    info = file.tensors[name]
    weights = dequantize(np.frombuffer(file.read(info), np.uint8), gguf.GGMLQuantizationType.BF16)
    rows = weights.reshape(-1, info.shape[0])
    back = dequantize(quantize(rows, gguf.GGMLQuantizationType.Q4_0), gguf.GGMLQuantizationType.Q4_0)
    data: Bytes = quantize(back, gguf.GGMLQuantizationType.BF16).reshape(-1).view(np.uint8)
    return data


def test_the_same_as_a_file_with_these_weights(session: Session, file: GGUFModel, tmp_path: Path) -> None:
    before = logits(session)
    copy = tmp_path / "m.gguf"
    shutil.copy(embedded_model(), copy)
    patcher = Patcher(session, file)
    with copy.open("r+b") as out:
        for name in PATCHED:
            data = rounded(file, name)
            out.seek(file.tensors[name].offset)
            out.write(data.tobytes())
            half = len(data) // 2 // 32 * 32
            patcher.write(name, 0, data[:half])
            patcher.write(name, half, data[half:])
            np.testing.assert_array_equal(patcher.read(name), data)
    patched = logits(session)
    with Session(copy, OPTIONS) as other:
        np.testing.assert_array_equal(patched, logits(other))
    assert np.abs(patched - before).max() > 0.1
    for name in PATCHED:
        patcher.restore(name)
    np.testing.assert_array_equal(logits(session), before)


def test_every_weight_is_found(session: Session, file: GGUFModel) -> None:
    found = Patcher(session, file).names
    assert found >= {name for name in file.tensors if name.endswith(".weight")}


def test_an_untied_output_and_a_quantized_file(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "m.gguf", "llama")
    with open_model(path) as file, Session(path, OPTIONS) as one:
        one.decode(TOKENS % 250)
        before = one.logits().copy()
        patcher = Patcher(one, file)
        assert {"token_embd.weight", "output.weight", "blk.1.ffn_down.weight"} <= patcher.names
        info = file.tensors["output.weight"]
        patcher.write("output.weight", 0, np.zeros(info.nbytes, np.uint8))
        one.decode(TOKENS % 250)
        assert not one.logits().any()
        patcher.restore("output.weight")
        one.decode(TOKENS % 250)
        np.testing.assert_array_equal(one.logits(), before)


def test_refused(session: Session, file: GGUFModel, tmp_path: Path) -> None:
    patcher = Patcher(session, file)
    name = "blk.3.attn_v.weight"
    size = file.tensors[name].nbytes
    with pytest.raises(UsageError, match="does not read"):
        patcher.write("blk.99.attn_v.weight", 0, np.zeros(2, np.uint8))
    for start, length in ((-2, 2), (0, size + 2), (size, 2)):
        with pytest.raises(UsageError, match="bytes"):
            patcher.write(name, start, np.zeros(length, np.uint8))
    for changed in ({"mmap": True}, {"repack": True}):
        with (
            Session(embedded_model(), OPTIONS.model_copy(update=changed)) as mapped,
            pytest.raises(UsageError, match="mmap=False and repack=False"),
        ):
            Patcher(mapped, file)


def test_another_file_than_the_loaded_one(session: Session, tmp_path: Path) -> None:
    copy = tmp_path / "m.gguf"
    shutil.copy(embedded_model(), copy)
    with open_model(copy) as other:
        info = other.tensors["blk.3.attn_v.weight"]
        with copy.open("r+b") as out:
            out.seek(info.offset + 10)
            out.write(b"\x01\x02")
        patcher = Patcher(session, other)
        with pytest.raises(InputError, match="other bytes than the file"):
            patcher.write(info.name, 0, np.zeros(2, np.uint8))
