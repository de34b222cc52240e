"""`kv` end to end on the embedded model: what is measured, that it is the same again, and what cannot work."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from rich.console import Console

from apex_quant import SessionOptions, embedded_model
from apex_quant.cli.kv import show_kv
from apex_quant.errors import ApexError, InputError, UsageError
from apex_quant.evaluation import pertoken
from apex_quant.evaluation.kv import KVResult, kv, load_kv
from apex_quant.evaluation.kv_observe import CacheTap, layer_rounding, rounding, stock_round_trip
from apex_quant.evaluation.kv_summary import Measured, _divergence, assemble
from apex_quant.evaluation.make_reference import make_reference
from apex_quant.evaluation.token_job import EvaluationProgress
from apex_quant.gguf import open_model
from apex_quant.model.kv_cache import head_lengths, kv_cache
from tests.calibration.stock import TEXT
from tests.evaluation.stock_tokens import llama_perplexity, small_file
from tests.helpers.cli import apex
from tests.helpers.random_models import write_random_gguf

ONE = SessionOptions(threads=1)
CTX, CHUNKS = 32, 33
TYPES = ("q8_0", "q4_0")


def run(out: Path | None, **more: Any) -> KVResult:
    given: dict[str, Any] = {"types": TYPES, "pairs": ["q8_0/q4_0"], "ctx": (CTX, 4096), "chunks": CHUNKS}
    given |= {"text": [TEXT], "speed": False, "options": ONE, "reference": embedded_model(), "simulate": "turbo3"}
    return kv(more.pop("model"), out=out, **{**given, **more})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kv")


@pytest.fixture(scope="module")
def small(folder: Path) -> Path:
    return small_file(folder)


@pytest.fixture(scope="module")
def found(folder: Path, small: Path) -> KVResult:
    """Interrupted in the middle, then to its end."""
    out = folder / "kv.json"
    seen: list[EvaluationProgress] = []

    def interrupt(event: EvaluationProgress) -> None:
        if event.what == "KV cache" and event.done > 3 * CHUNKS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out, model=small, progress=interrupt)
    assert not out.exists()
    made = run(out, model=small, progress=seen.append)
    assert seen[-1].done == seen[-1].planned
    assert seen[-1].resumed >= 3 * CHUNKS
    return made


# --- what is measured ---


def test_pairs_are_ranked_with_intervals(found: KVResult) -> None:
    assert [(row["k"], row["v"]) for row in found.pairs] == [
        ("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"), ("q8_0", "q4_0"),
    ]  # fmt: skip
    base = found.row("f16", "f16")["kld_mean"]
    assert abs(base["value"]) < 1e-6
    for row in found.pairs[1:]:
        mean = row["kld_mean"]
        assert 0 < mean["low"] < mean["value"] < mean["high"]
        assert mean["n"] == CHUNKS * (CTX - 1 - CTX // 2)
        assert row["kld_p99_9"]["value"] is None
        assert "too few" in row["kld_p99_9"]["note"]
        assert row["rotated"] == {"k": True, "v": True}
    assert found.row("q4_0", "q4_0")["kld_mean"]["value"] > found.row("q8_0", "q8_0")["kld_mean"]["value"]
    ranking = found.document["ranking"]
    assert (ranking[0]["k"], ranking[1]["k"]) == ("f16", "q8_0")
    assert [entry["rank"] for entry in ranking] == [1, 2, 3, 4]
    assert all(entry["to_next"]["value"] <= 0 for entry in ranking[:-1])
    assert ranking[0]["differs"] is True


def test_against_full_precision(found: KVResult) -> None:
    """The weights' own divergence is that of f16, to which a cache adds."""
    base = found.row("f16", "f16")["full"]
    assert base["kld_mean"]["value"] > 0.01
    assert base["added"]["value"] == 0
    four = found.row("q4_0", "q4_0")["full"]
    assert four["added"]["value"] == pytest.approx(four["kld_mean"]["value"] - base["kld_mean"]["value"], abs=1e-9)


