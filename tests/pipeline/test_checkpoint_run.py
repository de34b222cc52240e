"""From a checkpoint's folder to verified files, report and a rehearsed upload, with the real converter.

Needs a Python with PyTorch and transformers: the one that APEX_CONVERT_PYTHON names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from apex_quant import run
from apex_quant.pipeline.context import PhaseEvent
from apex_quant.pipeline.status import status
from tests.convert.tiny_checkpoint import write_checkpoint
from tests.hub.conftest import hub, token, waits  # noqa: F401 -- fixtures
from tests.hub.mock import MockHub
from tests.pipeline.conftest import TEXT, ran


@pytest.mark.slow
@pytest.mark.skipif("APEX_CONVERT_PYTHON" not in os.environ, reason="APEX_CONVERT_PYTHON names no Python")
@pytest.mark.usefixtures("waits", "token")
def test_from_a_checkpoint_to_a_rehearsed_upload(hub: MockHub, tmp_path: Path) -> None:  # noqa: F811
    checkpoint = write_checkpoint(tmp_path / "Apex-Tiny-MoE", shards=2)
    (tmp_path / "corpus.txt").write_text(TEXT)
    said: list[PhaseEvent] = []
    options: dict[str, Any] = {
        "work": str(tmp_path / "work"),
        "tiers": ["quality", "i-compact", "Q4_K_M"],
        "threads": 1,
        "convert": {"pre": "qwen35"},
        "reference": {"ctx": 64, "chunks": 1},
        "calibrate": {"tokens": 256, "ctx": 64, "corpus": [str(tmp_path / "corpus.txt")]},
        "evaluate": {"only": ["ppl", "kld"]},
        "verify": {"generate": 16},
        "report": {"formats": ["html", "md"]},
        "publish": {"repo": "me/Apex-Tiny-MoE-APEX-GGUF"},
    }
    made = run(checkpoint, **options, progress=lambda e: said.append(e) if isinstance(e, PhaseEvent) else None)
    assert [one.name for one in made.phases if not one.ran] == ["baselines"]
    assert [(one.tier, one.verified, one.quarantined) for one in made.files] == [
        ("quality", True, None), ("i-compact", True, None), ("Q4_K_M", True, None),
    ]  # fmt: skip
    release = tmp_path / "work/release"
    assert (release / "README.md").is_file()
    assert (release / "report/index.html").is_file()
    assert made.published is not None
    planned = {file["path"] for file in made.published["files"]}
    assert {"README.md", "report/index.html", *(one.path.name for one in made.files)} <= planned
    assert hub.repos == {}

    converted = tmp_path / "work/source/Apex-Tiny-MoE.gguf"
    assert not converted.exists()
    assert any(event.phase == "convert" and event.text.startswith("deleted ") for event in said)
    assert ran(run(checkpoint, **options)) == {}
    assert {one.next for one in status(tmp_path / "work").phases if one.name == "convert"} == {
        "unchanged; its file was deleted and nothing needs it"
    }
