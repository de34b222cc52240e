"""optimize: files and JSON it leaves, the certificate checked by hand, the validation loop on a small model."""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from apex_quant import SessionOptions, embedded_model, evaluate, quantize
from apex_quant.allocation import certificate as certificates
from apex_quant.allocation import sensitivity
from apex_quant.allocation.choices import make_space
from apex_quant.allocation.constraints import Constraints
from apex_quant.allocation.cost import CostModel
from apex_quant.allocation.exchange import exchanges, kinds, parted, smoothed
from apex_quant.allocation.frontier import frontier
from apex_quant.allocation.inputs import moved, working_folder
from apex_quant.allocation.optimize import measured_twin, optimize
from apex_quant.allocation.texts import BUILTIN, VALIDATION, heldout_read, judged_by, read_texts, validation_texts
from apex_quant.allocation.validate import Validator
from apex_quant.cli.optimize import show_optimized
from apex_quant.errors import BusyError, InputError, UsageError
from apex_quant.evaluation.make_reference import make_reference
from apex_quant.gguf import open_model
from apex_quant.importance import Importance
from apex_quant.recipe.plan import plan
from apex_quant.recipe.planned import PlanOptions
from apex_quant.sizes import parse_ctx
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
        out=out,
        **{"validate": False, "sensitivity": folder / "s.json", "imatrix": folder / "imatrix.gguf", **more},
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
    assert parse_ctx("32k") == 32768
    with pytest.raises(UsageError):
        parse_ctx("many")


def test_nothing_is_replaced_without_force(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "Tiny-APEX-Measured.gguf"
    for path in (output, tmp_path / "r.certificate.json"):
        path.write_text("somebody's")
        with pytest.raises(UsageError, match="exists already"):
            run(folder, tmp_path / "r.txt", bpw=4, quantize=True)
        assert path.read_text() == "somebody's"
        assert not (tmp_path / "r.txt").exists()
        path.unlink()
    output.write_text("not asked for, so not in the way")
    run(folder, tmp_path / "r.txt", bpw=4)
    assert run(folder, tmp_path / "r.txt", bpw=4, quantize=True, force=True).output == output


def test_moved_whole_to_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"new" * 1000)
    target.write_bytes(b"old")
    replace = Path.replace

    def elsewhere(self: Path, to: Path) -> Path:
        if self == source:
            raise OSError(errno.EXDEV, "another disk")
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", elsewhere)
    assert moved(source, target) == target
    assert target.read_bytes() == b"new" * 1000
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_the_working_folder_outlives_what_fails(tmp_path: Path) -> None:
    path = tmp_path / "r.apex-work"

    def interrupted() -> None:
        with working_folder(path, keep=False) as work:
            (work / "measured.json").write_text("{}")
            with pytest.raises(BusyError), working_folder(path, keep=False):
                pass
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [one.name for one in path.iterdir()] == ["measured.json"]
    with working_folder(path, keep=True):
        pass
    assert path.exists()
    with working_folder(path, keep=False):
        pass
    assert not path.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError), working_folder(tmp_path / "file", keep=False):
        pass


