"""Measuring sensitivities: against evaluate() on files, interrupted, with a budget, with odd arguments."""

from __future__ import annotations

import io
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from gguf.quants import quantize as quantize_rows
from rich.console import Console

from apex_quant import SessionOptions, embedded_model, evaluate, quantize
from apex_quant.allocation import groups, sensitivity
from apex_quant.allocation.errors_table import SAMPLE
from apex_quant.allocation.groups import (
    GroupPlan,
    fitting,
    joint_probes,
    make_groups,
    quantizable,
    single_probes,
    spread_out,
)
from apex_quant.allocation.journal import Journal, read_journal
from apex_quant.allocation.measure import MeasureProgress, _file, measure
from apex_quant.allocation.pace import Pace
from apex_quant.allocation.patches import Sums
from apex_quant.allocation.probe_job import Job
from apex_quant.allocation.sensitivity import Joint, Sensitivities
from apex_quant.cli.measure import MeasureBar, parse_time, show_sensitivities
from apex_quant.errors import BusyError, InputError, UsageError
from apex_quant.evaluation.scores import NotFinite
from apex_quant.gguf import open_model
from apex_quant.native.worker import Stopped
from apex_quant.recipe.planned import PlanOptions
from apex_quant.text import heldout, render

ONE = SessionOptions(threads=1)
CTX = 128
KIND = "Q4_0"


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(render(document, None) for document in heldout()[::40]), encoding="utf-8")
    return path


def run(out: Path, text: Path, **changed: Any) -> Sensitivities:
    asked: dict[str, Any] = {
        "groups": "role", "types": [KIND], "candidates": ["Q8_0", KIND], "joint": 0, "tokens": 4 * CTX, "ctx": CTX,
        "text": [text], "options": ONE, "rounding": False,
    }  # fmt: skip
    return measure(embedded_model(), out=out, **{**asked, **changed})


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Sensitivities:
    return run(tmp_path_factory.mktemp("whole") / "s.json", text)


def test_what_it_says(measured: Sensitivities) -> None:
    assert {group.role for group in measured.groups} == {
        "embedding", "attention", "ssm", "routed_expert", "shared_expert",
    }  # fmt: skip
    assert measured.text.tokens == 4 * CTX
    assert measured.floor is not None
    assert measured.floor.kld == 0
    assert measured.tokens_spent == (5 + 2) * 4 * CTX
    for group in measured.groups:
        (probe,) = group.probes
        assert probe.type == KIND
        assert probe.kld > probe.error > 0
        assert probe.n == 4
        assert probe.flips is not None
        assert 0 < probe.flips < 0.5
        by_chunk = (probe.model_extra or {})["by_chunk"]
        assert np.mean(by_chunk) == pytest.approx(probe.kld, rel=1e-4)
        assert probe.error == pytest.approx(np.std(by_chunk, ddof=1) / 2, rel=1e-3)
        table = [measured.errors[name][KIND].weighted for name in group.tensors]
        assert probe.weighted_error == pytest.approx(np.mean(table), rel=0.05)
    assert any("stand in the built-in held-out evaluation" in warning for warning in measured.warnings)


def test_the_same_as_evaluating_a_file(measured: Sensitivities, text: Path, tmp_path: Path) -> None:
    """Shared experts through PyPI gguf's Q4_0 in a file of their own, evaluated against the model itself."""
    copy = tmp_path / "m.gguf"
    shutil.copy(embedded_model(), copy)
    group = next(group for group in measured.groups if group.role == "shared_expert")
    with open_model(copy) as model, copy.open("r+b") as out:
        for name in group.tensors:
            info = model.tensors[name]
            rows = dequantize(np.frombuffer(model.read(info), np.uint8), gguf.GGMLQuantizationType.BF16)
            blocks = quantize_rows(rows.reshape(-1, info.shape[0]), gguf.GGMLQuantizationType.Q4_0)
            back = quantize_rows(dequantize(blocks, gguf.GGMLQuantizationType.Q4_0), gguf.GGMLQuantizationType.BF16)
            out.seek(info.offset)
            out.write(back.tobytes())
    made = evaluate(
        copy,
        reference=embedded_model(),
        text=[text],
        ctx=CTX,
        chunks=4,
        scored="all",
        only=["kld", "router"],
        options=ONE,
    )
    (probe,) = group.probes
    assert probe.kld == pytest.approx(made.metrics["kld"]["mean"]["value"], rel=1e-3)
    assert probe.flips == pytest.approx(made.metrics["router"]["changed"], rel=0.02)


