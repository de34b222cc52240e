"""Every failure at the top of docs/errors.md, made to happen to `apex run`: its status, one line, no traceback."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from apex_quant.pipeline.state import exclusive
from tests.cli.conftest import Call, call  # noqa: F401 -- fixtures
from tests.convert.tiny_checkpoint import write_checkpoint
from tests.helpers.cli import Ran, apex
from tests.hub.conftest import hub, waits  # noqa: F401 -- fixtures
from tests.hub.mock import Fault, MockHub, Repo
from tests.pipeline.conftest import TEXT, write_small
from tests.pipeline.test_errors_doc import DOCUMENT, fits, pieces
from tests.pipeline.test_hub_run import CHECKPOINT

SMALL = (
    "--tiers", "quality", "-j", "1", "--set", "reference.ctx=64", "--set", "reference.chunks=1",
    "--set", "evaluate.only=[ppl,kld]", "--set", "verify.generate=8", "--skip", "report",
)  # fmt: skip


@dataclass
class World:
    """What a failure is made of: the command in this process, the hub, an empty folder and a small model."""

    call: Call
    hub: MockHub
    folder: Path
    model: Path
    patch: pytest.MonkeyPatch

    def run(self, *words: str | Path) -> Ran:
        return self.call("run", *words, "--work", self.folder / "work")

    def small(self, *words: str | Path) -> Ran:
        return self.run(self.model, *SMALL, *words)

    def sabotaged(self, **sabotage: Any) -> Ran:
        """In a process of its own."""
        given = {"folder": str(self.folder), "whom": ["self"], **sabotage}
        return apex("run", self.model, *SMALL, "--work", self.folder / "work", sabotage=given)

    def hub_source(self, *words: str, **repo: Any) -> Ran:
        self.hub.repos["org/Tiny"] = Repo(files=dict(CHECKPOINT), **repo)
        return self.run("org/Tiny", "--only", "source", *words)

    def converter(self, script: str) -> None:
        """A llama.cpp with this script and one architecture, and a Python that has all it needs."""
        files = {
            "convert_hf_to_gguf.py": script,
            "gguf-py/gguf/__init__.py": "",
            "conversion/__init__.py": 'TEXT_MODEL_MAP: dict[str, str] = {"LlamaForCausalLM": "llama"}',
        }
        for name, text in files.items():
            path = self.folder / "llama.cpp" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.patch.setenv("LLAMA_CPP_DIR", str(self.folder / "llama.cpp"))
        self.patch.setattr("apex_quant.converter_python.NEEDS", {"sys": "sys"})


def no_network(world: World) -> Ran:
    nobody = "http://127.0.0.1:9"
    world.patch.setattr(constants, "ENDPOINT", nobody)
    template = nobody + "/{repo_id}/resolve/{revision}/{filename}"
    world.patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return world.hub_source()


def no_token(world: World) -> Ran:
    world.hub.faults.append(Fault("GET /api/models", status=403, times=99))
    return world.hub_source()


def gated(world: World) -> Ran:
    return world.hub_source(gated=True)


def corrupted_download(world: World) -> Ran:
    world.hub.corrupt["model.safetensors"] = 9
    return world.hub_source()


def disk_full_before(world: World) -> Ran:
    usage = shutil.disk_usage(world.folder)
    world.patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    return world.small()


def disk_full_while_writing(world: World) -> Ran:
    return world.sabotaged(where="nobody", fsize=100_000)


def unknown_architecture(world: World) -> Ran:
    world.converter("")
    return world.run(write_checkpoint(world.folder / "hf"), "--tiers", "quality")


def converter_failure(world: World) -> Ran:
    world.converter("raise SystemExit('this converter gives up')")
    source = write_checkpoint(world.folder / "hf")
    config = source / "config.json"
    config.write_text(
        re.sub(r"Qwen\w+ForCausalLM|Qwen\w+ForConditionalGeneration", "LlamaForCausalLM", config.read_text())
    )
    return world.run(source, "--tiers", "quality")


def killed_worker(world: World) -> Ran:
    return world.sabotaged(where="child", at=3)


def bad_configuration(world: World) -> Ran:
    (world.folder / "run.yaml").write_text("source: x.gguf\nevaluate: {suit: all}\n")
    return world.run(world.folder / "run.yaml")


def busy_folder(world: World) -> Ran:
    with exclusive(world.folder / "work"):
        return world.small()


def quarantined_file(world: World) -> Ran:
    return world.small("--set", "verify.kld_ceiling={quality: 0.000001}")


# by the first column of the table
FAILURES: dict[str, Callable[[World], Ran]] = {
    "no network": no_network,
    "no token": no_token,
    "gated repository": gated,
    "corrupted download": corrupted_download,
    "disk full, seen before": disk_full_before,
    "disk full, met while writing": disk_full_while_writing,
    "unknown architecture": unknown_architecture,
    "converter failure": converter_failure,
    "killed worker": killed_worker,
    "bad configuration": bad_configuration,
    "busy folder": busy_folder,
    "quarantined file": quarantined_file,
}


def documented() -> dict[str, tuple[int, str]]:
    """Status and message by the first column of 'What goes wrong most'."""
    table = DOCUMENT.read_text().partition("## What goes wrong most")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (\d+) \| \[`(.+?)`\]", table, re.MULTILINE)
    return {what: (int(status), message) for what, status, message in rows}


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("small"))


@pytest.fixture
def world(
    call: Call,  # noqa: F811
    hub: MockHub,  # noqa: F811
    waits: list[float],  # noqa: F811
    tmp_path: Path,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    (tmp_path / "corpus.txt").write_text(TEXT)
    return World(call, hub, tmp_path, small_model, monkeypatch)


@pytest.mark.parametrize("what", FAILURES)
def test_failure(world: World, what: str) -> None:
    status, message = documented()[what]
    done = FAILURES[what](world)
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert (done.status, len(errors)) == (status, 1), done.err
    assert fits(pieces(message), errors[0]), (message, errors[0])
    assert "Traceback" not in done.err + done.out


def test_all_of_them() -> None:
    assert set(FAILURES) == set(documented())


@pytest.mark.parametrize(
    ("number", "status", "says"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("at", [12, 45])
def test_a_signal(world: World, number: int, status: int, says: str, at: int) -> None:
    """The same line for both, and what was finished is found by the next run."""
    done = world.sabotaged(where="parent", at=at, signal=number)
    assert (done.status, done.err.splitlines()[-2]) == (status, f"error: {says}"), done.err
    assert "Traceback" not in done.err
    finished = {line.split()[0] for line in done.err.splitlines() if re.match(r"\w+ +done in", line)}
    again = world.small()
    assert again.status == 0, again.err
    skipped = {line.split()[0] for line in again.err.splitlines() if "skipped: unchanged" in line}
    assert finished <= skipped