def test_what_was_measured_is_known_by_content(folder: Path, tmp_path: Path) -> None:
    """The same paths with another matrix, text or reference in them are other measurements."""
    text, reference, other = tmp_path / "text.txt", tmp_path / "r.apexref", tmp_path / "other.gguf"
    text.write_text("one")
    reference.write_bytes(b"one")
    random_imatrix(folder / "Tiny-BF16.gguf", seed=5).write(other)
    with open_model(folder / "Tiny-BF16.gguf") as model:
        space = make_space(model, CostModel.from_sensitivities(drawn(model)))
        file = space.fit(sum(space.bounds()) // 2)

        def names(imatrix: Path, **more: Any) -> tuple[str, str]:
            with Importance.read(imatrix) as matrix:
                made = Validator(model, tmp_path, matrix, imatrix, PlanOptions(), **more)
                path = made._path(file)
                return path.name, made._out(path).name

        first = names(folder / "imatrix.gguf", text=[text])
        assert names(folder / "imatrix.gguf", text=[text]) == first
        by_reference = names(folder / "imatrix.gguf", reference=reference)
        text.write_text("two")
        reference.write_bytes(b"two")
        again = names(folder / "imatrix.gguf", text=[text])
        assert again[0] == first[0]
        found = {first[1], again[1], by_reference[1], names(folder / "imatrix.gguf", reference=reference)[1]}
        found |= {names(folder / "imatrix.gguf", text=[text], ctx=512)[1], names(other, text=[text])[1]}
        assert len(found) == 6
        assert names(other, text=[text])[0] != first[0]


def test_sensitivities_of_another_encoding_are_noted(folder: Path, tmp_path: Path) -> None:
    made = run(folder, tmp_path / "a.txt", bpw=4)
    assert any("measured without an importance matrix" in note for note in made.notes)
    with Importance.read(folder / "imatrix.gguf") as matrix:
        about = {"name": "imatrix.gguf", "sha256": matrix.sha256, "prior": "shrink K=64"}
    measured = sensitivity.load(folder / "s.json")
    filled = measured.model_copy(update={"imatrix": about})
    assert not run(folder, tmp_path / "b.txt", bpw=4, sensitivity=filled).notes
    made = run(folder, tmp_path / "c.txt", bpw=4, sensitivity=filled, options=PlanOptions(fill="none"))
    assert any("experts filled by 'shrink K=64'" in note for note in made.notes)
    made = run(folder, tmp_path / "d.txt", bpw=5, sensitivity=filled, imatrix=None)
    assert any("measured with an importance matrix" in note for note in made.notes)
    other = measured.model_copy(update={"imatrix": {**about, "sha256": "0" * 64}})
    with pytest.raises(InputError, match="another importance matrix"):
        run(folder, tmp_path / "e.txt", bpw=4, sensitivity=other)


def test_guessed_groups_are_counted(folder: Path, tmp_path: Path) -> None:
    measured = sensitivity.load(folder / "s.json")
    groups = [
        group.model_copy(update={"probes": [group.probes[0].model_copy(update={"kind": kind})]})
        for group, kind in zip(measured.groups, itertools.cycle(("real", "estimated", "guessed")), strict=False)
    ]
    made = run(folder, tmp_path / "r.txt", bpw=4, sensitivity=measured.model_copy(update={"groups": groups}))
    assert sum(made.groups.values()) == len(groups)
    assert set(made.groups) == {"real", "estimated", "guessed"}
    assert any("are guessed from their error alone" in note for note in made.notes)
    assert certificates.load(made.certificate)["sensitivity"]["groups"] == made.groups


def test_fixed_tensors_count(folder: Path, tmp_path: Path) -> None:
    """In the prediction, in the search for a KLD, and in what a byte is worth."""
    made = run(folder, tmp_path / "a.txt", bpw=4, fixed={"attention": "Q2_K"})
    free = run(folder, tmp_path / "b.txt", bpw=4)
    assert made.predicted_kld > free.predicted_kld
    asked = made.predicted_kld * 0.9
    found = run(folder, tmp_path / "c.txt", kld=asked, fixed={"attention": "Q2_K"})
    assert found.predicted_kld <= asked * (1 + 1e-9)
    assert found.total_bytes > made.total_bytes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fix", "(=Q8_0"], "neither a role nor a pattern"),
        (["--fix", "atention=Q8_0"], "attention"),
        (["--fill", "bogus"], "no rule of filling"),
        (["--equal", "bogus"], "no siblings"),
        (["--groups", "tensor"], "--sensitivity was measured before"),
    ],
)
def test_wrong_words(folder: Path, tmp_path: Path, words: list[str], message: str) -> None:
    ran = apex("optimize", str(folder / "Tiny-BF16.gguf"), "--sensitivity", str(folder / "s.json"), "--bpw", "5",
               "-o", str(tmp_path / "r.txt"), "--no-validate", *words)  # fmt: skip
    assert ran.status == 2, ran.err
    assert message in ran.err


def speeds(tmp_path: Path, **seconds: float) -> Path:
    path = tmp_path / "speeds.toml"
    rows = "".join(f"{name} = {value}\n" for name, value in seconds.items())
    path.write_text(f'machine = "m"\nreference = "Q4_K"\n[seconds_per_gigaweight]\n{rows}')
    return path


