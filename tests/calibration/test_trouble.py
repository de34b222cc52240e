"""Calibrations that meet trouble: another run on the same file, an abort in the library, a block out of reach."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from apex_quant import calibrate, embedded_model, plan
from apex_quant.calibration import calibrate as module
from apex_quant.calibration.calibrate import CalibrationProgress
from apex_quant.calibration.state import sums_path
from apex_quant.errors import BusyError, NativeError
from apex_quant.gguf import AtomicFile, atomic, layout, open_model
from apex_quant.recipe.planned import PlanOptions
from apex_quant.runtime.options import SessionOptions
from tests.calibration.stock import TEXT
from tests.helpers.random_models import write_random_gguf

QUICK = SessionOptions(threads=1, ctx=64, sequences=2, ubatch=128)

JOBS = """
import ctypes
from apex_quant.calibration import collect
from apex_quant.native import ggml

def run(payload, emit, stop, fds):
    def emit_and_fail(event):
        emit(event)
        if event["chunks"] >= 6:
            ctypes.CDLL(str(ggml().path)).ggml_abort(b"graph.cpp", 7, b"no kernel for %s", b"MUL_MAT_ID")
    return collect.run(payload, emit_and_fail, stop, fds)
"""

KILLED = """if True:
    import os, signal, sys
    from apex_quant import SessionOptions, calibrate, embedded_model
    from apex_quant.calibration import calibrate as module

    class Child(module.Child):
        def run(self, *args, **options):
            global child
            child = self._process.pid
            return super().run(*args, **options)

    def progress(event):
        os.kill(child, signal.SIGSTOP)
        os.write(1, str(child).encode())
        os.kill(os.getpid(), signal.SIGKILL)

    module.Child = Child
    calibrate(embedded_model(), sys.argv[1], corpus=[sys.argv[2]], tokens=768, progress=progress, save_seconds=0,
              options=SessionOptions(threads=1, ctx=64, sequences=2, ubatch=128))
    """


def test_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "BUSY_SECONDS", 0.0)
    out = tmp_path / "imatrix.gguf"
    refused: list[BusyError] = []

    def second(event: CalibrationProgress) -> None:
        if not refused:
            with pytest.raises(BusyError, match=r"imatrix\.gguf: another process is calibrating") as caught:
                calibrate(embedded_model(), out, corpus=[TEXT], tokens=128, options=QUICK)
            refused.append(caught.value)

    first = calibrate(embedded_model(), out, corpus=[TEXT], tokens=256, options=QUICK, progress=second)
    assert [error.exit_code for error in refused] == [4]
    assert (first.chunks, first.resumed) == (4, 0)
    assert list(tmp_path.iterdir()) == [out]


def test_what_another_run_finished_meanwhile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, other = tmp_path / "imatrix.gguf", tmp_path / "other.gguf"
    calibrate(embedded_model(), other, corpus=[TEXT], tokens=128, options=QUICK)
    lock = AtomicFile(tmp_path / "imatrix.gguf.calibration")

    def finish(seconds: float) -> None:
        other.rename(out)
        lock.abandon()

    monkeypatch.setattr("apex_quant.gguf.atomic.time.sleep", finish)
    assert calibrate(embedded_model(), out, corpus=[TEXT], tokens=128, options=QUICK).unchanged


def test_child_of_a_killed_run_still_holds_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may yet save its sums; when it is gone too, the next run goes on."""
    out = tmp_path / "imatrix.gguf"
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), str(TEXT)], stdout=subprocess.PIPE, check=False)
    assert done.returncode == -signal.SIGKILL
    child = int(done.stdout)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(atomic, "BUSY_SECONDS", 0.2)
            with pytest.raises(BusyError):
                calibrate(embedded_model(), out, corpus=[TEXT], tokens=768, options=QUICK)
    finally:
        os.kill(child, signal.SIGCONT)
    made = calibrate(embedded_model(), out, corpus=[TEXT], tokens=768, options=QUICK)
    assert 2 <= made.resumed <= made.chunks == 12
    assert list(tmp_path.iterdir()) == [out]


