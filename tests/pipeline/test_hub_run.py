"""Runs against a local server that answers as the hub does: sources, baselines, publishing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from apex_quant import run
from apex_quant.errors import InputError, ResourceError, UsageError
from apex_quant.pipeline import steps_checks
from apex_quant.pipeline.context import PhaseEvent
from apex_quant.pipeline.jobs import evaluate_file
from apex_quant.pipeline.results import RunResult
from apex_quant.pipeline.state import State
from tests.cli.conftest import Call, call  # noqa: F401 -- a fixture
from tests.helpers.random_models import write_random_gguf
from tests.hub.conftest import hub, token, waits  # noqa: F401 -- fixtures
from tests.hub.mock import MockHub, Repo
from tests.pipeline.conftest import ran, small_run

pytestmark = pytest.mark.usefixtures("waits")
CHECKPOINT = {
    "config.json": b'{"architectures": ["TinyForCausalLM"], "model_type": "tiny", "num_hidden_layers": 1}',
    "model.safetensors": (2).to_bytes(8, "little") + b"{}",
    "original/consolidated.pth": b"pickled",
    "images/logo.png": b"png",
}


def only_source(work: Path, **more: Any) -> State:
    run("org/Tiny", work=str(work), phases={"only": ["source"]}, **more)
    return State(work).load()


def test_a_source_from_the_hub_is_pinned(hub: MockHub, tmp_path: Path) -> None:  # noqa: F811
    """Weights and what goes with them, nothing else; asked once, then never again without a new revision."""
    hub.repos["org/Tiny"] = Repo(files=dict(CHECKPOINT))
    work = tmp_path / "work"
    found = only_source(work).records["source"][""]
    assert found.facts["commit"] == hub.repos["org/Tiny"].commit
    assert {Path(file.path).name for file in found.outputs["files"]} == {"config.json", "model.safetensors"}
    hub.log.clear()
    only_source(work)
    assert hub.log == []
    only_source(work, revision="v1")
    assert hub.log


@pytest.mark.parametrize("files", [None, "*BF16*"])
def test_an_emptied_cache(hub: MockHub, finished: Path, tmp_path: Path, files: str | None) -> None:  # noqa: F811
    """Nothing is fetched before a phase reads it, and then the commit that was recorded, not a newer one."""
    name = "Small-BF16.gguf"
    theirs = {name: (finished / name).read_bytes()} if files else dict(CHECKPOINT)
    repo = hub.repos["org/Tiny"] = Repo(files=theirs)
    work, given = tmp_path / "work", {"source_files": files}
    commit = only_source(work, **given).records["source"][""].facts["commit"]
    repo.history.append(dict(repo.files))
    repo.files["README.md"] = b"a newer commit"
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.log.clear()
    only_source(work, **given)
    assert hub.log == []
    if files:
        more: dict[str, Any] = {"tiers": ["quality"], "evaluate": {"suite": "none"}, **given}
        made = run("org/Tiny", work=str(work), **more, phases={"only": ["source", "recipes"]})
        assert {one.name: one.reason for one in made.phases}["source"] == "recipes reads its file, which was deleted"
        assert State(work).load().records["source"][""].facts["commit"] == commit
    else:
        with pytest.raises(UsageError, match="convert reads the files of phase source, which were deleted"):
            run("org/Tiny", work=str(work), phases={"only": ["convert"]})
    assert only_source(work, force=True, **given).records["source"][""].facts["commit"] == repo.commit != commit


def test_a_repository_of_gguf_files_is_no_checkpoint(hub: MockHub, tmp_path: Path) -> None:  # noqa: F811
    hub.repos["org/Tiny"] = Repo(files={"Tiny-BF16.gguf": b"GGUF", "config.json": b"{}"})
    with pytest.raises(InputError, match="holds GGUF files, and no checkpoint") as caught:
        only_source(tmp_path / "work")
    assert caught.value.hint == "apex run --set source_files=PATTERN takes the full-precision one: Tiny-BF16.gguf"


def test_what_converting_needs_is_looked_at_first(
    hub: MockHub,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No weight is downloaded for an architecture that the converter does not know, or without its Python."""
    hub.repos["org/Tiny"] = Repo(files=dict(CHECKPOINT))
    folder = tmp_path / "llama.cpp"
    for name, text in {
        "convert_hf_to_gguf.py": "",
        "gguf-py/gguf/__init__.py": "",
        "conversion/__init__.py": 'TEXT_MODEL_MAP: dict[str, str] = {"LlamaForCausalLM": "llama"}',
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(folder))
    notes: list[str] = []

    def listen(event: Any) -> None:
        if isinstance(event, PhaseEvent) and event.kind == "note":
            notes.append(event.text)

    monkeypatch.setattr("apex_quant.converter_python.NEEDS", {"no_such_module": "no-such-module"})
    with pytest.raises(ResourceError, match="converting needs no-such-module"):
        run("org/Tiny", work=str(tmp_path / "work"))
    run("org/Tiny", work=str(tmp_path / "work"), dry_run=True, progress=listen)
    assert [note.partition(", which")[0] for note in notes] == ["converting needs no-such-module"]
    monkeypatch.setattr("apex_quant.converter_python.NEEDS", {"sys": "sys"})
    with pytest.raises(InputError, match="does not convert TinyForCausalLM"):
        run("org/Tiny", work=str(tmp_path / "work"))
    assert hub.count(r"resolve/.*\.safetensors") == 0


