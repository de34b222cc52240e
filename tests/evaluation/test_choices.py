"""`evaluate_choices` end to end: the metric and its arrays, going on after an interruption, and what cannot work."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apex_quant import SessionOptions, embedded_model, native
from apex_quant.errors import ApexError, InputError, NativeError, ResourceError, UsageError
from apex_quant.evaluation import choices, pertoken
from apex_quant.evaluation.choices import evaluate_choices
from apex_quant.evaluation.schema import KNOWN
from apex_quant.evaluation.selection import select
from apex_quant.evaluation.taskfiles import FORMS
from apex_quant.evaluation.taskhub import FILES, task_file
from apex_quant.native.worker import ERRORS
from tests.evaluation.stock_choices import GOLDEN, RUNS, file_name, tasks, write
from tests.helpers.random_models import write_random_gguf

ONE = SessionOptions(threads=1)
COUNT = 12


def task_path(folder: Path, kind: str, count: int = COUNT) -> Path:
    return write(folder / file_name(kind), kind, tasks(kind, count))


def test_metric_and_arrays(tmp_path: Path) -> None:
    count = RUNS["moe"]["truthfulqa"]
    file = task_path(tmp_path, "truthfulqa", count)
    events: list[dict[str, Any]] = []
    metric, arrays = evaluate_choices(
        embedded_model(), "truthfulqa", file, tasks=0, options=ONE, out=tmp_path / "s", progress=events.append
    )
    golden = json.loads(GOLDEN.read_text())["moe"]["truthfulqa"]
    # right answers come first in these tasks
    assert metric["value"] == pytest.approx(np.mean(np.array(golden) == 0), abs=0.04)
    assert metric["n"] == metric["available"] == count
    assert metric["low"] < metric["value"] < metric["high"]
    assert metric["like"] == "llama-perplexity -np 5 -c 410"
    assert 0 < metric["mc2"]["value"] < 1
    KNOWN["truthfulqa"].model_validate(metric)
    assert json.loads(json.dumps(metric)) == metric

    made = tasks("truthfulqa", count)
    plain = {name.removeprefix("truthfulqa/"): array for name, array in arrays.items()}
    assert plain["task"].tolist() == list(range(count))
    assert plain["task_hash"].tolist() == [task.digest() for task in made]
    assert plain["correct"].mean() == metric["value"]
    bounds = plain["offsets"]
    assert np.diff(bounds).tolist() == [len(task.mc1.texts) for task in made]
    best = [int(plain["logprob"][a:b].argmax()) for a, b in itertools.pairwise(bounds)]
    assert best == plain["choice"].tolist()
    assert plain["mc2_place"].tolist() == list(range(count))
    assert plain["mc2"].mean() == pytest.approx(metric["mc2"]["value"], abs=1e-5)
    assert (events[0]["done"], events[-1]["done"], events[-1]["planned"]) == (0, 2 * count, 2 * count)
    pertoken.write(tmp_path / "numbers.npz", arrays)
    assert pertoken.metrics(pertoken.read(tmp_path / "numbers.npz")) == ["truthfulqa"]


@pytest.mark.parametrize("kind", ["hellaswag", "winogrande", "arc"])
def test_every_form(kind: str, tmp_path: Path) -> None:
    file = task_path(tmp_path, kind)
    metric, arrays = evaluate_choices(embedded_model(), kind, file, tasks=5, options=ONE, out=tmp_path / "s")
    assert metric["n"] == 5
    assert metric["like"] == "llama-perplexity -np 4 -c 512"
    assert arrays[f"{kind}/task"].tolist() == select(FORMS.get(kind, "bin"), COUNT, 5)
    assert "mc2" not in metric
    KNOWN[kind].model_validate(metric)


def test_what_is_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call gives the same at once; another seed or file is another thing."""
    file, out = task_path(tmp_path, "winogrande"), tmp_path / "s"
    once = evaluate_choices(embedded_model(), "winogrande", file, tasks=4, options=ONE, out=out)
    ran: list[bool] = []

    class Child(native.Child):
        def run(self, *args: Any, **options: Any) -> Any:
            ran.append(True)
            return super().run(*args, **options)

    monkeypatch.setattr(choices, "Child", Child)
    again = evaluate_choices(embedded_model(), "winogrande", file, tasks=4, options=ONE, out=out)
    assert (again[0], ran) == (once[0], [])
    assert all((again[1][name] == once[1][name]).all() for name in once[1])
    other, _ = evaluate_choices(embedded_model(), "winogrande", file, tasks=4, seed=2, options=ONE, out=out)
    assert (other["seed"], ran) == (2, [True])


