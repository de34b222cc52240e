"""What is gathered: numbers that trace to their files, labels, families, what is comparable, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_quant import embedded_model
from apex_quant.errors import InputError, UsageError
from apex_quant.evaluation.results import load, save
from apex_quant.evaluation.schema import ModelInfo
from apex_quant.recipe.plan import plan
from apex_quant.report.experts import coverage
from apex_quant.report.family import Family, family_of, matches, parse_families
from apex_quant.report.gather import gather
from apex_quant.report.labels import LONGEST, short_labels
from apex_quant.report.precision import from_gguf, from_plan
from apex_quant.report.quantities import QUANTITIES, gigabytes
from apex_quant.report.tokens import distribution, vocabulary, worst_tokens
from tests.evaluation import synthetic
from tests.report.results_data import REFERENCE, folder_of_all, metrics, write


def at(document: Any, pointer: str) -> Any:
    """What stands at a JSON pointer (RFC 6901)."""
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def test_every_number_is_found_again_in_its_file(tmp_path: Path) -> None:
    gathered = gather([folder_of_all(tmp_path)])
    counted = 0
    for entry in gathered.entries:
        numbers = list(entry.numbers.values())
        numbers += [*entry.domains("kld").values(), *entry.domains("ppl").values()]
        numbers += [one for row in entry.routers() for one in (row.changed, row.mass_moved) if one is not None]
        for number in numbers:
            document = json.loads((tmp_path / number.file).read_text())
            assert at(document, number.pointer) == number.value
            if number.low is not None:
                assert at(document, number.pointer.removesuffix("value") + "low") == number.low
            counted += 1
    assert counted > 150
    assert set(gathered.entries[1].numbers) >= set(QUANTITIES) - {"kld_floor", "kld_reverse", "ppl_all", "winogrande",
                                                                  "arc", "truthfulqa"}  # fmt: skip


def test_reference_families_and_labels(tmp_path: Path) -> None:
    gathered = gather([folder_of_all(tmp_path)], family=["Unsloth=UD-*"])
    assert [entry.label for entry in gathered.entries] == [
        "BF16", "UD-Q5_K", "Balanced", "Quality", "Compact", "UD-Q3_K", "Mini",
    ]  # fmt: skip
    assert gathered.reference is gathered.entries[0]
    assert {entry.label: entry.family for entry in gathered.entries}["Mini"] == "APEX"
    assert gathered.families == ("APEX", "Unsloth", "reference")
    chosen = gather([tmp_path], reference="*Quality")
    assert chosen.reference is not None
    assert chosen.reference.label == "Quality"
    with pytest.raises(UsageError, match="fits 4 files"):
        gather([tmp_path], reference="APEX-*")
    with pytest.raises(UsageError, match="no results are of 'tiny-Q1'"):
        gather([tmp_path], reference="tiny-Q1")


def test_what_is_broken_is_said_and_stops_nothing(tmp_path: Path) -> None:
    folder_of_all(tmp_path)
    whole = (tmp_path / "tiny-APEX-Mini.json").read_text()
    (tmp_path / "cut.json").write_text(whole[:500])
    (tmp_path / "old.json").write_text(whole.replace("apex.results/1", "apex.results/0"))
    (tmp_path / "new.json").write_text(whole.replace("apex.results/1", "apex.results/7"))
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "bytes.json").write_bytes(b"\xff\x00{")
    (tmp_path / "late.json.perplexity.state").write_bytes(b"")
    (tmp_path / "pipe.json").symlink_to("/dev/zero")
    partial = load(tmp_path / "tiny-UD-Q3_K.json")
    partial.metrics = {"kld": {"note": "too few"}}
    save(partial, tmp_path / "tiny-UD-Q3_K.json")
    gathered = gather([tmp_path])
    assert len(gathered.entries) == 7
    kinds = {one.place: one.kind for one in gathered.missing}
    assert kinds == {"cut.json": "corrupt", "old.json": "corrupt", "new.json": "corrupt", "bytes.json": "corrupt",
                     "late.json.perplexity.state": "unfinished", "pipe.json": "corrupt"}  # fmt: skip
    assert any("newer" in one.sentence for one in gathered.missing)
    assert any("apex.results/0" in one.sentence for one in gathered.missing)
    assert gathered.passed_over == ("other.json",)
    entry = gathered.by_label["UD-Q3_K"]
    assert entry.numbers == {}
    assert "mean KLD" in entry.not_measured()
    json.dumps(gathered.to_json(), allow_nan=False)


def test_places_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no results in"):
        gather([tmp_path])
    with pytest.raises(InputError, match="no such file"):
        gather([tmp_path / "none.json"])
    (tmp_path / "broken.json").write_text("{")
    assert [one.kind for one in gather([tmp_path]).missing] == ["corrupt"]


def test_numbers_about_something_else_are_set_aside(tmp_path: Path) -> None:
    folder_of_all(tmp_path)
    write(tmp_path, "tiny-Q4_0", 0.02, 18_000_000_000, reference=REFERENCE | {"model_sha256": "b" * 64})
    write(
        tmp_path, "tiny-Q4_1", 0.02, 19_000_000_000, settings={"ctx": 512, "scored": "half", "texts": ["chat", "code"]}
    )
    gathered = gather([tmp_path])
    aside = {one.entry.label: one.sentence for one in gathered.set_aside("kld")}
    assert set(aside) == {"Q4_0", "Q4_1"}
    assert "another reference" in aside["Q4_0"]
    assert "another context" in aside["Q4_1"]
    assert {one.entry.label for one in gathered.set_aside("ppl")} == {"Q4_1"}
    assert all(one.verified for one in gathered.shown("kld"))
    assert {one.kind for one in gathered.missing} == {"set_aside"}


def test_metrics_of_one_file_in_two_results_belong_together(tmp_path: Path) -> None:
    every = metrics(0.01)
    model = ModelInfo(path="m-Q4_K.gguf", sha256="1" * 64, bytes=1000)
    for name, keys in (("text", ("kld", "ppl")), ("speed", ("speed",)), ("again", ("speed",))):
        write(tmp_path, name, 0.01, 1, model=model, metrics={key: every[key] for key in keys})
    gathered = gather([tmp_path])
    assert len(gathered.entries) == 2  # the speed was measured twice
    both = next(entry for entry in gathered.entries if entry.number("kld"))
    speed, kld = both.number("tg"), both.number("kld")
    assert speed is not None
    assert kld is not None
    assert (speed.file, kld.file) == ("again.json", "text.json")
    assert len({entry.label for entry in gathered.entries}) == 2


def test_imports_of_one_file_belong_together(tmp_path: Path) -> None:
    (tmp_path / "m-Q4_0.log").write_text("Final estimate: PPL = 6.5 +/- 0.1\n")
    (tmp_path / "t.csv").write_text("name,size_gb,tg128\nm-Q4_0,4,60\nm-Q8_0,8,30\n")
    gathered = gather([tmp_path / "m-Q4_0.log", tmp_path / "t.csv"])
    assert [(entry.label, len(entry.sources), sorted(entry.numbers)) for entry in gathered.entries] == [
        ("Q8_0", 1, ["tg"]), ("Q4_0", 2, ["ppl", "tg"]),
    ]  # fmt: skip


def test_files_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "results", 0.01, 1000, model=ModelInfo(path="m.gguf", sha256=folder * 64, bytes=9))
    gathered = gather([tmp_path / "a", tmp_path / "b"])
    assert sorted(entry.files[0] for entry in gathered.entries) == ["a/results.json", "b/results.json"]
    assert sorted(entry.label for entry in gathered.entries) == ["m (a)", "m (b)"]


def test_tokens_of_the_archive(tmp_path: Path) -> None:
    path = synthetic.write(tmp_path, "m-Q4_0")
    entry = gather([path]).entries[0]
    arrays = load(path).arrays()
    kld = arrays["kld/kld"]
    worst = entry.worst
    assert [one.kld for one in worst[:3]] == np.sort(kld)[::-1][:3].tolist()
    place = int(kld.argmax())
    assert (worst[0].chunk, worst[0].position) == (arrays["kld/chunk"][place], arrays["kld/position"][place])
    assert worst[0].domain == ["chat", "code"][arrays["kld/domain"][place]]
    found = entry.distribution
    assert found is not None
    assert sum(found.counts) == found.n == kld.size
    at_edge = np.array([(kld >= edge).mean() for edge in found.edges[1:-1]])
    np.testing.assert_allclose(found.beyond[1:-1], at_edge, atol=1e-12)
    (tmp_path / "m-Q4_0.npz").write_bytes(b"PK broken")
    again = gather([path])
    assert again.entries[0].worst == []
    assert any("numbers per token" in one.sentence for one in again.missing)


@pytest.mark.parametrize("wrong", [{"kld/kld": np.zeros((2, 2), np.float32)}, {"kld/kld": np.array([np.nan])},
                                   {"kld/kld": np.zeros(3), "kld/chunk": np.zeros(3, np.int32)},
                                   {"kld/kld": np.array(["x"])}])  # fmt: skip
def test_archives_of_other_shapes_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        worst_tokens(wrong)
    if wrong["kld/kld"].size != 3:
        with pytest.raises(InputError):
            distribution(wrong)


def test_precision_map_is_that_of_the_file() -> None:
    found = from_gguf(embedded_model())
    reader = gguf.GGUFReader(embedded_model())
    sizes = {tensor.name: (tensor.tensor_type.name, int(tensor.n_bytes)) for tensor in reader.tensors}
    assert {one.name: (one.type, one.bytes) for one in found.tensors} == sizes
    assert sum(cell.bytes for cell in found.cells) == sum(size for _, size in sizes.values())
    assert found.layers == (*range(12), None)
    cell = next(cell for cell in found.cells if cell.layer == 3 and cell.role == "routed_expert")
    assert (cell.bits, cell.types, cell.tensors) == (16.0, ("BF16",), 3)


def test_precision_map_of_a_plan_and_of_another_file(tmp_path: Path) -> None:
    path = write(tmp_path, "apex-tiny-moe-APEX-Compact", 0.1, 1000)
    made = plan(embedded_model(), "compact").to_json()
    (tmp_path / "plan.json").write_text(json.dumps(made))
    entry = gather([tmp_path]).entries[0]
    assert entry.plan == tmp_path / "plan.json"
    assert entry.precision is not None
    assert {one.name: one.type for one in entry.precision.tensors} == {t["name"]: t["type"] for t in made["tensors"]}
    (tmp_path / "apex-tiny-moe-APEX-Compact.gguf").write_bytes(b"GGUF of another size")
    entry = gather([path]).entries[0]
    assert entry.gguf is None
    assert "another file" in entry.missing[0]
    made["tensors"][3]["bytes"] = "many"
    (tmp_path / "plan.json").write_text(json.dumps(made))
    with pytest.raises(InputError, match="not a plan"):
        from_plan(tmp_path / "plan.json")


def test_coverage_of_an_importance_matrix(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    for layer, tokens in ((0, [100, 0, 63, 64]), (2, [5000, 1, 2, 3])):
        writer.add_tensor(f"blk.{layer}.ffn_down_exps.weight.counts", np.array([tokens], np.float32).T)
        writer.add_tensor(f"blk.{layer}.ffn_down_exps.weight.in_sum2", np.zeros((4, 8), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found = coverage(path)
    assert found is not None
    assert [(one.layer, one.tokens, one.uncovered) for one in found.layers] == [
        (0, (100, 0, 63, 64), (1, 2)), (2, (5000, 1, 2, 3), (1, 2, 3)),
    ]  # fmt: skip
    assert (found.chunks, found.datasets) == (7, ("a.txt",))
    assert coverage(embedded_model()) is None


def test_text_of_tokens_is_the_librarys() -> None:
    decode = vocabulary(embedded_model())
    assert decode is not None
    reader = gguf.GGUFReader(embedded_model())
    words = reader.fields["tokenizer.ggml.tokens"].contents()
    space = next(
        k for k, word in enumerate(words) if word.startswith("\u0120") and word[1:].isascii() and len(word) > 3
    )
    newline = words.index("\u010a")
    assert decode([space, newline]) == f" {words[space][1:]}\n"
    assert decode([10**9]) == "[1000000000]"


@given(st.lists(st.text("abAPEX-_ .#0", max_size=40), min_size=1, max_size=12))
def test_labels_are_unique_and_short(names: list[str]) -> None:
    labels = short_labels(names)
    assert len(set(labels)) == len(names)
    assert all(len(label) <= LONGEST for label in labels)


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["M-7B-APEX-I-Quality.gguf", "M-7B-APEX-Mini.gguf"], ["I-Quality", "Mini"]),
        (["M-7B-APEX-I-Quality.gguf", "M-7B-APEX-I-Compact.gguf"], ["I-Quality", "I-Compact"]),
        (["M-7B-APEX-I-Quality.gguf"], ["I-Quality"]),
        (["M-7B-Q4_K_M.gguf"], ["Q4_K_M"]),
        (["M.gguf", "M-Q4_0.gguf", "M-Q8_0.gguf"], ["M", "Q4_0", "Q8_0"]),
        (["M-Q4_0-00001-of-00003.gguf", "M-Q8_0.gguf"], ["Q4_0", "Q8_0"]),
        (["same.gguf", "same.gguf"], ["same #1", "same #2"]),
    ],
)
def test_labels(names: list[str], labels: list[str]) -> None:
    assert short_labels([name.removesuffix(".gguf") for name in names]) == labels


def test_family_globs() -> None:
    assert matches("dir/Qwen3-UD-Q4_K_XL.gguf", "UD-*")
    assert not matches("Qwen3-IUD-Q4.gguf", "UD-*")
    assert matches("M-APEX-mini.gguf", "apex-*")
    assert not matches("a" * 400, "*a" * 30 + "b")  # no exponential time
    with pytest.raises(UsageError, match="NAME=GLOB"):
        parse_families(["UD-*"])
    assert family_of("x-Q4", {"family": "theirs"}, []) == "theirs"
    assert family_of("x-Q4", {"family": "theirs"}, [Family("mine", "Q4")]) == "mine"
    assert family_of("x-Q4", {"tier": "mini"}, []) == "APEX"


def test_sizes() -> None:
    assert [gigabytes(size) for size in (21_300_000_000, 15_166_144, 999, 123_456_789_000)] == [
        "21.3 GB", "15.2 MB", "999 B", "123 GB",
    ]  # fmt: skip