def test_abort_in_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ggml ends the child: the error names model, step and its last line, and what was summed is kept."""
    (tmp_path / "jobs.py").write_text(JOBS)
    out, whole = tmp_path / "out" / "imatrix.gguf", tmp_path / "whole.gguf"
    out.parent.mkdir()
    name = embedded_model().name
    with monkeypatch.context() as patched:
        patched.setenv("PYTHONPATH", str(tmp_path))
        patched.setattr(module, "COLLECTOR", "jobs")
        with pytest.raises(NativeError, match=rf"calibrating {name} ended with signal SIGABRT.*MUL_MAT_ID") as caught:
            calibrate(embedded_model(), out, corpus=[TEXT], tokens=768, options=QUICK, save_seconds=0)
    assert "graph.cpp:7" in caught.value.log_tail
    assert "goes on from there" in str(caught.value.hint)
    assert list(out.parent.iterdir()) == [sums_path(out)]
    resumed = calibrate(embedded_model(), out, corpus=[TEXT], tokens=768, options=QUICK)
    assert resumed.resumed in (4, 6)  # the sums of a batch go to disk after its event
    calibrate(embedded_model(), whole, corpus=[TEXT], tokens=768, options=QUICK)
    assert out.read_bytes() == whole.read_bytes()


def with_vocabulary(path: Path, model: Path) -> Path:
    """The same tensors with the embedded model's tokenizer."""
    with open_model(model) as opened, open_model(embedded_model()) as other:
        metadata = {key: value for key, value in opened.metadata.items() if not key.startswith("tokenizer.")}
        metadata |= {key: value for key, value in other.metadata.items() if key.startswith("tokenizer.")}
        made = layout(metadata, list(opened.tensors.values()))
        data = bytearray(made.header.ljust(made.total_bytes, b"\0"))
        raw = model.read_bytes()
        for name, info in opened.tensors.items():
            data[made.offsets[name] : made.offsets[name] + info.nbytes] = raw[info.offset : info.offset + info.nbytes]
    path.write_bytes(data)
    return path


def test_nextn_block_is_missing_and_planned_without_importance(tmp_path: Path) -> None:
    """Plain decoding never runs the block that predicts further tokens: said, and it gets types that need none."""
    bare = write_random_gguf(tmp_path / "bare.gguf", "qwen35moe", vocab=10240)
    model = with_vocabulary(tmp_path / "model.gguf", bare)
    made = calibrate(model, tmp_path / "i.gguf", corpus=[TEXT], tokens=512, options=QUICK)
    with open_model(model) as opened:
        block = int(str(opened.get("qwen35moe.block_count"))) - 1
        experts = {f"blk.{block}.ffn_{part}_exps.weight" for part in ("up", "gate", "down")}
        assert {*experts, f"blk.{block}.nextn.eh_proj.weight", f"blk.{block}.attn_q.weight"} <= set(made.missing)
        assert all(name.startswith(f"blk.{block}.") for name in made.missing if name != "token_embd.weight")
        plain = plan(opened, "micro", imatrix=made.path)  # an edge layer: Q3_K, which needs no importance anyway
        cells = plan(opened, "micro", imatrix=made.path, options=PlanOptions(cell=["routed.edge=IQ2_XS"]))
        mix = plan(opened, "IQ1_M", imatrix=made.path)
    for decided in (plain, cells, mix):
        assert not [t.name for t in decided.tensors if t.name in made.missing and t.type.imatrix == "needed"]
        assert decided.missing_importance == ()
        assert not decided.needs_importance
    assert any("have no importance" in text and "blk.8." in text for text in plain.warnings)
    for decided in (cells, mix):
        moved = {t.name for t in decided.tensors if t.why.startswith("no importance")}
        assert experts <= moved <= set(made.missing)
        (warning,) = [text for text in decided.warnings if "calibration did not reach" in text]
        assert all(name in warning for name in moved)
