"""The card: front matter as the hub reads it, numbers as in the results, a quote only of earned claims."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import yaml

from apex_quant.errors import InputError, UsageError
from apex_quant.publishable import kind_of
from apex_quant.report.card import card, card_text
from apex_quant.report.formats import code, markdown
from apex_quant.report.gather import gather
from tests.helpers.random_models import write_random_gguf
from tests.report.results_folder import add, agrees, at, with_headers

HOSTILE = "x|y`z`<script>alert(1)</script>[a](http://evil.example)\n# head\n---\n<!-- --> *b* \\"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("results")
    with_headers(made)
    return made


def parts(path: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    _, front, text = path.read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def tables(text: str) -> list[list[dict[str, str]]]:
    """Rows by heading."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        lines = [[one.strip() for one in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        found.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return found


def test_front_matter(folder: Path, tmp_path: Path) -> None:
    front, _ = parts(card(folder, tmp_path / "README.md", base_model="Org/Model-1", license="apache-2.0", repo="me/m"))
    assert front == {
        "license": "apache-2.0",
        "base_model": "Org/Model-1",
        "base_model_relation": "quantized",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "quantized_by": "me",
        "tags": ["gguf", "quantized", "apex", "moe"],
    }
    front, text = parts(card(folder, tmp_path / "README.md"))
    assert not {"base_model", "base_model_relation", "license", "quantized_by"} & set(front)
    assert "Not stated by any file: base model, license." in text
    assert kind_of("README.md") == "card"


