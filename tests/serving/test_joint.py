"""Weights or cache: verdicts from made-up measurements whose answer is known, intervals respected."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apex_quant.errors import InputError, UsageError
from apex_quant.evaluation.results import update
from apex_quant.evaluation.schema import ModelInfo, Results
from apex_quant.serving.fit import Fit, fit
from apex_quant.serving.joint import Joint, read_cache_damage
from tests.evaluation import synthetic
from tests.helpers.random_models import write_random_gguf

KINDS = ("BF16", "Q8_0")
WHOLE = json.dumps({
    "schema": "apex.kv/1", "model": {"path": "m.gguf", "sha256": "0", "bytes": 1}, "simulated": [],
    "pairs": [{"k": "a", "v": "b", "kld_mean": {"value": 0.5, "low": 0, "high": 1}, "bytes_per_token": 1,
               "mib_at": {}}],
})  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("joint")
    for kind in KINDS:
        write_random_gguf(made / f"m-{kind}.gguf", "qwen3moe", dtype=kind, sparse=True)  # type: ignore[arg-type]
    return made


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: object, **more: object) -> None:
        raise InputError("not here")

    monkeypatch.setattr("apex_quant.serving.fit.library_memory", refuse)


def estimate(value: float, half: float) -> dict[str, float | int]:
    return {"value": value, "low": value - half, "high": value + half, "n": 100}


def of_file(path: Path) -> dict[str, Any]:
    """What results and kv.json say of the file they were measured on."""
    data = path.read_bytes()
    return {"path": path.name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


Means = dict[str, tuple[float, float]]


def write(folder: Path, models: Path, weights: Means, kv: Means) -> list[Path]:
    """kv.json and results of each file."""
    folder.mkdir(exist_ok=True)
    pairs = [{"k": name, "v": name, "kld_mean": estimate(*value), "bytes_per_token": 1, "mib_at": {}}
             for name, value in kv.items()]  # fmt: skip
    about = {"path": "m.gguf", "sha256": "0" * 64, "bytes": 1}
    (folder / "kv.json").write_text(
        json.dumps({"schema": "apex.kv/1", "model": about, "pairs": pairs, "simulated": []} | {"ranking": []})
    )
    for kind, value in weights.items():
        document = {
            "schema": "apex.results/1",
            "model": of_file(models / f"m-{kind}.gguf"),
            "metrics": {"kld": {"mean": estimate(*value)}},
        }
        (folder / f"{kind}.json").write_text(json.dumps(document))
    return [folder / "kv.json", *(folder / f"{kind}.json" for kind in weights)]


def ask(folder: Path, files: list[Path], vram: int) -> tuple[Fit, Joint]:
    found = fit(folder, vram=vram, ctx=512, reserve=0, joint=files[0], results=files[1:])
    assert isinstance(found.joint, Joint)
    json.dumps(found.to_json())
    return found, found.joint


def tight(folder: Path, kind: str, cache: str) -> int:
    """Memory in which that file just fits with that cache."""
    (one,) = fit(folder / f"m-{kind}.gguf", vram=1 << 40, ctx=512, type_k=cache, reserve=0).options
    return one.device.total


@pytest.mark.parametrize(
    ("weights", "kv", "verdict"),
    [
        # the larger file costs about ten times the bytes of the larger cache
        ({"BF16": (0.0, 0.0), "Q8_0": (0.5, 0.001)}, {"q8_0": (0.001, 0.0001)}, "weights"),
        ({"BF16": (0.0, 0.0), "Q8_0": (0.01, 0.001)}, {"q8_0": (0.5, 0.01)}, "kv"),
        ({"BF16": (0.0, 0.0), "Q8_0": (0.5, 0.6)}, {"q8_0": (0.001, 0.0001)}, "neither_shown"),
        ({"BF16": (0.0, 0.0), "Q8_0": (0.01, 0.001)}, {"q8_0": (0.5, 0.6)}, "neither_shown"),
    ],
)
def test_verdicts(folder: Path, tmp_path: Path, weights: Any, kv: Any, verdict: str) -> None:
    found, joint = ask(folder, write(tmp_path / "r", folder, weights, kv), tight(folder, "Q8_0", "q8_0"))
    assert found.choice is not None
    assert joint.start == "m-Q8_0 with q8_0/q8_0"
    assert joint.verdict == verdict
    by_kind = {step.kind: step for step in joint.steps}
    assert by_kind["weights"].gain == pytest.approx(weights["Q8_0"][0])
    assert by_kind["kv"].gain == pytest.approx(kv["q8_0"][0])
    assert by_kind["weights"].bytes > by_kind["kv"].bytes > 0
    value, low, high = by_kind["kv"].per_gib
    assert low < value < high
    assert value == pytest.approx(kv["q8_0"][0] * 2**30 / by_kind["kv"].bytes)
    assert joint.sentence.startswith("From m-Q8_0 with q8_0/q8_0: ")


def test_sums_of_what_fits(folder: Path, tmp_path: Path) -> None:
    files = write(tmp_path / "r", folder, {"BF16": (0.0, 0.0), "Q8_0": (0.03, 0.004)}, {"q8_0": (0.01, 0.003)})
    _, joint = ask(folder, files, 1 << 40)
    rows = [(one.name, one.k, one.kld.value, one.shown_worse) for one in joint.fitting]
    assert rows == [
        ("m-BF16", "f16", 0.0, False), ("m-BF16", "q8_0", 0.01, True), ("m-Q8_0", "f16", 0.03, True),
        ("m-Q8_0", "q8_0", 0.04, True),
    ]  # fmt: skip
    assert joint.fitting[-1].kld.half == pytest.approx(0.005)  # independent: root of the sum of squares
    assert joint.verdict == "nothing_left"


def test_the_best_sum_is_chosen(folder: Path, tmp_path: Path) -> None:
    """A larger cache of the smaller file, where that is what was measured to be better; the unsafe pairs too."""
    files = write(
        tmp_path / "r",
        folder,
        {"BF16": (0.2, 0.001), "Q8_0": (0.01, 0.001)},
        {"q8_0": (0.5, 0.01), "q4_0": (0.02, 0.001)},
    )  # fmt: skip
    found, joint = ask(folder, files, tight(folder, "BF16", "q8_0"))
    assert found.choice is not None
    assert (found.choice.name, found.choice.k) == ("m-Q8_0", "f16")
    assert joint.fitting[0].name == "m-Q8_0"
    found, joint = ask(folder, files, tight(folder, "Q8_0", "q8_0"))  # f16 does not fit there any more
    assert found.choice is not None
    assert (found.choice.name, found.choice.k) == ("m-Q8_0", "q4_0")
    assert "smallest sum of measured damages" in found.reason
    assert "0.03 nats per token" in found.reason
    assert joint.start == "m-Q8_0 with q4_0/q4_0"
    best = next(one for one in joint.fitting if one.on_device)
    assert (best.name, best.k) == ("m-Q8_0", "q4_0")
    assert best.kld.value == pytest.approx(0.03)
    assert joint.fitting[0].kld.value < best.kld.value  # with experts in main memory


def test_measurements_belong_to_files(folder: Path, tmp_path: Path) -> None:
    """Those of the file itself are taken, known by its bytes; others only with a warning."""
    results = write(tmp_path / "r", folder, {"BF16": (0.0, 0.0), "Q8_0": (0.03, 0.004)}, {"q8_0": (0.01, 0.003)})
    documents = {kind: json.loads(results[0].read_text()) for kind in KINDS}
    for (kind, document), damage in zip(documents.items(), (0.4, 0.6), strict=True):
        document["model"] = of_file(folder / f"m-{kind}.gguf")
        document["pairs"][0]["kld_mean"] = estimate(damage, 0.1)
        (tmp_path / f"kv-{kind}.json").write_text(json.dumps(document))
    own = [tmp_path / f"kv-{kind}.json" for kind in reversed(KINDS)]
    found = fit(folder, vram=1 << 40, ctx=512, joint=own, results=results[1:])
    assert found.joint is not None
    assert not any("taken for it" in line for line in found.joint.warnings)
    sums = {(one.name, one.k): one.kld.value for one in found.joint.fitting}
    assert sums["m-BF16", "q8_0"] == pytest.approx(0.4)
    assert sums["m-Q8_0", "q8_0"] == pytest.approx(0.63)
    found = fit(folder, vram=1 << 40, ctx=512, joint=own[0], results=results[1:])
    assert found.joint is not None
    assert "m-BF16: its cache types were not measured; those of m-Q8_0.gguf are taken for it" in found.joint.warnings


def test_only_measured_pairs_are_weighed(folder: Path, tmp_path: Path) -> None:
    files = write(tmp_path / "r", folder, {"Q8_0": (0.03, 0.004)}, {"q4_0": (0.01, 0.003)})
    found, joint = ask(folder, files, 1 << 40)
    assert {(one.k, one.v) for one in found.options} == {("f16", "f16"), ("q4_0", "q4_0")}
    assert any("m-BF16: no mean KLD" in line for line in joint.warnings)
    assert {one.name for one in joint.fitting} == {"m-Q8_0"}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"pairs": 5}', '{"pairs": [{"k": "f16"}]}', "[" * 10**5,
     WHOLE.replace("apex.kv/1", "apex.kv/99"), WHOLE.replace('"value": 0.5', '"value": NaN'),
     WHOLE.replace('"value": 0.5', '"value": 2'), WHOLE.replace('"sha256": "0"', '"sha": 0')],
)  # fmt: skip
def test_files_that_are_no_kv_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "kv.json").write_text(WHOLE)
    assert set(read_cache_damage(tmp_path / "kv.json").pairs) == {("f16", "f16"), ("a", "b")}
    (tmp_path / "kv.json").write_text(text)
    with pytest.raises(InputError, match=r"kv\.json"):
        read_cache_damage(tmp_path / "kv.json")


def test_what_is_needed(folder: Path, tmp_path: Path) -> None:
    files = write(tmp_path / "r", folder, {"BF16": (0.0, 0.0)}, {"q8_0": (0.01, 0.003)})
    with pytest.raises(UsageError, match="results of apex eval"):
        fit(folder, vram=1 << 40, ctx=512, joint=files[0])
    with pytest.raises(InputError):
        fit(folder, vram=1 << 40, ctx=512, joint=tmp_path / "none.json", results=files[1:])


def test_pairs_without_an_interval_are_named(folder: Path, tmp_path: Path) -> None:
    files = write(tmp_path / "r", folder, {"Q8_0": (0.03, 0.004)}, {"q8_0": (0.01, 0.003)})
    document = json.loads(files[0].read_text())
    few = {"value": 0.1, "low": None, "high": None, "n": 2}
    more = {"kld_mean": few, "bytes_per_token": 1, "mib_at": {}}
    document["pairs"] += [{"k": kind, "v": kind, **more} for kind in ("f16", "q4_0")]
    files[0].write_text(json.dumps(document))
    assert set(read_cache_damage(files[0]).pairs) == {("f16", "f16"), ("q8_0", "q8_0")}
    _, joint = ask(folder, files, 1 << 40)
    assert [line for line in joint.warnings if "too little" in line] == [joint.warnings[0]]
    assert joint.warnings[0].startswith("q4_0/q4_0")


def per_token(folder: Path, models: Path, kind: str, half: float, **made: Any) -> Path:
    """Results with numbers per token whose mean has the interval `half`."""
    path = folder / f"{kind}.json"
    arrays = synthetic.kld_arrays(made.pop("ids", synthetic.tokens()), **made)
    value = {"mean": estimate(float(arrays["kld"].mean(dtype=np.float64)), half) | {"n": arrays["kld"].size}}
    about = Results(model=ModelInfo(**of_file(models / f"m-{kind}.gguf")))
    update(path, "kld", value, base=about, arrays=arrays)
    return path


def test_differences_are_paired_where_they_can_be(folder: Path, tmp_path: Path) -> None:
    """The same tokens on both sides give a narrower interval than the two intervals do."""
    files = write(tmp_path / "r", folder, {}, {"q8_0": (0.001, 0.0001)})
    files += [
        per_token(tmp_path / "r", folder, "BF16", 0.6, scale=0.5),
        per_token(tmp_path / "r", folder, "Q8_0", 0.6, scale=1.0, seed=1),
    ]
    _, joint = ask(folder, files, tight(folder, "Q8_0", "q8_0"))
    (step,) = [step for step in joint.steps if step.kind == "weights"]
    assert step.paired
    assert step.low > 0.1
    assert joint.verdict == "weights"  # not shown from the two intervals alone
    (tmp_path / "r" / "BF16.npz").write_bytes(b"")
    _, joint = ask(folder, files, tight(folder, "Q8_0", "q8_0"))
    assert not any(step.paired for step in joint.steps)
    assert joint.verdict == "neither_shown"
    assert any("differences are those of the intervals" in line for line in joint.warnings)


def test_numbers_of_other_tokens_are_not_compared(folder: Path, tmp_path: Path) -> None:
    files = write(tmp_path / "r", folder, {}, {"q8_0": (0.001, 0.0001)})
    files += [
        per_token(tmp_path / "r", folder, "BF16", 0.1),
        per_token(tmp_path / "r", folder, "Q8_0", 0.1, ids=synthetic.tokens(seed=8)),
    ]
    with pytest.raises(InputError, match="not measured on the same scored tokens"):
        ask(folder, files, 1 << 40)


def change(path: Path, **more: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({"reference": {"model_sha256": "1"}}, {"reference": {"model_sha256": "2"}}, "different references"),
        ({"settings": {"texts": ["a.txt"]}}, {"settings": {"texts": ["b.txt"]}}, "same text"),
        ({"settings": {"ctx": 512}}, {"settings": {"ctx": 2048}}, "ctx 512 and 2048"),
        ({}, {"metrics": {"kld": {"mean": estimate(0.1, 0.1) | {"n": 7}}}}, "tokens 100 and 7"),
    ],
)
def test_what_cannot_be_compared_is_not_summed(a: Any, b: Any, message: str, folder: Path, tmp_path: Path) -> None:
    files = write(tmp_path / "r", folder, {"BF16": (0.0, 0.0), "Q8_0": (0.03, 0.004)}, {"q8_0": (0.01, 0.003)})
    change(files[1], **a)
    change(files[2], **b)
    with pytest.raises(InputError, match=message):
        ask(folder, files, 1 << 40)
    change(files[1], **b)
    ask(folder, files, 1 << 40)


def test_results_of_another_file_of_the_name(folder: Path, tmp_path: Path) -> None:
    """Neither a later quantization under the same name nor results that say no sha256 are taken for the file's."""
    files = write(tmp_path / "r", folder, {"BF16": (0.0, 0.0), "Q8_0": (0.03, 0.004)}, {"q8_0": (0.01, 0.003)})
    own = of_file(folder / "m-Q8_0.gguf")
    for other in (own | {"sha256": "0" * 64}, own | {"bytes": 1}, {"path": own["path"]}):
        change(files[2], model=other)
        _, joint = ask(folder, files, 1 << 40)
        assert {one.name for one in joint.fitting} == {"m-BF16"}
        assert any("not measured on the m-Q8_0.gguf that is here" in line for line in joint.warnings)
    change(files[2], model=own | {"path": "older-name.gguf"})
    _, joint = ask(folder, files, 1 << 40)
    assert {one.name for one in joint.fitting} == {"m-BF16", "m-Q8_0"}


