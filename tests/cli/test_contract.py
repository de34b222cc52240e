"""What scripts rely on: one JSON document on standard output, exit statuses, error and hint lines, quiet pipes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main

from apex_quant import __version__, verify
from apex_quant.cli.app import app, parse_size
from apex_quant.errors import NativeError, UsageError
from apex_quant.recipe.planned import PlanOptions
from apex_quant.recipe.tiers import published_tiers
from tests.cli.conftest import Call
from tests.helpers.cli import PACKAGE_ROOT, Ran, apex

COMMANDS = [
    "quickstart", "doctor", "tiers", "inspect", "plan", "calibrate", "measure", "optimize", "frontier", "quantize",
    "verify", "diff", "split", "merge", "eval", "reference", "compare", "results", "report", "card", "which", "fit",
    "kv", "serve", "export", "chat", "convert", "convert-mlx", "publish", "run", "status",
]  # fmt: skip

PLAN_KEYS = {"model", "tier", "total_bytes", "bpw", "tensors", "warnings"}
TENSOR_KEYS = {"name", "role", "layer", "shape", "type", "bytes", "fallback_from"}
OUTPUT_KEYS = {"tier", "path", "bytes", "bpw", "sha256", "seconds"}


def document(result: Ran) -> Any:
    """The one JSON document of a successful command, strict JSON."""
    assert result.status == 0, result.err
    assert "Traceback" not in result.err

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    return json.loads(result.out, parse_constant=refuse)


def test_the_commands() -> None:
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)  # type: ignore[union-attr]


# --- documents ---


def test_tiers(call: Call) -> None:
    rows = document(call("tiers", "--json"))["tiers"]
    assert [row["name"] for row in rows] == [tier.name for tier in published_tiers()]
    assert {row["name"] for row in rows if not row["needs_imatrix"]} == {"quality", "balanced", "compact"}


def test_inspect(call: Call, model: Path) -> None:
    found = document(call("inspect", model, "--tensors", "--stats", "--json"))
    assert {
        "architecture",
        "parameters",
        "active_parameters",
        "experts",
        "layers",
        "roles",
        "types",
        "bpw",
        "metadata",
    } <= set(found)
    assert {"name", "role", "layer", "shape", "type", "bytes"} <= set(found["tensors"][0])
    assert found["statistics"]["roles"]


def test_plan(call: Call, model: Path) -> None:
    found = document(call("plan", model, "--tier", "micro", "--json"))
    assert set(found) >= PLAN_KEYS
    assert all(set(row) >= TENSOR_KEYS for row in found["tensors"])
    assert found["warnings"] == []
    several = document(call("plan", model, "--tier", "quality,compact", "--tier", "Q4_0", "--json"))["plans"]
    assert [one["tier"] for one in several] == ["quality", "compact", "Q4_0"]
    size = several[1]["total_bytes"]
    fit = document(call("plan", model, "--fit", size, "--json"))
    assert fit["limit"] == size
    assert {row["tier"]: row["fits"] for row in fit["plans"]}["compact"] is True
    assert {row["tier"]: row["fits"] for row in fit["plans"]}["quality"] is False
    assert len(fit["plans"]) == 9


def test_quantize_verify_and_the_rest(call: Call, model: Path, matrix: Path, tmp_path: Path) -> None:
    found = document(call("quantize", model, "--tier", "i-compact,Q8_0", "--imatrix", matrix, "-o", tmp_path, "--json"))
    assert all(set(row) >= OUTPUT_KEYS for row in found["outputs"])
    assert [row["tier"] for row in found["outputs"]] == ["i-compact", "Q8_0"]
    path = Path(found["outputs"][0]["path"])
    assert path == tmp_path / "tiny-APEX-I-Compact.gguf"
    assert path.stat().st_size == found["outputs"][0]["bytes"]
    assert found["job"]["rows_encoded"] > 0
    planned = document(call("plan", model, "--tier", "i-compact", "--imatrix", matrix, "--json"))
    assert planned["total_bytes"] == found["outputs"][0]["bytes"]

    checked = document(call("verify", path, "--source", model, "--imatrix", matrix, "--json"))
    assert checked["ok"] is True
    assert {"name", "ok", "detail"} == set(checked["checks"][0])
    other = document(call("diff", path, model, "--values", "--json"))
    assert {"a", "b", "metadata", "tensors", "tensors_equal"} <= set(other)
    shards = document(call("split", path, "-o", tmp_path / "s", "--split-max-size", "300K", "--json"))["outputs"]
    assert [row["bytes"] for row in shards] == [Path(row["path"]).stat().st_size for row in shards]
    (merged,) = document(call("merge", shards[1]["path"], "-o", tmp_path / "m.gguf", "--json"))["outputs"]
    assert merged["path"] == str(tmp_path / "m.gguf")

    dry = document(call("quantize", model, "--tier", "quality", "--dry-run", "--json"))
    assert dry["outputs"] == []
    assert set(dry["plans"][0]) >= PLAN_KEYS
    again = document(call("quantize", model, "--tier", "Q8_0", "--imatrix", matrix, "-o", tmp_path, "--json"))
    assert again["outputs"][0]["unchanged"] is True


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_quickstart(whole: bool, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, which takes a minute or two, and with less text and fewer tiers."""
    tiers, tokens = published_tiers(), 8192
    if not whole:
        tiers, tokens = tuple(tier for tier in tiers if tier.name in ("quality", "i-quality")), 1024
        monkeypatch.setattr("apex_quant.cli.quickstart.TOKENS", tokens)
        monkeypatch.setattr("apex_quant.cli.quickstart.CHUNKS", 1)
        monkeypatch.setattr("apex_quant.cli.quickstart.published_tiers", lambda: tiers)
    made = document(result := call("quickstart", tmp_path / "q", "--json"))
    assert [row["tier"] for row in made["outputs"]] == [tier.name for tier in tiers]
    assert made["imatrix"]["chunks"] == tokens // 512
    assert "5. Verify" in result.err
    for row in made["outputs"]:
        mean = row["metrics"]["kld"]["mean"]
        assert 0 < mean["value"] < 1
        assert (mean["low"] is None) != whole  # five chunks are too few for an interval
    text = call("quickstart", tmp_path / "q")
    assert text.status == 0
    assert text.out.rstrip().splitlines()[-1].strip().startswith("apex eval ")
    assert "APEX-I-Quality" in text.out


