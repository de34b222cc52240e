"""Others' results: what is read from their files, what is not known stays unknown, and hostile files."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from apex_quant.errors import InputError, UsageError
from apex_quant.evaluation.results import load
from apex_quant.evaluation.schema import Results
from apex_quant.report.examples import example
from apex_quant.report.gather import gather
from apex_quant.report.imports import FORMS, MAX_BYTES, NotImportableError, import_results
from apex_quant.report.pareto import front, rivals

DIVERGENCE = """\
print_info: file size   = 12.50 GiB (3.84 BPW)
llama_model_loader: loaded meta data with 51 key-value pairs from /data/m-Mini.gguf (version GGUF V3)
kl_divergence: computing over 8 chunks, n_ctx=256, batch_size=2048, n_seq=8
chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS
   8     100.7246 ±   11.3427       0.03918 ±    0.02332       0.21457 ±    0.00763     7.724 ±  0.480 %

====== Perplexity statistics ======
Mean PPL(Q)                   : 100.724613 ±  11.342725
Mean PPL(base)                :  96.854327 ±  10.931612
Cor(ln(PPL(Q)), ln(PPL(base))):  97.86%
Mean ln(PPL(Q)/PPL(base))     :   0.039182 ±   0.023323
Mean PPL(Q)/PPL(base)         :   1.039960 ±   0.024255
Mean PPL(Q)-PPL(base)         :   3.870285 ±   2.339897

====== KL divergence statistics ======
Mean    KLD:   0.214575 ±   0.007629
Maximum KLD:   2.680222
99.9%   KLD:   1.921606
99.0%   KLD:   1.151364
95.0%   KLD:   0.683663
90.0%   KLD:   0.493236
Median  KLD:   0.136955
10.0%   KLD:   0.025249
Minimum KLD:   0.000012