def test_damage_of_a_cache_is_not_counted_twice(folder: Path, tmp_path: Path) -> None:
    files = write(tmp_path / "r", folder, {"BF16": (0.0, 0.0), "Q8_0": (0.03, 0.004)}, {"q8_0": (0.01, 0.003)})
    other = tmp_path / "r" / "with-cache.json"
    document = json.loads(files[2].read_text())
    document["metrics"]["kld"]["mean"] = estimate(0.5, 0.1) | {"n": 1000}
    document["settings"] = {"options": {"type_k": "q8_0", "type_v": "f16"}}
    other.write_text(json.dumps(document))
    for order in ([*files, other], [*files[:2], other, files[2]]):
        _, joint = ask(folder, order, 1 << 40)
        assert {one.name: one.kld.value for one in joint.fitting if one.k == "f16"}["m-Q8_0"] == pytest.approx(0.03)
        assert any("measured with a cache of q8_0/f16" in line for line in joint.warnings)


def test_of_several_results_the_longest(folder: Path, tmp_path: Path) -> None:
    """Whatever the order of the files."""
    files = write(tmp_path / "r", folder, {"Q8_0": (0.03, 0.004)}, {"q8_0": (0.01, 0.003)})
    short = tmp_path / "r" / "short.json"
    document = json.loads(files[1].read_text())
    document["metrics"]["kld"]["mean"] = estimate(0.5, 0.1) | {"n": 9}
    short.write_text(json.dumps(document))
    for order in ([*files, short], [files[0], short, files[1]]):
        _, joint = ask(folder, order, 1 << 40)
        assert {one.kld.value for one in joint.fitting if one.k == "f16"} == {0.03}
        assert any("2 results are of it" in line for line in joint.warnings)