def test_front_matter_from_headers(tmp_path: Path) -> None:
    """License, base model, languages and the imatrix are in the files."""
    with_headers(tmp_path)
    path = tmp_path / "tiny-small.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_license("MIT")
    writer.add_languages(["en", "de"])
    writer.add_base_model_count(1)
    writer.add_string("general.base_model.0.repo_url", "https://huggingface.co/Org/Base-3")
    writer.add_uint32("qwen3moe.expert_count", 4)
    writer.add_uint32("quantize.imatrix.entries_count", 12)
    writer.add_string("quantize.imatrix.dataset", "/home/somebody/secret/calibration.txt")
    writer.add_uint32("quantize.imatrix.chunks_count", 7)
    writer.add_string("apex.imatrix.sha256", "c" * 64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    results = next(tmp_path.glob("tiny-small*.json"))
    document = json.loads(results.read_text())
    document["model"]["bytes"] = path.stat().st_size
    results.write_text(json.dumps(document))
    front, text = parts(card(tmp_path))
    assert (front["license"], front["base_model"], front["language"]) == ("mit", "Org/Base-3", ["en", "de"])
    assert "imatrix" in front["tags"]
    assert f"sha256 `{'c' * 64}`: calibrated on calibration.txt, 7 chunks" in text
    assert "somebody" not in text


def test_numbers_are_those_of_the_results(folder: Path, tmp_path: Path) -> None:
    """Each cell of both tables, by the trace at the end."""
    _, text = parts(card(folder, tmp_path / "README.md"))
    found = re.search(r"<!-- apex-trace\n(.*)\n-->", text)
    assert found is not None
    trace = json.loads(found[1])
    main, more = tables(text)[:2]
    headings = {
        "Size, MB": "bytes", "bpw": "bpw", "Mean KLD (nats)": "kld", "Perplexity": "ppl",
        "Generation speed (tokens/s)": "tg", "Largest KLD (nats)": "kld_max", "Same top token (%)": "top1",
        "Router choices changed (%)": "router", "HellaSwag (%)": "hellaswag", "Prompt speed (tokens/s)": "pp",
    }  # fmt: skip
    checked = 0
    for row in [*main, *more]:
        label = re.sub(r"^\[(.*)\]\(.*\)$", r"\1", row["File"])
        name = next(name for name in trace["files"] if name == label or name.endswith(f"-{label}.gguf"))
        (file,) = trace["files"][name]["results"]
        for heading, text_ in row.items():
            if heading == "File" or heading.startswith("For memory"):
                continue
            key = headings[heading]
            pointer = trace["files"][name].get(key) or trace["columns"][key]
            scale = 0.01 if "%" in heading else 1e6 if heading == "Size, MB" else 1.0
            texts = re.findall(r"[\d.]+(?:e-?\d+)?", text_)
            beside = pointer.rpartition("/")[0]
            wanted = [pointer, *(f"{beside}/{end}" for end in ("low", "high"))] if "[" in text_ else [pointer]
            wanted += [f"{beside}/{'error' if key == 'ppl' else 'deviation'}"] if "±" in text_ else []
            assert len(texts) == len(wanted), (heading, text_)
            for one, place in zip(texts, wanted, strict=True):
                assert agrees(one, scale, at(folder / file, place)), (heading, one, place)
                checked += 1
    assert checked >= 3 * 15


def test_quotes_are_earned(tmp_path: Path) -> None:
    for seed in range(2):
        add(tmp_path, f"m-{'ab'[seed]}", scale=1.0, seed=seed)
    _, text = parts(card(tmp_path))
    assert not re.search(r"^>", text, re.M)
    assert not re.search(r"\bbetter\b|\blower\b|\bbest\b", text)
    add(tmp_path, "m-c", scale=0.5, seed=4)
    _, text = parts(card(tmp_path))
    quoted = re.findall(r"^> (.+)$", text, re.M)
    assert len(quoted) == 2
    assert all(line.startswith("c has lower mean KLD than ") for line in quoted)
    assert "where there is no difference" in text


def test_everything_is_escaped(tmp_path: Path) -> None:
    path = add(tmp_path, HOSTILE, scale=1.0, tier=HOSTILE, architecture=HOSTILE, recipe_sha256=HOSTILE)
    add(tmp_path, "m-b", scale=0.5, seed=1)
    document = json.loads(path.read_text())
    document["reference"] |= {"path": HOSTILE}
    document["environment"] = {"cpu": HOSTILE}
    document["settings"]["texts"] = [HOSTILE]
    path.write_text(json.dumps(document))
    front, text = parts(card(tmp_path))
    assert front["library_name"] == "gguf"
    outside = re.sub(r"(`+) ?.*? ?\1|```.*?```", "", text, flags=re.S)
    assert "<script" not in outside
    assert not re.search(r"(?<!\\)\]\(http", outside)
    assert text.count("<!--") == text.count("-->") == 1 + len(re.findall(r"`[^\n]*<!--", text.split("<!-- apex")[0]))
    assert not re.search(r"^# head|^---", text, re.M)
    for rows in tables(text):
        assert rows


def test_fences_cannot_be_left(tmp_path: Path) -> None:
    assert code("a`b") == "`` a`b ``"
    assert code("a|b\nc") == "`a¦b c`"
    assert markdown("[a](b) <i> _x_ a_b") == "[a\\](b) &lt;i&gt; \\_x\\_ a_b"
    add(tmp_path, "m\n```\n<script>", scale=1.0, tier="```\nx")
    _, text = parts(card(tmp_path))
    blocks = re.findall(r"^```$", text, re.M)
    assert len(blocks) % 2 == 0
    inside = re.split(r"^```$", text, flags=re.M)[1::2]
    assert all("llama-server" in one or "apex " in one for one in inside)


def test_for_whom(tmp_path: Path) -> None:
    add(tmp_path, "m-24", scale=0.5, size=20 << 30)
    add(tmp_path, "m-huge", scale=0.4, size=1 << 40, seed=1)
    _, text = parts(card(tmp_path, ctx=4096))
    cells = {row["File"]: row["For memory of (context 4,096)"] for row in tables(text)[0]}
    assert [text for _, text in sorted(cells.items())] == [
        "24 GiB, KV cache not counted",
        "1025 GiB, KV cache not counted",
    ]


def test_a_release_folder(tmp_path: Path) -> None:
    """Files in the folder, results in its folder "results", as apex run leaves them."""
    (tmp_path / "results").mkdir()
    with_headers(tmp_path / "results")
    for path in (tmp_path / "results").glob("*.gguf"):
        path.rename(tmp_path / path.name)
    made = card(tmp_path)
    assert made == tmp_path / "README.md"
    assert "KV cache not counted" not in made.read_text()


def test_errors(folder: Path, tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"base_model": "no slash"}, {"repo": "a/b/c"}, {"license": "a b"}, {"quantized_by": "\n"},
    ]  # fmt: skip
    for options in cases:
        with pytest.raises(UsageError):
            card(folder, tmp_path / "README.md", **options)
    with pytest.raises(UsageError, match="where should the card go"):
        card([folder])
    with pytest.raises(UsageError, match="a folder; the card is a file"):
        card(folder, tmp_path)
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        card(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match=r"nothing to describe: a\.txt"):
        card(tmp_path / "a.txt")
    assert not (tmp_path / "README.md").exists()


