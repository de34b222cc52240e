"""Sizes: the allocation is called with what the run has, and its recipe is encoded under the size's name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apex_quant.gguf import open_model
from apex_quant.pipeline.config import load_config
from apex_quant.pipeline.wanted import needing_importance, wanted
from tests.pipeline.conftest import ran, small_run


def test_a_size_is_allocated_and_encoded(again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def measure(model: Path, **given: Any) -> str:
        calls.append(("measure", given))
        given["out"]("0" * 64).write_text("{}")
        return "measured"

    def optimize(model: Path, **given: Any) -> Any:
        calls.append(("optimize", given))
        certificate = given["out"].with_suffix(".certificate.json")
        certificate.write_text("{}")
        given["out"].write_text(r"^blk\.0\.ffn_down_exps\.weight$=Q6_K" + "\n^blk=Q4_K\ntoken_embd=Q6_K\n")
        keys = ("total_bytes", "target_bytes", "predicted_kld", "measured_kld", "gap", "proved")
        return SimpleNamespace(certificate=certificate, notes=("a note",), to_json=lambda: dict.fromkeys(keys, 1))

    monkeypatch.setattr("apex_quant.allocation.measure.measure", measure)
    monkeypatch.setattr("apex_quant.allocation.optimize.optimize", optimize)
    only = {"only": ["recipes", "quantize"]}
    made = small_run(again, sizes=["8MB", "500MB"], optimize={"types": ["Q4_K", "Q6_K"]}, phases=only)
    new = ("8MB", "0.5GB")
    assert ran(made) == {"recipes": new, "quantize": new}
    assert [name for name, _ in calls] == ["measure", "optimize"] * 2
    # measured once: the second call finds it finished; what is measured in another way has another file
    places = [calls[place][1]["out"](spec * 64) for place, spec in ((0, "a"), (2, "a"), (2, "b"))]
    assert places[0] == places[1] != places[2]
    assert calls[1][1]["sensitivity"] == "measured"
    assert (calls[1][1]["size"], calls[3][1]["size"]) == (8_000_000, 500_000_000)
    assert calls[1][1]["types"] == ("Q4_K", "Q6_K")
    assert calls[1][1]["imatrix"].name == "Small-BF16.imatrix.gguf"
    file = next(one for one in made.files if one.tier == "8MB")
    assert file.path.name == "Small-APEX-8MB.gguf"
    with open_model(file.path) as opened:
        assert opened.tensors["blk.0.ffn_down_exps.weight"].type.name == "Q6_K"
        assert opened.tensors["blk.1.ffn_down_exps.weight"].type.name == "Q4_K"


def test_who_needs_an_importance_matrix() -> None:
    def needs(**options: Any) -> bool:
        return needing_importance(load_config(None, {"source": "x.gguf", **options}))

    assert not needs(tiers=["quality", "Q8_0", "BF16"])
    for option in ({"tiers": ["i-quality"]}, {"tiers": ["Q4_K_M"]}, {"tiers": ["mini"]}, {"sizes": ["1GB"]}, {}):
        assert needs(**option)


def test_names(tmp_path: Path) -> None:
    def names(**options: Any) -> list[str]:
        return [one.name for one in wanted(load_config(None, {"source": "x.gguf", **options}))]

    assert names(tiers="all,q4_k_m,I-Mini", sizes=["12GB", "5.5GB", "300MB"])[-5:] == [
        "Q4_K_M", "i-mini", "12GB", "5.5GB", "0.3GB",
    ]  # fmt: skip