def test_interrupted_and_resumed(measured: Sensitivities, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    seen: list[MeasureProgress] = []

    def stop(event: MeasureProgress) -> None:
        if event.what == "probes" and event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(UsageError, match="no interrupted run"):
        run(out, text, resume=True)
    with pytest.raises(KeyboardInterrupt):
        run(out, text, progress=stop)
    assert not out.exists()
    with (tmp_path / "s.json.probes").open("ab") as journal:
        journal.write(b'{"key": "group|torn')  # a kill in the middle of a line
    again = run(out, text, progress=seen.append, resume=True)
    probes = [event for event in seen if event.what == "probes"]
    assert probes[0].resumed >= 3
    assert probes[0].planned == 5
    assert again.groups == measured.groups
    assert not (tmp_path / "s.json.probes").exists()
    seen.clear()
    assert run(out, text, progress=seen.append).groups == again.groups
    assert not seen  # it was finished: nothing is done
    with pytest.raises(UsageError, match="measured in another way"):
        run(out, text, tokens=5 * CTX)


def test_another_measurements_journal_is_not_discarded(text: Path, tmp_path: Path) -> None:
    """Hours of probes would be lost by one changed option."""
    out, journal = tmp_path / "s.json", tmp_path / "s.json.probes"
    kept = Journal(journal, "another")
    kept.add({"chunks": 3})
    kept.add({"key": "a", "kld": 1.0})
    before = journal.read_bytes()
    with pytest.raises(UsageError, match="interrupted run of another measurement"):
        run(out, text, tokens=CTX)
    assert journal.read_bytes() == before
    assert run(out, text, tokens=CTX, force=True).groups
    assert not journal.exists()


def test_rounding_is_that_of_a_file(measured: Sensitivities, text: Path, tmp_path: Path) -> None:
    """A uniform Q8_0 file as evaluate() measures it; the file is gone, and the row survives an interruption."""

    def stop(event: MeasureProgress) -> None:
        if event.what == "probes":
            assert not (tmp_path / "s.json.q8_0.gguf").exists()  # the rest may take hours
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s.json", text, rounding=True, progress=stop)
    kept = (tmp_path / "s.json.probes").read_text()
    assert kept.count('"file|Q8_0"') == 1
    (tmp_path / "s.json.q8_0.gguf").write_text("left by a kill")
    found = run(tmp_path / "s.json", text, rounding=True)
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]
    assert found.groups == measured.groups
    assert found.rounding is not None
    assert set(found.rounding.types.values()) == {"Q8_0"}
    pure = PlanOptions(pure=True)
    file = quantize(embedded_model(), "Q8_0", out=tmp_path / "q8.gguf", options=pure).outputs[0].path
    made = evaluate(
        file, reference=embedded_model(), text=[text], ctx=CTX, chunks=4, scored="all", only=["kld"], options=ONE
    )
    assert found.rounding.kld == pytest.approx(made.metrics["kld"]["mean"]["value"], rel=0.02)


@pytest.mark.slow
def test_a_budget(text: Path, tmp_path: Path) -> None:
    """Less text, then fewer probes; what is missing is said and estimated; later the rest is measured."""
    out = tmp_path / "s.json"
    short = run(out, text, groups="role,layer", tokens=16 * CTX, budget=0.01, joint=2)
    assert short.text.chunks == 4
    assert not short.settings["complete"]
    kinds = [probe.kind for group in short.groups for probe in group.probes]
    assert kinds.count("real") >= 1
    assert kinds.count("estimated") + kinds.count("guessed") == len(short.groups) - kinds.count("real")
    for group in short.groups:  # what stands for a group is of its role, or says that nothing does
        if group.probes[0].kind == "estimated":
            assert any(g.probes[0].kind == "real" and g.role == group.role for g in short.groups)
    (ended,) = (warning for warning in short.warnings if "the budget ended" in warning)
    assert f" groups and {len(short.joint)} of 2 joint probes were measured" in ended
    assert any("of a budget of" in warning for warning in short.warnings)
    assert read_journal(tmp_path / "s.json.probes", short.settings["spec"])[0]


