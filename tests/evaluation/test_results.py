"""results.json: read, written, grown under a lock, merged; what is broken, foreign or newer is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_quant.errors import BusyError, InputError, ResourceError, UsageError
from apex_quant.evaluation import pertoken, results
from apex_quant.evaluation.results import archive_path, find, load, merge, merge_files, save, summary, update
from apex_quant.evaluation.schema import Divergence, PerToken, Results, Task, different_references
from apex_quant.gguf import atomic
from apex_quant.gguf.atomic import AtomicFile
from tests.evaluation.synthetic import base, kld_arrays, task_arrays, tokens, write

PPL = {"value": 6.5, "error": 0.04, "n": 32768}
DOCUMENT: dict[str, Any] = {
    "schema": "apex.results/1.4",
    "model": {"path": "m/a.gguf", "sha256": "a" * 64, "bytes": 12, "bpw": 4, "colour": "red"},
    "reference": {"path": "r.apexref", "form": "hidden"},
    "metrics": {
        "ppl": {**PPL, "texts": {"chat": {"value": 5.0}}, "seconds": 3.5},
        "kld": {
            "mean": {"value": 0.01, "low": 0.009, "high": 0.011, "n": 32768, "chunks": 32},
            "median": 0.001, "p90": 0.1, "p99_9": None, "note": "too few",
            "max": {"value": 3.5, "chunk": 1, "position": 9, "token": "x", "context": "a b"},
            "top1_agreement": {"value": 0.9, "low": 0.8, "high": 1, "n": 32768},
            "by_position": [[0, 0.1]], "by_domain": {"chat": {"mean": 0.1}}, "floor": None,
        },
        "hellaswag": {"value": 0.4, "low": 0.35, "high": 0.45, "n": 400, "wording": "stock"},
        "speed": {"pp512": {"value": 100.5, "deviation": 1.25, "n": 5}, "tg128": {"value": 10, "n": 5}, "busy": False},
        "later": {"anything": [1, {"x": None}]},
    },
    "settings": {"ctx": 2048},
    "environment": {"cpu": "x"},
    "per_token": None,
    "warnings": ["w"],
    "future": {"a": 1},
}  # fmt: skip


def _write(path: Path, document: Any) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


# --- reading and writing ---


def test_unknown_keys_are_kept(tmp_path: Path) -> None:
    read = load(_write(tmp_path / "a.json", DOCUMENT))
    assert (read.name, read.path) == ("a", tmp_path / "a.json")
    save(read, tmp_path / "b.json")
    written = json.loads((tmp_path / "b.json").read_text())
    assert {key: item for key, item in written["model"].items() if item is not None} == DOCUMENT["model"]
    assert {**written, "model": 0} == {**DOCUMENT, "model": 0}
    assert read.path == tmp_path / "b.json"
    assert load(tmp_path / "b.json").to_json() == read.to_json()


def test_typed_metrics(tmp_path: Path) -> None:
    read = load(_write(tmp_path / "a.json", DOCUMENT))
    kld = read.metric("kld")
    assert isinstance(kld, Divergence)
    assert kld.mean is not None
    assert (kld.mean.low, kld.p99_9, kld.p90) == (0.009, None, 0.1)
    task = read.metric("hellaswag")
    assert isinstance(task, Task)
    assert (task.n, task.wording) == (400, "stock")
    assert read.metric("mmlu") is None
    assert read.metric("later") == {"anything": [1, {"x": None}]}


def test_a_new_file_says_its_schema(tmp_path: Path) -> None:
    save(base(), tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["schema"] == "apex.results/1"
    assert list(json.loads((tmp_path / "a.json").read_text()))[:2] == ["schema", "model"]


def _without(*keys: str) -> dict[str, Any]:
    return {key: item for key, item in DOCUMENT.items() if key not in keys}


def _with(metric: str, value: Any) -> dict[str, Any]:
    return {**DOCUMENT, "metrics": {metric: value}}


BAD: list[tuple[Any, str]] = [
    ("", "not a whole JSON document"),
    (json.dumps(DOCUMENT)[:-20], "not a whole JSON document"),
    (json.dumps(DOCUMENT) + "x", "not a whole JSON document"),
    ("\x00" * 100, "not a whole JSON document"),
    ("[" * 100_000, "nested too deep|not a whole JSON document"),
    ('{"schema": "apex.results/1", "x": ' + "[" * 300 + "]" * 300 + "}", "nested too deep"),
    ('{"schema": "apex.results/1", "x": ' + "9" * 10_000 + "}", "not a whole JSON document"),
    ('{"schema": "apex.results/1", "x": NaN}', "NaN is not a JSON number"),
    ('{"schema": "apex.results/1", "x": -Infinity}', "-Infinity is not a JSON number"),
    ([], "not results of apex eval"),
    (7, "not results of apex eval"),
    ({"schema": "other/1"}, "not results of apex eval"),
    ({"schema": 1}, "not results of apex eval"),
    (_without("schema"), "not results of apex eval"),
    ({**DOCUMENT, "schema": "apex.results/2"}, r"schema apex\.results/2 is newer than apex\.results/1"),
    ({**DOCUMENT, "schema": "apex.results/10.3"}, "is newer"),
    ({**DOCUMENT, "schema": "apex.results/0"}, "schema: 'apex.results/0' is not apex.results/1"),
    ({**DOCUMENT, "schema": "apex.results/x"}, "schema: 'apex.results/x' is not"),
    (_without("model"), "model: Field required"),
    ({**DOCUMENT, "model": {"path": 7}}, "model.path"),
    ({**DOCUMENT, "model": {"path": "a", "bytes": -1}}, "model.bytes"),
    ({**DOCUMENT, "model": {"path": "a", "bpw": "4.5"}}, "model.bpw"),
    ({**DOCUMENT, "metrics": []}, "metrics"),
    (_with("ppl", 6.5), "metrics.ppl"),
    (_with("ppl", {"value": "6.5"}), "metrics: ppl: value"),
    (_with("ppl", {"value": True}), "metrics: ppl: value"),
    (_with("ppl", {"n": 1.5}), "metrics: ppl: n"),
    (_with("kld", {"mean": 0.1}), "metrics: kld: mean"),
    (_with("kld", {"mean": {"value": [1]}}), "metrics: kld: mean.value"),
    (_with("hellaswag", {"n": -1}), "metrics: hellaswag: n"),
    (_with("speed", {"pp512": {"value": "fast"}}), "metrics: speed.pp512: value"),
    ({**DOCUMENT, "warnings": "x"}, "warnings"),
    ({**DOCUMENT, "settings": [1]}, "settings"),
    ({**DOCUMENT, "per_token": {"path": "a.npz"}}, "per_token.sha256"),
    ({**DOCUMENT, "per_token": {"path": "/etc/passwd", "sha256": ""}}, "per_token.path: must be the name"),
    ({**DOCUMENT, "per_token": {"path": "../a.npz", "sha256": ""}}, "per_token.path: must be the name"),
    ({**DOCUMENT, "per_token": {"path": "b\\..\\..\\a.npz", "sha256": ""}}, "per_token.path: must be the name"),
    ({**DOCUMENT, "per_token": {"path": "", "sha256": ""}}, "per_token.path: must be the name"),
]


@pytest.mark.parametrize(("document", "says"), BAD)
def test_bad_documents(document: Any, says: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "a.json", document)
    with pytest.raises(InputError, match=says) as caught:
        load(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert "\n" not in caught.value.message
    with pytest.raises(InputError):
        update(path, "ppl", PPL, base=base())  # and such a file is not overwritten
    assert path.read_text() == (document if isinstance(document, str) else json.dumps(document))


def test_every_truncation(tmp_path: Path) -> None:
    text = json.dumps(DOCUMENT)
    for size in range(len(text)):
        with pytest.raises(InputError):
            load(_write(tmp_path / "a.json", text[:size]))


@settings(max_examples=200, deadline=None)
@given(
    where=st.sampled_from(["model", "reference", "metrics", "settings", "environment", "per_token", "warnings"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["kld", "ppl", "path", "mean", "value", "sha256", "speed"]), inner)
        ),
        max_leaves=8,
    ),
)
def test_any_json(where: str, value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Read and written again without loss, or refused."""
    path = _write(tmp_path_factory.getbasetemp() / "any.json", {**DOCUMENT, where: value})
    try:
        read = load(path)
    except InputError:
        return
    save(read, path)
    assert load(path).to_json() == read.to_json()