def test_a_gguf_of_a_hub_repository(hub: MockHub, tmp_path: Path) -> None:  # noqa: F811
    data = write_random_gguf(tmp_path / "x.gguf", "qwen3moe", layers="M").read_bytes()
    hub.repos["org/Tiny"] = Repo(files={"Tiny-BF16.gguf": data, "Tiny-Q8_0.gguf": b"GGUF"})
    found = only_source(tmp_path / "a", source_files="*BF16*")
    (file,) = found.records["source"][""].outputs["files"]
    assert file.bytes == len(data)
    with pytest.raises(InputError, match=r"2 models fit \*\.gguf"):
        only_source(tmp_path / "b", source_files="*.gguf")


@pytest.mark.usefixtures("token")
def test_baselines_and_publishing(hub: MockHub, again: Path) -> None:  # noqa: F811
    """Others' files are measured beside ours; --publish says what it would do, and does it with --yes."""
    theirs = (again / "work/release/Small-APEX-I-Compact.gguf").read_bytes()
    hub.repos["other/Small-GGUF"] = Repo(files={"Small-Q4_K_M.gguf": theirs, "README.md": b"theirs"})
    more: dict[str, Any] = {"baselines": ["other/Small-GGUF:*Q4_K_M*:theirs"], "publish": {"repo": "me/Small"}}
    said: list[Any] = []
    made = small_run(again, **more, progress=said.append)
    assert ran(made) == {"baselines": ("other/Small-GGUF:*Q4_K_M*:theirs",), "publish": ("",)}
    facts = State(again / "work").load().records["baselines"]["other/Small-GGUF:*Q4_K_M*:theirs"].facts
    assert (facts["models"][0]["label"], facts["models"][0]["bytes"]) == ("theirs", len(theirs))
    assert made.published is not None
    assert made.published["dry_run"]
    assert "me/Small" not in hub.repos
    assert [e.text for e in said if isinstance(e, PhaseEvent) and e.kind == "note"] == [
        "nothing was uploaded to me/Small: --yes does it"
    ]
    made = small_run(again, **more, yes=True)
    assert list(ran(made)) == ["publish"]
    uploaded = hub.repos["me/Small"].files
    assert uploaded["Small-APEX-I-Compact.gguf"] == theirs or len(uploaded["Small-APEX-I-Compact.gguf"]) < 1000
    assert {
        "Small-APEX-Quality.gguf",
        "Small-BF16.imatrix.gguf",
        "SHA256SUMS",
        "recipes/Small-BF16-quality.txt",
    } <= set(uploaded)
    hub.log.clear()
    assert ran(small_run(again, **more, yes=True)) == {}
    assert hub.log == []


