"""A small real model (four layers of the embedded one, with its vocabulary) and one finished run on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apex_quant import PlanOptions, embedded_model, quantize
from apex_quant.pipeline.engine import run
from apex_quant.pipeline.results import RunResult

TEXT = "The quick brown fox jumps over the lazy dog, and 12 + 30 = 42. " * 60
SETTINGS: dict[str, Any] = {
    "tiers": ["quality", "i-compact"],
    "threads": 1,
    "reference": {"ctx": 64, "chunks": 1},
    "calibrate": {"tokens": 256, "ctx": 64, "corpus": ["corpus.txt"]},
    "evaluate": {"only": ["ppl", "kld"]},
    "verify": {"generate": 8},
    "phases": {"skip": ["report"]},
}

Runner = Callable[..., RunResult]


def write_small(folder: Path) -> Path:
    """Small-BF16.gguf: 20 MB, hybrid MoE, 4 layers."""
    out = folder / "Small-BF16.gguf"
    quantize(embedded_model(), "BF16", out=out, options=PlanOptions(prune_layers=list(range(4, 12))), threads=1)
    out.with_name(out.name + ".journal").unlink()
    return out


def small_run(folder: Path, **more: Any) -> RunResult:
    """A run in `folder`, which has the model and the corpus; everything small."""
    settings = {**SETTINGS, "work": str(folder / "work")}
    settings["calibrate"] = {**SETTINGS["calibrate"], "corpus": [str(folder / "corpus.txt")]}
    options = {key: value for key, value in more.items() if key in ("yes", "dry_run", "force", "progress")}
    return run(
        folder / "Small-BF16.gguf",
        **options,
        **settings | {key: value for key, value in more.items() if key not in options},
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, corpus and work/ of a finished run; copy it before changing it."""
    folder = tmp_path_factory.mktemp("finished")
    write_small(folder)
    (folder / "corpus.txt").write_text(TEXT)
    made = small_run(folder)
    assert [one.name for one in made.phases if one.ran] == [
        "source", "reference", "calibrate", "recipes", "quantize", "verify", "evaluate",
    ]  # fmt: skip
    return folder


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of it elsewhere, dates kept."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def ran(made: RunResult) -> dict[str, tuple[str, ...]]:
    """The phases that ran, with their items."""
    return {one.name: one.ran for one in made.phases if one.ran}
