"""`apex quantize --measured`: the measured allocation of a tier's size, in the form of quantize's outputs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from apex_quant.allocation import optimize
from apex_quant.cli import run
from apex_quant.errors import UsageError
from apex_quant.recipe.plan import plan
from tests.allocation.costs import drawn
from tests.helpers.random_models import write_random_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_random_gguf(tmp_path_factory.mktemp("measured") / "Tiny-BF16.gguf", "qwen3moe", sparse=True)
    drawn(path).save(path.with_name("s.json"))
    return path


def test_twins(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two tiers, two files of at most their sizes. (Not validated: the model has no vocabulary to read text with.)"""
    twin = optimize.measured_twin

    def unvalidated(*given: Any, **more: Any) -> Any:
        return twin(*given, validate=False, **more)

    monkeypatch.setattr(optimize, "measured_twin", unvalidated)
    words = ["quantize", str(model), "--tier", "quality,compact", "--measured", "-o", str(tmp_path)]
    words += ["--sensitivity", str(model.with_name("s.json"))]
    assert run([*words, "--json"]) == 0
    outputs = json.loads(capsys.readouterr().out)["outputs"]
    assert [output["tier"] for output in outputs] == ["quality-measured", "compact-measured"]
    for tier, output in zip(("quality", "compact"), outputs, strict=True):
        path = tmp_path / f"Tiny-APEX-{tier.capitalize()}-Measured.gguf"
        assert output["path"] == str(path)
        assert output["bytes"] == path.stat().st_size <= plan(model, tier).total_bytes
        assert output["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert output["optimized"]["target_bytes"] == plan(model, tier).total_bytes
    assert run([*words, "--force"]) == 0
    assert "mean KLD: predicted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--measured", "--tier", "compact", "--pure"], "does not go with --pure"),
        (["--measured", "--tier", "compact", "--dry-run"], "does not go with --dry-run"),
        (["--measured", "--tier", "compact", "--override", "x=Q8_0"], "does not go with --override"),
        (["--measured"], "takes the size of a tier"),
        (["--measured", "--tier", "compact,quality", "-o", "x.gguf"], "is one file, and 2 tiers"),
        (["--tier", "compact", "--sensitivity", "s.json"], "is for --measured"),
    ],
)
def test_wrong_usage(words: list[str], message: str, model: Path) -> None:
    with pytest.raises(UsageError, match=message):
        run(["quantize", str(model), *words])
