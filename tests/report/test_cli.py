"""`apex report`, `apex card`, `apex which`: documents, files, exit statuses, defaults of the functions."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from apex_quant.cli import main
from apex_quant.cli import report as commands
from apex_quant.report.card import card
from apex_quant.report.choose import CTX, choose, parse_ctx
from apex_quant.report.report import FORMATS, report
from tests.helpers.cli import Ran
from tests.report.results_folder import add, with_headers

Call = Callable[..., Ran]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*words: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Ran(caught.value.code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("results")
    with_headers(made)
    return made


def test_report(call: Call, folder: Path, tmp_path: Path) -> None:
    ran = call("report", folder, "-o", tmp_path / "r", "--format", "html,md,csv", "--json")
    assert ran.status == 0, ran.err
    document = ran.json
    assert set(document) == {"paths", "missing", "sentences", "caution"}
    assert set(document["paths"]) == {"html", "md", "csv"}
    assert all(Path(path).is_file() for path in document["paths"].values())
    rows = Path(document["paths"]["csv"]).read_text().splitlines()
    assert rows[0].startswith("file,label,family,bytes,bpw,quantity,unit,value")
    assert any(row.startswith("tiny-large.gguf,large,") and ",kld,nats," in row for row in rows)
    assert "writing index.html" in ran.err
    shown = call("report", folder, "-o", tmp_path / "r", "--format", "md")
    assert (shown.status, "report.md" in shown.out) == (0, True)
    assert "no file was shown to be better" in shown.out


def test_claims_and_gaps_are_shown(call: Call, tmp_path: Path) -> None:
    for seed, scale in enumerate((0.5, 1.0)):
        add(tmp_path, f"m-{'ab'[seed]}", scale=scale, seed=seed)
    (tmp_path / "cut.json").write_text("{")
    shown = call("report", tmp_path, "-o", tmp_path / "r", "--format", "csv").out
    assert re.search(r"^a has lower mean KLD than b by ", shown, re.M)
    assert re.search(r"^missing: .*cut\.json", shown, re.M)
    assert "about 5 % of them exclude zero all the same" in shown


def test_card(call: Call, folder: Path, tmp_path: Path) -> None:
    ran = call("card", folder, "-o", tmp_path / "README.md", "--repo", "me/m", "--json")
    assert ran.json == {"path": str(tmp_path / "README.md"), "bytes": (tmp_path / "README.md").stat().st_size}
    assert "-hf me/m -hff tiny-" in (tmp_path / "README.md").read_text()


def test_which(call: Call, folder: Path) -> None:
    document = call("which", folder, "--vram", "16GB", "--ctx", "32k", "--json").json
    assert document["best"]["label"] == "large"
    assert (document["vram"], document["ctx"]) == (16 * 10**9, 32768)
    assert document == json.loads(json.dumps(choose(folder, vram=16 * 10**9).to_json()))
    shown = call("which", folder, "--vram", "16GiB")
    assert document["sentence"] in shown.out
    assert re.search(r"^large +[\d.]+ MB .* yes", shown.out, re.M)
    nothing = call("which", folder, "--vram", "1k")
    assert nothing.status == 0
    assert "no measured file fits" in nothing.out


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["report", "none"], 3, "no such file"),
        (["report", "DIR", "--format", "pdf"], 2, "no format is called 'pdf'"),
        (["report", "DIR", "--format", ","], 2, "no format to write"),
        (["report", "DIR", "--family", "x"], 2, "NAME=GLOB"),
        (["report", "DIR", "--reference", "nobody"], 2, "nobody"),
        (["card", "none"], 3, "none: no such file or folder"),
        (["card", "DIR", "--repo", "x"], 2, "ORG/NAME"),
        (["card", "DIR", "--ctx", "many"], 2, "not a context"),
        (["which", "DIR", "--vram", "much"], 2, "not a size"),
        (["which", "DIR", "--vram", "0"], 2, "memory and context are at least 1"),
        (["which", "DIR", "--type-k", "q9"], 2, "no cache type"),
        (["which", "none"], 3, "no such file"),
    ],
)
def test_errors(call: Call, folder: Path, tmp_path: Path, words: list[str], status: int, says: str) -> None:
    named = {"DIR": str(folder), "none": str(tmp_path / "none")}
    ran = call(*(named.get(word, word) for word in words), *(["-o", tmp_path / "o"] if words[0] != "which" else []))
    if words[:2] == ["card", "none"]:
        ran = call("card", tmp_path / "none")
    assert (ran.status, ran.out) == (status, "")
    line = next(line for line in ran.err.splitlines() if line.startswith("error: "))
    assert says in line
    assert not (tmp_path / "o").exists()


def test_defaults_are_those_of_the_functions() -> None:
    for command, function in ((commands.report, report), (commands.card, card), (commands.which, choose)):
        options = inspect.signature(command).parameters
        for name, parameter in inspect.signature(function).parameters.items():
            if name not in options or parameter.default is inspect.Parameter.empty:
                continue
            default = options[name].default
            if name == "ctx" and default is not None:
                assert parse_ctx(default) == CTX == parameter.default
            elif name == "formats":
                assert tuple(default.split(",")) == FORMATS == parameter.default
            else:
                assert (default or None) == (parameter.default or None) or str(default) == parameter.default, name


def test_importing_needs_no_library() -> None:
    """Report, card and which work where llama_cpp is not installed."""
    import subprocess
    import sys

    from tests.helpers.cli import PACKAGE_ROOT

    code = (
        "import sys; sys.modules['llama_cpp'] = None; import apex_quant.report.report, apex_quant.report.card, "
        "apex_quant.cli.report; print([m for m in ('matplotlib', 'scipy', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE_ROOT)
    assert done.stdout.strip() == "[]"
