"""Real runs on a small model: what is made, what a rerun does, and what stops it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apex_quant import quantize, run
from apex_quant.errors import BusyError, InputError, UsageError
from apex_quant.gguf import split
from apex_quant.pipeline.config import load_config
from apex_quant.pipeline.context import Context, PhaseEvent
from apex_quant.pipeline.results import RunResult
from apex_quant.pipeline.state import Started, State, exclusive
from apex_quant.pipeline.status import status
from apex_quant.pipeline.steps_publish import publish_items
from apex_quant.publishable import publishable
from tests.cli.conftest import Call, call  # noqa: F401 -- a fixture
from tests.convert.tiny_checkpoint import write_checkpoint
from tests.helpers.generic_models import write_generic
from tests.pipeline.conftest import SETTINGS, ran, small_run


def contents(folder: Path) -> dict[str, str]:
    """sha256 of all models, matrices, recipes and references."""
    kinds = (".gguf", ".txt", ".apexref")
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix in kinds
    }


def test_what_a_run_makes(finished: Path) -> None:
    work = finished / "work"
    assert set(contents(work)) == {
        "reference/Small-BF16.apexref", "release/Small-BF16.imatrix.gguf",
        "release/Small-APEX-Quality.gguf", "release/Small-APEX-I-Compact.gguf",
        "release/recipes/Small-BF16-quality.txt", "release/recipes/Small-BF16-i-compact.txt",
    }  # fmt: skip
    made = status(work)
    assert [(one.tier, one.verified, one.quarantined) for one in made.files] == [
        ("quality", True, None), ("i-compact", True, None),
    ]  # fmt: skip
    assert all(one.kld is not None and 0 < one.kld["value"] < 1 for one in made.files)
    found = publishable(work / "release")
    assert sorted(model.paths[0] for model in found.models) == [
        "Small-APEX-I-Compact.gguf", "Small-APEX-Quality.gguf",
    ]  # fmt: skip
    kinds = {file.path: file.kind for file in found.files}
    assert kinds["results/Small-APEX-Quality.json"] == kinds["results/Small-APEX-Quality.npz"] == "results"
    assert kinds["recipes/Small-BF16-quality.txt"] == "recipe"


def test_dates_are_nothing_and_bytes_are_all(again: Path) -> None:
    """New dates rerun nothing; one byte of the calibration text redoes what it decided, and no other tier."""
    before = contents(again / "work")
    for path in again.rglob("*"):
        os.utime(path, ns=(10**18, 10**18))
    assert ran(small_run(again)) == {}
    assert contents(again / "work") == before

    corpus = again / "corpus.txt"
    corpus.write_text(corpus.read_text().replace("quick", "quack", 1))
    said: list[PhaseEvent] = []
    made = small_run(again, progress=lambda event: said.append(event) if isinstance(event, PhaseEvent) else None)
    only = ("i-compact",)
    assert ran(made) == {"calibrate": ("",), "recipes": only, "quantize": only, "verify": only, "evaluate": only}
    after = contents(again / "work")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"release/Small-BF16.imatrix.gguf", "release/Small-APEX-I-Compact.gguf"}
    reasons = {event.phase: event.text for event in said if event.kind in ("run", "skip")}
    assert reasons["calibrate"].startswith("corpus corpus.txt changed (sha256 ")
    assert reasons["quantize"].startswith("1 of 2: i-compact: imatrix changed (sha256 ")
    assert reasons["reference"] == "unchanged"


def test_a_damaged_file_is_made_again(again: Path) -> None:
    before = contents(again / "work")
    (again / "work/reference/Small-BF16.apexref").unlink()
    file = again / "work/release/Small-APEX-Quality.gguf"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    looked = small_run(again, dry_run=True)
    why = {one.name: one.reason for one in looked.phases}
    assert why["reference"] == "reference/Small-BF16.apexref is gone"
    assert why["quantize"] == "1 of 2: quality: release/Small-APEX-Quality.gguf was changed"
    made = small_run(again, phases={"only": ["quantize"]})
    assert ran(made) == {"quantize": ("quality",)}
    assert contents(again / "work").items() >= {(k, v) for k, v in before.items() if "apexref" not in k}


def test_a_file_above_its_ceiling_is_quarantined(again: Path) -> None:
    """The check needs no new measurement of the others, the note keeps the file from the hub."""
    made = small_run(again, verify={"generate": 8, "kld_ceiling": {"i-compact": 1e-6}})
    assert ran(made) == {"evaluate": ("i-compact",)}
    (bad,) = made.quarantined
    assert bad.tier == "i-compact"
    assert bad.quarantined is not None
    assert bad.quarantined.endswith("is above 1e-06, the ceiling of i-compact")
    with pytest.raises(InputError, match=r"I-Compact\.gguf: quarantined: mean KLD"):
        publishable(again / "work/release")
    assert ran(small_run(again)) == {"evaluate": ("i-compact",)}  # with the ceiling of old, it is released
    assert publishable(again / "work/release").models


def test_two_runs_exclude_each_other(again: Path) -> None:
    with exclusive(again / "work"):
        with pytest.raises(BusyError, match=f"another apex run is working there .process {os.getpid()} since"):
            small_run(again)
        assert status(again / "work").running is not None
    assert status(again / "work").running is None
    assert ran(small_run(again)) == {}


def test_a_dry_run_changes_nothing(again: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*")}
    made = small_run(again, dry_run=True, tiers=["quality", "i-compact", "nano"], threads=2)
    assert ran(made) == {"recipes": ("nano",), "quantize": ("nano",), "verify": ("nano",), "evaluate": ("nano",)}
    assert {one.phase for one in made.estimates} == set(ran(made))
    assert made.disk is not None
    assert made.to_json()["disk"] == {"peak": made.disk[0], "end": made.disk[1]}
    assert "disk" not in replace(made, dry_run=False).to_json()
    assert {path: path.stat().st_mtime_ns for path in again.rglob("*")} == before


def test_a_phase_needs_those_before_it(finished: Path, tmp_path: Path) -> None:
    os.link(finished / "Small-BF16.gguf", tmp_path / "Small-BF16.gguf")
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(UsageError, match="phase source has not run in") as caught:
        small_run(tmp_path, phases={"phase": "quantize"})
    assert caught.value.hint == "--from source runs it and what follows"


def test_a_phase_that_is_left_out_must_be_up_to_date(again: Path, tmp_path: Path) -> None:
    """Another model, other settings or a damaged file before the phases asked for: refused, nothing is changed."""
    before = contents(again / "work")
    state = (again / "work/state.json").read_text()
    other = again / "Other-BF16.gguf"
    quantize(again / "Small-BF16.gguf", "Q8_0", out=other, threads=1)
    with pytest.raises(UsageError) as caught:
        run(other, **{**SETTINGS, "work": str(again / "work"), "phases": {"from": "recipes"}})
    assert caught.value.message.startswith(
        "recipes builds on source, which is left out of this run and out of date: model changed (sha256 "
    )
    with pytest.raises(InputError, match="no such file"):
        run(again / "none.gguf", **{**SETTINGS, "work": str(again / "work"), "phases": {"from": "verify"}}, force=True)
    corpus = [str(again / "corpus.txt")]
    with pytest.raises(UsageError, match=r"calibrate, which is left out .* out of date: tokens is 128, was 256"):
        small_run(
            again, calibrate={"tokens": 128, "ctx": 64, "corpus": corpus}, phases={"from": "quantize"}, force=True
        )
    with pytest.raises(UsageError, match=r"recipes, which is left out .* out of date: after calibrate"):
        small_run(again, phases={"only": ["calibrate", "quantize"]}, force=True)
    assert (contents(again / "work"), (again / "work/state.json").read_text()) == (before, state)
    (again / "work/reference/Small-BF16.apexref").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"evaluate builds on reference, .*Small-BF16\.apexref was changed"):
        small_run(again, phases={"phase": "evaluate"}, force=True)
    made = small_run(again, report={"formats": ["md"]}, phases={"phase": "report"})  # which does not read that file
    assert ran(made) == {"report": ("",)}


def test_a_wrong_source_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    for source, says in {
        tmp_path: "holds no config.json",
        tmp_path / "hf": "holds no model",
        tmp_path / "x.gguf": "x.gguf",
        tmp_path / "none": "no such file or folder",
    }.items():
        with pytest.raises(InputError, match=says):
            run(source, work=str(tmp_path / "work"))
    assert not (tmp_path / "work").exists()


def test_what_counts_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a conversion reads: not the card, nor what the run itself puts there."""
    folder = write_checkpoint(tmp_path / "Tiny-MoE")
    monkeypatch.chdir(folder)

    def only_source() -> RunResult:
        return run(".", phases={"only": ["source"]})

    made = only_source()
    assert made.work == folder / "Tiny-MoE-apex"
    assert ran(made) == {"source": ("",)}
    (folder / "README.md").write_text("a card")
    (folder / "logo.png").write_bytes(b"png")
    (made.work / "release/results/x.json").write_text("{}")
    (folder / "other-apex").mkdir()
    (folder / "other-apex/state.json").write_text("{}")
    assert ran(only_source()) == {}
    (folder / "tokenizer_config.json").write_text("{}")
    assert ran(only_source()) == {"source": ("",)}


