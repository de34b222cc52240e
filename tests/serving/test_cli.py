"""The commands: documents, tables, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from apex_quant import embedded_model
from apex_quant.cli import main
from tests.helpers.cli import PACKAGE_ROOT
from tests.serving.standin import standin

MODEL = str(embedded_model())


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, captured.out, captured.err


def test_fit(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "fit", MODEL, "--vram", "2GiB", "--ctx", 2048, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["choice"]["placement"]["gpu_layers"] == 13
    assert {"options", "reason", "compute", "warnings", "joint"} <= set(found)
    status, out, _ = call(capsys, "fit", MODEL, "--vram", "0", "--ram", "1GB", "--ctx", 2048)
    assert status == 0
    assert "apex-tiny-moe" in out
    assert "llama-server -m" in out
    status, out, _ = call(capsys, "fit", MODEL, "--vram", "2GiB", "--ctx", "2k", "--json")
    assert json.loads(out)["choice"] == found["choice"]
    status, _, err = call(capsys, "fit", MODEL, "--vram", "2GiB", "--ctx", "0")
    assert (status, err.splitlines()[0]) == (2, "error: '0' is not a context; write 32k or 40000")
    assert call(capsys, "fit", MODEL, "--vram", "lots")[0] == 2
    assert call(capsys, "fit", __file__, "--vram", "1GB")[0] == 3


def test_export(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = call(capsys, "export", "ollama", MODEL, "-o", tmp_path, "--json")
    assert status == 0
    assert json.loads(out)["paths"] == [str(tmp_path / "Modelfile")]
    status, _, err = call(capsys, "export", "ollama", MODEL, "-o", tmp_path)
    assert status == 2
    assert "--force" in err
    assert call(capsys, "export", "nowhere", MODEL)[0] == 2
    assert call(capsys, "export", "ollama", MODEL, "-o", tmp_path, "--ctx", "1k", "--force")[0] == 0
    assert "PARAMETER num_ctx 1024" in (tmp_path / "Modelfile").read_text()
    for out_ in (tmp_path / "Modelfile", tmp_path / "Modelfile" / "inner"):
        status, _, err = call(capsys, "export", "ollama", MODEL, "-o", out_)
        assert status == 2
        assert "is a file, not a folder" in err


def test_refusals(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = call(capsys, "serve", MODEL, "--host", "0.0.0.0")
    assert status == 2
    assert "no key" in err
    assert call(capsys, "chat", MODEL, "--json")[0] == 2
    assert call(capsys, "serve", tmp_path, "--server", standin(tmp_path / "bin"))[0] == 3
    status, _, err = call(capsys, "run", "--phase", "nonsense")
    assert status == 2
    assert err.startswith("error: Invalid value for '--phase': 'nonsense' is not one of 'source'")


@contextmanager
def served(program: Path) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """`apex serve` as a process of its own, and what it printed once its server answered."""
    words = [sys.executable, "-m", "apex_quant", "serve", MODEL, "--port", "0", "--server", str(program), "--json"]
    env = {**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        lines: list[str] = []
        while not lines or not lines[-1].startswith("}"):
            line = process.stdout.readline()
            assert line, process.communicate()
            lines.append(line)
        yield process, json.loads("".join(lines))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_serve_until_it_is_told_to_stop(number: signal.Signals, tmp_path: Path) -> None:
    with served(standin(tmp_path)) as (process, found):
        assert found["plan"]["backend"] == "llama-server"
        health = found["url"].removesuffix("/v1") + "/health"
        with urllib.request.urlopen(health, timeout=30) as response:
            assert response.status == 200
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopping" in err
    with pytest.raises(OSError):
        urllib.request.urlopen(health, timeout=5)


def test_serve_reports_a_killed_backend(tmp_path: Path) -> None:
    with served(standin(tmp_path)) as (process, _):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "error: llama-server ended with status 137" in err


def test_serve_is_told_to_stop_before_it_serves(tmp_path: Path) -> None:
    """The plan is shown by then, and no finished work is spoken of."""
    program = standin(tmp_path)
    (tmp_path / "never").touch()
    words = [sys.executable, "-m", "apex_quant", "serve", MODEL, "--port", "0", "--server", str(program)]
    env = {**os.environ, "PYTHONPATH": str(PACKAGE_ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        assert "llama-server at" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "error: stopped before it served"


@pytest.mark.parametrize("utf8", ["0", "1"])
def test_chat_with_bytes_that_are_no_text(utf8: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "apex_quant", "chat", MODEL, "--server", str(standin(tmp_path))], input=b"\xff\xfe\n",
        capture_output=True, check=False, env={**os.environ, "PYTHONPATH": str(PACKAGE_ROOT), "PYTHONUTF8": utf8,
             "PYTHONIOENCODING": "utf-8:strict" if utf8 == "0" else ""},
    )  # fmt: skip
    assert done.returncode == 3
    assert b"error: what was typed is not UTF-8" in done.stderr


def test_chat_with_a_pipe(tmp_path: Path) -> None:
    """No prompt where nobody types; loading is spoken of when the file and the options were looked at."""

    def chat(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "apex_quant", "chat", *map(str, words), "--server", str(standin(tmp_path))]
        env = {**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)}
        return subprocess.run(command, input="/help", capture_output=True, check=False, env=env, text=True)

    done = chat(MODEL)
    assert (done.returncode, done.stderr) == (0, f"loading {Path(MODEL).name}\n")
    assert ">" not in done.stdout
    assert done.stdout.endswith("ends\n")
    for words, status in (((MODEL, "-m", " "), 2), ((MODEL, "--ctx", "many"), 2), ((tmp_path / "none.gguf",), 3)):
        done = chat(*words)
        assert (done.returncode, done.stdout) == (status, "")
        assert done.stderr.startswith("error: ")


@pytest.mark.slow
def test_chat_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    status, out, _ = call(capsys, "chat", MODEL, "-m", "Hello", "--max-tokens", 5, "-j", 1, "--json")
    assert status == 0
    assert json.loads(out)["texts"][0]
    status, out, _ = call(capsys, "chat", MODEL, "--vs", MODEL, "-m", "Hello", "--max-tokens", 5, "-j", 1)
    assert status == 0
    assert "the same answer" in out
