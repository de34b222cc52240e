"""The page: every number traces to its results file, claims are earned, everything is escaped, nothing is loaded."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest

from apex_quant.errors import InputError, UsageError
from apex_quant.evaluation.compare import NOT_SHOWN, compare
from apex_quant.evaluation.results import load
from apex_quant.report.card import card
from apex_quant.report.formats import Sources, rounded
from apex_quant.report.gather import gather
from apex_quant.report.html import LIMIT_BYTES
from apex_quant.report.report import report
from tests.helpers.random_models import write_random_gguf
from tests.report.results_folder import Page, add, agrees, at, page_of, with_headers

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\'"&{{7*7}}{% raw %}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("results")
    with_headers(made)
    return made


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(page_of(folder))


def test_numbers_trace_to_results(folder: Path, page: Page) -> None:
    """Text, value and the place in the results file agree, of the table and of each mark of the charts."""
    gathered = gather([folder])
    files = {Sources(gathered.entries).name(one): one.path for entry in gathered.entries for one in entry.sources}
    seen = set()
    for attributes, text in page.all("data"):
        source, _, pointer = attributes["data-trace"].partition("#")
        path = files[source]
        assert path is not None
        value = at(path, pointer)
        assert float(attributes["value"]) == value, attributes
        assert agrees(text, float(attributes.get("data-scale", 1)), value), (text, attributes)
        seen.add(pointer)
    assert {"/model/bytes", "/metrics/kld/mean/low", "/metrics/ppl/error", "/metrics/speed/tg128/deviation",
            "/metrics/hellaswag/high", "/metrics/kld/max/value"} <= seen  # fmt: skip
    marks = [attributes for attributes, _ in page.all("g") if "data-traces" in attributes]
    assert len(marks) > 3 * 6
    for mark in marks:
        traces, values = mark["data-traces"].split(), mark["data-values"].split()
        assert len(traces) == len(values) > 0
        for trace, value in zip(traces, values, strict=True):
            source, _, pointer = trace.partition("#")
            path = files[source]
            assert path is not None
            assert at(path, pointer) == float(value)


def test_no_number_of_the_table_without_trace(folder: Path) -> None:
    text = page_of(folder)
    table = re.search(r'<table class="files sortable">.*?</table>', text, re.S)
    assert table is not None
    body = table[0].split("<tbody>")[1]
    bare = re.sub(r"<data [^>]*>.*?</data>", "", body)
    bare = re.sub(r"<th .*?</th>|<[^>]*>", " ", bare)
    assert not re.search(r"\d", bare), bare


def test_numbers_have_their_error(page: Page) -> None:
    """Each cell has an interval, a ± or says that there is none; sizes and bits are exact."""
    columns = [text.strip() for _, text in page.all("button")]
    assert "Mean KLD (nats)" in columns
    for attributes, text in page.all("td"):
        if attributes.get("data-sort") and "." in text:
            assert re.search(r"\[.*\]|±|no interval", text) or re.fullmatch(r"\s*[\d.]+\s*", text), text


def test_claims_are_those_of_compare(tmp_path: Path) -> None:
    paths = [add(tmp_path, f"m-{name}", scale=scale, seed=seed) for seed, (name, scale) in
             enumerate([("good", 0.5), ("bad", 1.0)])]  # fmt: skip
    pair = compare(paths, ["kld"])[0]
    assert pair.verdict != NOT_SHOWN
    claims = [text for attributes, text in Page(page_of(tmp_path)).all("p") if attributes.get("class") == "claim"]
    assert claims == [pair.sentence.replace("m-good", "good").replace("m-bad", "bad")]


def test_ties_claim_nothing(tmp_path: Path) -> None:
    """Equal models with their own noise: no claim, no word of better, and the tie is said with its interval."""
    for seed in range(3):
        add(tmp_path, f"m-{'abc'[seed]}", scale=1.0, seed=seed)
    pairs = compare([load(path) for path in sorted(tmp_path.glob("*.json"))], ["kld"], all_pairs=True)
    assert {pair.verdict for pair in pairs} == {NOT_SHOWN}
    made = report(tmp_path, tmp_path / "out", formats=("html", "md"))
    assert made.sentences == ()
    html, text = (made.paths[name].read_text() for name in ("html", "md"))
    assert 'class="claim"' not in html
    assert not [line for line in text.splitlines() if line.startswith(">")]
    assert "no difference can be shown" in html
    shown = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", html, flags=re.S)
    assert not re.search(r"has (lower|higher)|\boutperform", shown)


def test_one_file_alone(tmp_path: Path) -> None:
    """Nothing is said of others where there are none."""
    add(tmp_path, "m-large", scale=0.5)
    made = report(tmp_path, tmp_path / "out", formats=("html", "md"))
    for path in made.paths.values():
        assert "Only one file was measured." in path.read_text()
        assert "larger than another" not in path.read_text()


def test_every_mark_is_named_or_the_caption_says_how_many_are_not(tmp_path: Path) -> None:
    """Names of marks that lie close together are led to by lines."""
    for seed, (name, size) in enumerate((("m-first", 2000), ("m-second", 2001), ("m-third", 2002), ("m-last", 9000))):
        add(tmp_path, name, scale=1.0, size=size, seed=seed)
    page = page_of(tmp_path)
    figure = next(part for part in page.split("<figure>") if part.startswith("<h3>Perplexity against size"))
    named = [
        name for name in ("first", "second", "third", "last") if re.search(rf'<text x="[^>]*>{name}</text>', figure)
    ]
    assert len(named) == 4
    assert 'class="lead"' in figure
    assert "left out" not in figure
    for seed in range(60):
        add(tmp_path, f"m-{seed}-of-a-crowd-of-many-names", scale=1.0, size=2000 + seed, seed=10 + seed)
    figure = next(part for part in page_of(tmp_path).split("<figure>") if part.startswith("<h3>Perplexity against"))
    written = len(
        re.findall(
            r'<text x="[^"]*" y="[^"]*" text-anchor="(?:start|end|middle)">[^<]*(?:m|first|second|third|last)', figure
        )
    )
    left = re.search(r"(\d+) names are left out", figure)
    assert left is not None
    assert 0 < int(left[1]) < 64
    assert written


def test_marks_of_a_distribution_differ(tmp_path: Path) -> None:
    """Each quantity has an outline of its own, and the legend names those that are drawn."""
    add(tmp_path, "m-a", scale=1.0)
    figure = next(part for part in page_of(tmp_path).split("<figure>") if part.startswith("<h3>How the divergence"))
    legend = re.findall(r"</svg> ([^<]*)</li>", figure)
    assert legend == ["median", "mean", "99 %", "largest"]
    glyphs = re.findall(r'<g class="any"><path d="([^"]*)"', figure)
    assert len(set(glyphs)) == 4
    marks = re.findall(r'<g class="mark[^>]*aria-label="([^"]*)"[^>]*>.*?<path d="M[-\d.]+ [-\d.]+([^"]*)"', figure)
    assert len({outline for _, outline in marks}) == len(marks) == 4


def test_pictures_are_links(tmp_path: Path) -> None:
    """Those for a dark ground have none of their own; nothing else leads out of the page."""
    add(tmp_path, "m-a", scale=1.0)
    made = report(tmp_path, tmp_path / "out", formats=("html", "png"))
    links = [attributes["href"] for attributes, _ in Page(made.paths["html"].read_text()).all("a")]
    outside = [href for href in links if not href.startswith("#")]
    assert outside
    assert all((tmp_path / "out" / href).is_file() and "-dark" not in href for href in outside)
    assert sorted(outside) == sorted(
        f"plots/{name}" for name in made.paths if name.endswith(".png") and "-dark" not in name
    )


def test_columns_of_the_chooser_differ(page: Page) -> None:
    heads = [text for _, text in page.all("th")]
    assert heads.index("Weights") < heads.index("KV cache")


def test_a_report_goes_into_a_folder(tmp_path: Path) -> None:
    add(tmp_path, "m-a", scale=0.5)
    (tmp_path / "text").write_text("a")
    for out in ("text", "text/deeper"):
        with pytest.raises(UsageError, match="text: not a folder"):
            report(tmp_path, tmp_path / out)


def test_commands_name_a_context_that_the_model_was_trained_for(tmp_path: Path) -> None:
    metadata: dict[str, str | int | float | bool] = {"qwen3moe.context_length": 2048}
    model = write_random_gguf(tmp_path / "m-a.gguf", "qwen3moe", layers="M", metadata=metadata)
    add(tmp_path, "m-a", scale=1.0, size=model.stat().st_size)
    html = page_of(tmp_path)
    assert "-c 2048 --jinja" in html
    assert "trained on contexts of 2,048 tokens" in html


def test_larger_files_are_no_news(tmp_path: Path) -> None:
    """Less divergence for more bytes is no claim; it is one at no more bytes, whoever's it is."""
    add(tmp_path, "m-large", scale=0.5, size=2000, seed=1)
    add(tmp_path, "m-small", scale=1.0, size=1000, seed=2)
    made = report(tmp_path, tmp_path / "out", formats=("html",))
    assert made.sentences == ()
    assert "none is better at no more bytes" in made.paths["html"].read_text()
    add(tmp_path, "m-UD-rival", scale=0.3, size=1900, seed=3)
    made = report(tmp_path, tmp_path / "out", formats=("html",), family=["Rivals=UD-*"])
    assert [re.match(r"(\S+) has lower mean KLD than (\S+) by", line)[1] for line in made.sentences] == ["UD-rival"]  # type: ignore[index]