def test_the_source_is_never_cleared_away(finished: Path, tmp_path: Path) -> None:
    """A source that lies where a file would be made is refused, and stays."""
    place = tmp_path / "work/release/Small-APEX-Quality.gguf"
    place.parent.mkdir(parents=True)
    os.link(finished / "work/release/Small-APEX-Quality.gguf", place)
    with pytest.raises(UsageError, match="is the source"):
        run(place, name="Small", work=str(tmp_path / "work"), tiers=["quality"], quantize={"allow_requantize": True},
            evaluate={"suite": "none"})  # fmt: skip
    assert place.stat().st_size > 1_000_000


def test_a_name_is_a_link_and_never_the_only_copy(finished: Path, tmp_path: Path) -> None:
    """Another name makes another link; a link of ours that has become the source is not deleted."""
    work, source = tmp_path / "work", tmp_path / "Given-BF16.gguf"
    os.link(finished / "Small-BF16.gguf", source)

    def only_source(place: Path, name: str) -> None:
        run(place, name=name, work=str(work), phases={"only": ["source"]})

    only_source(source, "First")
    link = work / "source/First.gguf"
    assert link.samefile(source)
    only_source(source, "Second")
    assert not link.exists()
    link = work / "source/Second.gguf"
    source.unlink()
    only_source(link, "Second")
    only_source(link, "Third")
    assert link.exists()
    assert (work / "source/Third.gguf").samefile(link)