def test_speed_tables_and_what_is_feasible(folder: Path, tmp_path: Path) -> None:
    """All lacking types at once; the nearest slowdown where none is fast enough; the nearest size where a fast file
    must be larger."""
    with pytest.raises(UsageError, match=r"IQ4_XS.*IQ1_S"):
        run(folder, tmp_path / "r.txt", bpw=4, speeds=speeds(tmp_path, Q4_K=1.0, Q8_0=2.0))
    table = speeds(tmp_path, Q4_K=1.0, Q6_K=1.5, Q2_K=2.0)
    types = "q6_k,q4_k,q2_k"
    with pytest.raises(UsageError, match=r"nearest feasible is 1$"):
        run(folder, tmp_path / "r.txt", bpw=4, types=types, speeds=table, max_slowdown=0.5)
    with pytest.raises(UsageError, match=r"nearest feasible size is (\d+) bytes") as refused:
        run(folder, tmp_path / "r.txt", bpw=3, types=types, speeds=table, max_slowdown=1.1)
    size = int(re.findall(r"size is (\d+) bytes", str(refused.value))[0])
    made = run(folder, tmp_path / "r.txt", size=size, types=types, speeds=table, max_slowdown=1.1)
    assert made.total_bytes == size


def test_shards(folder: Path, tmp_path: Path) -> None:
    options = PlanOptions(split_max_size=500_000)
    made = run(folder, tmp_path / "r.txt", bpw=4.5, quantize=True, options=options)
    shards = list(tmp_path.glob("*-of-*.gguf"))
    assert len(shards) > 1
    assert sum(path.stat().st_size for path in shards) == made.total_bytes


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
        moves = list(exchanges(space, {name: str(kind) for name, kind in best.types.items()}))
        assert len(moves) > 4
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


def test_smoothing_knows_only_what_was_measured(folder: Path) -> None:
    """Tensors that no probe reached have their like's costs; they change nothing for the others."""
    with open_model(folder / "Tiny-BF16.gguf") as model:
        measured = drawn(model)
        last = max(group.layer for group in measured.groups if group.layer is not None)
        rest = measured.model_copy(update={"groups": [group for group in measured.groups if group.layer != last]})
        for types in (("Q8_0", "Q6_K", "Q4_K"), ("BF16", "Q8_0", "Q6_K", "Q4_K")):
            costs = CostModel.from_sensitivities(rest)
            space = smoothed(make_space(model, costs, constraints=Constraints(types=types)))
            by_kind: dict[tuple[str, str], list[float]] = {}
            for name, kind in kinds(space).items():
                if name in set(costs.tensors):
                    by_kind.setdefault(kind, []).append(space.costs.cost(name, "Q6_K") / costs.cost(name, "Q6_K"))
            # each kind keeps its level: what is dearer than its like becomes cheaper, and the other way round
            for factors in by_kind.values():
                assert math.prod(factors) == pytest.approx(1)


