"""Which candidate is delivered, what is certified then, and that a KLD is checked, by measurements that are made up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apex_quant.allocation import certificate as certificates
from apex_quant.allocation import loop, optimize
from apex_quant.allocation.exchange import exchanges, reweighted
from apex_quant.allocation.space import Predicted
from apex_quant.allocation.texts import ProbeTexts
from apex_quant.allocation.validate import Candidate
from tests.allocation.costs import drawn
from tests.helpers.imatrix import random_imatrix
from tests.helpers.random_models import write_random_gguf

Truth = Callable[[str, Predicted], float]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("loop")
    path = write_random_gguf(where / "Tiny-BF16.gguf", "qwen3moe", sparse=True)
    random_imatrix(path).write(where / "imatrix.gguf")
    drawn(path).save(where / "s.json")
    return where


class Pretended:
    """A validator that encodes nothing: the KLD of a candidate is `truth`(its name, its file)."""

    def __init__(self, folder: Path, truth: Truth) -> None:
        self.folder, self.truth = folder, truth
        self.about = {"text": {"name": "pretended", "sha256": ""}, "reference": {"name": "model"}}
        self.texts = ProbeTexts("pretended", (), "")
        self.known: dict[str, Candidate] = {}
        self.encoded: list[str] = []

    def measure(self, recipes: Mapping[str, Predicted]) -> list[Candidate]:
        for name, file in recipes.items():
            value = self.truth(name, file)
            metrics = {"kld": {"mean": {"value": value, "low": value * 0.99, "high": value * 1.01, "n": 1}}}
            results: Any = SimpleNamespace(metrics=metrics)
            path = self.folder / f"{file.plan.recipe.sha256[:8]}.gguf"
            if file.plan.recipe.sha256 not in self.known:
                path.write_bytes(name.encode())
            self.known.setdefault(file.plan.recipe.sha256, Candidate(name, file, path, results))
        return [self.known[file.plan.recipe.sha256] for file in recipes.values()]

    def drop(self, candidates: Sequence[Candidate]) -> None:
        for one in candidates:
            one.path.unlink(missing_ok=True)

    def encode(self, pairs: Sequence[tuple[Predicted, Path]]) -> None:
        for _, path in pairs:
            self.encoded.append(path.name)
            path.write_bytes(b"again")


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """optimize() with `truth` instead of measurements."""

    def called(truth: Truth, **more: Any) -> Any:
        made: list[Pretended] = []

        def pretended(_: Any, where: Path, *rest: Any, **named: Any) -> Pretended:
            made.append(Pretended(where, truth))
            return made[-1]

        monkeypatch.setattr(optimize, "Validator", pretended)
        monkeypatch.setattr(loop, "compare", lambda *_: [SimpleNamespace(sentence="", verdict="")])
        monkeypatch.setattr(loop, "shown_lower", lambda one, than: one.kld["high"] < than.kld["low"])
        found = optimize.optimize(
            folder / "Tiny-BF16.gguf", sensitivity=folder / "s.json", imatrix=folder / "imatrix.gguf",
            out=tmp_path / "r.txt", force=True, **{"steps": 0, **more},
        )  # fmt: skip
        return found, made[0]

    return called


def test_what_was_asked_to_be_equal_stays_equal(run: Any, folder: Path) -> None:
    """However low siblings apart would measure."""
    made, validator = run(lambda name, _: 0.01 if name == "siblings apart" else 0.1, bpw=4, equal=["gate_up"])
    assert "siblings apart" not in {one.name for one in validator.known.values()}
    for name, kind in made.types.items():
        if "ffn_gate_exps" in name:
            assert made.types[name.replace("gate", "up")] == kind
    assert certificates.load(made.certificate)["constraints"]["equal"] == ["gate_up"]


def test_where_nothing_was_asked_siblings_may_be_parted_and_it_is_said(run: Any) -> None:
    made, _ = run(lambda name, _: 0.01 if name == "siblings apart" else 0.1, bpw=4)
    parted = [n for n, k in made.types.items() if "gate_exps" in n and made.types[n.replace("gate", "up")] != k]
    assert parted
    assert any("--equal gate_up forbids it" in note for note in made.notes)
    document = certificates.load(made.certificate)
    assert document["constraints"]["equal"] == []
    assert document["notes"] == list(made.notes)
    assert all(len(group["tensors"]) == 1 for group in document["proof"]["groups"])
    assert certificates.check(document)["bytes"] == document["proof"]["bytes"]
    assert made.proved  # it is the optimum of the wider space


def test_siblings_are_not_parted_by_chance(run: Any) -> None:
    """Lower, and not shown to be."""
    made, _ = run(lambda name, _: 0.0995 if name == "siblings apart" else 0.1, bpw=4)
    for name, kind in made.types.items():
        if "ffn_gate_exps" in name:
            assert made.types[name.replace("gate", "up")] == kind
    assert certificates.load(made.certificate)["constraints"]["equal"] == ["gate_up"]


def test_the_delivered_recipe_is_certified(run: Any) -> None:
    """Another one than the solver's optimum: its own cost, bytes and distance from the bound."""
    made, _ = run(lambda name, _: 0.01 if name == "smoothed" else 0.1, bpw=4, equal=["gate_up"])
    document = certificates.load(made.certificate)
    assert document["recipe"]["types"] == dict(made.types)
    taken = {name: group["taken"] for group in document["proof"]["groups"] for name in group["tensors"]}
    assert taken.items() <= dict(made.types).items()
    assert document["proof"]["gap"] == made.gap > 0
    assert not made.proved
    checked = certificates.check(document)
    assert checked["cost"] > document["proof"]["bound"]
    assert document["predicted_kld"] == made.predicted_kld
    assert made.measured_kld["value"] == 0.01