def test_whose_predictions(tmp_path: Path) -> None:
    """Each file stands with its own hash."""
    kept = {"path": "m.apexref", "form": "apexref", "sha256": "a" * 64, "model": "m.gguf", "model_sha256": "b" * 64}
    add(tmp_path, "m-a", scale=1.0, reference=kept)
    _, text = parts(card(tmp_path))
    assert f"the predictions of `m.gguf` (sha256 `{'b' * 64}`), kept in `m.apexref` (sha256 `{'a' * 64}`)." in text
    for name in "23":
        (tmp_path / name).mkdir()
    whole = {"path": "m.gguf", "form": "gguf", "model_sha256": "b" * 64}
    add(tmp_path / "2", "m-a", scale=1.0, reference=whole)
    assert f"Divergences are from `m.gguf` (sha256 `{'b' * 64}`)." in card(tmp_path / "2").read_text()
    logits = {"path": "m.logits", "form": "logits"}
    add(tmp_path / "3", "m-a", scale=1.0, reference=logits)
    assert "Divergences are from the predictions kept in `m.logits`." in card(tmp_path / "3").read_text()


def trained_on(folder: Path, ctx: int) -> None:
    """A file with results whose header says on what it was trained."""
    model = write_random_gguf(folder / "m-a.gguf", "qwen3moe", layers="M", metadata={"qwen3moe.context_length": ctx})
    add(folder, "m-a", scale=1.0, size=model.stat().st_size)


def test_no_context_that_the_model_was_not_trained_for(tmp_path: Path) -> None:
    trained_on(tmp_path, 2048)
    _, text = parts(card(tmp_path))
    assert "-c 2048 --jinja" in text
    assert "For memory of (context 2,048)" in text
    assert "Warning" not in text
    assert "not known" not in text
    _, text = parts(card(tmp_path, ctx=4096))
    assert "-c 4096 --jinja" in text
    assert "**Warning**: the model was trained on contexts of 2,048 tokens" in text
    (tmp_path / "m-a.gguf").unlink()
    _, text = parts(card(tmp_path))
    assert "trained on contexts of 32,768 tokens is not known" in text


def test_what_is_said_of_intervals_is_what_is_shown(tmp_path: Path) -> None:
    """Where results have too little text for an interval the card says so, with the reason."""
    path = add(tmp_path, "m-a", scale=1.0)
    _, text = parts(card(tmp_path))
    assert "Brackets hold 95 % intervals; ± is a standard error; ± of speeds is a standard deviation; a value " in text
    document = json.loads(path.read_text())
    note = "too few: 5 chunks, an interval takes at least 32"
    none = {"low": None, "high": None, "note": note}
    kld = document["metrics"]["kld"]
    document["metrics"] = {"kld": {"mean": kld["mean"] | none, "top1_agreement": kld["top1_agreement"] | none}}
    path.write_text(json.dumps(document))
    _, text = parts(card(tmp_path))
    assert "No value has an interval." in text
    assert "95 % intervals" not in text
    missing = text.split("## Not measured")[1]
    assert f"a: no 95 % interval of mean KLD, same top token ({note})" in missing


def test_the_same_results_give_the_same_card(folder: Path) -> None:
    assert card_text(gather([folder])) == card_text(gather([folder]))
