"""From a checkpoint's folder to verified files, report and a rehearsed upload, with the real converter; undisturbed,
and killed at ten moments.

Needs a Python with PyTorch and transformers: the one that APEX_CONVERT_PYTHON names (make test-slow makes one).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apex_quant import run
from apex_quant.pipeline.context import PhaseEvent
from apex_quant.pipeline.status import status
from tests.convert.tiny_checkpoint import write_checkpoint
from tests.helpers.cli import PACKAGE_ROOT
from tests.hub.mock import MockHub, serving
from tests.pipeline.conftest import TEXT, ran
from tests.pipeline.kills import killed_ten_times, numbers
from tests.pipeline.test_run import contents

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("APEX_CONVERT_PYTHON" not in os.environ, reason="APEX_CONVERT_PYTHON names no Python"),
]
TIERS = ["quality", "i-compact", "mini"]
SCRIPT = """
import json, sys
from apex_quant import run
run(sys.argv[1], **json.loads(sys.argv[2]))
"""


def options(work: Path) -> dict[str, Any]:
    """Everything small; the corpus lies beside WORK."""
    return {
        "work": str(work),
        "tiers": TIERS,
        "threads": 1,
        "convert": {"pre": "qwen35"},
        "reference": {"ctx": 64, "chunks": 1},
        "calibrate": {"tokens": 256, "ctx": 64, "corpus": [str(work.parent / "corpus.txt")]},
        "evaluate": {"only": ["ppl", "kld"]},
        "verify": {"generate": 16},
        "report": {"formats": ["html", "md"]},
        "publish": {"repo": "me/Apex-Tiny-MoE-APEX-GGUF"},
    }


@pytest.fixture(scope="module")
def server() -> Iterator[MockHub]:
    """A hub for every process of this module."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        patch.setattr(constants, "ENDPOINT", hub.url)
        yield hub


@pytest.fixture(scope="module")
def whole(server: MockHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with checkpoint, corpus and the `work` of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    write_checkpoint(folder / "Apex-Tiny-MoE", shards=2)
    (folder / "corpus.txt").write_text(TEXT)
    said: list[PhaseEvent] = []
    made = run(
        folder / "Apex-Tiny-MoE",
        **options(folder / "work"),
        progress=lambda e: said.append(e) if isinstance(e, PhaseEvent) else None,
    )
    assert [one.name for one in made.phases if not one.ran] == ["baselines"]
    assert any(event.phase == "convert" and event.text.startswith("deleted ") for event in said)
    return folder


def test_from_a_checkpoint_to_a_rehearsed_upload(server: MockHub, whole: Path) -> None:
    work = whole / "work"
    found = status(work)
    assert [(one.tier, one.verified, one.quarantined) for one in found.files] == [(tier, True, None) for tier in TIERS]
    assert all(one.kld is not None and one.ceiling is not None for one in found.files)
    assert (work / "release/README.md").is_file()
    assert (work / "release/report/index.html").is_file()
    published = json.loads((work / "state.json").read_text())["phases"]["publish"][""]["facts"]["published"]
    planned = {file["path"] for file in published["files"]}
    assert {"README.md", "report/index.html", *(one.path.name for one in found.files)} <= planned
    assert server.repos == {}
    assert not (work / "source/Apex-Tiny-MoE.gguf").exists()
    assert ran(run(whole / "Apex-Tiny-MoE", **options(work))) == {}
    assert {one.next for one in found.phases if one.name == "convert"} == {
        "unchanged; its file was deleted and nothing needs it"
    }


def test_ten_kills_on_the_way(server: MockHub, whole: Path, tmp_path: Path) -> None:
    """In the converter, in a worker, anywhere: what comes out is the same, and nothing that was finished is redone."""
    (tmp_path / "corpus.txt").symlink_to(whole / "corpus.txt")
    work = tmp_path / "work"
    source = str(whole / "Apex-Tiny-MoE")
    command = [sys.executable, "-c", SCRIPT, source, json.dumps(options(work))]
    known = killed_ten_times(command, work, dict(os.environ, PYTHONPATH=str(PACKAGE_ROOT)), longest=12.0)
    made = run(source, **options(work))
    assert not {(phase, item) for phase, items in ran(made).items() for item in items} & set(known)
    assert contents(work) == contents(whole / "work")
    assert numbers(work) == numbers(whole / "work")
    assert [(one.tier, one.verified) for one in made.files] == [(tier, True) for tier in TIERS]
    assert {path.name for path in made.report} == {path.name for path in status_report(whole / "work")}
    assert made.published is not None
    assert made.published["dry_run"]
    assert ran(run(source, **options(work))) == {}
    assert [path for path in work.rglob("*") if path.name.endswith((".partial", ".state", ".sums"))] == []


def status_report(work: Path) -> list[Path]:
    """The files of the report, as the state has them."""
    outputs = json.loads((work / "state.json").read_text())["phases"]["report"][""]["outputs"]
    return [work / file["path"] for files in outputs.values() for file in files]