def test_what_was_measured_corrects_the_prediction(run: Any) -> None:
    made, _ = run(lambda _, file: 1.25 * file.predicted, bpw=4)
    assert made.corrected_kld == pytest.approx(1.25 * made.predicted_kld)
    assert made.measured_kld["value"] == pytest.approx(made.corrected_kld)


def test_a_kld_is_asked_for_again_once(run: Any) -> None:
    """The first file shows how far predictions are off; the second size has what was asked for."""
    made, _ = run(lambda _, file: 1.5 * file.predicted, kld=0.05)
    first, second = made.candidates[0], made.candidates[1]
    assert first["measured_kld"]["value"] > 0.05
    assert second["total_bytes"] > first["total_bytes"]
    assert made.measured_kld["value"] <= 0.05
    assert made.target["kept"] is True
    assert not any("target" in note for note in made.notes)
    assert made.total_bytes <= second["total_bytes"]
    assert certificates.load(made.certificate)["target"]["kept"] is True


def test_a_missed_kld_is_said(run: Any) -> None:
    made, _ = run(lambda name, file: (1.5 if name == "first size" else 2.0) * file.predicted, kld=0.05)
    assert made.target["kept"] is False
    assert any("the target is missed" in note for note in made.notes)


def test_the_chosen_file_is_kept_and_others_are_not(run: Any, tmp_path: Path) -> None:
    """Also where an exchange measured lower without being shown to be: it is not chosen, nor is anything made again."""
    made, validator = run(
        lambda name, _: 0.995 if "bytes for" in name else 1.0,
        bpw=4, steps=2, quantize=True,
    )  # fmt: skip
    assert made.output.read_bytes() in {b"optimum", b"smoothed", b"siblings apart"}
    assert validator.encoded == []
    assert {path.name for path in tmp_path.iterdir()} == {"r.txt", "r.certificate.json", made.output.name}


def test_agreement_measures_no_exchange(run: Any) -> None:
    """The interval of the optimum lies at its prediction."""
    for off, exchanged in ((1.3, False), (1.4, True), (0.8, True)):
        _, validator = run(lambda _, file, off=off: off * file.predicted, bpw=4, steps=4, equal=["gate_up"])
        assert any("bytes for" in one.name for one in validator.known.values()) is exchanged


def test_exchanges_keep_siblings_apart_where_that_won(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are exchanges of the recipe that won, not of one that was given up."""
    begun: list[tuple[str, ...]] = []

    def watched(space: Any, factors: Any) -> Any:
        begun.append(space.constraints.equal)
        return reweighted(space, factors)

    monkeypatch.setattr(loop, "reweighted", watched)
    run(lambda name, _: 0.01 if name == "siblings apart" else 0.1, bpw=4, steps=2)
    assert begun == [(), ()]


def test_what_was_shown_to_help_is_not_undone(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the way back count as a step."""
    labels: list[str] = []

    def named(*given: Any) -> Any:
        for label, factors in exchanges(*given):
            labels.append(label)
            yield label, factors

    tried: list[int] = []

    def counted(space: Any, factors: Any) -> Any:
        tried.append(len(set(factors.values())))
        return reweighted(space, factors)

    monkeypatch.setattr(loop, "exchanges", named)
    monkeypatch.setattr(loop, "reweighted", counted)
    _, validator = run(
        lambda name, _: 0.01 if name.startswith("more bytes") else 0.1, bpw=4, steps=3, equal=["gate_up"]
    )
    helped = next(one.name for one in validator.known.values() if one.name.startswith("more bytes"))
    back = helped.replace("more", "fewer")
    assert back in labels
    assert back not in {one.name for one in validator.known.values()}
    assert len(tried) == 3