@pytest.mark.slow
def test_other_ways_of_disturbing_rank_alike(text: Path, tmp_path: Path) -> None:
    """Noise of the same error, and the Q8_0 form of the model with weights from the model itself, against real blocks
    in the model: by part of all layers."""
    from scipy.stats import spearmanr

    file = quantize(embedded_model(), "Q8_0", out=tmp_path / "q8.gguf").outputs[0].path
    ways: dict[str, dict[str, Any]] = {"real": {}, "noise": {"noise": True}, "loaded": {"loaded": file}}
    made = {
        name: run(tmp_path / f"{name}.json", text, groups="role,part", types=["Q3_K"], candidates=["Q3_K"], **how)
        for name, how in ways.items()
    }
    klds = {name: [group.probes[0].kld for group in found.groups] for name, found in made.items()}
    assert len(klds["real"]) > 10
    assert made["noise"].kinds == {"noise": len(klds["real"])}
    assert made["loaded"].model.loaded == "q8.gguf"
    for other in ("noise", "loaded"):
        assert spearmanr(klds["real"], klds[other]).statistic > 0.9
        assert np.median(np.abs(np.log(np.divide(klds[other], klds["real"])))) < 0.3


def test_refused(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    for changed, message in (
        ({"groups": "nonsense"}, "--groups"),
        ({"groups": "layer"}, "whole layers"),
        ({"types": ["F16"]}, "not a type"),
        ({"types": ["Q9"]}, "no tensor type"),
        ({"types": []}, "no type to probe"),
        ({"tokens": 10}, "at least one context"),
        ({"budget": -1.0}, "at least one context"),
        ({"fill": "bogus"}, "no rule of filling"),
    ):
        with pytest.raises(UsageError, match=message):
            run(out, text, **changed)
    with pytest.raises(UsageError, match="no such folder"):
        run(tmp_path / "absent" / "s.json", text)
    (tmp_path / "short.txt").write_text("Hello")
    with pytest.raises(InputError, match="tokens, but one context"):
        run(out, tmp_path / "short.txt")
    assert list(tmp_path.glob("s.json")) == []


def test_one_run_at_a_time(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    refused: list[BusyError] = []

    def second(event: MeasureProgress) -> None:
        if not refused:
            with pytest.raises(BusyError, match="another process is measuring") as caught:
                run(out, text)
            refused.append(caught.value)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out, text, groups="role", tokens=CTX, progress=second)
    assert refused


# --- plans ---


def test_groups() -> None:
    with open_model(embedded_model()) as model:
        names = list(quantizable(model))
        assert len(names) == 130
        assert "output_norm.weight" not in names
        single = make_groups(model, "tensor", names)
        assert [group.tensors for group in single] == [(name,) for name in names]
        by_role = make_groups(model, "role,layer", names)
        assert {tuple(sorted(n.split(".")[2] for n in g.tensors)) for g in by_role if g.role == "routed_expert"} == {
            ("ffn_down_exps", "ffn_gate_exps", "ffn_up_exps")
        }
        assert [g.tensors for g in by_role if g.role == "embedding"] == [("token_embd.weight",)]
        probes = single_probes(model, single, ["Q3_K"], names, noise=False)
        assert len({probe.key for probe in probes}) == len(probes)
        assert [p.kind for p in probes[:130]] == ["Q3_K"] * 130
        joints = joint_probes(model, names, 8, names, 0)
        assert len(joints) == 8
        assert all(set(joint.types) == set(names) for joint in joints)
        assert joints == joint_probes(model, names, 8, names, 0) != joint_probes(model, names, 8, names, 1)
        plain = joint_probes(model, names, 8, (), 0)
        assert not any(kind.startswith(("IQ1", "IQ2")) for joint in plain for kind in joint.types.values())


def test_layers_far_apart_come_first() -> None:
    """And one of each part before a second one of any."""
    groups = [GroupPlan(f"{part} {layer}", ("x",), "attention", part, layer) for layer in range(12) for part in "qkv"]
    groups.append(GroupPlan("embedding", ("y",), "embedding", "", None))
    order = spread_out(groups)
    assert {group.part for group in order[:3]} == {"q", "k", "v"}
    assert order[3].name == "embedding"
    assert [group.layer for group in order if group.part == "q"][:3] == [6, 3, 9]
    assert sorted(group.name for group in order) == sorted(group.name for group in groups)


def test_fallbacks() -> None:
    with open_model(embedded_model()) as model:
        info = model.tensors["blk.0.ffn_down_exps.weight"]
        assert fitting("IQ2_XS", info, importance=True) == "IQ2_XS"
        assert fitting("IQ2_XS", info, importance=False) == "Q2_K"
        narrow = type(info)(**{**{f: getattr(info, f) for f in info.__dataclass_fields__}, "shape": (96, 4)})
        assert fitting("Q3_K", narrow, importance=True) == "Q4_0"
        assert fitting("IQ3_XXS", narrow, importance=True) == "IQ4_NL"


def test_journals_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, "spec")
    journal.add({"chunks": 3})
    journal.add({"key": "a", "kld": 1.0})
    assert read_journal(path, "spec") == ({"chunks": 3, "spec": "spec"}, {"a": {"key": "a", "kld": 1.0}})
    assert read_journal(path, "other") == ({}, {})
    for data in (b"", b"[]\n", b"{\n", b'{"spec": "spec"}\n{"no": "key"}\n', b'{"spec": "spec"}\n[1]\n', b"\xff\n"):
        path.write_bytes(data)
        assert read_journal(path, "spec") == ({}, {})
    assert Journal(path, "spec").rows == {}