def test_recipe_files(call: Call, model: Path, tmp_path: Path) -> None:
    """A plan's recipe is a recipe: of either form, and of the file made with it."""
    wanted = document(call("plan", model, "--tier", "compact", "--json"))
    for name in ("r.txt", "r.json"):
        result = call("plan", model, "--tier", "compact", "-o", tmp_path / name)
        assert result.status == 0
        assert f"recipe written to {tmp_path / name}" in result.out
        found = document(call("plan", model, "--recipe", tmp_path / name, "--tier", "compact", "--json"))
        assert [t["type"] for t in found["tensors"]] == [t["type"] for t in wanted["tensors"]]
    assert call("plan", model, "--tier", "compact,quality", "-o", tmp_path / "r.txt").status == 2
    assert call("plan", model, "--tier", "compact", "-o", tmp_path).status == 2


# --- exit statuses and errors ---


@pytest.mark.parametrize(
    ("words", "status", "error", "hint"),
    [
        (["quantise"], 2, "No such command 'quantise'.*quantize", "--help"),
        (["plan"], 2, "MODEL", "--help"),
        (["plan", "MODEL", "--teir", "x"], 2, "--teir.*--tier", "--help"),
        (["plan", "MODEL", "--tier", "qualty"], 2, "'qualty'.*Did you mean quality", "apex tiers"),
        (["plan", "MODEL", "--tier", ""], 2, "no tier", None),
        (["plan", "MODEL"], 2, "nothing says which types", "--tier"),
        (["plan", "MODEL", "--fit", "16Gib!"], 2, "'16Gib!' is not a size", None),
        (["plan", "MODEL", "--fit", "-1"], 2, "not a size", None),
        (["plan", "MODEL", "--tier", "quality", "--cell", "routed.midle=Q4_K"], 2, "midle", None),
        (["plan", "MODEL", "--tier", "quality", "--override", "x"], 2, "PATTERN=TYPE", None),
        (["plan", "MODEL", "--tier", "quality", "--override", "x=Q4_J"], 2, "'Q4_J'.*Did you mean Q4_", None),
        (["plan", "MODEL", "--tier", "quality", "--override", "(=Q4_K"], 2, r"\(", None),
        (["plan", "MODEL", "--tier", "quality", "--override-kv", "x=1"], 2, "KEY=", None),
        (["plan", "MODEL", "--tier", "quality", "--prune-layers", "a"], 2, "--prune-layers 'a'", None),
        (["plan", "MODEL", "--tier", "quality", "--prune-layers", "9"], 2, "no layer 9", None),
        (["plan", "MODEL", "--tier", "quality", "--keep-split", "--split-max-size", "1G"], 2, "exclude", None),
        (["plan", "MODEL", "--tier", "quality", "--output-tensor-type", "Q9"], 2, "'Q9'", None),
        (["quantize", "MODEL", "--tier", "Q8_0", "-j", "0"], 2, "'--threads'.*greater than or equal to 1", None),
        (["quantize", "MODEL", "--tier", "i-quality"], 2, "importance matrix", "--imatrix"),
        (["quantize", "MODEL", "--tier", "micro"], 2, "importance matrix", "--imatrix"),
        (["quantize", "MODEL", "--tier", "Q8_0", "-o", "MODEL", "--force"], 2, "is what is read", "-o"),
        (["verify", "MODEL", "--all"], 2, "--source", None),
        (["plan", "nowhere.gguf", "--tier", "quality"], 3, "nowhere.gguf: cannot be opened: No such file", None),
        (["plan", "MODEL", "--tier", "nowhere.toml"], 3, "nowhere.toml", None),
        (["plan", "MODEL", "--tier", "quality", "--recipe", "nowhere.txt"], 3, "nowhere.txt", None),
        (["plan", "MODEL", "--tier", "quality", "--imatrix", "MODEL"], 3, "", None),
        (["plan", "MODEL", "--like", "nowhere.gguf"], 3, "nowhere.gguf", None),
        (["inspect", "."], 3, "is a folder: name a file in it", None),
        (["split", "MODEL", "-o", "/nowhere/x", "--split-max-size", "1G"], 4, "/nowhere", "folder"),
    ],
)  # fmt: skip
def test_errors(call: Call, model: Path, words: list[str], status: int, error: str, hint: str | None) -> None:
    result = call(*(str(model) if word == "MODEL" else word for word in words))
    assert (result.status, result.out) == (status, ""), result.err
    lines = result.err.splitlines()
    assert lines[0].startswith("error: ")
    assert re.search(error, lines[0]), lines[0]
    assert len(lines) <= 2
    assert all(line.startswith("hint: ") for line in lines[1:])
    if hint is not None:
        assert hint in lines[1]


