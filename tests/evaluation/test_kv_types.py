"""Pairs of cache types, what a llama-server lists, what the library's log says, and predictions; nothing native."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_quant.errors import NativeError, UsageError
from apex_quant.evaluation.kv_types import (
    STOCK,
    Pair,
    all_pairs,
    bits_of,
    confirm,
    offered_types,
    parse_pair,
    read_log,
    require_offered,
    server_types,
    stock_pair,
)
from apex_quant.evaluation.turbo import predict
from apex_quant.evaluation.turbo.codec import TURBO

HELP = """
-ctk,  --cache-type-k TYPE              KV cache data type for K
                                        allowed values: f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1{more}
                                        (default: f16)
                                        (env: LLAMA_ARG_CACHE_TYPE_K)
-ctv,  --cache-type-v TYPE              KV cache data type for V
"""
LOG = [
    "llama_kv_cache:        CPU KV buffer size =     0.84 MiB",
    "llama_kv_cache: size =    0.84 MiB (   512 cells,   3 layers,  4/4 seqs), K (q8_0):    0.40 MiB, V (q4_0):    "
    "0.44 MiB",
    "llama_kv_cache: attn_rot_k = 1, n_embd_head_k_all = 64",
    "llama_kv_cache: attn_rot_v = 0, n_embd_head_k_all = 128",
    "llama_memory_recurrent: size =    4.71 MiB (     1 cells,  12 layers,  1 seqs), R (f32):    0.21 MiB, S (f32)",
]


def test_bits() -> None:
    assert [bits_of(name) for name in STOCK] == [16, 8.5, 6, 5.5, 5, 4.5, 4.5]
    assert [bits_of(name) for name in TURBO] == [2.125, 3.125, 4.125]
    assert Pair("q8_0", "turbo3").bits == pytest.approx(5.8125)
    # the figures of docs/kv.md
    assert round(16 / Pair("turbo3", "turbo3").bits, 2) == 5.12
    assert round(16 / Pair("q8_0", "turbo3").bits, 2) == 2.75
    assert round(16 / Pair("q5_0", "q4_0").bits, 2) == 3.2


@pytest.mark.parametrize(
    ("text", "pair"),
    [("q8_0", ("q8_0", "q8_0")), ("q8_0/q5_1", ("q8_0", "q5_1")), ("q8_0:f16", ("q8_0", "f16")),
     (("f16", "turbo2"), ("f16", "turbo2"))],
)  # fmt: skip
def test_pairs(text: str | tuple[str, str], pair: tuple[str, str]) -> None:
    assert parse_pair(text) == pair


@pytest.mark.parametrize("text", ["", "q9_0", "q8_0/q5_1/q4_0", "q4_k", "turbo5", "q8_0/"])
def test_no_pairs(text: str) -> None:
    with pytest.raises(UsageError):
        parse_pair(text)


def test_all_pairs_are_there_once_and_f16_first() -> None:
    found = all_pairs(["q4_0", "f16"], ["q4_0/q4_0", ("q8_0", "q4_0")])
    assert [pair.name for pair in found] == ["f16/f16", "q4_0/q4_0", "q8_0/q4_0"]


@given(st.sampled_from(["turbo2", "turbo3", "turbo4", "q8_0", "f16"]), st.sampled_from(list(TURBO)))
def test_the_stock_pair_takes_no_more_bits_where_one_can(k: str, v: str) -> None:
    pair = Pair(k, v)
    found = stock_pair(pair)
    assert set(found) <= set(STOCK)
    assert found.bits <= pair.bits or (found == ("q4_0", "q4_0") and pair.bits < 4.5)


def test_help_of_servers() -> None:
    assert server_types(HELP.format(more="")) == (
        "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1",
    )  # fmt: skip
    assert "turbo3" in server_types(HELP.format(more=", turbo2, turbo3"))
    assert server_types("nothing of the kind") == ()


@given(st.text(max_size=400))
@settings(max_examples=100)
def test_help_of_anything(text: str) -> None:
    assert isinstance(server_types(text), tuple)
    assert isinstance(server_types(HELP + text), tuple)


def fake_server(folder: Path, text: str) -> None:
    program = folder / "llama-server"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    program.chmod(0o755)


def test_turbo_types_are_offered_by_the_users_server_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [parse_pair("q8_0/turbo3")]
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    assert offered_types() == ()
    with pytest.raises(UsageError, match=r"turbo3 is not in stock llama\.cpp.*q5_1/q5_0 takes 5\.75") as caught:
        require_offered(wanted)
    assert "--simulate q8_0/turbo3" in str(caught.value.hint)
    fake_server(tmp_path, HELP.format(more=""))
    with pytest.raises(UsageError, match="no llama-server here lists it"):
        require_offered(wanted)
    fake_server(tmp_path, HELP.format(more=", turbo2, turbo3, turbo4"))
    assert "turbo3" in offered_types()
    require_offered(wanted)
    with pytest.raises(UsageError, match=r"q4_0/q4_0 takes 4\.5 bits a value, the smallest that stock"):
        require_offered([parse_pair("turbo2")], offered=())
    require_offered([parse_pair("q8_0")], offered=())


def test_the_log() -> None:
    (found,) = read_log(LOG)
    assert (found.k, found.v, found.cells, found.k_mib, found.v_mib) == ("q8_0", "q4_0", 512, 0.40, 0.44)
    assert found.rotated == (True, False)
    assert found.heads == (64, 128)
    confirm(Pair("q8_0", "q4_0"), [found], "model")
    with pytest.raises(NativeError, match="asked for a cache of q8_0/q8_0, the library made one of q8_0/q4_0"):
        confirm(Pair("q8_0", "q8_0"), [found], "model")
    with pytest.raises(NativeError, match="names no cache"):
        confirm(Pair("q8_0", "q8_0"), [], "model")
    assert read_log(LOG[:2])[0].rotated == (None, None)
    assert len(read_log(LOG * 2)) == 2


# --- predictions ---


def test_a_constant_factor_is_found() -> None:
    checks = [predict.Check(f"p{i}", 1.5 * kld, kld) for i, kld in enumerate((0.001, 0.004, 0.02))]
    found = predict.predict(0.05, checks)
    assert found["value"] == pytest.approx(0.075)
    assert found["low"] == pytest.approx(0.075)
    wide = predict.predict(0.05, checks, 0.04, 0.06)
    assert wide["low"] == pytest.approx(0.075 * 0.8)
    assert wide["high"] == pytest.approx(0.075 * 1.2)


def test_prediction_intervals_hold_their_level() -> None:
    """Checks and truth with the same scatter: 95 % of the intervals hold the truth."""
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        ratios = random.normal(0.2, 0.3, 5)
        checks = [predict.Check("", math.exp(r), 1.0) for r in ratios[:4]]
        found = predict.predict(1.0, checks)
        hits += found["low"] <= math.exp(ratios[4]) <= found["high"]
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_too_little_is_said() -> None:
    assert predict.predict(0.1, [])["low"] is None
    assert "too few" in predict.predict(0.1, [predict.Check("a", 1.0, 1.0)])["note"]
    assert predict.from_attention(0.1, {"a": (0.1, 0.1)})["value"] is None
    like = predict.alike({"value": 0.1, "low": None, "high": None}, {})
    assert like["nearest"] is None


def test_lines_through_errors() -> None:
    known = {f"p{i}": (x, 3 * x**1.2) for i, x in enumerate((0.001, 0.01, 0.03, 0.1))}
    found = predict.from_attention(0.05, known)
    assert found["value"] == pytest.approx(3 * 0.05**1.2)
    assert found["rank_correlation"] == pytest.approx(1)
    assert found["missed_by"] == pytest.approx(1, abs=1e-9)
    assert not found["outside"]
    assert predict.from_attention(0.5, known)["outside"]


def test_sentences_say_what_is_known() -> None:
    measured, bits = {"q4_0/q4_0": 0.01, "q8_0/q8_0": 0.001}, {"q4_0/q4_0": 4.5, "q8_0/q8_0": 8.5}
    predicted = {"value": 0.012, "low": 0.009, "high": 0.016}
    like = predict.alike(predicted, measured)
    assert like == {"nearest": "q4_0/q4_0", "within": ["q4_0/q4_0"]}
    said = predict.sentence("turbo3/turbo3", 3.125, predicted, like, measured, bits, {})
    assert "nearest to q4_0/q4_0 (4.5 bits, measured 0.01)" in said
    unknown = predict.sentence("turbo3/turbo3", 3.125, {**predicted, "low": None}, like, measured, bits, {})
    assert unknown.endswith("how far off that is, is not known.")
    said = predict.sentence("q8_0/turbo3", 5.8, {"value": 0.02, "low": 0.015, "high": 0.03}, like, measured, bits, {})
    assert "q4_0/q4_0 takes no more bits and loses less" in said
    wide = {"value": 0.02, "low": 0.015, "high": 0.03}
    assert "loses less" not in predict.sentence("t", 5.8, wide, like, measured, bits, {"q4_0/q4_0": 0.016})
