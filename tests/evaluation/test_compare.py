"""Paired comparison: what is shown and what is not, tokens and tasks matched by their hashes, sentences to quote."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_quant.errors import InputError, UsageError
from apex_quant.evaluation import compare as module
from apex_quant.evaluation.compare import Pair, compare
from apex_quant.evaluation.results import load, update
from apex_quant.evaluation.statistics import mcnemar, mean_interval, quantile_difference, share_difference
from tests.evaluation.synthetic import base, kld_arrays, task_arrays, tokens, write

MEASURED = ["kld", "p99_9", "top1_agreement", "ppl"]


def one(pairs: list[Pair], metric: str) -> Pair:
    (found,) = [pair for pair in pairs if pair.metric == metric]
    return found


def tasks(folder: Path, name: str, correct: Any, *, task: str = "hellaswag", seed: int = 5) -> Path:
    path = folder / f"{name}.json"
    arrays = task_arrays(np.asarray(correct), seed=seed)
    update(path, task, {"value": 0.5}, base=base(f"{name}.gguf", name * 8), arrays=arrays)
    return path


# --- tokens ---


def test_a_better_model(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a", scale=0.8, seed=1), write(tmp_path, "b", seed=2)
    pairs = compare([a, b])
    assert [pair.metric for pair in pairs] == MEASURED
    x, y = (load(path).arrays() for path in (a, b))
    wanted = mean_interval(x["kld/kld"].astype(float) - y["kld/kld"].astype(float), x["kld/chunk"])
    kld = one(pairs, "kld")
    assert (kld.a, kld.b, kld.n, kld.chunks) == ("a", "b", 40 * 31, 40)
    assert (kld.difference, kld.low, kld.high) == pytest.approx(wanted[:3])
    assert (kld.verdict, kld.better_result, kld.p, kld.note) == ("a_lower", "a", None, None)
    assert kld.better == np.mean(x["kld/kld"] < y["kld/kld"])
    assert kld.worse == np.mean(x["kld/kld"] > y["kld/kld"])
    assert [kld.better, kld.worse] == pytest.approx([np.mean(x["kld/kld"] < y["kld/kld"]), 1 - (kld.better or 0)])
    assert re.fullmatch(r"a has lower mean KLD than b by 0\.\d+ \[0\.\d+, 0\.\d+\] on 1,240 tokens", kld.sentence)

    back = one(compare([b, a]), "kld")
    assert (back.verdict, back.better_result) == ("b_lower", "a")
    assert back.difference == pytest.approx(-(kld.difference or 0))
    assert (back.better, back.worse) == (kld.worse, kld.better)
    assert re.fullmatch(r"a has lower mean KLD than b by 0\.\d+ \[0\.\d+, 0\.\d+\] on 1,240 tokens", back.sentence)


def test_top1_is_better_when_higher(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a", scale=0.5), write(tmp_path, "b", scale=2)
    found = one(compare([a, b]), "top1_agreement")
    assert (found.verdict, found.better_result) == ("b_lower", "a")
    assert found.difference is not None
    assert found.difference > 0
    assert found.better is not None
    assert found.worse is not None
    assert found.better - found.worse == pytest.approx(found.difference)
    assert found.sentence.startswith("a has higher top-1 agreement than b by 0.")
    back = one(compare([b, a]), "top1_agreement")
    assert (back.verdict, back.better_result) == ("a_lower", "a")
    assert back.sentence == found.sentence


def test_ppl_is_the_mean_nll(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a", scale=0.5), write(tmp_path, "b")
    found = one(compare([a, b]), "ppl")
    x, y = (load(path).arrays()["kld/nll"].astype(float) for path in (a, b))
    assert found.difference == pytest.approx((x - y).mean())
    ratio = math.exp(x.mean()) / math.exp(y.mean())
    assert found.sentence.endswith(f"on 1,240 tokens (ratio of perplexities {ratio:.4f})")
    assert found.sentence.startswith("a has lower mean NLL than b by 0.")
    back = one(compare([b, a]), "ppl")
    assert back.sentence == found.sentence


def test_ppl_prefers_its_own_tokens(tmp_path: Path) -> None:
    """With both sides' ppl tokens, those; with one side's only, the tokens of kld that both have."""
    a, b = write(tmp_path, "a"), write(tmp_path, "b")
    own = kld_arrays(tokens(50, 32, seed=9))
    keys = ("chunk", "position", "token", "chunk_hash", "nll")
    update(a, "ppl", {"value": 5.0}, arrays={key: own[key] for key in keys})
    assert one(compare([a, b]), "ppl").n == 40 * 31
    update(b, "ppl", {"value": 5.0}, arrays={key: own[key] for key in keys})
    found = one(compare([a, b]), "ppl")
    assert (found.n, found.difference, found.verdict) == (50 * 15, 0, "no_difference_shown")
    assert "is 0 [0, 0] on 750 tokens" in found.sentence


def test_equal_models_are_not_different(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a", seed=1), write(tmp_path, "b", seed=2)
    found = one(compare([a, b]), "kld")
    assert (found.verdict, found.better_result) == ("no_difference_shown", None)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0 < found.high
    wanted = (
        r"no difference can be shown: mean KLD of a minus that of b is -?0\.\d+ \[-0\.\d+, 0\.\d+\] on 1,240 tokens"
    )
    assert re.fullmatch(wanted, found.sentence)


def test_too_few(tmp_path: Path) -> None:
    """31 chunks: a value, no interval, nothing shown however large the difference; no 99.9 % value at all."""
    ids = tokens(31)
    a, b = write(tmp_path, "a", scale=0.01, ids=ids), write(tmp_path, "b", ids=ids)
    kld, tail, *_ = compare([a, b])
    assert kld.difference is not None
    assert kld.difference < -0.5
    assert (kld.low, kld.high, kld.verdict, kld.better_result) == (None, None, "no_difference_shown", None)
    assert "too few: 31 chunks, an interval takes at least 32" in kld.sentence
    assert kld.sentence.startswith("no difference can be shown: mean KLD of a minus that of b is -")
    assert (tail.difference, tail.low, tail.verdict) == (None, None, "no_difference_shown")
    assert "99.9 % KLD of a and b, too few: 961 values, the 99.9 % value takes at least 100,000" in tail.sentence
    json.dumps([pair.to_json() for pair in (kld, tail)], allow_nan=False)


def test_the_tail(tmp_path: Path) -> None:
    ids = tokens(200, 1024)
    a, b = write(tmp_path, "a", scale=0.5, ids=ids), write(tmp_path, "b", ids=ids)
    found = one(compare([a, b], ["p99_9"], draws=300), "p99_9")
    x, y = (load(path).arrays() for path in (a, b))
    wanted = quantile_difference(x["kld/kld"], y["kld/kld"], x["kld/chunk"], 0.999, draws=300)
    assert (found.difference, found.low, found.high) == wanted[:3]
    assert found.difference == pytest.approx(np.quantile(x["kld/kld"], 0.999) - np.quantile(y["kld/kld"], 0.999))
    assert found.verdict == "a_lower"
    assert found.sentence.startswith("a has lower 99.9 % KLD than b by ")
    assert found.sentence.endswith("on 102,200 tokens")


def test_every_value_is_finite(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a"), write(tmp_path, "b")
    arrays = load(b).arrays()
    broken = {name.removeprefix("kld/"): array for name, array in arrays.items()}
    broken["kld"] = broken["kld"].copy()
    broken["kld"][17] = np.nan
    update(b, "kld", {}, arrays=broken)
    with pytest.raises(InputError, match="kld/kld is nan in row 17"):
        compare([a, b])


def test_absurd_numbers(tmp_path: Path) -> None:
    """Finite, but too large to square or to raise e to: no warning, no crash."""
    a, b = write(tmp_path, "a"), write(tmp_path, "b")
    arrays = {name.removeprefix("kld/"): array for name, array in load(b).arrays().items()}
    update(b, "kld", {}, arrays={**arrays, "nll": np.full(1240, 5000.0)})
    assert one(compare([a, b]), "ppl").sentence.endswith("(ratio of perplexities 0.0000)")
    assert one(compare([b, a]), "ppl").verdict == "b_lower"
    update(b, "kld", {}, arrays={**arrays, "kld": np.linspace(0, 1e300, 1240)})
    with pytest.raises(InputError, match="not finite or beyond 1e"):
        compare([a, b])


# --- what belongs together ---


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    ids = tokens()
    a = write(tmp_path, "a", ids=ids)
    other = ids.copy()
    other[3, 60] += 1  # one token of one chunk: all tokens of that chunk had another context
    b = write(tmp_path, "b", ids=other)
    with pytest.raises(InputError, match="not measured on the same scored tokens: 1,209 of 1,240 and 1,240") as caught:
        compare([a, b])
    assert str(a) in caught.value.message
    assert str(b) in caught.value.message
    assert caught.value.hint is not None
    with pytest.raises(InputError, match="930 of 1,240 and 930 are the same"):
        compare([a, write(tmp_path, "c", ids=ids[:30])])
    with pytest.raises(InputError, match="0 of 1,240 and 600 are the same"):
        compare([a, write(tmp_path, "d", ids=tokens(40, 32))])


def test_another_order_is_the_same_tokens(tmp_path: Path) -> None:
    """Chunks measured in another order: matched by their hashes, the same numbers."""
    ids = tokens()
    a, b = write(tmp_path, "a", ids=ids, scale=0.9), write(tmp_path, "b", ids=ids)
    wanted = one(compare([a, b]), "kld")
    arrays = {name.removeprefix("kld/"): array for name, array in load(b).arrays().items()}
    turned = np.random.default_rng(0).permutation(arrays["chunk"].size)
    chunks = np.random.default_rng(1).permutation(40)
    moved = {name: array[turned] if array.size == turned.size else array for name, array in arrays.items()}
    moved["chunk"] = chunks[moved["chunk"]].astype(np.int32)
    moved["chunk_hash"] = np.empty_like(arrays["chunk_hash"])
    moved["chunk_hash"][chunks] = arrays["chunk_hash"]
    update(b, "kld", {}, arrays=moved)
    found = one(compare([a, b]), "kld")
    assert (found.difference, found.low, found.high) == pytest.approx((wanted.difference, wanted.low, wanted.high))
    assert found.better == wanted.better


def test_repeated_text_is_no_obstacle(tmp_path: Path) -> None:
    ids = np.concatenate([tokens(20), tokens(20)])
    a, b = write(tmp_path, "a", ids=ids), write(tmp_path, "b", ids=ids)
    assert one(compare([a, b]), "kld").n == 1240
    with pytest.raises(InputError, match="1,209 of 1,240 and 1,209"):
        compare([a, write(tmp_path, "c", ids=ids[1:])])


def test_other_references_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path, "a", reference={"sha256": "x", "model_sha256": "m"})
    b = write(tmp_path, "b", reference={"sha256": "y", "model_sha256": "m"})  # one read from a .apexref
    assert len(compare([a, b])) == 4
    c = write(tmp_path, "c", reference={"sha256": "x", "model_sha256": "n"})
    with pytest.raises(InputError, match="measured against different references"):
        compare([a, c])
    # not said: told by what the reference gave the tokens
    d, e = write(tmp_path, "d"), write(tmp_path, "e")
    arrays = {name.removeprefix("kld/"): array for name, array in load(e).arrays().items()}
    noise = np.random.default_rng(0).normal(0, 1e-3, arrays["ref_nll"].size)
    update(e, "kld", {}, arrays={**arrays, "ref_nll": arrays["ref_nll"] + noise})
    assert len(compare([d, e])) == 4
    update(e, "kld", {}, arrays={**arrays, "ref_nll": arrays["ref_nll"] + 50 * noise})
    with pytest.raises(InputError, match=r"different references: their nll of the same tokens are 0\.0"):
        compare([d, e])


def test_nothing_to_pair(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a"), tasks(tmp_path, "b", np.ones(50))
    with pytest.raises(InputError, match=r"has kld, p99_9, top1_agreement, ppl and .* hellaswag: nothing"):
        compare([a, b])
    with pytest.raises(UsageError, match="no numbers for 'hellaswag': it has kld"):
        compare([a, b], ["hellaswag"])
    with pytest.raises(UsageError, match="Did you mean kld"):
        compare([a, a], ["kdl"])
    with pytest.raises(UsageError, match="two results or more"):
        compare([a])
    c = tmp_path / "c.json"
    update(c, "kld", {"median": 0.1}, base=base())
    with pytest.raises(InputError, match=r"c\.json: no numbers per token"):
        compare([a, c])
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"a\.npz: not the file that results\.json names"):
        compare([a, write(tmp_path, "d")])
    (tmp_path / "a.npz").unlink()
    with pytest.raises(InputError, match="No such file"):
        compare([a, b])


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("chunk_hash", None, "kld/chunk_hash of its numbers per token is missing"),
        ("position", None, "kld/position of its numbers per token is missing"),
        ("chunk", np.zeros((620, 2), np.int32), r"kld/chunk .* is int32 of shape \(620, 2\)"),
        ("chunk", np.zeros(1240), "kld/chunk .* is float64"),
        ("chunk", np.full(1240, 40, np.int32), "chunk 40 of 40"),
        ("chunk", np.full(1240, -1, np.int32), "do not fit together"),
        ("position", np.zeros(1239, np.int32), "differ in length"),
        ("chunk_hash", np.zeros(40, np.int32), "kld/chunk_hash .* is int32"),
        ("chunk_hash", np.zeros(0, np.uint64), "chunk 39 of 0"),
        ("kld", np.zeros(1239), "kld/kld has 1239 values for 1240 rows"),
        ("kld", np.array(["x"] * 1240), "kld/kld .* is <U1"),
        ("top1", np.zeros((1, 1240), bool), "kld/top1 .* of shape"),
        ("ref_nll", np.zeros(3), "kld/ref_nll has 3 values"),
    ],
)
def test_arrays_that_do_not_fit(name: str, value: Any, says: str, tmp_path: Path) -> None:
    a, b = write(tmp_path, "a"), write(tmp_path, "b")
    arrays = {key.removeprefix("kld/"): array for key, array in load(b).arrays().items()}
    if value is None:
        del arrays[name]
    else:
        arrays[name] = value
    update(b, "kld", {}, arrays=arrays)
    with pytest.raises(InputError, match=says):
        compare([a, b])


# --- tasks ---


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), n=st.integers(1, 400), share=st.floats(0, 1), better=st.floats(0, 0.5))
def test_tasks(seed: int, n: int, share: float, better: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("t")
    random = np.random.default_rng(seed)
    x = random.random(n) < share
    y = np.where(random.random(n) < better, True, x)
    (found,) = compare([tasks(folder, "a", x), tasks(folder, "b", y)])
    only_a, only_b = int((x & ~y).sum()), int((y & ~x).sum())
    assert (found.metric, found.n) == ("hellaswag", n)
    assert found.p == mcnemar(only_a, only_b)
    wanted = share_difference(only_a, only_b, n)
    assert (found.difference, found.low, found.high) == wanted[:3]
    assert (found.better, found.worse) == (only_a / n, only_b / n)
    if found.verdict == "no_difference_shown":
        assert found.better_result is None
        assert found.p >= 0.05 or not wanted.excludes_zero()
    else:
        assert (found.verdict, found.better_result) == ("a_lower", "b")
        assert found.p < 0.05
        assert wanted.high is not None
        assert wanted.high < 0


def test_the_sentence_of_tasks(tmp_path: Path) -> None:
    x = np.arange(400) < 300
    y = np.arange(400) < 260
    (found,) = compare([tasks(tmp_path, "a", x), tasks(tmp_path, "b", y)])
    wanted = "a has higher HellaSwag accuracy than b by 0.100 [0.069, 0.130] on 400 tasks (McNemar p = 1.8e-12)"
    assert found.sentence == wanted
    (back,) = compare([tasks(tmp_path, "c", y), tasks(tmp_path, "d", x)])
    assert back.sentence == wanted.replace("a has", "d has").replace("than b", "than c")
    (none,) = compare([tasks(tmp_path, "e", x), tasks(tmp_path, "f", x)])
    assert none.verdict == "no_difference_shown"
    assert none.sentence.endswith("on 400 tasks (McNemar p = 1)")


def test_verdict_takes_both_interval_and_test(tmp_path: Path) -> None:
    """Seven to one of 8 disagreements: the interval of 400 tasks just excludes zero, the exact test has p = 0.07."""
    x, y = np.zeros(400, bool), np.zeros(400, bool)
    x[:7], y[7] = True, True
    (found,) = compare([tasks(tmp_path, "a", x), tasks(tmp_path, "b", y)])
    assert found.p == pytest.approx(18 / 256)
    assert found.verdict == "no_difference_shown"
    y[7] = False
    (found,) = compare([tasks(tmp_path, "c", x), tasks(tmp_path, "d", y)])
    assert found.p == pytest.approx(2 / 128)
    assert found.verdict == "b_lower"


def test_tasks_in_another_order_and_other_tasks(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random(50) < 0.5
    a, b, c = tasks(tmp_path, "a", x), tasks(tmp_path, "b", x), tasks(tmp_path, "c", x, seed=6)
    arrays = {name.removeprefix("hellaswag/"): array[::-1] for name, array in load(b).arrays().items()}
    update(b, "hellaswag", {}, arrays=arrays)
    (found,) = compare([a, b])
    assert (found.better, found.worse, found.equal) == (0, 0, 1)
    with pytest.raises(InputError, match="not measured on the same HellaSwag tasks: 0 of 50 and 50 are the same"):
        compare([a, c])
    update(b, "hellaswag", {}, arrays={**arrays, "correct": arrays["correct"][:-1]})
    with pytest.raises(InputError, match="hellaswag/correct has 49 values for 50 rows"):
        compare([a, b])


def test_mc2(tmp_path: Path) -> None:
    """Of the tasks that have one; the mean of shares, each task for itself."""
    random = np.random.default_rng(0)
    masses, rows = random.random((2, 60)), np.arange(3, 63, dtype=np.int32)
    masses[0] = np.clip(masses[1] + 0.1 + random.normal(0, 0.1, 60), 0, 1)
    paths = []
    for name, mass in zip("ab", masses, strict=True):
        path = tmp_path / f"{name}.json"
        arrays = task_arrays(np.ones(70)) | {"mc2": mass.astype(np.float32), "mc2_place": rows}
        update(path, "truthfulqa", {"value": 1.0}, base=base(f"{name}.gguf", name * 8), arrays=arrays)
        paths.append(path)
    accuracy, mc2 = compare(paths)
    assert (accuracy.metric, accuracy.verdict) == ("truthfulqa", "no_difference_shown")
    wanted = mean_interval(*(np.float32(masses[0]).astype(float) - np.float32(masses[1]), np.arange(60)))
    assert (mc2.metric, mc2.n) == ("truthfulqa_mc2", 60)
    assert (mc2.difference, mc2.low, mc2.high) == pytest.approx(wanted[:3])
    assert (mc2.verdict, mc2.better_result, mc2.p, mc2.chunks) == ("b_lower", "a", None, None)
    assert re.fullmatch(r"a has higher TruthfulQA mc2 than b by 0\.\d+ \[.*\] on 60 tasks", mc2.sentence)
    few = {**task_arrays(np.ones(70)), "mc2": masses[0][:31], "mc2_place": rows[:31]}
    for path in paths:
        update(path, "truthfulqa", {}, arrays=few)
    assert "too few: 31 tasks, an interval takes at least 32" in compare(paths, ["truthfulqa_mc2"])[0].sentence
    update(paths[0], "truthfulqa", {}, arrays={**few, "mc2_place": rows[:31] + 60})
    with pytest.raises(InputError, match="names tasks that are not there"):
        compare(paths, ["truthfulqa_mc2"])


# --- pairs and labels ---


def test_pairs(tmp_path: Path) -> None:
    paths = [write(tmp_path, name, scale=1 + i / 10) for i, name in enumerate("abc")]
    assert [(p.a, p.b) for p in compare(paths, ["kld"])] == [("a", "b"), ("a", "c")]
    assert [(p.a, p.b) for p in compare(paths, ["kld", "kld"], all_pairs=True)] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert compare(paths, ["kld"], level=0.5)[0].level == 0.5
    assert compare([load(path) for path in paths], ["kld"]) == compare(paths, ["kld"])


def test_labels(tmp_path: Path) -> None:
    """Models of one name are told apart by their files, one file twice by numbers."""
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    a, b = write(tmp_path / "x", "a"), write(tmp_path / "y", "a")
    assert (compare([a, b])[0].a, compare([a, b])[0].b) == (str(a), str(b))
    assert (compare([a, a])[0].a, compare([a, a])[0].b) == (f"{a} (1)", f"{a} (2)")


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.00213, 0.00172, 0.00252, "0.0021 [0.0017, 0.0025]"),
        (0.0021, 0.0011, 0.0031, "0.0021 [0.0011, 0.0031]"),
        (12.3456, 10.2, 14.4, "12.3 [10.2, 14.4]"),
        (0.001, 0.00001, 0.002, "0.00100 [0.00001, 0.00200]"),
        (-0.5, -0.9, -0.1, "-0.5 [-0.9, -0.1]"),
        (0.00001, -0.5, 0.5, "0.0 [-0.5, 0.5]"),
        (-0.00001, -0.5, 0.5, "0.0 [-0.5, 0.5]"),
        (5.0, 5.0, 5.0, "5 [5, 5]"),
        (0.0, 0.0, 0.0, "0 [0, 0]"),
        (150000.0, 100000.0, 200000.0, "150000 [100000, 200000]"),
    ],
)
def test_digits(value: float, low: float, high: float, text: str) -> None:
    assert module._numbers(value, low, high) == text


def test_needs_no_library() -> None:
    """Neither the native one nor scipy, which is for tests."""
    code = (
        "import sys, apex_quant.evaluation.compare, apex_quant.evaluation.results, apex_quant.cli.results;"
        "print([name for name in ('llama_cpp', 'gguf', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