def test_everything_is_escaped(tmp_path: Path) -> None:
    path = add(tmp_path, HOSTILE, scale=1.0, tier=HOSTILE, architecture=HOSTILE, recipe_sha256=HOSTILE)
    add(tmp_path, "m-other", scale=0.5, seed=1)
    document = json.loads(path.read_text())
    document["metrics"]["kld"]["max"] |= {"token": HOSTILE, "context": HOSTILE, "domain": HOSTILE}
    document["metrics"]["kld"]["by_domain"] = {HOSTILE: document["metrics"]["kld"]["by_domain"]["chat"]}
    document["metrics"]["kld"]["p99_9"]["note"] = HOSTILE
    document["reference"] |= {"path": HOSTILE, "name": HOSTILE}
    document["settings"] |= {"ctx": HOSTILE, "texts": [HOSTILE]}
    document["environment"] |= {"cpu": HOSTILE}
    document["warnings"] = [HOSTILE]
    document["per_token"] = None  # the worst token is the one of the JSON
    path.write_text(json.dumps(document))
    text = page_of(tmp_path)
    page = Page(text)
    assert len(page.all("script")) == 2
    assert not page.all("img")
    assert "<script>alert" not in text
    assert 'onerror="alert' not in text
    assert not any(name.startswith("on") for _, attributes, _ in page.elements for name in attributes)
    assert "{{7*7}}" in "".join(inner for _, inner in page.all("mark"))
    json.loads(page.all("script")[0][1])


