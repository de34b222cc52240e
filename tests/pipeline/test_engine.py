"""The engine on a table of toy phases: what runs, why, what is resumed, cleared and freed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from apex_quant.errors import InputError, ResourceError, UsageError
from apex_quant.pipeline import disk, engine, room
from apex_quant.pipeline.config import PHASES as NAMES
from apex_quant.pipeline.config import load_config
from apex_quant.pipeline.context import Context, PhaseEvent
from apex_quant.pipeline.phases import Done, Item, Need, Phase, always
from apex_quant.pipeline.reasons import changes, grouped
from apex_quant.pipeline.results import PhaseRun, RunResult
from apex_quant.pipeline.state import Record, Started, State, key_of
from tests.pipeline.conftest import ran


class Toy:
    """source -> convert -> calibrate -> quantize (two items, one reads calibrate's file); the rest have nothing to do.

    Every phase writes its input's text with its own name around it.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.work = folder, folder / "work"
        self.source = folder / "hf"
        self.source.mkdir()
        (self.source / "config.json").write_text("weights")
        self.calls: list[tuple[str, str]] = []
        self.fails: str | None = None
        self.tokens, self.needs = 5, 0
        self.asked: Sequence[str] = ("plain", "weighted")
        self.text = folder / "text"
        self.text.write_text("abc")
        rows = {
            "source": self.phase(
                "source", lambda c: [Item("", {}, {"file": c.state.sha256(self.source / "config.json")})]
            ),
            "convert": self.phase("convert", lambda c: [Item("", {}, {"in": c.artifact("source", "out").digest})]),
            "calibrate": self.phase("calibrate", self.calibrations, weights=True),
            "quantize": self.phase("quantize", self.tiers, weights=True),
        }
        empty = [self.phase(name, lambda c: [], unused="nothing to do") for name in NAMES]
        table = tuple(rows.get(phase.name, phase) for phase in empty)
        self.table = table
        monkeypatch.setattr(engine, "PHASES", table)
        monkeypatch.setattr(room, "facts_at_hand", lambda context: None)
        monkeypatch.setattr(room, "needs", self.room)
        monkeypatch.setattr(engine, "check_source", lambda config: None)
        monkeypatch.setattr(engine, "refuse_hopeless", lambda context, looks: None)
        monkeypatch.setattr("apex_quant.pipeline.results.wanted", lambda config: [])

    def room(self, context: Context, phase: Phase, items: Sequence[Item], facts: None) -> list[Need]:
        return [Need(self.work, self.needs)] if phase.weights(context) else []

    def calibrations(self, context: Context) -> list[Item]:
        inputs = {"model": context.artifact("convert", "model").digest, "text": context.state.sha256(self.text)}
        return [Item("", {"tokens": self.tokens}, inputs)]

    def tiers(self, context: Context) -> list[Item]:
        model = {"model": context.artifact("convert", "model").digest}
        items = [
            Item("plain", {"type": "Q8_0"}, model),
            Item("weighted", {"type": "IQ2_S"}, {**model, "imatrix": context.artifact("calibrate", "out").digest}),
        ]
        return [item for item in items if item.name in self.asked]

    def phase(self, name: str, items: object, *, weights: bool = False, unused: str | None = None) -> Phase:
        label = "model" if name == "convert" else "out"

        def claims(context: Context, item: Item) -> Iterable[Path]:
            return [self.work / "release" / f"{name}-{item.name}"]

        def work(context: Context, due: Sequence[Item]) -> Iterator[Done]:
            for item in due:
                (out,) = claims(context, item)
                self.calls.append((name, item.name))
                if weights:
                    assert context.artifact("convert", "model").path.exists()
                half = out.with_name(out.name + ".partial")
                half.write_text("half")
                if self.fails == f"{name} {item.name}".strip():
                    raise InputError("broken")
                half.unlink()
                out.write_text(json.dumps([name, item.parameters, item.inputs], default=dict))
                yield Done(item, {label: [out]})

        return Phase(
            name, (), name, items, work, claims,  # type: ignore[arg-type]
            always if unused is None else lambda context: unused,
            weights=lambda context: weights,
        )  # fmt: skip

    def run(self, *, force: bool = False, progress: object = None, **options: object) -> RunResult:
        """Toy options and those of the configuration; the folder is the toy's."""
        self.calls.clear()
        given = {"source": str(self.source), "work": str(self.work), **options}
        config = load_config(None, given)
        return engine.run(config, force=force, progress=progress)  # type: ignore[arg-type]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    return Toy(tmp_path, monkeypatch)


ALL = [("source", ""), ("convert", ""), ("calibrate", ""), ("quantize", "plain"), ("quantize", "weighted")]


def reasons(made: RunResult) -> dict[str, str]:
    return {one.name: one.reason for one in made.phases if one.ran}


def test_only_what_changed(toy: Toy) -> None:
    toy.run(keep=True)
    assert toy.calls == ALL
    toy.run(keep=True)
    assert toy.calls == []
    toy.tokens = 6
    made = toy.run(keep=True)
    assert toy.calls == [("calibrate", ""), ("quantize", "weighted")]
    assert reasons(made)["calibrate"] == "tokens is 6, was 5"
    assert reasons(made)["quantize"].startswith("1 of 2: weighted: imatrix changed (sha256 ")
    (toy.source / "config.json").write_text("other weights")
    toy.run(keep=True)
    assert toy.calls == ALL


def test_selection(toy: Toy) -> None:
    with pytest.raises(UsageError, match="phase source has not run"):
        toy.run(phases={"phase": "convert"})
    toy.run(phases={"only": ["source", "convert"]})
    assert toy.calls == ALL[:2]
    toy.run(phases={"from": "calibrate"})
    assert toy.calls == ALL[2:]
    with pytest.raises(UsageError, match="calibrate reads the files of phase convert, which were deleted"):
        toy.run(phases={"phase": "calibrate"}, force=True)
    made = toy.run(phases={"only": ["convert", "calibrate"]}, force=True, keep=True)
    assert toy.calls == [("convert", ""), ("calibrate", "")]
    assert reasons(made) == {"convert": "asked for with --force", "calibrate": "asked for with --force"}
    toy.tokens = 9
    toy.run(phases={"skip": ["quantize"]}, keep=True)
    assert toy.calls[-1] == ("calibrate", "")
    assert ("quantize", "weighted") not in toy.calls


def test_a_failure_keeps_what_was_finished_and_is_resumed(toy: Toy) -> None:
    toy.fails = "quantize weighted"
    with pytest.raises(InputError, match="broken"):
        toy.run()
    assert toy.calls == ALL
    left = toy.work / "release/quantize-weighted.partial"
    assert left.exists()
    state = State(toy.work).load()
    assert set(state.records["quantize"]) == {"plain"}
    assert set(state.started["quantize"]) == {"weighted"}
    assert (toy.work / "release/convert-").exists()  # a phase still reads it
    toy.fails = None
    made = toy.run()
    assert toy.calls == [("quantize", "weighted")]
    assert reasons(made) == {"quantize": "1 of 2: weighted: goes on where an earlier run stopped"}
    assert State(toy.work).load().started == {}


def test_what_another_configuration_began_is_cleared_away(toy: Toy) -> None:
    toy.fails = "calibrate"
    with pytest.raises(InputError):
        toy.run()
    left = toy.work / "release/calibrate-.partial"
    assert left.read_text() == "half"
    (toy.work / "release/calibrate-.sums").write_text("of 5 tokens")
    toy.fails, toy.tokens = None, 7
    made = toy.run()
    assert reasons(made)["calibrate"] == "not made yet"
    assert not (toy.work / "release/calibrate-.sums").exists()


def test_what_is_no_longer_asked_for(toy: Toy) -> None:
    """In hand it is cleared away, finished it stays and is told of, whether or not anything is left to do."""
    toy.fails = "quantize weighted"
    with pytest.raises(InputError, match="broken"):
        toy.run(keep=True)
    release = toy.work / "release"
    assert (release / "quantize-weighted.partial").exists()
    toy.asked = ("plain",)
    assert "quantize" not in ran(toy.run(keep=True))
    assert not (release / "quantize-weighted.partial").exists()
    assert State(toy.work).load().started == {}
    toy.asked, toy.fails = ("weighted",), None
    for first in (True, False):
        said: list[object] = []
        assert ("quantize" in ran(toy.run(keep=True, progress=said.append))) == first
        notes = [e.text for e in said if isinstance(e, PhaseEvent) and e.kind == "note"]
        assert notes == ["plain is no longer asked for; its file stays: release/quantize-plain"]
    (release / "quantize-plain").unlink()
    said = []
    toy.run(keep=True, progress=said.append)
    assert [e for e in said if isinstance(e, PhaseEvent) and e.kind == "note"] == []


def test_what_was_in_hand_beside_a_finished_file_of_the_same_name(toy: Toy) -> None:
    """An item under another name had the same file in hand, which has been finished since: that stays."""
    toy.run(keep=True)
    state = State(toy.work).load()
    state.started["quantize"] = {"alias": Started("k", state.records["quantize"]["plain"].claims)}
    state.save()
    assert ran(toy.run(keep=True)) == {}
    assert (toy.work / "release/quantize-plain").exists()
    assert State(toy.work).load().started == {}


def test_force_begins_anew_what_was_interrupted(toy: Toy) -> None:
    toy.fails = "calibrate"
    with pytest.raises(InputError):
        toy.run()
    (toy.work / "release/calibrate-.sums").write_text("half of them")
    toy.fails = None
    made = toy.run(phases={"from": "calibrate"}, force=True)
    assert reasons(made)["calibrate"] == "asked for with --force"
    assert not (toy.work / "release/calibrate-.sums").exists()


def test_the_converted_file_is_freed_and_made_again_when_it_is_read(toy: Toy) -> None:
    said: list[PhaseEvent] = []
    toy.run(progress=said.append)
    converted = toy.work / "release/convert-"
    assert not converted.exists()
    (note,) = [event.text for event in said if event.kind == "note"]
    assert note.startswith("deleted release/convert- (")
    made = toy.run()
    assert toy.calls == []
    assert {one.name: one.reason for one in made.phases}["convert"] == (
        "unchanged; its file was deleted and nothing needs it"
    )
    toy.tokens = 6
    made = toy.run()
    assert toy.calls == [("convert", ""), ("calibrate", ""), ("quantize", "weighted")]
    assert reasons(made)["convert"] == "calibrate reads its file, which was deleted"
    assert not converted.exists()
    toy.tokens = 7
    toy.run(keep=True)
    assert converted.exists()


def test_what_is_left_out_of_this_run_alone_may_still_read_the_converted_file(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unused(context: Context) -> str | None:
        return "evaluation is left out" if "evaluate" in context.config.phases.skip else None

    table = [replace(one, unused=unused) if one.name == "quantize" else one for one in toy.table]
    monkeypatch.setattr(engine, "PHASES", tuple(table))
    toy.run(phases={"skip": ["evaluate"]})
    assert toy.calls == ALL[:3]
    assert (toy.work / "release/convert-").exists()
    toy.run()
    assert toy.calls == ALL[3:]
    assert not (toy.work / "release/convert-").exists()


def test_nothing_outside_is_freed(toy: Toy) -> None:
    toy.run(keep=True)
    state = State(toy.work).load()
    (file,) = state.records["convert"][""].outputs["model"]
    outside = toy.folder / "mine"
    outside.write_bytes((toy.work / file.path).read_bytes())
    file.path = str(outside)
    state.save()
    with pytest.raises(UsageError, match="nothing is deleted"):
        toy.run()
    assert outside.exists()


def test_a_run_that_ended_while_it_freed_a_file(toy: Toy) -> None:
    """Recorded as deleted, and still there: the next run reads it where it can, and deletes it."""
    toy.run(keep=True)
    converted = toy.work / "release/convert-"
    state = State(toy.work).load()
    state.records["convert"][""].released = True
    state.save()
    toy.tokens = 6
    toy.run()
    assert toy.calls == [("calibrate", ""), ("quantize", "weighted")]
    assert not converted.exists()


def test_a_file_that_is_gone_or_changed(toy: Toy) -> None:
    toy.run(keep=True)
    (toy.work / "release/quantize-plain").unlink()
    (toy.work / "release/calibrate-").write_text("else")
    made = toy.run(keep=True)
    assert reasons(made) == {
        "calibrate": "release/calibrate- was changed", "quantize": "1 of 2: plain: release/quantize-plain is gone",
    }  # fmt: skip
    assert toy.calls == [("calibrate", ""), ("quantize", "plain")]


def test_disk_is_looked_at_before(toy: Toy) -> None:
    toy.needs = 1 << 60
    with pytest.raises(ResourceError, match=r"calibrate: .*: 1152921504623624192 bytes needed, \d+ free") as caught:
        toy.run()
    assert caught.value.exit_code == 4
    assert toy.calls == ALL[:2]


def test_each_file_is_hashed_once(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the source nor an output is read twice in a run, and not at all in the next."""
    read: list[str] = []
    real = Path.open

    def opened(path: Path, mode: str = "r", **more: object) -> object:
        if mode == "rb" and path.name != "state.json":
            read.append(path.name)
        return real(path, mode, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", opened)
    toy.run(keep=True)
    assert read.count("config.json") == 1
    assert len(read) == len(set(read))
    read.clear()
    toy.run(keep=True)
    assert read == []


def test_json_of_the_result(toy: Toy) -> None:
    document = toy.run(keep=True).to_json()
    assert json.loads(json.dumps(document)) == document
    assert [one["name"] for one in document["phases"]] == list(NAMES)


# --- parts ---


def test_changes() -> None:
    record = Record("", {"a": 1, "b": {"c": [1], "d": "x"}}, {"f": "0" * 64, "g": "1" * 64})
    same = Item("", {"b": {"d": "x", "c": [1]}, "a": 1}, {"g": "1" * 64, "f": "0" * 64})
    assert changes(record, same) is None
    assert key_of(record.parameters, record.inputs) == key_of(same.parameters, same.inputs)
    other = Item("", {"b": {"c": [2], "e": 1}, "a": 1}, {"f": "2" * 64, "h": "1" * 64})
    assert changes(record, other) == "b.c is [2], was [1]; b.d is unset, was x; b.e is 1, was unset and 3 more"


def test_grouped() -> None:
    assert grouped([], 3) == ""
    assert grouped([("", "x")], 0) == "x"
    assert grouped([("a", "x"), ("b", "x")], 1) == "2 of 3: a, b: x"
    assert grouped([("a", "x"), ("b", "y")], 0) == "a: x; b: y"


def test_nothing_outside_is_deleted(tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "release").mkdir(parents=True)
    outside = tmp_path / "mine"
    outside.write_text("x")
    for path in (outside, work, work / ".." / "mine", Path("/")):
        with pytest.raises(UsageError, match="nothing is deleted"):
            disk.clear(work, path)
    for name in ("a.gguf", "a.gguf.journal", "a.gguf.quarantine.json", "ab.gguf"):
        (work / "release" / name).write_text("x")
    disk.clear(work, work / "release/a.gguf", keep=[work.resolve() / "release/a.gguf"])
    assert sorted(path.name for path in (work / "release").iterdir()) == ["a.gguf", "ab.gguf"]
    disk.clear(work, work / "release/a.gguf")
    assert [path.name for path in (work / "release").iterdir()] == ["ab.gguf"]


def test_a_link_is_no_copy(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    target = disk.link(tmp_path / "a", tmp_path / "folder" / "b")
    assert target.samefile(tmp_path / "a")
    assert disk.link(tmp_path / "a", target) == target


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"apex_run": 2}', '{"apex_run": 1}', '{"apex_run": 1, "phases": {"a": {"": {}}}}',
     '{"apex_run": 1, "phases": [], "started": {}, "hashes": {}, "about": {}}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_state_is_an_input_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(InputError, match=r"state\.json"):
        State(tmp_path).load()


def test_the_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    state = State(tmp_path)
    (tmp_path / "x").write_text("x")
    record = Record("k", {"a": [1]}, {"b": "c"}, {"out": [state.stored(tmp_path / "x")]}, {"f": 1}, 1.5, "now", ["x"])
    state.records = {"calibrate": {"": record}}
    state.about = {"name": "n"}
    state.save()
    again = State(tmp_path).load()
    assert (again.records, again.about, again.hashes) == (state.records, state.about, state.hashes)
    assert again.damage(record) is None
    assert PhaseRun("a", ("",), (), "r").to_json()["ran"] == [""]


@pytest.mark.parametrize("work", ["sub/../out", "link/out", "../{name}/out"])
def test_a_folder_by_any_name(toy: Toy, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    """`..` and links in --work name one folder: the second run finds what the first made there."""
    (toy.folder / "sub").mkdir()
    (toy.folder / "link").symlink_to(toy.folder)
    monkeypatch.chdir(toy.folder)
    toy.work = toy.folder / "out"
    given = work.format(name=toy.folder.name)
    toy.fails = "quantize weighted"
    with pytest.raises(InputError, match="broken"):
        toy.run(keep=True, work=given)
    toy.fails, toy.tokens = None, 6
    toy.run(keep=True, work=given)
    assert toy.calls == [("calibrate", ""), ("quantize", "weighted")]
    toy.run(keep=True, work=str(toy.work))
    assert toy.calls == []