def test_memory_is_that_of_the_planner_and_of_the_log(found: KVResult, small: Path) -> None:
    with open_model(small) as opened:
        for row in found.pairs:
            for ctx in (CTX, 4096):
                cache = kv_cache(opened, ctx=ctx, type_k=row["k"], type_v=row["v"])
                assert row["mib_at"][str(ctx)] == pytest.approx(cache.bytes / 2**20, abs=1e-4)
            assert row["bytes_per_token"] == 3 * 2 * 128 * row["bits"] / 8
    assert not [note for note in found.document["notes"] if "the library's cache" in note]
    assert any("trained on 2048" in note for note in found.document["notes"])
    assert found.simulated[0]["bytes_per_token"] == 3 * 2 * 50


def test_the_document(found: KVResult, folder: Path) -> None:
    document = json.loads((folder / "kv.json").read_text())
    assert document == found.to_json()
    assert all({"k", "v", "kld_mean", "bytes_per_token", "mib_at"} <= set(row) for row in document["pairs"])
    assert document["settings"]["ctx"] == [CTX]
    assert document["failed"] == document["unrotated"] == []
    arrays = pertoken.read(folder / "kv.npz", document["per_token"]["sha256"])
    kld = arrays[f"{CTX}/q4_0-q4_0/kld"]
    assert kld.shape == (CHUNKS, CTX - 1 - CTX // 2)
    assert kld.mean() == pytest.approx(found.row("q4_0", "q4_0")["kld_mean"]["value"], rel=1e-5)
    assert load_kv(folder / "kv.json").pairs == document["pairs"]
    assert {path.name for path in folder.iterdir()} >= {"kv.json", "kv.npz"}
    assert not list(folder.glob("kv.json.*"))


def test_the_same_call_has_nothing_to_do(found: KVResult, folder: Path, small: Path) -> None:
    seen: list[EvaluationProgress] = []
    again = run(folder / "kv.json", model=small, progress=seen.append)
    assert again.document == found.document
    assert not seen


def test_the_same_run_gives_the_same_numbers(found: KVResult, small: Path, folder: Path) -> None:
    """In another process, with fewer pairs, and without having been interrupted."""
    again = run(None, model=small, types=["q4_0"], pairs=(), reference=None, simulate=None)
    ours, theirs = again.row("q4_0", "q4_0"), found.row("q4_0", "q4_0")
    for key in ("kld_mean", "kld_median", "kld_p99", "kld_max", "top1_agreement"):
        assert ours["by_ctx"][0][key] == theirs["by_ctx"][0][key]
    assert again.path is None


def test_refused_pairs_are_named() -> None:
    """They poison neither the other rows nor those who read them."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = [
        {"id": f"{name}-{name}", "k": name, "v": name, "rotation": True, "simulated": False}
        for name in ("f16", "q8_0", "q4_0")
    ]
    shape = (40, 5)
    arrays = {
        row["id"]: {"kld": random.random(shape) * scale, "nll": np.zeros(shape), "top1": np.ones(shape, np.bool_)}
        for row, scale in zip(rows[:2], (0.0, 1.0), strict=True)
    }
    about = {"ctx": 64, "rows": [{"id": "q4_0-q4_0", "problem": "the library refuses"}]}
    with open_model(embedded_model()) as opened:
        document, kept = assemble(opened, [Measured(about, arrays)], rows, [64], {}, [])
    assert [row["k"] for row in document["pairs"]] == ["f16", "q8_0"]
    assert [(row["k"], row["problem"]) for row in document["failed"]] == [("q4_0", "the library refuses")]
    assert "q4_0/q4_0: the library refuses" in document["notes"]
    assert set(kept) >= {"64/q8_0-q8_0/kld"}


# --- simulation ---


def test_turbo_is_predicted_with_its_uncertainty(found: KVResult) -> None:
    (row,) = found.simulated
    assert (row["k"], row["v"], row["type_bytes"]) == ("turbo3", "turbo3", {"turbo3": 50})
    (made,) = row["predictions"]
    assert {check["name"] for check in made["checks"]} == {"q8_0/q8_0", "q4_0/q4_0", "q8_0/q4_0"}
    assert made["simulated"]["value"] > found.row("q8_0", "q8_0")["kld_mean"]["value"]
    assert made["predicted"]["low"] < made["predicted"]["value"] < made["predicted"]["high"]
    assert [layer["layer"] for layer in made["layers"]] == [3, 7, 11]
    for layer in made["layers"]:
        # rotated to something near a normal distribution, whatever the layer: the distortion of the paper
        assert layer["k_error"] == pytest.approx(0.0345, rel=0.15)
        assert layer["v_error"] == pytest.approx(0.0345, rel=0.15)
        assert 0 < layer["attention_error"] < 1
    assert "too few" in made["from_attention"]["note"]
    assert "turbo3/turbo3 (3.125 bits a value): predicted mean KLD" in row["sentence"]


def test_simulated_f16_is_f16(small: Path) -> None:
    """Nothing is rounded: the path through a cache of f32 adds nothing of its own."""
    made = run(None, model=small, types=(), pairs=(), reference=None, simulate="f16", chunks=4)
    assert abs(made.simulated[0]["by_ctx"][0]["kld_mean"]["value"]) < 1e-6


@pytest.mark.slow
def test_simulations_of_stock_types_are_near_the_truth() -> None:
    made = kv(
        embedded_model(), types=["q8_0", "q5_0", "q4_0", "iq4_nl"], pairs=(), ctx=(128,), chunks=40, text=[TEXT],
        speed=False, simulate="turbo4", out=None, options=ONE,
    )  # fmt: skip
    (row,) = made.simulated[0]["predictions"]
    for check in row["checks"]:
        if check["name"] != "q8_0/q8_0":  # so little that queries in 8 bits and flipped experts show
            assert check["ratio"] == pytest.approx(1, abs=0.3), check
    assert row["from_attention"]["rank_correlation"] > 0.5
    predicted = made.simulated[0]["kld_mean"]["value"]
    assert 0.5 < predicted / made.row("q4_0", "q4_0")["kld_mean"]["value"] < 2


@pytest.mark.parametrize("name", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_round_trips_are_those_of_the_gguf_package(name: str) -> None:
    """An independent implementation of the formats."""
    x = np.random.default_rng(1).standard_normal((7, 128)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[name.upper()]
    expected = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    np.testing.assert_array_equal(stock_round_trip(x, name), expected)


def test_rotation_helps_rows_with_one_large_value() -> None:
    x = np.random.default_rng(2).standard_normal((50, 128)).astype(np.float32)
    x[:, 3] *= 50
    with_it, without = rounding("q4_0", "k", 64), rounding("q4_0", "k", 64, rotated=False)
    odd = rounding("q4_0", "k", 48)
    assert with_it is not None
    assert without is not None
    assert odd is not None
    small = np.delete(np.arange(128), range(32))
    assert np.abs(with_it(x) - x).mean() < np.abs(without(x) - x).mean()
    np.testing.assert_array_equal(without(x), odd(x))
    np.testing.assert_array_equal(without(x)[:, small], stock_round_trip(x, "q4_0")[:, small])
    assert rounding("f16", "v", 64) is None


def test_heads_are_filled_up_where_rows_are_no_whole_blocks() -> None:
    """Three heads of 64, as SmolLM2's: each has a block of its own, so their lengths are kept one by one."""
    x = np.random.default_rng(3).standard_normal((9, 192)).astype(np.float32) * np.repeat([1, 100, 0.01], 64)
    to_type = rounding("turbo4", "k", 64)
    assert to_type is not None
    made = to_type(x.astype(np.float32))
    assert made.shape == x.shape
    error = np.square(made - x).reshape(9, 3, 64).sum(axis=2) / np.square(x).reshape(9, 3, 64).sum(axis=2)
    assert error.max() < 0.03
    nothing = rounding("turbo4", "k", -1)
    assert nothing is not None
    with pytest.raises(UsageError, match="multiple of 128"):
        nothing(x.astype(np.float32))


def test_layers_have_heads_of_their_own_length(tmp_path: Path) -> None:
    """Full layers of gemma4 have heads of 128, windowed ones rows of one head of 64: rounded with the other length, two
    tokens would be turned into one another, and every layer's error would be another."""
    path = write_random_gguf(tmp_path / "m.gguf", "gemma4", vocabulary=embedded_model(), vocab=10240, kv=1)
    with open_model(path) as opened:
        heads = head_lengths(opened)
    assert {layer: pair[0] for layer, pair in heads.items()} == {0: 64, 1: 64, 2: 64, 3: 128, 4: 64, 5: 64, 6: 128}
    made = kv(path, types=["q4_0"], pairs=(), ctx=(32,), chunks=8, text=[TEXT], speed=False, simulate="q4_0", out=None,
              options=ONE)  # fmt: skip
    layers = made.simulated[0]["predictions"][0]["layers"]
    assert [one["layer"] for one in layers] == list(heads)
    for one in layers:
        assert 0 < one["k_error"] < 0.02
        assert one["attention_error"] is not None  # none for any where one length was used for all


def test_each_layer_is_rounded_with_its_own_heads() -> None:
    x = np.random.default_rng(4).standard_normal((4, 128)).astype(np.float32)
    of_layer = layer_rounding("q4_0", "k", {0: (64, 64), 1: (128, 64)})
    for layer, length in ((0, 64), (1, 128)):
        own, expected = of_layer(layer), rounding("q4_0", "k", length)
        assert own is not None
        assert expected is not None
        np.testing.assert_array_equal(own(x), expected(x))
    with pytest.raises(UsageError, match="layer 2"):
        of_layer(2)


def test_rows_that_are_no_whole_heads_are_refused() -> None:
    to_type = rounding("q4_0", "k", 128)
    assert to_type is not None
    with pytest.raises(UsageError, match="no heads of 128"):
        to_type(np.zeros((2, 64), np.float32))


def test_the_tap_changes_new_rows_only() -> None:
    calls: list[int] = []

    def halved(rows: Any) -> Any:
        calls.append(len(rows))
        return rows / 2

    tap = CacheTap(lambda layer: halved, lambda layer: None)
    cache = np.zeros((8, 4), np.float32)
    tap.begin()
    cache[2:5] = 8
    tap.take_node("cache_k_l3 (view)", "SET_ROWS", cache, None)
    cache[5] = 2
    tap.take_node("cache_k_l3 (view)", "SET_ROWS", cache, None)
    tap.take_node("cache_k_l3 (view)", "SET_ROWS", cache, None)
    tap.take_node("cache_v_l3 (view)", "SET_ROWS", cache, None)
    tap.take_node("leaf_7", "SET_ROWS", cache, None)
    np.testing.assert_array_equal(cache[:, 0], [0, 0, 4, 4, 4, 1, 0, 0])
    assert calls == [3, 1]
    assert tap.errors() == [{"layer": 3, "k_error": pytest.approx(0.25), "v_error": 0.0}]


# --- references, rotation, speed ---


@pytest.mark.slow
def test_a_stored_reference(tmp_path: Path, small: Path, found: KVResult) -> None:
    reference = tmp_path / "made.apexref"
    make_reference(embedded_model(), reference, text=[TEXT], ctx=CTX, chunks=CHUNKS, options=ONE)
    more: dict[str, Any] = {"reference": reference, "source": embedded_model(), "simulate": None, "types": ["q4_0"]}
    made = run(None, model=small, pairs=(), text=None, chunks=None, **more)
    ours, theirs = (one.row("q4_0", "q4_0") for one in (made, found))
    assert ours["kld_mean"] == theirs["kld_mean"]
    assert ours["full"] == theirs["full"]
    with pytest.raises(UsageError, match="used whole"):
        run(None, model=small, pairs=(), text=None, chunks=3, **more)
    with pytest.raises(UsageError, match="that of the reference file"):
        run(None, model=small, pairs=(), chunks=None, **more)


def test_divergences_are_not_negative() -> None:
    kld = np.random.default_rng(0).normal(0, 1e-9, 40 * 20)
    found = _divergence(kld, np.repeat(np.arange(40), 20))
    assert 0 <= found["low"] <= found["value"] <= found["high"]
    assert found["low"] == 0


def test_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no cache types"):
        kv(embedded_model(), types=(), pairs=(), out=tmp_path / "kv.json")


@pytest.mark.slow
def test_rotation_and_speed(tmp_path: Path) -> None:
    more: dict[str, Any] = {"types": ["q4_0"], "pairs": (), "reference": None, "simulate": None, "speed": True}
    made = run(tmp_path / "kv.json", model=embedded_model(), rotation="both", **more)
    assert [row["rotation"] for row in made.pairs] == [None, True]
    (plain,) = made.document["unrotated"]
    assert plain["rotated"] == {"k": False, "v": False}
    assert plain["kld_mean"]["value"] != made.pairs[1]["kld_mean"]["value"]
    made.document["ranking"] = [dict(row, differs=False) for row in made.document["ranking"]]
    console = Console(file=io.StringIO(), width=200)
    show_kv(console, made)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert len([line for line in shown.splitlines() if line.lstrip().startswith("q4_0")]) == 2
    assert "q4_0/q4_0 without rotation" in shown
    assert all(row["speed"]["pp512"]["value"] > 0 and row["speed"]["tg32"]["value"] > 0 for row in made.pairs)
    off = run(None, model=embedded_model(), rotation="off", **{**more, "speed": False})
    assert off.row("q4_0", "q4_0", rotation=False)["kld_mean"] == plain["kld_mean"]


@pytest.mark.slow
def test_against_llama_perplexity(tmp_path: Path) -> None:
    """The same text, chunks and types in stock's tool, which keeps its reference in 16 bits."""
    given = os.environ.get("APEX_STOCK_TOOLS")
    if not given:
        pytest.skip("APEX_STOCK_TOOLS names no folder with llama-perplexity (tools/build_stock_tools.py)")
    tools, ctx, chunks = Path(given), 128, 20
    base = tmp_path / "base"
    words = ("-f", TEXT, "-c", ctx, "--chunks", chunks, "-fa", "on")
    llama_perplexity(tools, embedded_model(), *words, "--save-all-logits", base)
    said = llama_perplexity(
        tools, embedded_model(), "--kl-divergence", "--kl-divergence-base", base, "-c", ctx, "-fa", "on",
        "-ctk", "q8_0", "-ctv", "q4_0",
    )  # fmt: skip
    stock = re.search(r"Mean +KLD: *([-\d.]+)", said)
    assert stock is not None, said
    made = kv(
        embedded_model(), types=["q8_0/q4_0"], pairs=(), ctx=(ctx,), chunks=chunks, text=[TEXT], speed=False,
        out=None, options=ONE,
    )  # fmt: skip
    assert made.row("q8_0", "q4_0")["kld_mean"]["value"] == pytest.approx(float(stock[1]), rel=0.02, abs=2e-5)


# --- the command ---


def test_the_command(found: KVResult, folder: Path, small: Path) -> None:
    """Of what is measured already, so that nothing is run."""
    words: list[str | Path] = [
        "kv",
        small,
        "--reference",
        embedded_model(),
        "--types",
        "q8_0,q4_0,q8_0/q4_0",
        "--text",
        TEXT,
    ]
    words += ["--ctx", f"{CTX},4096", "--chunks", str(CHUNKS), "--simulate", "turbo3", "--no-speed", "-j", "1"]
    done = apex(*words, "-o", folder / "kv.json", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out) == found.to_json()
    shown = apex(*words, "-o", folder / "kv.json")
    assert shown.status == 0, shown.err
    assert "simulated: turbo3/turbo3 (3.125 bits a value): predicted" in shown.out
    assert "MiB at 4096" in shown.out


def test_too_little_text_is_no_missing_difference(found: KVResult) -> None:
    few = {"value": -0.01, "low": None, "high": None, "n": 80, "note": "too few: 5 chunks", "chunks": 5}
    ranking = [row | {"to_next": row["to_next"] and few, "differs": False} for row in found.document["ranking"]]
    console = Console(file=io.StringIO(), width=200)
    show_kv(console, KVResult({**found.document, "ranking": ranking}))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert shown.count("5 chunks: intervals and comparisons take 32 (more --chunks, or more text)") == 1
    assert "no difference shown" not in shown


# --- what cannot work ---


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"types": ["turbo3"]}, "turbo3 is not in stock"),
        ({"types": ["q9_0"]}, "no cache type is called 'q9_0'"),
        ({"ctx": ()}, "contexts .*: none; it takes at least one"),
        ({"ctx": (8,)}, "contexts .*: 8; .*each of 16 tokens or more"),
        ({"chunks": 0}, "0 chunks .*at least 1"),
        ({"options": SessionOptions(flash_attention="off")}, "a quantized V needs flash attention"),
        ({"options": SessionOptions(gpu_layers=1)}, "changes the cache in main memory"),
        ({"text": ["missing.txt"]}, "no such file"),
        ({"reference": TEXT}, "neither a GGUF model nor"),
    ],
)
def test_bad_calls(more: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(ApexError, match=message):
        run(tmp_path / "kv.json", model=embedded_model(), **more)
    assert not list(tmp_path.iterdir())


def test_bad_places(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        run(tmp_path / "no" / "kv.json", model=embedded_model())
    with pytest.raises(UsageError, match="is the model"):
        run(embedded_model(), model=embedded_model())
    for name in ("", "kv.npz", "kv.gguf"):  # the numbers per token would go where the result goes
        with pytest.raises(UsageError, match="goes to a file such as"):
            run(tmp_path / name, model=embedded_model())


@pytest.mark.parametrize(
    ("there", "refused"),
    [
        ({"kv.json": "my notes"}, "kv.json"),
        ({"kv.json": '{"schema": "apex.results/1"}'}, "kv.json"),
        ({"kv.npz": "numbers"}, "kv.npz"),
        ({"kv.json": '{"schema": "apex.kv/1"}', "kv.npz": "numbers"}, "kv.npz"),
        ({"kv.json": '{"schema": "apex.kv/1", "per_token": {"path": "other.npz"}}', "kv.npz": "numbers"}, "kv.npz"),
    ],
)
def test_files_of_others_are_kept(there: dict[str, str], refused: str, tmp_path: Path) -> None:
    for name, text in there.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=rf"{re.escape(refused)} exists already"):
        run(tmp_path / "kv.json", model=embedded_model())
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == there


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: None,
        lambda d: [],
        lambda d: {**d, "schema": "apex.kv/9"},
        lambda d: {**d, "pairs": None},
        lambda d: {**d, "pairs": [1]},
        lambda d: {**d, "pairs": [{"k": "f16"}]},
        lambda d: {key: value for key, value in d.items() if key != "simulated"},
    ],
)
def test_other_documents(damage: Callable[[Any], Any], found: KVResult, tmp_path: Path) -> None:
    path = tmp_path / "kv.json"
    path.write_text(json.dumps(damage(found.document)))
    with pytest.raises(InputError, match=r"kv\.json"):
        load_kv(path)
    for text in ("", "{", "[" * 100_000, '{"schema": '):
        path.write_text(text)
        with pytest.raises(InputError):
            load_kv(path)
