"""optimize: files and JSON it leaves, the certificate checked by hand, the validation loop on a small model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apex_quant import embedded_model, evaluate, quantize
from apex_quant.allocation import certificate as certificates
from apex_quant.allocation.choices import make_space
from apex_quant.allocation.cost import CostModel
from apex_quant.allocation.exchange import exchanges, parted, smoothed
from apex_quant.allocation.optimize import measured_twin, optimize
from apex_quant.cli.optimize import parse_context
from apex_quant.errors import InputError, UsageError
from apex_quant.gguf import open_model
from apex_quant.recipe.plan import plan
from apex_quant.recipe.planned import PlanOptions
from tests.allocation.costs import drawn
from tests.helpers.cli import apex
from tests.helpers.imatrix import random_imatrix
from tests.helpers.random_models import write_random_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("optimize")
    path = write_random_gguf(where / "Tiny-BF16.gguf", "qwen3moe", sparse=True)
    random_imatrix(path).write(where / "imatrix.gguf")
    drawn(path).save(where / "s.json")
    return where


def run(folder: Path, out: Path, **more: Any) -> Any:
    return optimize(
        folder / "Tiny-BF16.gguf",
        sensitivity=folder / "s.json",
        imatrix=folder / "imatrix.gguf",
        out=out,
        **{"validate": False, **more},
    )


def test_recipe_certificate_and_numbers(folder: Path, tmp_path: Path) -> None:
    size = plan(folder / "Tiny-BF16.gguf", "i-compact", imatrix=folder / "imatrix.gguf").total_bytes
    made = run(folder, tmp_path / "recipe.txt", size=size)
    assert made.total_bytes <= size
    assert made.proved
    assert made.measured_kld == {}
    options = PlanOptions(recipe=tmp_path / "recipe.txt")
    planned = plan(folder / "Tiny-BF16.gguf", None, imatrix=folder / "imatrix.gguf", options=options)
    assert planned.total_bytes == made.total_bytes
    document = certificates.load(made.certificate)
    checked = certificates.check(document)
    assert checked["cost"] == pytest.approx(document["proof"]["cost"])
    assert 0 <= checked["gap"] < 0.2
    assert document["recipe_sha256"] == planned.recipe.sha256
    shared = document["texts"]["shared_runs_of_13_words_of_built_in_texts"]
    assert len(shared) == 6
    assert not any(shared.values())
    assert set(made.to_json()) >= {"recipe", "total_bytes", "target_bytes", "predicted_kld", "measured_kld", "gap"}
    json.dumps(made.to_json(), allow_nan=False)


def test_a_changed_certificate_is_refused(folder: Path, tmp_path: Path) -> None:
    made = run(folder, tmp_path / "recipe.txt", bpw=4)
    document = certificates.load(made.certificate)
    changes: list[Callable[[dict[str, Any]], Any]] = [
        lambda proof: proof.update(cost=proof["cost"] * 0.9),
        lambda proof: proof.update(bytes=proof["bytes"] - 32),
        lambda proof: proof.update(byte_limit=proof["bytes"] - 1),
        lambda proof: proof.update(bound=proof["cost"] * 2),
        lambda proof: proof["groups"][0].update(taken="F64"),
        lambda proof: proof.pop("groups"),
    ]
    for change in changes:
        broken = json.loads(json.dumps(document))
        change(broken["proof"])
        with pytest.raises(InputError):
            certificates.check(broken)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError):
        certificates.load(tmp_path / "x.json")


def test_json_recipe_and_targets(folder: Path, tmp_path: Path) -> None:
    first = run(folder, tmp_path / "a.json", bpw=4.5)
    assert json.loads(first.recipe.read_text())["types"] == dict(first.types)
    by_kld = run(folder, tmp_path / "b.txt", kld=first.predicted_kld)
    assert by_kld.total_bytes <= first.total_bytes
    assert by_kld.predicted_kld <= first.predicted_kld * (1 + 1e-9)
    assert by_kld.target_bytes is None


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nearest feasible"):
        run(folder, tmp_path / "r.txt", size=1000)
    with pytest.raises(UsageError, match="how large"):
        run(folder, tmp_path / "r.txt")
    with pytest.raises(UsageError, match="no such folder"):
        run(folder, tmp_path / "no" / "r.txt", bpw=4)
    (tmp_path / "r.txt").write_text("")
    with pytest.raises(UsageError, match="exists already"):
        run(folder, tmp_path / "r.txt", bpw=4)
    assert parse_context("32k") == 32768
    with pytest.raises(UsageError):
        parse_context("many")


def test_the_command(folder: Path, tmp_path: Path) -> None:
    words = ["optimize", folder / "Tiny-BF16.gguf", "--sensitivity", folder / "s.json", "--imatrix",
             folder / "imatrix.gguf", "--bpw", "4", "-o", tmp_path / "r.txt", "--no-validate", "--json"]  # fmt: skip
    ran = apex(*map(str, words))
    assert ran.status == 0, ran.err
    found = ran.json
    assert found["total_bytes"] <= found["target_bytes"]
    assert found["bpw"] <= 4
    ran = apex(*map(str, [*words[:6], "--size", "1k", "-o", tmp_path / "s.txt"]))
    assert ran.status == 2
    assert "nearest feasible size" in ran.err


def test_variants_and_exchanges_are_of_equal_size(folder: Path) -> None:
    with open_model(folder / "Tiny-BF16.gguf") as model:
        space = make_space(model, CostModel.from_sensitivities(drawn(model)))
        size = sum(space.bounds()) // 2
        best = space.fit(size)
        for other in (smoothed(space), parted(space)):
            assert other.fit(size).plan.total_bytes <= size
        again = space.predicted(smoothed(space).fit(size).plan)
        assert again.predicted >= best.predicted * (1 - 1e-9)
        moves = list(exchanges(space, {name: str(kind) for name, kind in best.types.items()}, 4))
        assert len(moves) == 4
        assert moves[0][0].startswith("more")
        assert moves[1][0].startswith("fewer")


def test_quantize_without_validation(folder: Path, tmp_path: Path) -> None:
    """The bytes are those of quantize() with the recipe."""
    made = run(folder, tmp_path / "r.txt", bpw=4.5, quantize=True)
    again = quantize(
        folder / "Tiny-BF16.gguf", imatrix=folder / "imatrix.gguf", out=tmp_path / "again.gguf",
        options=PlanOptions(recipe=made.recipe),
    )  # fmt: skip
    assert made.output.read_bytes() == again.outputs[0].path.read_bytes()
    assert made.output.stat().st_size == made.total_bytes


@pytest.mark.slow
def test_validation_measures_whole_files(tmp_path: Path) -> None:
    """On the embedded model: three candidates, one exchange, and the file that is kept."""
    matrix = tmp_path / "imatrix.gguf"
    random_imatrix(embedded_model()).write(matrix)
    made = optimize(
        embedded_model(), size=13_000_000, sensitivity=drawn(embedded_model()), imatrix=matrix, quantize=True,
        out=tmp_path / "r.txt", chunks=1, steps=1, types="q8_0,q6_k,q5_k,q4_k,q3_k,q2_k",
    )  # fmt: skip
    assert len(made.candidates) >= 2
    assert made.measured_kld["value"] > 0
    assert made.output is not None
    assert made.output.stat().st_size == made.total_bytes <= 13_000_000
    text = [tmp_path / "text.txt"]
    text[0].write_text("word " * 700)
    found = evaluate(made.output, reference=embedded_model(), only=("kld",), text=text, ctx=512)
    assert found.metrics["kld"]["mean"]["value"] > 0
    assert len(made.comparisons) == len(made.candidates) - 1


@pytest.mark.slow
def test_measured_twin(folder: Path, tmp_path: Path) -> None:
    made = measured_twin(
        folder / "Tiny-BF16.gguf", "i-compact", imatrix=folder / "imatrix.gguf", out=tmp_path,
        sensitivity=folder / "s.json", validate=False,
    )  # fmt: skip
    assert made.output is not None
    assert made.output.name == "Tiny-APEX-I-Compact-Measured.gguf"
    size = plan(folder / "Tiny-BF16.gguf", "i-compact", imatrix=folder / "imatrix.gguf").total_bytes
    assert made.output.stat().st_size <= size