def test_what_only_evaluation_needs_is_left_out_with_it(finished: Path, tmp_path: Path) -> None:
    made = run(
        finished / "Small-BF16.gguf", work=str(tmp_path / "work"), tiers=["quality"], dry_run=True,
        phases={"skip": ["evaluate"]},
    )  # fmt: skip
    assert list(ran(made)) == ["source", "recipes", "quantize", "verify"]


def test_commands(again: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """apex run with options and with YAML, apex status; exit codes."""
    monkeypatch.chdir(again)
    yaml = again / "run.yaml"
    yaml.write_text(
        "source: Small-BF16.gguf\nwork: work\ntiers: [quality, i-compact]\nthreads: 1\n"
        "reference: {ctx: 64, chunks: 1}\ncalibrate: {tokens: 256, ctx: 64, corpus: [corpus.txt]}\n"
        "evaluate: {only: [ppl, kld]}\nverify: {generate: 8}\n"
    )
    done = call("run", yaml, "--skip", "report", "--json")
    assert done.status == 0, done.err
    document = json.loads(done.out)
    assert not any(one["ran"] for one in document["phases"]), done.err
    assert [one["tier"] for one in document["files"]] == ["quality", "i-compact"]
    assert "reference  skipped: unchanged" in done.err
    done = call("run", yaml, "--tiers", "quality", "--skip", "report", "--set", "calibrate.tokens=1k", "--dry-run")
    assert done.status == 0, done.err
    assert "nothing was done" in done.out
    assert "no tier is encoded with an importance matrix" in done.out
    done = call("run", yaml, "--set", "evaluate.suit=all")
    assert (done.status, done.err.splitlines()[0]) == (2, "error: evaluate.suit: is not known. Did you mean suite?")
    done = call("status", again / "work")
    assert done.status == 0
    assert re.search(r"quantize +(quality, i-compact|i-compact, quality) .* unchanged", done.out)
    assert call("status", again).status == 3
    assert call("run", again / "none.gguf").status == 3
    assert call("run").status == 2


def test_quarantined_files_end_with_status_3(again: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """After everything else was done, and said."""
    good = status(again / "work")
    files = (replace(good.files[0], quarantined="garbage"), good.files[1])
    made = RunResult(again / "work", (), files, (), None, 1.0, False)
    monkeypatch.setattr("apex_quant.pipeline.engine.run", lambda config, **more: made)
    done = call("run", again / "Small-BF16.gguf")
    assert done.status == 3
    assert done.err.splitlines()[0] == "error: 1 of 2 files are quarantined: quality: garbage"
    assert "i-compact" in done.out


def test_a_projector_is_published_as_it_is(finished: Path, tmp_path: Path) -> None:
    """A finished one, named by the user; publishable() asks for no journal of it."""
    for name in ("Small-BF16.gguf", "corpus.txt"):
        shutil.copy2(finished / name, tmp_path / name)
    tensors = {"v.patch_embd.weight": ((16, 16), "F16")}
    projector = write_generic(tmp_path / "mm.gguf", "clip", tensors, **{"/general__file_type": 1})
    made = small_run(tmp_path, convert={"mmproj": str(projector)}, phases={"only": ["source"]})
    assert ran(made) == {"source": ("", "mmproj")}
    beside = tmp_path / "work/release/mmproj-Small-BF16.gguf"
    assert beside.samefile(projector)
    listed = publishable(beside.parent)
    assert [(file.path, file.kind) for file in listed.files] == [(beside.name, "projector")]
    assert listed.models == ()
    assert ran(small_run(tmp_path, convert={"mmproj": str(projector)}, phases={"only": ["source"]})) == {}
    with pytest.raises(InputError, match="not a projector"):
        small_run(tmp_path, convert={"mmproj": str(tmp_path / "Small-BF16.gguf")}, phases={"only": ["source"]})
    with pytest.raises(InputError, match="no such file"):
        small_run(tmp_path, convert={"mmproj": str(tmp_path / "none.gguf")}, phases={"only": ["source"]})


@pytest.mark.parametrize("linked", [False, True])
def test_what_is_given_is_never_cleared_away(again: Path, linked: bool) -> None:
    """A matrix and a projector that lie under the names that the run would give them."""
    release = again / "work/release"
    tensors = {"v.patch_embd.weight": ((16, 16), "F16")}
    projector = release / "mmproj-Small-BF16.gguf"
    write_generic(projector, "clip", tensors, **{"/general__file_type": 1})
    matrix = release / "Small-BF16.imatrix.gguf"
    before = {path: path.read_bytes() for path in (matrix, projector)}
    names = {"imatrix": matrix, "mmproj": projector}
    if linked:
        for label, path in names.items():
            names[label] = again / f"{label}.gguf"
            names[label].symlink_to(path)
    given: dict[str, Any] = {"convert": {"mmproj": str(names["mmproj"])}, "phases": {"only": ["source", "calibrate"]}}
    for force in (False, True):
        made = run(again / "Small-BF16.gguf", work=str(again / "work"), tiers=["i-compact"], **given, force=force,
                   calibrate={"imatrix": str(names["imatrix"])}, evaluate={"suite": "none"})  # fmt: skip
        assert ran(made) == {"source": ("", "mmproj") if force else ("mmproj",), "calibrate": ("",)}
        assert {path: path.read_bytes() for path in before} == before
    state = State(again / "work").load()
    assert [state.records[phase][name].claims for phase, name in (("source", "mmproj"), ("calibrate", ""))] == [[], []]


def test_the_folder_of_the_caller_is_nothing(again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative names mean the same to `apex status` elsewhere, folders of text and a source like a hub id included."""
    (again / "org").mkdir()
    (again / "org/Small.gguf").hardlink_to(again / "Small-BF16.gguf")
    (again / "texts").mkdir()
    (again / "corpus.txt").rename(again / "texts/corpus.txt")
    monkeypatch.chdir(again)
    run("org/Small.gguf", work="other", tiers=["i-compact"], calibrate={"corpus": ["texts"], "tokens": 256, "ctx": 64},
        threads=1, evaluate={"suite": "none"}, phases={"only": ["source", "calibrate"]})  # fmt: skip
    there = {one.name: one.next for one in status("other").phases}
    monkeypatch.chdir("/")
    elsewhere = {one.name: one.next for one in status(again / "other").phases}
    assert elsewhere == there
    assert (there["source"], there["calibrate"]) == ("unchanged", "unchanged")


def test_shards_and_names_are_part_of_a_file(again: Path, tmp_path: Path) -> None:
    """What decides only how a file is cut or called makes it anew as well; what has the old name goes."""
    release = tmp_path / "work/release"
    source = split(again / "Small-BF16.gguf", tmp_path / "Split", 8_000_000)[0]

    def made(**more: Any) -> dict[str, tuple[str, ...]]:
        return ran(run(source, work=str(tmp_path / "work"), tiers=["quality"], threads=1, evaluate={"suite": "none"},
                       phases={"only": ["source", "recipes", "quantize"]}, **more))  # fmt: skip

    made()
    assert [path.name for path in release.glob("*.gguf")] == ["Split-APEX-Quality.gguf"]
    assert made(quantize={"keep_split": True}) == {"recipes": ("quality",), "quantize": ("quality",)}
    assert len(list(release.glob("Split-APEX-Quality-*-of-*.gguf"))) > 1
    assert not (release / "Split-APEX-Quality.gguf").exists()
    made()
    again_made = made(name="Other")
    assert again_made == {"source": ("",), "recipes": ("quality",), "quantize": ("quality",)}
    assert {path.name for path in release.rglob("*") if path.is_file()} == {
        "Other-APEX-Quality.gguf", "Other-APEX-Quality.gguf.journal", "Other-quality.txt",
    }  # fmt: skip


def test_another_name_is_another_name_everywhere(again: Path) -> None:
    """The files of all phases that have it in theirs, and the results that are published beside them."""
    made = small_run(again, name="Other")
    assert list(ran(made)) == ["source", "reference", "calibrate", "recipes", "quantize", "verify", "evaluate"]
    files = [path.name for path in (again / "work").rglob("*") if path.is_file() and "Small" in path.name]
    assert files == []
    assert sorted(path.name for path in (again / "work/release/results").iterdir() if path.suffix == ".json") == [
        "Other-APEX-I-Compact.json", "Other-APEX-Quality.json",
    ]  # fmt: skip


def test_publish_waits_for_the_last_phase_before_it(again: Path) -> None:
    (item,) = publish_items(_looked_at(again, {("verify", "quality"), ("evaluate", "quality")}))
    assert item.inputs["files"] == "after evaluate"


def test_a_report_without_what_was_not_measured(again: Path) -> None:
    """A run that measures nothing reports what was measured before, and says what is missing."""
    said: list[object] = []
    given: dict[str, Any] = {"tiers": ["quality", "i-compact", "compact"], "report": {"formats": ["md"]}}
    made = small_run(again, **given, phases={"skip": ["verify", "evaluate"]}, progress=said.append)
    assert "report" in ran(made)
    notes = [e.text for e in said if isinstance(e, PhaseEvent) and (e.kind, e.phase) == ("note", "report")]
    assert "without compact: not measured, and evaluation is left out" in notes
    shown = State(again / "work").load().records["report"][""].inputs
    assert sorted(shown) == ["results of i-compact", "results of quality"]
    made = small_run(again, **given, phases={"only": ["verify", "evaluate", "report"]})
    assert "report" in ran(made)
    assert "results of compact" in State(again / "work").load().records["report"][""].inputs


def test_status_without_a_tier_file(again: Path) -> None:
    """The file that a tier of the user's own was read from is gone: what was made of it is told all the same."""
    state = State(again / "work").load()
    state.about["config"]["tiers"] = [str(again / "mine.toml")]
    state.save()
    found = status(again / "work")
    assert sorted(file.tier for file in found.files) == ["i-compact", "quality"]
    assert all("mine.toml" in one.next for one in found.phases)


def test_settings_of_another_kind_of_source(finished: Path, tmp_path: Path) -> None:
    source, work = finished / "Small-BF16.gguf", str(tmp_path / "work")
    for given, why in (
        ({"source_files": "*BF16*"}, "source_files concerns a download"),
        ({"convert": {"mmproj": True}}, "the source is a GGUF"),
    ):
        for dry_run in (False, True):
            with pytest.raises(UsageError, match=why):
                run(source, work=work, dry_run=dry_run, **given)
    with pytest.raises(UsageError, match="the source is a GGUF"):
        run("org/Tiny", work=work, source_files="*BF16*", convert={"mmproj": True}, dry_run=True)
    assert not (tmp_path / "work").exists()
    said: list[str] = []
    run(source, work=work, tiers=["quality"], convert={"outtype": "f16", "nextn": False, "mmproj": False}, dry_run=True,
        progress=lambda event: said.append(event.text))  # fmt: skip
    assert "the source is a GGUF: convert.outtype, convert.nextn not used" in said


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, how: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    said: list[str] = []
    with exclusive(tmp_path, said.append):
        assert said == [f"{tmp_path}: this file system has no locks: nothing keeps a second run out of the folder"]


def test_what_is_known_of_a_file_outlives_the_run(again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended after the file was made and before it was recorded."""
    given: dict[str, Any] = {"phases": {"only": ["reference"]}, "reference": {"ctx": 32, "chunks": 1}}
    before = State(again / "work").load().records["reference"][""].facts

    def ends(state: State, path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(State, "stored", ends)
        with pytest.raises(KeyboardInterrupt):
            small_run(again, **given)
    small_run(again, **given)
    facts = State(again / "work").load().records["reference"][""].facts
    assert set(facts) == set(before)
    assert facts["tokens"] < before["tokens"]


def _looked_at(folder: Path, pending: set[tuple[str, str]]) -> Context:
    config = load_config(None, {"source": str(folder / "Small-BF16.gguf"), "publish.repo": "me/Small"})
    return Context(config, folder / "work", State(folder / "work").load(), pending=pending)


def test_a_finished_matrix_that_was_not_recorded(again: Path) -> None:
    """Where the model runs decides nothing: the matrix is found with other options, and its bytes are the same."""
    before = contents(again / "work")
    state = State(again / "work").load()
    record = state.records["calibrate"].pop("")
    state.started["calibrate"] = {"": Started(record.key, record.claims)}
    state.save()
    made = small_run(again, gpu={"tensor_buffers": ["exps=CPU"], "mmap": False})
    assert ran(made) == {"calibrate": ("",)}
    assert contents(again / "work") == before
    forced = small_run(again, gpu={"cpu_experts": True}, phases={"phase": "calibrate"}, force=True)
    assert ran(forced) == {"calibrate": ("",)}
    assert contents(again / "work") == before


def test_a_matrix_of_another_library_is_replaced(again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies there finished, and the version that begins now would make another: no reason to be stuck."""
    state = State(again / "work").load()
    record = state.records["calibrate"].pop("")
    state.started["calibrate"] = {"": Started(record.key, record.claims)}
    state.save()
    monkeypatch.setattr("apex_quant.calibration.calibrate._FORMAT", "another")
    assert "calibrate" in ran(small_run(again))


def test_minutes_of_hashing_are_announced(again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they begin; and not by a run that knows the hashes."""
    monkeypatch.setattr("apex_quant.pipeline.context._WORTH_SAYING", 1)
    said: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, PhaseEvent) and event.kind == "note":
            said.append(event.text)

    small_run(again)  # a copy is another file until it was read
    small_run(again, dry_run=True, progress=listen)
    assert said == []
    os.utime(again / "Small-BF16.gguf")
    small_run(again, dry_run=True, progress=listen)
    assert said == ["reading 0 GB once, for their sha256"]