@pytest.mark.parametrize("after", [0, 6, 14])
def test_interrupted_and_gone_on(after: int, tmp_path: Path) -> None:
    """By Ctrl-C after some tasks: what was done stays done, and the end is the same to the last bit."""
    file, out = task_path(tmp_path, "truthfulqa"), tmp_path / "s"

    def run(out: Path, progress: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        found = evaluate_choices(embedded_model(), "truthfulqa", file, tasks=0, options=ONE, out=out, progress=progress)
        return found[1]

    def interrupt(event: dict[str, Any]) -> None:
        if event["done"] >= after:
            os.kill(os.getpid(), signal.SIGINT)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(out, interrupt)
    events: list[dict[str, Any]] = []
    rest = run(out, events.append)
    assert after <= events[0]["resumed"] < 2 * COUNT
    assert rest.keys() == whole.keys()
    for name in whole:
        np.testing.assert_array_equal(rest[name], whole[name])


def test_killed_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 costs what was not saved; the next call ends with the same numbers."""
    file, out = task_path(tmp_path, "winogrande"), tmp_path / "s"
    whole = evaluate_choices(embedded_model(), "winogrande", file, tasks=0, options=ONE, out=tmp_path / "whole")
    children: list[native.Child] = []

    class Child(native.Child):
        def __init__(self, module: str) -> None:
            super().__init__(module)
            children.append(self)

    def kill(event: dict[str, Any]) -> None:
        if event["done"] >= 4:
            children[0]._process.kill()

    monkeypatch.setattr(choices, "Child", Child)
    with pytest.raises(NativeError, match="SIGKILL"):
        evaluate_choices(
            embedded_model(), "winogrande", file, tasks=0, options=ONE, out=out, progress=kill, save_seconds=0
        )
    events: list[dict[str, Any]] = []
    rest = evaluate_choices(embedded_model(), "winogrande", file, tasks=0, options=ONE, out=out, progress=events.append)
    assert events[0]["resumed"] >= 2
    for name in whole[1]:
        np.testing.assert_array_equal(rest[1][name], whole[1][name])


def test_damaged_state_counts_as_none(tmp_path: Path) -> None:
    file, out = task_path(tmp_path, "hellaswag"), tmp_path / "s"
    out.write_bytes(b"PK\3\4 not an archive")
    metric, _ = evaluate_choices(embedded_model(), "hellaswag", file, tasks=2, options=ONE, out=out)
    assert metric["n"] == 2


def test_what_cannot_work(tmp_path: Path) -> None:
    file = task_path(tmp_path, "arc")
    without_vocabulary = write_random_gguf(tmp_path / "m.gguf", "llama")
    wrong: list[tuple[type[ApexError], str, Path, str, dict[str, Any]]] = [
        (UsageError, "no tasks called 'art'. Did you mean arc", embedded_model(), "art", {}),
        (UsageError, "no such folder", embedded_model(), "arc", {"out": tmp_path / "no" / "s"}),
        (UsageError, "may be negative", embedded_model(), "arc", {"tasks": -1}),
        (InputError, "no vocabulary", without_vocabulary, "arc", {}),
        (InputError, "none.gguf", tmp_path / "none.gguf", "arc", {}),
    ]
    for error, match, model, kind, changes in wrong:
        with pytest.raises(error, match=match):
            evaluate_choices(model, kind, file, **{"options": ONE, "out": tmp_path / "s", **changes})
    assert set(ERRORS) >= {"InputError", "UsageError"}


# --- the hub ---


class FakeApi:
    """What task_file uses of HfApi."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.size = folder, 0
        self.error: Exception | None = None

    def get_paths_info(self, repository: str, paths: list[str], repo_type: str) -> list[Any]:
        assert repo_type == "dataset"
        if self.error is not None:
            raise self.error
        return [SimpleNamespace(size=self.size, path=path) for path in paths]

    def hf_hub_download(self, repository: str, path: str, repo_type: str) -> str:
        assert repo_type == "dataset"
        return str(self.folder / repository / path)


class Gone(Exception):
    pass


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    library, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    for name in ("RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError"):
        setattr(errors, name, Gone)
    api = FakeApi(tmp_path)
    vars(library).update(errors=errors, HfApi=lambda: api)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return api


def test_files_of_the_hub(fake: FakeApi, tmp_path: Path) -> None:
    assert task_file("arc", "some.bin") == Path("some.bin")
    assert task_file("arc", "hub:me/data/dir/some.bin") == tmp_path / "me/data/dir/some.bin"
    for kind, name in FILES.items():
        assert task_file(kind, None) == tmp_path / name.removeprefix("hub:")


@pytest.mark.parametrize("name", ["hub:", "hub:me/data", "hub:me/data/../x", "hub:me/../data/x", "hub:/me/data/x"])
def test_names_that_are_none(fake: FakeApi, name: str) -> None:
    with pytest.raises(UsageError, match="is not hub:USER/DATA/FILE"):
        task_file("arc", name)


def test_hub_in_trouble(fake: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.size = 1 << 40
    with pytest.raises(InputError, match="1099511627776 bytes"):
        task_file("arc", None)
    fake.error = Gone("404\nurl")
    with pytest.raises(InputError, match=r"arc-challenge-validation\.bin: 404"):
        task_file("arc", None)
    fake.error = TimeoutError("slow")
    with pytest.raises(ResourceError, match="TimeoutError: slow"):
        task_file("arc", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ResourceError, match="needs huggingface_hub"):
        task_file("arc", None)