def test_nothing_is_loaded(folder: Path) -> None:
    text = page_of(folder)
    page = Page(text)
    assert len(text.encode()) < LIMIT_BYTES
    for tag, attributes, _ in page.elements:
        assert "src" not in attributes, tag
        assert attributes.get("href", "#").startswith("#")
        assert "style" not in attributes, "the policy forbids it"
    assert not page.all("link")
    assert "url(" not in text
    assert "@import" not in text
    policy = next(one["content"] for one, _ in page.all("meta") if "http-equiv" in one)
    assert policy.startswith("default-src 'none';")
    for tag, index in (("style", 0), ("script", 1)):
        inner = page.all(tag)[index][1]
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert str(folder) not in text, "no folder of this machine"


def test_the_same_results_give_the_same_page(folder: Path) -> None:
    assert page_of(folder) == page_of(folder)


def test_what_is_there(folder: Path, page: Page) -> None:
    headings = {text for _, text in page.all("h2")}
    assert {"What was shown", "Which file should I take?", "Files", "Plots", "Precision map", "Worst tokens",
            "Run, make and measure again", "What was not measured", "Hashes and versions"} <= headings  # fmt: skip
    code = "\n".join(text for _, text in page.all("code"))
    assert "llama-server -m tiny-small.gguf -c 512" in code  # the trained length
    assert "apex eval tiny-small.gguf --reference tiny-BF16.gguf" in code
    digests = " ".join(text for attributes, text in page.all("td") if "hash" in attributes.get("class", ""))
    for path in folder.glob("*.json"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in digests
        assert str(load(path).model.sha256) in digests
    missing = page.all("section")[-2][1]
    assert "Winogrande" in missing
    assert "too few: 1,240 values" in missing
    data = json.loads(page.all("script")[0][1])
    assert [len(one["types"]) for one in data["maps"]] == [len(data["layouts"][one["layout"]]) for one in data["maps"]]


def test_bytes_of_the_map_are_the_files(folder: Path, page: Page) -> None:
    data = json.loads(page.all("script")[0][1])
    for entry, one in zip(gather([folder]).entries, data["maps"], strict=True):
        assert entry.precision is not None
        for tensor, letter, row in zip(
            entry.precision.tensors, one["types"], data["layouts"][one["layout"]], strict=True
        ):
            name, block, size = data["types"][ord(letter) - 48]
            weights = 1
            for side in row[3]:
                weights *= side
            assert (row[0], name, weights // block * size) == (tensor.name, tensor.type, tensor.bytes)


def test_partial_and_broken_folders(tmp_path: Path) -> None:
    """Whatever is wrong with some files, the others are shown and the page says what is missing."""
    add(tmp_path, "m-good", scale=0.5, seed=1)
    lost = add(tmp_path, "m-lost", scale=1.0, seed=2)
    lost.with_suffix(".npz").unlink()
    (tmp_path / "cut.json").write_text('{"schema": "apex.results/1", "model": {"pa')
    (tmp_path / "newer.json").write_text('{"schema": "apex.results/7", "model": {"path": "m-new.gguf"}}')
    (tmp_path / "bare.json").write_text('{"schema": "apex.results/1", "model": {"path": "m-bare.gguf"}}')
    (tmp_path / "m-half.json.kld.state").write_text("")
    made = report(tmp_path, tmp_path / "out", formats=("html", "md", "csv"))
    said = "\n".join(made.missing)
    for word in ("cut.json", "newer", "m-half.json", "lost"):
        assert word in said
    assert str(tmp_path) not in said + "".join(path.read_text() for path in made.paths.values())
    html = made.paths["html"].read_text()
    section = html[html.index('id="missing"') :]
    for word in ("cut.json", "m-half.json", "perplexity"):
        assert word in section
    assert {"good", "lost", "bare"} <= {text for _, text in Page(html).all("th")}
    assert "Not usable" in made.paths["md"].read_text()
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "cut.json").write_text('{"schema": "apex.results/1"')
    with pytest.raises(InputError, match=r"nothing to describe: cut\.json"):
        report(tmp_path / "only", tmp_path / "out2", formats=("html",))
    assert not (tmp_path / "out2").exists()
    with pytest.raises(InputError, match=r"nothing to describe: cut\.json"):
        card(tmp_path / "only")


JUNK: list[Any] = [
    None, True, 0, -1, 1.5, 1e308, -1e-300, 10**18, "", "x", "<b>", [], {}, [1, "a", None], {"a": {"b": [1]}},
    {"value": 1}, {"value": "x"}, "\x00\ud800\n|`",
]  # fmt: skip


def mutated(value: Any, random: Random) -> Any:
    """The same with a few values replaced or gone."""
    if isinstance(value, dict):
        kept = {key: one for key, one in value.items() if random.random() > 0.008}
        return {
            key: random.choice(JUNK) if random.random() < 0.015 else mutated(one, random) for key, one in kept.items()
        }
    return [mutated(one, random) for one in value] if isinstance(value, list) else value


def test_whatever_results_say(tmp_path: Path) -> None:
    """Free keys may hold anything, known ones any number: there is a page, and a card or an error that says why not."""
    paths = [add(tmp_path, f"m-{seed}", scale=1.0 + seed, seed=seed) for seed in range(3)]
    documents = [json.loads(path.read_text()) for path in paths]
    written = 0
    for seed in range(14):
        random = Random(seed)
        for path, document in zip(paths, documents, strict=True):
            path.write_text(json.dumps({**mutated(document, random), "schema": "apex.results/1"}))
        report(tmp_path, tmp_path / "out", formats=("html", "md", "csv"))
        try:
            card(tmp_path)
            written += 1
        except InputError:
            assert not gather([tmp_path]).entries
    assert written > 7


def test_digits_follow_the_interval() -> None:
    assert rounded(0.020581159, 0.019090868, 0.022164105) == ("0.0206", "0.0191", "0.0222")
    assert rounded(6.5432, 6.5, 6.58) == ("6.54", "6.50", "6.58")
    assert rounded(6.5432, 6.53, 6.55) == ("6.543", "6.530", "6.550")
    assert rounded(38.87, 30.4, 48.5) == ("38.9", "30.4", "48.5")
    assert rounded(0.5, 0.00004, 1.2) == ("0.50000", "0.00004", "1.20000")
    assert rounded(0.0, 0.0, 0.0) == ("0", "0", "0")
