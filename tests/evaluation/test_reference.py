"""Reference files and their parts: rebuilt logits, .apexref, _logits_, the cutting of text into decodes."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_quant.errors import InputError
from apex_quant.evaluation import reference, stock_logits
from apex_quant.evaluation.rebuild import STATES, OutputMatrix, from_bf16, to_bf16
from apex_quant.evaluation.reference import ApexReference, encode_logits, pack, unpack
from apex_quant.evaluation.scores import divergence
from apex_quant.evaluation.steps import Batching, Plan, Step
from apex_quant.evaluation.watch import Routing
from apex_quant.gguf import ggml_type

Array = np.ndarray[Any, Any]


def logits_of(rows: int, vocabulary: int, seed: int = 0, spread: float = 4) -> Array:
    return (np.random.default_rng(seed).normal(size=(rows, vocabulary)) * spread).astype(np.float32)


# --- decodes ---


@settings(max_examples=60, deadline=None)
@given(st.integers(16, 3000), st.integers(1, 20), st.integers(1, 300_000), st.integers(1, 2), st.booleans())
def test_every_scored_token_once(ctx: int, chunks: int, vocabulary: int, models: int, every: bool) -> None:
    first = max(1, ctx // 8) if every else ctx // 2
    tokens = np.arange(chunks * ctx, dtype=np.int32).reshape(chunks, ctx)
    plan = Plan(tokens, np.zeros(chunks, np.int16), ("text",), first, bos=7)
    batching = Batching.of(ctx, vocabulary, models)
    assert 2 * 4 * batching.tokens * vocabulary * models <= max(700 << 20, 2 * 4 * 32 * vocabulary * models)
    seen = np.zeros((chunks, plan.scored), int)
    for steps in plan.steps(0, batching):
        for number, step in enumerate(steps):
            assert step.tokens.size <= batching.tokens
            assert step.position == sum(one.tokens.shape[1] for one in steps[:number])
            expected = tokens[step.chunks.start : step.chunks.stop, step.position :][:, : step.tokens.shape[1]].copy()
            if step.position == 0:
                expected[:, 0] = 7
            np.testing.assert_array_equal(step.tokens, expected)
            positions = step.position + np.flatnonzero(step.outputs)
            np.testing.assert_array_equal(positions, first + np.arange(plan.scored)[step.scored])
            seen[step.chunks.start : step.chunks.stop, step.scored] += 1
    assert (seen == 1).all()
    np.testing.assert_array_equal(plan.targets(), tokens[:, first + 1 :])


def test_batching_is_that_of_llama_perplexity() -> None:
    """2048 tokens side by side, 512 of them at a time; fewer where logits are large."""
    assert Batching.of(512, 32_000, 1) == Batching(4, 512)
    assert Batching.of(2048, 32_000, 1) == Batching(1, 512)
    assert Batching.of(128, 32_000, 2) == Batching(16, 512)
    assert Batching.of(2048, 150_000, 1) == Batching(1, 512)
    assert Batching.of(2048, 150_000, 2) == Batching(1, 256)


# --- rebuilt logits ---


def test_bf16_is_that_of_gguf() -> None:
    values = logits_of(50, 64)
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16).view(np.uint16)
    np.testing.assert_array_equal(to_bf16(values), expected)
    np.testing.assert_array_equal(to_bf16(from_bf16(expected)), expected)


def test_q8_0_is_that_of_gguf() -> None:
    values = logits_of(50, 64)
    np.testing.assert_array_equal(
        STATES["q8_0"].encode(values), gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    )
    expected = gguf.quants.dequantize(STATES["q8_0"].encode(values), gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(STATES["q8_0"].decode(STATES["q8_0"].encode(values)), expected)


@pytest.mark.parametrize("name", STATES)
def test_states_come_back(name: str) -> None:
    kind, values = STATES[name], logits_of(10, 512)
    values[3] = 0
    kept = kind.encode(values)
    assert kept.shape == (10, kind.row_bytes(512))
    most = np.abs(values.reshape(-1, kind.block)).max(axis=1, keepdims=True)
    error = np.abs(kind.decode(kept) - values).reshape(-1, kind.block)
    assert (error <= most * (0.6 / 127 if kind.block > 1 else 2.0**-8)).all()
    for part in (slice(0, 3), slice(3, 10)):
        np.testing.assert_array_equal(kind.decode(kept[part]), kind.decode(kept)[part])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.25, 30.0)])
def test_blocks_of_the_product(kind: str, scale: float, softcap: float) -> None:
    values = logits_of(700, 64, 1, 0.1)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    exact = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind]).astype(np.float64)
    data = packed.tobytes()
    matrix = OutputMatrix("output.weight", ggml_type(kind), (64, 700), lambda a, n: data[a : a + n], scale, softcap)
    hidden = logits_of(9, 64, 2)
    expected = hidden.astype(np.float64) @ exact.T * scale
    if softcap:
        expected = softcap * np.tanh(expected / softcap)
    blocks = list(matrix.blocks(hidden))
    np.testing.assert_allclose(np.hstack([block for _, block in blocks]), expected, atol=1e-5)
    assert [start for start, _ in blocks] == [0]
    assert matrix.sha256() == hashlib.sha256(data).hexdigest()


# --- _logits_ ---


def stock_file(path: Path, ctx: int = 16, vocabulary: int = 33, chunks: int = 2) -> tuple[Array, Array]:
    """A file written as the format says, value by value; its tokens and log-probabilities."""
    scored = ctx - 1 - ctx // 2
    tokens = np.random.default_rng(1).integers(0, vocabulary, (chunks, ctx)).astype(np.int32)
    known = np.empty((chunks, scored, vocabulary))
    with path.open("wb") as file:
        file.write(b"_logits_" + struct.pack("<Iii", ctx, vocabulary, chunks) + tokens.tobytes())
        for chunk in range(chunks):
            for row, logits in enumerate(logits_of(scored, vocabulary, chunk)):
                top, total = logits.max(), np.log(np.exp(logits.astype(float) - logits.max()).sum())
                low = max(logits.min(), top - 16)
                scale, smallest = np.float32((top - low) / 65535), np.float32(low - top - total)
                words = [round(max(0.0, float((x - low) / scale))) for x in logits]
                file.write(struct.pack("<ff", scale, smallest))
                file.write(np.array([*words, 0][: vocabulary + vocabulary % 2], "<u2").tobytes())
                known[chunk, row] = np.float32(scale) * np.array(words) + smallest
    return tokens, known


def step_of(ctx: int, chunks: range, scored: slice) -> Step:
    return Step(chunks, np.zeros((len(chunks), 1), np.int32), 0, np.ones(scored.stop - scored.start, bool), scored)


def test_stock_file_is_read(tmp_path: Path) -> None:
    tokens, known = stock_file(tmp_path / "base")
    one = stock_logits.StockLogits(tmp_path / "base")
    np.testing.assert_array_equal(one.tokens, tokens)
    blocks, routing = one.take(step_of(16, range(2), slice(2, 6)))
    rows = np.hstack([block for _, block in blocks])
    np.testing.assert_allclose(rows, known[:, 2:6].reshape(8, -1), rtol=1e-5, atol=1e-5)
    assert routing is None
    one.close()


def test_stock_rows_are_written(tmp_path: Path) -> None:
    _, known = stock_file(tmp_path / "base")
    written = stock_logits.encode(logits_of(7, 33, 0))
    decoded = np.hstack([block for _, block in stock_logits.decode(written, 33)])
    np.testing.assert_allclose(decoded, known[0], atol=2e-3)
    head = stock_logits.head(16, 33, np.zeros((2, 16), np.int32))
    assert len(head) + 2 * written.nbytes == (tmp_path / "base").stat().st_size


@pytest.mark.parametrize("change", ["magic", "short", "empty", "context", "chunks", "token", "vocabulary"])
def test_stock_file_that_is_broken(change: str, tmp_path: Path) -> None:
    path = tmp_path / "base"
    stock_file(path)
    data = bytearray(path.read_bytes())
    spoiled: dict[str, bytes | bytearray] = {
        "magic": b"_logitz_" + data[8:],
        "short": data[:-1],
        "empty": data[:9],
        "context": data[:8] + struct.pack("<I", 0) + data[12:],
        "chunks": data[:16] + struct.pack("<i", 1 << 30) + data[20:],
        "token": data[:20] + struct.pack("<i", 33) + data[24:],
        "vocabulary": data[:12] + struct.pack("<i", -5) + data[16:],
    }
    path.write_bytes(bytes(spoiled[change]))
    with pytest.raises(InputError):
        stock_logits.StockLogits(path)


# --- .apexref ---


def test_logits_in_16_bits() -> None:
    logits = logits_of(40, 500, 3, 8)
    step, low, high, rest = encode_logits(logits)
    words = high.astype(np.float32) * 256 + rest
    made = divergence(words * step + low, logits, logits.argmax(axis=1))
    assert np.abs(made.kld).max() < 1e-6


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["hidden", "logprobs"]), st.integers(1, 9), st.booleans(), st.sampled_from([64, 300]))
def test_parts_come_back(form: str, rows: int, routed: bool, experts: int) -> None:
    random = np.random.default_rng(rows)
    body = [STATES["bf16"].encode(logits_of(rows, 16))] if form == "hidden" else encode_logits(logits_of(rows, 50))
    kind = np.uint8 if experts <= 256 else np.uint16
    routing = (
        random.integers(0, experts, (3, rows, 2)).astype(kind),
        random.random((3, rows, 2)).astype(np.float16),
    )
    about = {"layers": [0, 1, 5], "k": 2, "experts": experts} if routed else None
    header = {"form": form, "dtype": "bf16", "n_embd": 16, "vocabulary": 50, "routers": about}
    nll = random.random(rows)
    data = pack(form, body, nll, routing if routed else None)
    back, nll_back, routing_back = unpack(header, data, rows)
    for ours, theirs in zip(back, body, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(nll_back, nll, rtol=1e-6)
    if routed:
        assert routing_back is not None
        np.testing.assert_array_equal(routing_back[0], routing[0])
        np.testing.assert_array_equal(routing_back[1], routing[1].astype(np.float32))
    for spoiled in (data[:-1], data + b"\0", data[: len(data) // 2]):
        with pytest.raises((ValueError, struct.error, zlib.error)):
            unpack(header, spoiled, rows)


def apexref(path: Path, **changes: Any) -> Path:
    """A small file of form hidden: 2 chunks of 16 tokens, 4 states, a vocabulary of 32, the output matrix in it."""
    random = np.random.default_rng(0)
    tokens, parts = random.integers(0, 32, (2, 16)).astype("<i4"), []
    matrix = random.normal(size=(32, 4)).astype(np.float32)
    data = bytearray(reference.PREAMBLE.size)

    def add(raw: bytes) -> list[Any]:
        data.extend(raw)
        return [len(data) - len(raw), len(raw), hashlib.sha256(raw).hexdigest()]

    for _ in range(2):
        parts.append([add(pack("hidden", [STATES["f16"].encode(logits_of(7, 4))], np.zeros(7), None))])
    header = {
        "schema": reference.SCHEMA,
        "model": {"name": "model.gguf", "sha256": "0" * 64},
        "vocabulary": 32,
        "n_embd": 4,
        "ctx": 16,
        "first": 8,
        "bos": None,
        "texts": [{"name": "a", "chunks": 1}, {"name": "b", "chunks": 1}],
        "routers": None,
        "form": "hidden",
        "dtype": "f16",
        "rows": 7,
        "error": {"mean": 0.0},
        "output": {"tensor": "output.weight", "type": "F32", "shape": [4, 32], "sha256": "", "scale": 1.0,
                   "softcap": 0.0},
        "output_copy": add(matrix.tobytes()),
        "tokens": add(tokens.tobytes()),
        "parts": parts,
    }  # fmt: skip
    raw = json.dumps({**header, **changes}).encode()
    at = add(raw)
    data[: reference.PREAMBLE.size] = reference.PREAMBLE.pack(
        reference.MAGIC, at[0], at[1], hashlib.sha256(raw).digest()
    )
    path.write_bytes(data)
    return path


def read_all(path: Path) -> None:
    one = ApexReference(path)
    one.load_output(None)
    one.take(step_of(16, range(2), slice(0, 7)))


def test_small_file_is_read(tmp_path: Path) -> None:
    one = ApexReference(apexref(tmp_path / "a.apexref"))
    one.load_output(None)
    assert one.domains == ("a", "b")
    blocks, _ = one.take(step_of(16, range(2), slice(1, 5)))
    rows = np.hstack([block for _, block in blocks])
    matrix = np.random.default_rng(0)
    matrix.integers(0, 32, (2, 16))
    kept = logits_of(7, 4).astype(np.float16).astype(np.float32)[1:5]
    np.testing.assert_allclose(rows[:4], kept @ matrix.normal(size=(32, 4)).astype(np.float32).T, rtol=1e-5, atol=1e-5)
    one.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": "apex.reference/2"},
        {"form": "other"},
        {"ctx": 0},
        {"ctx": "16"},
        {"ctx": 1 << 40},
        {"vocabulary": 8},
        {"texts": [{"name": "a", "chunks": 3}]},
        {"texts": None},
        {"parts": [[[0, 1 << 50, ""]], [[0, 8, ""]]]},
        {"tokens": [-1, 8, ""]},
        {"tokens": [0, 8, ""]},
        {"dtype": "f8"},
        {"dtype": "q8_0"},
        {"rows": 3},
    ],
)
def test_header_that_lies(changes: dict[str, Any], tmp_path: Path) -> None:
    path = apexref(tmp_path / "a.apexref", **changes)
    with pytest.raises(InputError):
        read_all(path)


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 3000), value=st.integers(0, 255))
def test_damage_is_noticed(place: int, value: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("damage") / "a.apexref"
    data = bytearray(apexref(path).read_bytes())
    place %= len(data)
    if data[place] == value or 56 <= place < 64:
        return
    data[place] = value
    path.write_bytes(data)
    with pytest.raises(InputError):
        read_all(path)


# --- routers ---


def test_moved_weight() -> None:
    experts = np.array([[[0, 1], [2, 3], [4, 5]]], np.int32)
    weights = np.array([[[0.5, 0.5], [0.9, 0.1], [1, 0]]], np.float32)
    other = np.array([[[1, 0], [2, 4], [6, 7]]], np.int32)
    shares = np.array([[[0.75, 0.25], [0.8, 0.2], [0.5, 0.5]]], np.float32)
    changed, moved = Routing((0,), experts, weights).moved(Routing((0,), other, shares))
    np.testing.assert_array_equal(changed, [[False, True, True]])
    np.testing.assert_allclose(moved, [[0.25, 0.2, 1.0]], rtol=1e-6)