def test_wrong_usage_is_found_before_anything_is_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring may take hours."""

    def begun(*_: Any, **__: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("apex_quant.allocation.measure.measure", begun)
    table = speeds(tmp_path, Q4_K=1.0, Q6_K=1.5, Q2_K=2.0)
    wrong: list[dict[str, Any]] = [
        {}, {"bpw": 4, "size": 10**6}, {"bpw": -1}, {"like_size": tmp_path / "none.gguf"}, {"size": 1000},
        {"bpw": 4, "fixed": {"atention": "Q8_0"}}, {"bpw": 4, "minimum": {"output": "Q8_0"}, "types": "q4_k"},
        {"bpw": 4, "types": "q6_k,q4_k,q2_k", "speeds": table, "max_slowdown": 0.5},
        {"bpw": 4, "options": PlanOptions(fill="bogus")},
        {"bpw": 4, "validate": True, "text": [tmp_path / "none.txt"]},
        {"bpw": 4, "validate": True, "reference": tmp_path / "none.gguf"},
        {"bpw": 4, "validate": True, "reference": folder / "s.json"},
    ]  # fmt: skip
    for words in wrong:
        with pytest.raises((UsageError, InputError)):
            run(folder, tmp_path / "r.txt", **{"sensitivity": None, **words})
    with pytest.raises(UsageError, match="atention"):
        frontier(folder / "Tiny-BF16.gguf", fixed={"atention": "Q8_0"})
    with pytest.raises(AssertionError, match="measured"):
        run(folder, tmp_path / "r.txt", sensitivity=None, bpw=4)


@pytest.mark.parametrize("name", ["reference", "text", "chunks", "work"])
def test_nothing_says_how_to_measure_where_nothing_is(folder: Path, tmp_path: Path, name: str) -> None:
    given = {"reference": "nosuch", "text": ["nosuch"], "chunks": 1, "work": "nosuch/dir"}
    with pytest.raises(UsageError, match=f"--{name} does not go with it"):
        run(folder, tmp_path / "r.txt", bpw=4, **{name: given[name]})


def test_options_that_say_types_are_refused(folder: Path, tmp_path: Path) -> None:
    """They would be replaced by what is found."""
    model, options = folder / "Tiny-BF16.gguf", PlanOptions(override=["attn_k=Q8_0"])
    with pytest.raises(UsageError, match="optimize does not go with --override"):
        run(folder, tmp_path / "r.txt", bpw=4, options=options)
    with pytest.raises(UsageError, match="frontier does not go with --override"):
        frontier(model, sensitivity=folder / "s.json", options=options)
    for wrong in (options, PlanOptions(split_max_size=500_000)):
        with pytest.raises(UsageError, match="--measured does not go with"):
            measured_twin(model, "compact", out=tmp_path, options=wrong, sensitivity=folder / "s.json", validate=False)


def test_a_stored_reference_may_be_of_the_held_out_text(tmp_path: Path) -> None:
    """What `apex reference` makes by default: then the choice has read what is to judge it, and that is said."""
    for name, text in (("heldout", None), ("validation", [VALIDATION])):
        reference = tmp_path / f"{name}.apexref"
        make_reference(embedded_model(), reference, text=text, ctx=256, chunks=1, options=SessionOptions(threads=1))
        with open_model(embedded_model()) as model:
            texts = Validator(model, tmp_path, None, None, PlanOptions(), reference=reference).texts
            measured = drawn(model)
        said = heldout_read(texts, measured)
        if name == "heldout":
            assert texts.heldout
            assert any("held-out evaluation" in note for note in judged_by(texts, measured))
            assert f"{texts.heldout} of its runs" in said
            assert "never read" not in said
        else:
            assert texts.heldout == 0
            assert "never read" in heldout_read(texts, measured.model_copy(update={"text": probed(measured)}))
            assert "the sensitivities has of it is not known" in said
    (tmp_path / "t.txt").write_text("words")
    given: list[tuple[dict[str, Any], str]] = [({"text": [tmp_path / "t.txt"]}, "--text"), ({"chunks": 1}, "--chunks")]
    for more, flag in given:
        with pytest.raises(UsageError, match=f"{flag} does not go with it"):
            optimize(
                embedded_model(), bpw=4, sensitivity=drawn(embedded_model()), out=tmp_path / "r.txt",
                reference=tmp_path / "heldout.apexref", **more,
            )  # fmt: skip


def probed(measured: Any) -> Any:
    """As if measured on the built-in probe text."""
    return measured.text.model_copy(update={"name": BUILTIN})


def test_one_text_for_costs_and_choice_is_noted(tmp_path: Path) -> None:
    """By content, whatever the file is called."""
    (tmp_path / "a.txt").write_text("some words")
    (tmp_path / "b.txt").write_text("some words")
    (tmp_path / "c.txt").write_text("other words")
    with open_model(embedded_model()) as model:
        made_costs = read_texts(model, [tmp_path / "a.txt", tmp_path / "c.txt"])
        measured = drawn(model).model_copy(update={"settings": {"texts": made_costs.parts}})
        for name, count in (("b.txt", 1), ("c.txt", 1), (None, 0)):
            texts = validation_texts(model, [tmp_path / name] if name else None)
            assert sum("made the costs and chooses" in note for note in judged_by(texts, measured)) == count


def test_how_far_above_the_optimum() -> None:
    """The gap is a share of the recipe's own cost: one of a half is twice the optimum."""
    out = io.StringIO()
    made: Any = SimpleNamespace(
        target_bytes=None, total_bytes=1, bpw=4.0, predicted_kld=0.1, measured_kld={}, corrected_kld=None, proved=False,
        gap=0.5, shadow_price=0.0, candidates=(), notes=(), recipe=None, certificate=None, output=None,
    )  # fmt: skip
    show_optimized(Console(file=out, width=200), made)
    assert "at most 100.00% above the optimum" in out.getvalue()