def test_a_rehearsal_without_network(hub: MockHub, again: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Nothing was to be uploaded: the run is finished, says so, and asks again the next time."""
    given: dict[str, Any] = {"publish": {"repo": "me/Small"}}
    with monkeypatch.context() as offline:
        offline.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        said: list[Any] = []
        made = small_run(again, **given, progress=said.append)
    assert [file.tier for file in made.files] == ["quality", "i-compact"]
    assert made.published is None
    notes = [event.text for event in said if isinstance(event, PhaseEvent) and event.kind == "note"]
    assert "me/Small: cannot be looked up" in notes[0]
    assert notes[1:] == ["nothing was uploaded to me/Small: --yes does it"]
    assert not State(again / "work").load().started.get("publish")
    assert small_run(again, **given).published is not None
    assert hub.repos == {}


@pytest.mark.usefixtures("token")
def test_what_is_finished_is_told_before_an_error(
    hub: MockHub,  # noqa: F811
    again: Path,
    call: Call,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The table and the report of hours, when only the upload failed."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said: list[Any] = []
    with pytest.raises(ResourceError, match="cannot be looked up"):
        small_run(again, publish={"repo": "me/Small"}, yes=True, progress=said.append)
    (told,) = [event for event in said if isinstance(event, RunResult)]
    assert [file.tier for file in told.files] == ["quality", "i-compact"]
    assert all(file.verified and file.kld for file in told.files)
    assert "publish" not in ran(told)
    config = State(again / "work").load().about["config"]
    monkeypatch.chdir(again)
    (again / "run.yaml").write_text(yaml.safe_dump(config))
    done = call("run", "run.yaml", "--yes", "--json")
    assert (done.status, done.out) == (4, "")
    table, _, error = done.err.partition("error: ")
    assert "Small-APEX-I-Compact.gguf" in table
    assert error.startswith("me/Small: cannot be looked up")


def test_an_interrupted_baseline_stays_at_its_commit(
    hub: MockHub,  # noqa: F811
    again: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A newer commit changes nothing until it is asked for, and files of two folders may have one name."""
    ours, others = ((again / f"work/release/Small-APEX-{tier}.gguf").read_bytes() for tier in ("Quality", "I-Compact"))
    repo = hub.repos["other/GGUF"] = Repo(files={"a/X-Q4.gguf": ours, "b/X-Q4.gguf": others})
    first, spec = repo.commit, "other/GGUF:X-Q4*"
    given: dict[str, Any] = {"baselines": [spec], "phases": {"only": ["baselines"]}}
    calls: list[Any] = []

    def ends_after_one(*about: Any) -> Any:
        calls.append(about)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate_file(*about)

    monkeypatch.setattr(steps_checks, "evaluate_file", ends_after_one)
    with pytest.raises(KeyboardInterrupt):
        small_run(again, **given)
    repo.history.append(dict(repo.files))
    repo.files = {"a/X-Q4.gguf": others, "b/X-Q4.gguf": ours}
    small_run(again, **given)
    record = State(again / "work").load().records["baselines"][spec]
    assert {one["commit"] for one in record.facts["models"]} == {first}
    assert [Path(file.path).name for file in record.outputs["results"]] == ["a-X-Q4.json", "b-X-Q4.json"]
    small_run(again, **given, force=True)
    record = State(again / "work").load().records["baselines"][spec]
    assert {one["commit"] for one in record.facts["models"]} == {repo.commit} != {first}


@pytest.mark.usefixtures("token")
def test_large_files_are_published_in_shards(hub: MockHub, again: Path) -> None:  # noqa: F811
    """Cut before the upload, once: the next run finds nothing to do. Other bytes or sizes are cut anew."""
    release = again / "work/release"

    def uploaded(most: int, **more: Any) -> list[str]:
        publish = {"repo": "me/Small", "shards": most, "replace": True}
        made = small_run(again, publish=publish, yes=True, **more)
        assert "publish" in ran(made)
        assert ran(small_run(again, publish=publish, yes=True, **more)) == {}
        assert made.published is not None
        return [file["path"] for file in made.published["files"] if file["kind"] == "model"]

    shards = uploaded(2_000_000)
    assert len(shards) > 2
    assert all("-of-" in name for name in shards)
    assert sorted(path.name for path in release.glob("*-of-*.gguf")) == sorted(shards)
    before = {name: (release / name).read_bytes() for name in shards}
    assert len(uploaded(3_000_000)) < len(shards)
    other = {"quantize": {"override_kv": ["general.description=str:another"]}}
    again_cut = uploaded(2_000_000, **other)
    assert again_cut == shards
    assert all((release / name).read_bytes() != data for name, data in before.items() if "-00001-" in name)
    assert [name for name in uploaded(48_000_000_000, **other) if "-of-" in name] == []
    assert list(release.glob("*-of-*.gguf")) == []