====== Token probability statistics ======
Mean    Δp: -0.761 ± 0.241 %
Maximum Δp: 42.010%
Median  Δp: -0.002%
RMS Δp    :  7.724 ± 0.480 %
Same top p: 70.669 ± 1.429 %
"""
BENCH = {
    "build_commit": "0c1e570", "cpu_info": "a cpu", "gpu_info": "a gpu", "model_filename": "/data/m-Q4_K_M.gguf",
    "model_size": 8_000_000, "model_n_params": 16_000_000, "n_threads": 4, "n_gpu_layers": -1,
    "n_prompt": 512, "n_gen": 0, "n_depth": 0, "avg_ts": 900.5, "stddev_ts": 3.25,
}  # fmt: skip
PUBLISHED = {"model": "M-APEX-Mini", "size_gb": 12.2, "perplexity": 7.0877, "ppl_error": 0.04591, "kl_mean": 0.087,
             "kl_99_9": None, "hellaswag": 81.0, "mmlu": 41.2791, "arc_challenge": 50.001,
             "tg128_ts": 74.39}  # fmt: skip


def one(path: Path, text: str) -> Results:
    path.write_text(text, encoding="utf-8")
    (made,) = import_results(path)
    return made


def test_log_of_a_divergence(tmp_path: Path) -> None:
    made = one(tmp_path / "mini.log", DIVERGENCE)
    kld, n = made.metrics["kld"], 8 * (256 - 1 - 128)
    assert kld["mean"] == {"value": 0.214575, "error": 0.007629, "n": n}
    assert [kld[key] for key in ("median", "p90", "p95", "p99")] == [0.136955, 0.493236, 0.683663, 1.151364]
    assert (kld["p99_9"]["value"], kld["max"]["value"]) == (1.921606, 2.680222)
    assert kld["top1_agreement"]["value"] == pytest.approx(0.70669)
    assert kld["delta_p_rms"] == pytest.approx(0.07724)
    assert made.metrics["ppl"] == {"value": 100.724613, "error": 11.342725, "n": n}
    assert made.model.path == "m-Mini.gguf"
    assert (made.model.bytes, made.model.bpw) == (round(12.5 * 2**30), 3.84)
    assert made.settings["imported"]["sha256"] == hashlib.sha256(DIVERGENCE.encode()).hexdigest()
    assert made.metric("kld").mean.low is None


def test_log_of_a_perplexity_in_two_forms_of_lines(tmp_path: Path) -> None:
    text = "perplexity: calculating perplexity over 4 chunks, n_ctx=512, batch_size=2048, n_seq=4\n[1]90.1,[2]97.2\n"
    plain = one(tmp_path / "a.log", text + "Final estimate: PPL = 6.5371 +/- 0.04169\n")
    stamped = one(tmp_path / "b.log", text + "10:0.07.587.881 I Final estimate: PPL = 6.5371 +/- 0.04169\n")
    assert plain.metrics == stamped.metrics == {"ppl": {"value": 6.5371, "error": 0.04169, "n": 4 * 255}}


@pytest.mark.parametrize(
    ("name", "text", "task", "hits", "n"),
    [
        ("x", "hellaswag_score : calculating hellaswag score over selected tasks.\n\ntask\tacc_norm\t95% confidence "
              "interval\n399\t82.45614035%\t[78.4%, 85.9%]\n400\t82.50000000%\t[78.4653%, 85.9160%]\n",
         "hellaswag", 330, 400),
        ("x", "task\tacc_norm\t95% confidence interval\n60\t50.00000000%\t[37%, 62%]\n", "hellaswag", 30, 60),
        ("x", "hellaswag score over selected tasks\ntask\tacc_norm\n400\t81.75000000\n", "hellaswag", 327, 400),
        ("x", "200\t58.0000\t -4.047165   -3.753203  2  2\nFinal Winogrande score(200 tasks): 58.0000 +/- 3.4988\n",
         "winogrande", 116, 200),
        ("arc-run", "task\tacc_norm\n99\t25.25252525\n", "arc", 25, 99),
        ("x", "task\tacc_norm\n817\t37.20930233\nFinal result: 37.2093 +/- 1.6920\nRandom chance: 22.0 +/- 1\n",
         "truthfulqa", 304, 817),
        ("x", "task\tacc_norm\n1548\t41.27906977\nFinal result: 41.2791 +/- 1.2517\n", "mmlu", 639, 1548),
    ],
)  # fmt: skip
def test_logs_of_tasks(tmp_path: Path, name: str, text: str, task: str, hits: int, n: int) -> None:
    found = one(tmp_path / f"{name}.log", text).metrics[task]
    assert found["n"] == n
    assert found["value"] == pytest.approx(hits / n, abs=1e-6)
    z, p = norm.ppf(0.975), hits / n  # Wilson 1927
    centre, half = (p + z * z / (2 * n)), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found["low"] == pytest.approx((centre - half) / (1 + z * z / n))
    assert found["high"] == pytest.approx((centre + half) / (1 + z * z / n))


def test_a_multiple_choice_that_nobody_named_is_left_out(tmp_path: Path) -> None:
    made = one(tmp_path / "x.log", "task\tacc_norm\n500\t37.2\nFinal result: 37.2000 +/- 1.6920\n")
    assert made.metrics == {}
    assert "500 tasks is left out" in made.warnings[0]


def test_bench_in_four_forms(tmp_path: Path) -> None:
    generation = BENCH | {"n_prompt": 0, "n_gen": 128, "avg_ts": 60.25, "stddev_ts": 0.5}
    deep = generation | {"n_depth": 4096, "avg_ts": 40.0}
    both = BENCH | {"n_gen": 16}
    tests = [row | {"samples_ts": [1.0, 2.0]} for row in (BENCH, generation, deep, both)]
    heading = io.StringIO()
    writer = csv.DictWriter(heading, BENCH, quoting=csv.QUOTE_ALL)
    heading.write(",".join(BENCH) + "\n")
    writer.writerows([BENCH, generation, deep])
    table = (
        "| model         |     size |  params | backend | ngl |          test |           t/s |\n"
        "| ------------- | -------: | ------: | ------- | --: | ------------: | ------------: |\n"
        "| m 1B Q4_K - M | 7.63 MiB | 16.00 M | CUDA    |  99 |         pp512 | 900.50 ± 3.25 |\n"
        "| m 1B Q4_K - M | 7.63 MiB | 16.00 M | CUDA    |  99 |         tg128 |  60.25 ± 0.50 |\n"
        "| m 1B Q4_K - M | 7.63 MiB | 16.00 M | CUDA    |  99 | tg128 @ d4096 |  40.00 ± 0.50 |\n\nbuild: 0c1e570 (9)\n"
    )
    texts = {"bench.json": json.dumps(tests), "bench.jsonl": "\n".join(map(json.dumps, tests)),
             "bench.csv": heading.getvalue(), "bench.md": table}  # fmt: skip
    for name, text in texts.items():
        made = one(tmp_path / name, text)
        speed = made.metrics["speed"]
        rates = {test: (rate["value"], rate["deviation"]) for test, rate in speed.items() if isinstance(rate, dict)}
        assert rates == {"pp512": (900.5, 3.25), "tg128": (60.25, 0.5), "tg128@d4096": (40.0, 0.5)}
        if name != "bench.md":
            assert made.name == "m-Q4_K_M"
            assert (made.model.bytes, made.model.bpw, speed["device"]) == (8_000_000, 4.0, "a gpu")
    assert one(tmp_path / "m-Q4_0.md", table).name == "m-Q4_0"


def test_published_json(tmp_path: Path) -> None:
    made = one(tmp_path / "apex_mini.json", json.dumps(PUBLISHED))
    assert made.model.bytes == round(12.2 * 2**30)
    assert made.model.model_dump()["family"] == "APEX"
    assert made.metrics["ppl"] == {"value": 7.0877, "error": 0.04591}
    assert made.metrics["kld"] == {"mean": {"value": 0.087}}
    assert made.metrics["mmlu"]["n"] == 1548
    assert made.metrics["mmlu"]["low"] < 639 / 1548 < made.metrics["mmlu"]["high"]
    assert made.metrics["arc"] == {"value": 0.50001}  # no share of 299 tasks: no interval
    assert "no interval" in " ".join(made.warnings)
    written = import_results(tmp_path / "apex_mini.json", out=tmp_path)
    assert load(tmp_path / "M-APEX-Mini.json").metrics == written[0].metrics == made.metrics


def test_the_example_is_the_published_table() -> None:
    made = {one.name.removeprefix("Qwen3.5-35B-A3B-"): one for one in import_results(example("qwen3.5-35b-a3b"))}
    published = {  # GiB, PPL, mean KLD, largest KLD, HellaSwag, tg128
        "F16": (64.6, 6.537, None, None, 82.5, 30.4), "Q8_0": (34.4, 6.533, 0.0046, 14.71, 83.0, 52.5),
        "APEX-Quality": (21.3, 6.527, 0.0114, 5.85, 83.0, 62.3),
        "APEX-I-Quality": (21.3, 6.552, 0.0102, 5.59, 83.5, 63.1),
        "APEX-Balanced": (23.6, 6.533, 0.0088, 6.03, 83.0, 60.8),
        "APEX-I-Balanced": (23.6, 6.548, 0.0078, 5.77, 83.0, 61.4),
        "APEX-Compact": (16.1, 6.783, 0.0469, 7.56, 82.5, 69.8),
        "APEX-I-Compact": (16.1, 6.669, 0.0332, 5.50, 81.8, 69.8),
        "APEX-Mini": (12.2, 7.088, 0.0870, 5.57, 81.0, 74.4), "UD-Q8_K_XL": (45.3, 6.536, 0.0025, 4.36, 82.5, 36.4),
        "Q5_K_S": (23.1, 6.535, 0.0069, 4.60, 83.0, 56.4), "UD-Q4_K_XL": (20.7, 6.554, 0.0097, 3.14, 83.0, 58.1),
        "UD-Q4_K_L": (18.8, 6.586, 0.0151, 5.98, 82.3, 65.5), "Q3_K_M": (15.1, 6.730, 0.0420, 5.56, 82.0, 60.6),
        "IQ2_M": (11.3, 7.303, 0.1113, 6.07, 80.3, 76.2),
    }  # fmt: skip
    assert set(made) == set(published)
    for name, (size, ppl, kld, largest, hellaswag, speed) in published.items():
        metrics = made[name].metrics
        assert made[name].model.bytes == round(size * 2**30)
        assert metrics["ppl"]["value"] == pytest.approx(ppl, abs=5.1e-4)
        assert metrics["hellaswag"]["value"] == pytest.approx(hellaswag / 100, abs=5.1e-4)
        assert metrics["speed"]["tg128"]["value"] == pytest.approx(speed, abs=0.051)
        assert (kld is None) == ("kld" not in metrics)
        if kld is not None:
            assert metrics["kld"]["mean"]["value"] == pytest.approx(kld, abs=5.1e-5)
            assert metrics["kld"]["max"]["value"] == pytest.approx(largest, abs=5.1e-3)
            assert made[name].reference == {"path": "Qwen3.5-35B-A3B-F16"}
        assert made[name].settings["imported"]["source"].startswith("mudler/apex-quant")


def test_the_example_says_where_each_family_leads() -> None:
    gathered = gather(["example:qwen3.5-35b-a3b"])
    assert gathered.reference is not None
    assert gathered.reference.label == "F16"
    assert [one.entry.label for one in front(gathered.shown("kld"))] == [
        "IQ2_M", "Mini", "Q3_K_M", "I-Compact", "UD-Q4_K_L", "UD-Q4_K_XL", "Q5_K_S", "Q8_0", "UD-Q8_K_XL",
    ]  # fmt: skip
    found = {(one.shown.entry.label, one.family): one for one in rivals(gathered)}
    assert {key for key, one in found.items() if one.ratio < 1} == {("Mini", "bartowski")}
    assert {key[0] for key, one in found.items() if one.ratio > 1} == {"Quality", "I-Quality", "Balanced", "I-Balanced"}
    assert all(one.low is None and one.high is None for one in found.values())
    assert all(entry.number("hellaswag").interval() for entry in gathered.entries)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="Did you mean"):
        gather(["example:qwen3.5-35b"])


def test_csv_of_ones_own(tmp_path: Path) -> None:
    text = (
        "# source: a friend\n# mmlu_n: 1548\n\n"
        "name,size_gb,kld,kld_low,kld_high,mmlu,top1,router,tg64,colour\n"
        'm-Q4_0,4.5,0.02,0.018,0.022,41.2791,94.5,3.5,20.5,red\n"m, the other",,,,,0.412791,,,,\n'
    )
    (tmp_path / "t.csv").write_text(text)
    first, second = import_results(tmp_path / "t.csv")
    assert first.model.bytes == 4_500_000_000
    assert first.metrics["kld"] == {"mean": {"value": 0.02, "low": 0.018, "high": 0.022},
                                    "top1_agreement": {"value": 0.945}}  # fmt: skip
    assert first.metrics["router"] == {"changed": pytest.approx(0.035)}
    assert first.metrics["speed"] == {"tg64": {"value": 20.5}}
    assert second.metrics["mmlu"]["value"] == pytest.approx(first.metrics["mmlu"]["value"])
    assert second.metrics["mmlu"]["low"] == pytest.approx(first.metrics["mmlu"]["low"])
    assert second.name == "m, the other"
    assert "colour" in first.warnings[0]
    assert first.settings["imported"]["source"] == "a friend"


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.csv", "name,kld\nm,nan\n", "not a number"),
        ("a.csv", "name,kld\nm,1e400\n", "too large|not a number"),
        ("a.csv", "name,kld\nm,-1\n", "cannot be -1"),
        ("a.csv", "name,kld\nm,0.1,0.2\n", "3 cells"),
        ("a.csv", "name,kld,kld\nm,1,1\n", "twice"),
        ("a.csv", "name,kld\n", "without rows"),
        ("a.csv", 'name,kld\n"m,1\n', "not a CSV"),
        ("a.csv", "name,mmlu\nm,150\n", "cannot be 1.5"),
        ("a.json", json.dumps([BENCH | {"model_filename": None}]), "names no model"),
        ("a.json", json.dumps([BENCH | {"avg_ts": [1]}]), "not a number"),
        ("a.json", json.dumps([BENCH | {"n_prompt": -5}]), "not a number of things"),
        ("a.json", json.dumps([BENCH])[:-9], "cut short"),
        ("a.json", json.dumps(PUBLISHED | {"kl_mean": "0.1"}), "not a number"),
        ("a.json", json.dumps(PUBLISHED | {"hellaswag": 830}), "cannot be 8.3"),
        ("a.json", json.dumps(PUBLISHED | {"model": ""}), "without a name"),
        ("a.log", "Mean    KLD:   99999999999999999999.5 ± 0.1\n", "cannot be"),
    ],
)
def test_impossible_numbers_are_refused(tmp_path: Path, name: str, text: str, match: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=match):
        import_results(tmp_path / name)
    broken = gather([tmp_path / name])
    assert [missing.kind for missing in broken.missing] == ["corrupt"]


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "[1]", "hello\n", "name,colour\nm,red\n", "[" * 100_000, "\x00\xff", "|a|b|\n"]
)
def test_files_of_no_form(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(NotImportableError):
        import_results(tmp_path / "x.txt")


def test_a_model_is_refused_unread(tmp_path: Path) -> None:
    """However large: this one is longer than what is read of results."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    os.truncate(path, MAX_BYTES + 1)
    with pytest.raises(NotImportableError, match=r"m\.gguf: a model, not results"):
        import_results(path)


def test_forms_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_text(DIVERGENCE)
    assert import_results(tmp_path / "x", form="llama-perplexity log")
    with pytest.raises(NotImportableError, match="as csv"):
        import_results(tmp_path / "x", form="csv")
    with pytest.raises(UsageError):
        import_results(tmp_path / "x", form="xls")


_WORDS = st.sampled_from(["name", "kld", ",", "\n", "#", "tg128", "0.1", "Mean    KLD:", "±", "|", "test", "t/s",
                          "model", "pp512", "{", "}", '"model"', ":", "[", "]", "Final estimate: PPL =", "1e9", "\t",
                          "task\tacc_norm",
                          "400\t82.5", '"', "1", "-", "%"])  # fmt: skip


@given(st.lists(_WORDS | st.text(max_size=5), max_size=60).map(" ".join) | st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in FORMS.values():
        try:
            rows: Any = read(text, "stem")
        except InputError:
            continue
        for row in rows or ():
            assert json.loads(json.dumps(row.metrics, allow_nan=False)) == row.metrics