@pytest.mark.parametrize(("text", "seconds"), [("30min", 1800), ("90s", 90), ("2h", 7200), ("1.5", 90), ("3 m", 180)])
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-3min", "soon", "1e9h", "3 weeks", "inf"])
def test_no_times(text: str) -> None:
    with pytest.raises(UsageError, match="not a time"):
        parse_time(text)


def test_the_file_is_json_of_the_schema(measured: Sensitivities) -> None:
    again = sensitivity.parse(json.loads(json.dumps(measured.to_json())), "s.json")
    assert again.to_json() == measured.to_json()


def test_what_is_shown(measured: Sensitivities, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joint = Joint(name="joint 0", types={"token_embd.weight": KIND}, kld=0.1, error=0.01, n=4)
    console = Console(file=(shown := io.StringIO()), width=200)
    show_sensitivities(console, measured.model_copy(update={"joint": [joint]}), tmp_path / "s.json")
    for word in ("5 groups", "token_embd.weight", KIND, "joint 0", "note:"):
        assert word in shown.getvalue()
    with MeasureBar("measuring m") as bar:
        bar._last_line -= 1000
        bar(MeasureProgress("probes", 3, 9, 1, 100, 12.0))
    assert "probes: 3 of 9 (1 from an earlier run), ETA 12 s" in capsys.readouterr().err


class Named(Exception):
    """Raised instead of measuring."""


def spec_of(text: Path, **changed: Any) -> str:
    """The hash by which a measurement is known."""

    def out(spec: str) -> Path:
        raise Named(spec)

    with pytest.raises(Named) as caught:
        run(out, text, **changed)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_name_for_each_measurement(text: Path) -> None:
    """What changes the numbers changes the name of a file that is named by them; a budget and threads do not, nor does
    the case in which types are written."""
    first = spec_of(text)
    assert spec_of(text, budget=60.0, options=SessionOptions(threads=2), types=[KIND.lower()]) == first
    others = {
        spec_of(text, tokens=5 * CTX), spec_of(text, options=SessionOptions(flash_attention="off")),
        spec_of(text, candidates=["Q8_0", KIND, "Q4_K"]), spec_of(text, seed=1, joint=2),
        spec_of(text, seed=2, joint=2),
    }  # fmt: skip
    assert len(others | {first}) == 6


def test_a_probe_without_numbers_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It neither ends the measurement nor stands in the journal."""
    job: Any = object.__new__(Job)
    job.payload = {"batching": {"sequences": 1, "tokens": 16}}
    job.journal = Journal(tmp_path / "j", "spec")
    job.journal.add({"chunks": 1})
    job.probes = [{"key": name, "group": name, "kind": KIND, "joint": False, "types": {}} for name in "abc"]
    job.budget, job.started, job.resumed, job.spent, job.notes = None, 0.0, 0, 0, []
    job.disturber = job.source = None
    job.patcher, job.session = SimpleNamespace(names=["a"]), SimpleNamespace(threads=1)
    job.emit = lambda _: None
    kept = SimpleNamespace(whole=True, kept=1, rest=0.0)

    def probe(one: dict[str, Any], *_: Any) -> dict[str, Any]:
        if one["key"] == "b":
            raise NotFinite(0, "the model")
        return {"key": one["key"], "kld": 1.0, "seconds": 1.0}

    for name, stand_in in (
        ("_text", lambda: None),
        ("errors", lambda _: {}),
        ("_prepare", lambda *_: SimpleNamespace(seconds=1.0, kept=kept)),
        ("_file", lambda *_: None),
        ("_probe", probe),
    ):
        monkeypatch.setattr(Job, name, staticmethod(stand_in))
    found = job.run(threading.Event())
    assert found["complete"]
    assert len(found["notes"]) == 1
    assert "1 probes were left out" in found["notes"][0]
    assert f"b {KIND}" in found["notes"][0]
    assert set(read_journal(tmp_path / "j", "spec")[1]) == {"a", "c"}


def test_a_journal_with_a_probe_without_numbers(tmp_path: Path) -> None:
    """As one was written before: the rest is not lost."""
    rows = ({"spec": "s", "chunks": 1}, {"key": "a", "kld": 1.0}, {"key": "b", "kld": float("nan")})
    (tmp_path / "j").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert set(read_journal(tmp_path / "j", "s")[1]) == {"a"}


def test_experts_of_a_large_model_are_drawn_from_fast_types(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far down the ladder as others are; and it is another measurement."""
    with open_model(embedded_model()) as model:
        names = list(quantizable(model))
        before = joint_probes(model, names, 8, names, 0)
        spec = spec_of(text, joint=2)
        monkeypatch.setattr(groups, "FAST_ABOVE", 1000)
        after = joint_probes(model, names, 8, names, 0)
        assert groups.experts_ladder(model, names) == groups.FAST
    assert spec_of(text, joint=2) != spec
    experts = {probe.types[name] for probe in after for name in names if "_exps" in name}
    assert experts == set(groups.FAST)
    for one, other in zip(before, after, strict=True):
        assert {n: k for n, k in one.types.items() if "_exps" not in n} == {
            n: k for n, k in other.types.items() if "_exps" not in n
        }
        for name in names:
            if "_exps" in name:  # the nearest of as many steps
                steps = groups.LADDER.index(one.types[name]) / 7, groups.FAST.index(other.types[name]) / 4
                assert abs(steps[0] - steps[1]) < 1 / 14 + 1 / 8


def test_a_joint_probe_says_how_far_its_encoding_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """And stops in the middle of it."""
    job: Any = object.__new__(Job)
    told: list[float] = []
    stop = threading.Event()
    job.emit = lambda event: told.append(event["left"])
    job.pace, job.resumed, job.probes, job.spent = Pace({"Q3_K": 0.01, "IQ2_S": 0.1}), 0, [], 0
    job.source = SimpleNamespace(tensors={name: SimpleNamespace(n_elements=10) for name in "ab"})
    job.loaded = SimpleNamespace(tensors={name: SimpleNamespace(type="BF16") for name in "ab"})
    job.patcher = SimpleNamespace(restore=lambda _: None)
    job.disturber = SimpleNamespace(write=lambda *_, **__: Sums(1, 1, 1, 1))
    monkeypatch.setattr(Job, "_weights", lambda *_: None)
    probing: Any = SimpleNamespace(compare=lambda _: {"kld": 1.0}, plan=SimpleNamespace(tokens=np.zeros(4)))
    probe = {"key": "j", "group": "j", "kind": "", "joint": True, "noise": False, "types": {"a": "Q3_K", "b": "IQ2_S"}}
    tell = job._telling(0, 10.0)
    tell({})
    assert job._probe(probe, probing, stop, tell)["kld"] == 1.0
    assert told == pytest.approx([10.0, 9.9, 8.9])
    stop.set()
    with pytest.raises(Stopped):
        job._probe(probe, probing, stop, tell)


def test_a_file_that_does_not_fit_beside_the_model_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An OOM kill would come again with each run."""
    notes: list[str] = []
    with open_model(embedded_model()) as model:
        size = sum(info.nbytes for info in model.tensors.values())
        monkeypatch.setattr("apex_quant.allocation.measure.available_bytes", lambda: size)
        assert _file(model, tmp_path / "q8.gguf", None, ONE, notes) is None
    assert "of memory" in notes[0]
    assert list(tmp_path.iterdir()) == []


def test_fewer_rows_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    job: Any = object.__new__(Job)
    job.payload, job.notes, job.budget, job.started = {"errors": {}}, [], None, 0.0
    job._weights = job.disturber = None
    for least, count in ((SAMPLE, 0), (SAMPLE // 2, 1)):
        monkeypatch.setattr("apex_quant.allocation.probe_job.error_table", lambda *_, least=least, **__: ({}, least))
        assert job.errors(threading.Event()) == {}
        assert len(job.notes) == count