def test_not_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="No such file"):
        load(tmp_path / "none.json")
    with pytest.raises(InputError, match="not a file"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match="not a file"):
        load(tmp_path / "pipe.json")
    monkeypatch.setattr(results, "MAX_BYTES", 100)
    with pytest.raises(InputError, match="at most 100 are read"):
        load(_write(tmp_path / "a.json", DOCUMENT))
    with pytest.raises(ResourceError):
        save(base(), tmp_path / "none" / "a.json")


def test_not_finite_numbers_are_not_written(tmp_path: Path) -> None:
    for metrics in ({"ppl": {"value": float("inf")}}, {"other": {"x": [1.0, float("nan")]}}):
        with pytest.raises((InputError, ValueError), match="finite"):
            update(tmp_path / "a.json", next(iter(metrics)), next(iter(metrics.values())), base=base())
    assert list(tmp_path.iterdir()) == []
    bad = base(settings={"x": {"y": [0.0, float("nan")]}})
    with pytest.raises(InputError, match=r"settings\.x\.y\.1 is not a finite number"):
        save(bad, tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


# --- growing ---


def test_metrics_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(UsageError, match="nothing says which model"):
        update(path, "ppl", PPL)
    arrays = kld_arrays(tokens())
    update(path, "ppl", PPL, base=base(settings={"ctx": 512}), warnings=["one"])
    assert not archive_path(path).exists()
    update(path, "kld", {"median": 0.1}, arrays=arrays, warnings=["one", "two"])
    update(path, "hellaswag", {"value": 0.5}, arrays=task_arrays(np.ones(9)), base=base(settings={"tasks": 9}))
    found = update(path, "ppl", {**PPL, "value": 7.0})
    assert found.to_json() == load(path).to_json()
    assert list(found.metrics) == ["ppl", "kld", "hellaswag"]
    assert found.metric("ppl").value == 7
    assert (found.warnings, found.settings) == (["one", "two"], {"ctx": 512, "tasks": 9})
    kept = load(path).arrays()
    assert pertoken.metrics(kept) == ["hellaswag", "kld"]
    for name, array in arrays.items():
        assert np.array_equal(kept[f"kld/{name}"], array)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.npz"]
    update(path, "kld", {"median": 0.2}, arrays={"kld": np.ones(3)})
    assert [name for name in load(path).arrays() if name.startswith("kld/")] == ["kld/kld"]
    update(path, "kld", {"median": 0.3})
    assert pertoken.metrics(load(path).arrays()) == ["hellaswag"]


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a")
    before = path.read_bytes()
    with pytest.raises(InputError, match="results of different models") as caught:
        update(path, "ppl", PPL, base=base("b.gguf", "b" * 64))
    assert caught.value.message.startswith(str(path))
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.npz"]


def test_lost_archive_does_not_cost_the_new_metric(tmp_path: Path) -> None:
    path = write(tmp_path, "a")
    archive_path(path).write_bytes(b"x")
    found = update(path, "hellaswag", {"value": 0.5}, arrays=task_arrays(np.ones(4)))
    assert any("earlier metrics are lost" in line for line in found.warnings)
    assert list(found.metrics) == ["kld", "hellaswag"]
    assert pertoken.metrics(found.arrays()) == ["hellaswag"]


@pytest.mark.parametrize("at", range(1, 5))
def test_killed_anywhere(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each rename, and after the last: either all of the new metric is there, or all of the old ones are."""
    path = write(tmp_path, "a")
    calls = 0
    real: Callable[..., Any] = Path.replace

    def replace(self: Path, target: Path) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    try:
        update(path, "hellaswag", {"value": 0.5}, arrays=task_arrays(np.ones(4)))
    except KeyboardInterrupt:
        assert at <= 3
    else:
        assert at == 4
    monkeypatch.undo()
    found = load(path)
    kept = found.arrays()
    assert "kld/kld" in kept
    assert ("hellaswag" in found.metrics) == ("hellaswag/correct" in kept) == (at >= 3)
    again = update(path, "hellaswag", {"value": 0.5}, arrays=task_arrays(np.ones(4)))
    assert pertoken.metrics(again.arrays()) == ["hellaswag", "kld"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.npz"]


def _grow(path: Path, metric: str) -> None:
    for _ in range(5):
        update(path, metric, {"value": 0.5}, arrays={"correct": np.ones(3)})


def test_several_processes_lose_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "a")
    context = multiprocessing.get_context("spawn")
    names = ["hellaswag", "winogrande", "mmlu"]
    children = [context.Process(target=_grow, args=(path, name)) for name in names]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    found = load(path)
    assert sorted(found.metrics) == sorted(["kld", *names])
    assert pertoken.metrics(found.arrays()) == sorted(["kld", *names])


def test_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "BUSY_SECONDS", 0.0)
    path = write(tmp_path, "a")
    held = AtomicFile(path)
    with pytest.raises(BusyError, match="another process is writing it"):
        update(path, "ppl", PPL)
    held.abandon()
    update(path, "ppl", PPL)


def test_arrays_need_a_place() -> None:
    assert base().arrays() == {}
    homeless = base(per_token=PerToken(path="a.npz", sha256="x"))
    with pytest.raises(UsageError, match="never read or saved"):
        homeless.arrays()


# --- merging, listing ---


def test_merge(tmp_path: Path) -> None:
    a = write(tmp_path, "a", settings={"ctx": 512}, environment={"cpu": "x"})
    update(a, "ppl", PPL)
    b = tmp_path / "b.json"
    later = base("copy.gguf", "a" * 8, settings={"ctx": 2048}, environment={"cpu": "x"}, reference={"sha256": "r"})
    later.model.sha256, later.model.tier = load(a).model.sha256, "i-quality"
    update(b, "ppl", {**PPL, "value": 7.5}, base=later, arrays={"nll": np.ones(3)})
    update(b, "hellaswag", {"value": 0.5}, arrays=task_arrays(np.ones(4)))
    merged = merge_files([a, b], tmp_path / "c.json")
    assert merged.to_json() == load(tmp_path / "c.json").to_json()
    assert sorted(merged.metrics) == ["hellaswag", "kld", "ppl"]
    assert merged.metric("ppl").value == 7.5
    assert merged.warnings == ["ppl: measured twice, the later one is kept", "settings ctx: 512 and 2048"]
    assert (merged.model.path, merged.model.tier, merged.model.bpw) == ("a.gguf", "i-quality", 4.5)
    assert merged.reference == {"sha256": "r"}
    assert pertoken.metrics(merged.arrays()) == ["hellaswag", "kld", "ppl"]
    assert merge([b, a]).metric("ppl").value == 6.5
    with pytest.raises(UsageError, match="exists already"):
        merge_files([a, b], tmp_path / "c.json")
    assert merge_files([a], tmp_path / "c.json", force=True).metrics.keys() == {"kld", "ppl"}
    assert merge_files([a, b], a, force=True).metrics.keys() == {"hellaswag", "kld", "ppl"}
    assert pertoken.metrics(load(a).arrays()) == ["hellaswag", "kld", "ppl"]


def test_a_metric_measured_again_without_tokens(tmp_path: Path) -> None:
    """The earlier one's numbers per token are not those of the value that is kept."""
    a = write(tmp_path, "a")
    b = tmp_path / "b.json"
    update(b, "kld", {"median": 9.0}, base=base(sha256="a" * 8))
    merged = merge_files([a, b], tmp_path / "c.json")
    assert merged.metric("kld").median == 9
    assert merged.per_token is None


def test_merge_refuses(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a"), write(tmp_path, "b")
    with pytest.raises(InputError, match=r"results of different models: a \(sha256 aaaaaaaa\) and b"):
        merge([a, b])
    with pytest.raises(UsageError, match="nothing to merge"):
        merge([])
    one, two = (base(reference={"sha256": name}) for name in "xy")
    with pytest.raises(InputError, match="different references"):
        merge([one, two])
    unknown = base(sha256="a")
    unknown.model.sha256 = None
    with pytest.raises(InputError, match="different models"):
        merge([unknown, unknown])


def test_references() -> None:
    assert different_references({"sha256": "x"}, {"sha256": "y"})
    assert not different_references({"sha256": "x", "model_sha256": "m"}, {"sha256": "y", "model_sha256": "m"})
    assert not different_references({"sha256": "x"}, {"path": "y"})


def test_find(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a"), write(tmp_path, "b")
    recipe = _write(tmp_path / "recipe.json", {"tensors": []})
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "c")
    found, passed_over = find([tmp_path])
    assert [one.path for one in found] == [a, b]
    assert passed_over == [recipe]
    assert summary(found[0])["metrics"]["kld"]["median"] == 0.1
    with pytest.raises(InputError, match="not results of apex eval"):
        find([a, recipe])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no results in"):
        find([tmp_path / "empty"])
    _write(tmp_path / "z.json", "{")
    with pytest.raises(InputError, match=r"z\.json: not a whole JSON document"):
        find([tmp_path])


def test_models_can_be_made_by_name_or_alias() -> None:
    assert Results(schema="apex.results/1", model={"path": "a"}).schema_ == "apex.results/1"  # type: ignore[arg-type]