@pytest.mark.parametrize(
    ("raised", "status", "says"),
    [
        (RuntimeError("boom\n\x1b[31m"), 5, "error: internal failure: RuntimeError: boom\\x0a\\x1b[31m"),
        (MemoryError(), 4, "error: out of memory"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (RecursionError(), 5, "error: internal failure: RecursionError: "),
    ],
)
def test_unforeseen(call: Call, monkeypatch: pytest.MonkeyPatch, raised: BaseException, status: int, says: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("apex_quant.doctor.doctor", fail)
    result = call("doctor")
    assert (result.status, result.out) == (status, "")
    assert result.err.splitlines()[0] == says.rstrip() or result.err.splitlines()[0] == says
    assert result.err.splitlines()[1].startswith("hint: ")
    assert "Traceback" not in result.err
    if status == 5:
        assert "Traceback" in call("doctor", "--debug").err


def test_debug(call: Call, tmp_path: Path) -> None:
    """Anywhere on the line; the error line comes last all the same."""
    for words in (["--debug", "inspect", tmp_path], ["inspect", tmp_path, "--debug"]):
        result = call(*words)
        assert result.status == 3
        assert "Traceback" in result.err
        assert "GGUFError" in result.err
        assert result.err.splitlines()[-1].startswith("error: ")


def test_debug_prints_the_log_of_the_library(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise NativeError("it died", log_tail="first line\n\x1b[31msecond", hint="go on")

    monkeypatch.setattr("apex_quant.doctor.doctor", fail)
    assert call("doctor") == Ran(5, "", "error: it died\nhint: go on\n")
    lines = call("doctor", "--debug").err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-4:] == ["first line", "\\x1b[31msecond", "error: it died", "hint: go on"]


def test_no_library(call: Call, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", "/elsewhere")
    result = call("quantize", model, "--tier", "Q8_0", "-o", tmp_path)
    assert result.status == 4
    assert "LLAMA_CPP_LIB_PATH" in result.err
    assert not list(tmp_path.iterdir())


# --- help ---


def test_no_arguments(call: Call) -> None:
    result = call()
    assert result.status == 2
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", result.out, re.MULTILINE)
    assert call("--help").out.strip().splitlines()[0] == result.out.strip().splitlines()[0]
    assert call("--help").status == 0


def test_version(call: Call) -> None:
    assert call("--version") == Ran(0, f"apex {__version__}\n", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of(name: str, call: Call) -> None:
    """Every option and argument has its line and a text."""
    result = call(name, "--help")
    assert (result.status, result.err) == (0, "")
    group: Any = typer.main.get_command(app)
    for parameter in group.commands[name].params:
        if parameter.name == "help":
            continue
        assert parameter.help, f"{name} {parameter.name} has no help"
        shown = parameter.opts[-1] if parameter.param_type_name == "option" else parameter.metavar
        assert re.search(rf"^  .*{re.escape(shown)}\b", result.out.replace("[", "").replace("]", ""), re.MULTILINE) or (
            shown.strip("[]") in result.out
        )


@pytest.mark.parametrize("name", ["plan", "quantize"])
def test_every_plan_option_has_a_flag(name: str) -> None:
    group: Any = typer.main.get_command(app)
    parameters = {parameter.name: parameter for parameter in group.commands[name].params}
    for field in fields(PlanOptions):
        assert field.name in parameters
        default = parameters[field.name].default
        assert default == field.default or not (default or field.default), f"{field.name} has the default {default!r}"


def test_sizes() -> None:
    wanted = {
        "16GiB": 16 << 30, "48G": 48 * 10**9, "500M": 5 * 10**8, "1234": 1234, "1.5k": 1500, " 2 TB ": 2 * 10**12,
        "3gib": 3 << 30, "7B": 7, "1KiB": 1024,
    }  # fmt: skip
    assert {text: parse_size(text) for text in wanted} == wanted
    for bad in ("", "G", "0", "-1", "1e5", "1X", "1.2.3", "nan", "9" * 30, "１G", "0x10", "1 G iB"):
        with pytest.raises(UsageError, match="is not a size"):
            parse_size(bad)


# --- streams ---


def test_broken_pipe(model: Path) -> None:
    """... | head -1: no complaint, no traceback."""
    command = f"{sys.executable} -m apex_quant inspect {model} --tensors"
    env = dict(os.environ, PYTHONPATH=str(PACKAGE_ROOT))
    for unbuffered in ("", "1"):
        done = subprocess.run(
            ["bash", "-c", f"{command} | head -1; echo ${{PIPESTATUS[0]}}"],
            capture_output=True, text=True, check=True, env=env | {"PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
        assert done.stderr == ""
        assert done.stdout.splitlines()[-1] == "0"


def test_closed_streams(model: Path, tmp_path: Path) -> None:
    """Started with closed streams, whose numbers the outputs must not get."""
    env = dict(os.environ, PYTHONPATH=str(PACKAGE_ROOT))
    command = f"{sys.executable} -m apex_quant quantize {model} --tier Q8_0 -o {tmp_path}"
    for closed in (">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"):
        done = subprocess.run(["bash", "-c", f"{command} {closed}"], capture_output=True, check=False, env=env)
        assert (done.returncode, done.stderr) == (0, b""), closed
        (made,) = tmp_path.glob("*.gguf")
        assert verify(made).ok
        made.unlink()
    failing = f"{sys.executable} -m apex_quant inspect {tmp_path}"
    for closed in ("2>&-", "2>/dev/full"):
        assert subprocess.run(["bash", "-c", f"{failing} {closed}"], check=False, env=env).returncode == 3


def test_full_output(model: Path) -> None:
    """A standard output that cannot be written is an error."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m apex_quant inspect {model} > /dev/full"],
        capture_output=True, text=True, check=False, env=dict(os.environ, PYTHONPATH=str(PACKAGE_ROOT)),
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "error: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_colour_outside_a_terminal(model: Path, tmp_path: Path) -> None:
    for words in (["tiers"], ["plan", model, "--tier", "micro"], ["inspect", model], ["doctor"]):
        result = apex(*words, TERM="xterm-256color")
        assert result.status == 0
        assert "\x1b" not in result.out + result.err
    result = apex("quantize", model, "--tier", "Q8_0", "-o", tmp_path, TERM="xterm-256color")
    assert "\x1b" not in result.out + result.err


def test_lines_are_whole_in_a_pipe(call: Call, model: Path) -> None:
    """Nothing is cut or wrapped at 80 columns when nobody looks."""
    rows = [
        line for line in call("inspect", model, "--tensors").out.splitlines() if line.startswith("blk.1.ffn_down_exps")
    ]
    assert len(rows) == 1
    assert "256 x 256 x 3" in rows[0]


def test_names_that_are_no_text(call: Call, model: Path, tmp_path: Path) -> None:
    """File names may hold any bytes: shown escaped, in JSON kept."""
    odd = tmp_path / os.fsdecode(b"m\xff\n\x1b[31m.gguf")
    odd.hardlink_to(model)
    for words in (["inspect", odd], ["verify", odd], ["plan", odd, "--tier", "Q8_0"], ["diff", odd, model]):
        result = call(*words)
        assert result.status == 0, result.err
        assert "\x1b" not in result.out + result.err
        assert document(call(*words, "--json")) is not None
    folder = tmp_path / os.fsdecode(b"\xfe\x1b[2J")
    result = call("quantize", odd, "--tier", "Q8_0", "-o", folder)
    assert result.status == 0, result.err
    assert "\x1b" not in result.out + result.err
    assert len(list(folder.glob("*.gguf"))) == 1
    result = apex("inspect", str(folder / "none.gguf"))
    assert result.status == 3
    assert "\x1b" not in result.err


def test_plain_progress_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Outside a terminal now and then a line, on standard error."""
    from apex_quant.cli import progress
    from apex_quant.encode.job import JobProgress

    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    with progress.JobBar("quantizing \x1bm") as bar:
        bar(JobProgress("encode", 0.0, 2.0, 0, 100, "a"))
        bar(JobProgress("encode", 1.0, 2.0, 50, 100, "[red]"))
    with progress.JobBar("quiet", quiet=True) as bar:
        bar(JobProgress("encode", 1.0, 2.0, 50, 100, "b"))
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"quantizing \\x1bm \(encode\): 50%, .* MB/s, ETA \d+ s, \[red\]", lines[1])


def test_public_functions() -> None:
    """What the commands do can be called: the same names, loaded on first use."""
    import apex_quant

    for name in ("quantize", "plan", "verify", "diff", "inspect", "split", "merge", "open_model"):
        assert callable(getattr(apex_quant, name))
        assert name in dir(apex_quant)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = apex_quant.nothing
