"""Estimates before a run: sizes to the byte where a header is there, ranges on every time, corrections by what was
measured, and the peak of disk by brute force."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_quant import embedded_model
from apex_quant.encode.quantize import quantize
from apex_quant.errors import InputError, ResourceError
from apex_quant.gguf import open_model
from apex_quant.gguf.types import TYPES
from apex_quant.hub import HubFile, models_fitting
from apex_quant.pipeline import estimate as module
from apex_quant.pipeline import room
from apex_quant.pipeline.config import PHASES, RunConfig, make_config
from apex_quant.pipeline.context import Context
from apex_quant.pipeline.estimate import PhaseEstimate, estimate, peak_disk
from apex_quant.pipeline.phase_work import WORK, text_tokens
from apex_quant.pipeline.phases import Item
from apex_quant.pipeline.source_facts import BPW, ENCODED, SourceFacts, fitting_bytes, source_facts
from apex_quant.pipeline.state import State
from apex_quant.pipeline.table import PHASES as TABLE
from apex_quant.recipe.plan import plan
from apex_quant.recipe.tiers import published_tiers
from tests.helpers.random_models import write_random_gguf

TIERS = ["quality", "i-quality", "i-mini"]


def config(**keys: Any) -> RunConfig:
    return make_config({"source": str(embedded_model()), "tiers": TIERS}, keys)


@pytest.fixture(scope="module")
def facts() -> SourceFacts:
    return source_facts(config())


def by_phase(found: list[PhaseEstimate]) -> dict[str, PhaseEstimate]:
    return {one.phase: one for one in found}


def test_facts_of_a_gguf(facts: SourceFacts) -> None:
    assert facts.exact
    assert facts.model == embedded_model().stat().st_size
    assert facts.outputs == {tier: plan(embedded_model(), tier).total_bytes for tier in TIERS}
    with open_model(embedded_model()) as model:
        assert facts.weights == sum(info.n_elements for info in model.tensors.values())
        assert facts.vocabulary == 10240
    assert facts.active is not None
    assert 0 < facts.active < facts.weights  # 2 of 6 experts


def test_the_size_is_the_size_of_the_file(tmp_path: Path) -> None:
    """What --dry-run says of `quantize` is what quantize then writes."""
    model = write_random_gguf(tmp_path / "m.gguf", "qwen3moe")
    found = by_phase(estimate(config(source=model, tiers=["quality"], phases={"only": ["quantize"]})))["quantize"]
    made = quantize(model, "quality", out=tmp_path / "q.gguf", threads=1)
    assert found.bytes_disk == made.outputs[0].bytes == (tmp_path / "q.gguf").stat().st_size


def test_every_selected_phase_in_order(facts: SourceFacts) -> None:
    whole = config(publish={"repo": "a/b", "dry_run": True}, baselines=["a/b:*"])
    found = estimate(whole, SourceFacts(**{**vars(facts), "baselines": {"a/b:*": 10**9}}), cpus=2)
    assert [one.phase for one in found] == [name for name in PHASES if name != "convert"]
    for one in found:
        assert one.bytes_disk is not None
        assert one.bytes_memory > 0
        assert one.seconds is not None
        assert one.low is not None
        assert one.high is not None
        assert one.low <= one.seconds <= one.high
        assert one.basis
        json.dumps(one.to_json(), allow_nan=False)
    few = estimate(config(phases={"only": ["verify", "report"]}), facts)
    assert [one.phase for one in few] == ["verify", "report"]


def test_what_is_left_out(facts: SourceFacts) -> None:
    given = config(evaluate={"suite": "none"}, calibrate={"imatrix": "i.gguf"})
    assert set(by_phase(estimate(given, facts))) == {"source", "recipes", "quantize", "verify", "report"}


def test_items_that_are_due(facts: SourceFacts) -> None:
    due = {"quantize": ["i-mini"], "report": [""], "evaluate": ["quality", "i-mini"]}
    found = by_phase(estimate(config(), facts, due=due))
    assert set(found) == set(due)
    assert found["quantize"].bytes_disk == facts.outputs["i-mini"]
    assert set(found["evaluate"].items) == {"quality", "i-mini"}
    # pieces by other names than are counted here: all of them
    other = by_phase(estimate(config(), facts, due={"quantize": ["x"]}))["quantize"]
    assert other.bytes_disk == sum(size or 0 for size in facts.outputs.values())


def test_more_processors_take_less_time(facts: SourceFacts) -> None:
    one, many = (by_phase(estimate(config(), facts, cpus=n)) for n in (1, 16))
    for phase in ("reference", "calibrate", "evaluate"):
        few, lot = one[phase].seconds, many[phase].seconds
        assert few is not None
        assert lot is not None
        assert lot < few < 16 * lot  # starting takes as long
    assert by_phase(estimate(config(threads=16), facts, cpus=1))["reference"] == many["reference"]


def test_a_gpu_widens_the_range(facts: SourceFacts) -> None:
    without, with_gpu = (by_phase(estimate(config(gpu={"layers": n}), facts, cpus=1))["reference"] for n in (0, 99))
    assert (without.low or 0) > 10 * (with_gpu.low or 0)
    assert without.high == with_gpu.high
    assert "GPU" in with_gpu.basis


def test_what_was_measured_corrects(facts: SourceFacts) -> None:
    plain = by_phase(estimate(config(), facts, cpus=1))
    items = plain["quantize"].items
    recorded = {
        "quantize": {"quality": 10 * (items["quality"] or 0)},
        "reference": {"": 4 * (plain["reference"].seconds or 0)},
    }
    found = by_phase(estimate(config(), facts, cpus=1, recorded=recorded))
    assert found["quantize"].seconds == pytest.approx(10 * (plain["quantize"].seconds or 0))
    assert found["quantize"].basis.endswith("as it took before")
    # of the same kind: reading text
    assert found["calibrate"].seconds == pytest.approx(4 * (plain["calibrate"].seconds or 0))
    assert found["calibrate"].basis.endswith("as other phases took")
    for phase in ("quantize", "calibrate"):
        assert (found[phase].high or 0) / (found[phase].low or 1) < (plain[phase].high or 0) / (plain[phase].low or 1)
    assert found["report"] == plain["report"]


# --- disk ---


def test_peak_of_disk(facts: SourceFacts) -> None:
    def one(phase: str, size: int | None, temporary: bool = False) -> PhaseEstimate:
        return PhaseEstimate(phase, size, 0, 0, 0, 0, "", temporary=temporary)

    run = [one("source", 60), one("convert", 70, True), one("reference", 1), one("quantize", 40), one("verify", 0),
           one("evaluate", 2), one("report", 5)]  # fmt: skip
    assert peak_disk(run, keep=True) == (178, 178)
    assert peak_disk(run, keep=False) == (173, 108)  # gone after evaluate, before the report
    assert peak_disk(run[:2], keep=False) == (130, 60)
    assert peak_disk([*run, one("publish", None)], keep=True) is None
    assert peak_disk([], keep=False) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from(PHASES), st.integers(0, 9), st.booleans()), max_size=8), st.booleans())
def test_peak_by_brute_force(phases: list[tuple[str, int, bool]], keep: bool) -> None:
    run = [PhaseEstimate(name, size, 0, 0, 0, 0, "", temporary=gone) for name, size, gone in phases]
    last = max((n for n, one in enumerate(run) if one.phase in module._READERS), default=-1)
    held, peak, files = 0, 0, list[tuple[int, int]]()
    for number, one in enumerate(run):
        files.append((one.bytes_disk or 0, max(number, last) if one.temporary and not keep else len(run)))
        peak = max(peak, sum(size for size, _ in files))
        files = [(size, until) for size, until in files if until > number]
        held = sum(size for size, _ in files)
    assert peak_disk(run, keep=keep) == (peak, held)


# --- sources that are not there yet ---


def test_a_checkpoint(tmp_path: Path) -> None:
    header = json.dumps(
        {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [1000, 64], "data_offsets": [0, 128000]}}
    )
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(128_000))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}))
    given = make_config({"source": str(tmp_path), "tiers": TIERS, "sizes": ["1MB"]})
    found = source_facts(given)
    assert (found.kind, found.exact, found.weights) == ("checkpoint", False, 64_000)
    assert found.outputs["quality"] == found.outputs["i-quality"] == int(64_000 * BPW["quality"] / 8)
    assert 1_000_000 in found.outputs.values()
    phases = by_phase(estimate(given, found))
    assert phases["convert"].temporary
    assert phases["convert"].bytes_disk == found.model
    kept, dropped = (peak_disk(list(phases.values()), keep=keep) for keep in (True, False))
    assert kept is not None
    assert dropped is not None
    assert kept[1] - dropped[1] == found.model
    assert kept[0] >= dropped[0]


def test_the_hub_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import apex_quant.hub

    def unreachable(*_: Any) -> None:
        raise ResourceError("a/b: cannot be loaded: no network")

    monkeypatch.setattr(apex_quant.hub, "repository", unreachable)
    given = make_config({"source": "a/b", "tiers": TIERS, "baselines": ["c/d:*"]})
    found = source_facts(given)
    assert found.notes == (
        "sizes are not known: a/b: cannot be loaded: no network",
        "sizes of c/d:* are not known: a/b: cannot be loaded: no network",
    )
    for offline in (found, source_facts(given, online=False)):
        phases = by_phase(estimate(given, offline))
        assert phases["source"].bytes_disk is None
        assert phases["quantize"].bytes_disk is None
        assert phases["quantize"].seconds is None
        assert phases["quantize"].to_json()["seconds"] is None
        assert peak_disk(list(phases.values()), keep=False) is None


def test_the_hub_tells_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    import apex_quant.hub
    from apex_quant.hub import HubFile, Repository

    files = {
        "a/b": [
            HubFile("model-1.safetensors", 6 * 10**9, None, None),
            HubFile("consolidated.safetensors", 6 * 10**9, None, None),  # the same weights in another form
            HubFile("config.json", 900, None, None),
        ],
        "c/d": [HubFile("Q4/m-Q4_K_M.gguf", 10**9, None, None), HubFile("m-Q8_0.gguf", 2 * 10**9, None, None)],
    }
    monkeypatch.setattr(
        apex_quant.hub, "repository", lambda name, revision=None: Repository(name, "c" * 40, False, tuple(files[name]))
    )
    given = make_config({"source": "a/b", "tiers": TIERS, "baselines": ["c/d@main:*Q4*:theirs"]})
    found = source_facts(given)
    assert (found.kind, found.download, found.weights) == ("hub", 6 * 10**9, 3 * 10**9)
    assert found.baselines == {"c/d@main:*Q4*:theirs": 10**9}
    phases = by_phase(estimate(given, found))
    assert phases["source"].bytes_disk == 6 * 10**9
    assert phases["baselines"].bytes_disk is not None
    assert 10**9 < phases["baselines"].bytes_disk < 1.1 * 10**9
    # a repository of GGUF files is not converted
    given = make_config({"source": "c/d", "source_files": "*Q8_0*", "tiers": TIERS})
    found = source_facts(given)
    assert (found.download, found.model) == (2 * 10**9, 2 * 10**9)
    assert "convert" not in by_phase(estimate(given, found))


def test_sizes_are_those_of_what_is_downloaded() -> None:
    """By path or name, without the files beside the models that are none."""
    names = ["X-Q4.gguf", "a/X-Q4-00001-of-00002.gguf", "a/X-Q4-00002-of-00002.gguf", "mmproj-X-Q4.gguf",
             "X-Q4.imatrix.gguf", "X-Q4.txt", "Y-Q4.gguf"]  # fmt: skip
    files = [HubFile(name, 10**number, None, None) for number, name in enumerate(names)]
    assert fitting_bytes(files, "*X-Q4*") == 111
    assert {name: len(shards) for name, shards in models_fitting(files, "*X-Q4*").items()} == {"X-Q4": 1, "a/X-Q4": 2}


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        source_facts(make_config({"source": str(tmp_path / "none.gguf")}))


# --- the tables ---


def test_tables_are_complete() -> None:
    assert set(WORK) == set(PHASES)
    assert set(BPW) == {tier.name.removeprefix("i-") for tier in published_tiers()}
    assert set(ENCODED) <= set(TYPES)
    used = {t.type.name for tier in published_tiers() for t in plan(embedded_model(), tier).tensors}
    assert {name for name in used if TYPES[name].is_quantized} <= set(ENCODED)


def test_bits_per_weight_are_those_of_plans(tmp_path: Path) -> None:
    """The table for models whose header is not there, against the real widths it was taken from."""
    path = write_random_gguf(tmp_path / "r.gguf", "qwen35moe", scale="real", sparse=True, layers="LLLA" * 10)
    with open_model(path) as model:
        weights = sum(info.n_elements for info in model.tensors.values())
        for name, bpw in BPW.items():
            assert plan(model, name).total_bytes * 8 / weights == pytest.approx(bpw, abs=0.01), name


def test_text_tokens(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("word " * 20_000)
    assert text_tokens(config(reference={"text": [text]})) == 25_000
    assert text_tokens(config(reference={"text": [text], "chunks": 2})) == 4096
    built_in = text_tokens(config())
    assert 40_000 < built_in < 160_000
    assert all(built_in >= text_tokens(config(reference={"chunks": n})) for n, _ in itertools.pairwise(range(1, 5)))


# --- room before a phase ---


def test_what_is_asked_for_is_what_was_said(finished: Path) -> None:
    """--dry-run and the check before each phase have one answer, and it is enough for what is then written."""
    state = State(finished / "work").load()
    given = make_config(state.about["config"])
    context = Context(given, state.work, State(finished / "none"))
    facts = room.facts_at_hand(context)
    assert facts is not None
    said = by_phase(estimate(given, facts, due={name: list(items) for name, items in state.records.items()}))
    for phase in TABLE:
        if phase.name in said and phase.name not in ("source", "publish"):
            records = state.records[phase.name]
            free = replace(phase, claims=lambda context, item: [])
            (need,) = room.needs(context, free, [Item(name, {}, {}) for name in records], facts)
            assert need.bytes == said[phase.name].bytes_disk, phase.name
            files = [file for record in records.values() for every in record.outputs.values() for file in every]
            assert sum(file.bytes for file in files) <= need.bytes + (1 << 20), phase.name


def test_what_lies_there_is_not_asked_for_again(finished: Path) -> None:
    state = State(finished / "work").load()
    context = Context(make_config(state.about["config"]), state.work, state)
    facts = room.facts_at_hand(context)
    assert facts is not None
    assert facts.exact
    phase = next(one for one in TABLE if one.name == "quantize")
    assert sum(need.bytes for need in room.needs(context, phase, phase.items(context), facts)) < 10_000
    assert sum(size or 0 for size in facts.outputs.values()) > 1_000_000


def test_what_a_conversion_writes(facts: SourceFacts, tmp_path: Path) -> None:
    """The projector and, in the reference, the output matrix: the converted model is gone when files are evaluated."""
    there = SourceFacts(**{**vars(facts), "kind": "checkpoint", "projector": 10**9})
    chunks: dict[str, Any] = {"reference": {"chunks": 1}}
    found = by_phase(estimate(config(source=tmp_path, **chunks), there))
    assert found["convert"].bytes_disk == (facts.model or 0) + 10**9
    without = by_phase(estimate(config(source=tmp_path, **chunks, convert={"mmproj": False}), there))
    assert without["convert"].bytes_disk == facts.model
    of_gguf = by_phase(estimate(config(**chunks), facts))["reference"]
    assert (found["reference"].bytes_disk or 0) - (of_gguf.bytes_disk or 0) == 2 * facts.embedding * facts.vocabulary


def test_files_that_are_gone_in_the_end_count(facts: SourceFacts) -> None:
    plain, floor = (estimate(config(evaluate={"floor": one}), facts) for one in (False, True))
    before, after = peak_disk(plain, keep=True), peak_disk(floor, keep=True)
    assert before is not None
    assert after is not None
    assert after[0] > before[0]
    assert after[1] == before[1]


def test_measuring_for_sizes(facts: SourceFacts) -> None:
    """Measured once for all sizes, with a Q8_0 file that goes again; a given measurement leaves the candidates."""
    given = config(sizes=["12MB", "20MB"], phases={"only": ["recipes"]})
    known = source_facts(given)
    assert known.layers == 12
    (found,) = estimate(given, known, cpus=2)
    first, second = (found.items[name] for name in ("12MB", "20MB"))
    assert first is not None
    assert second is not None
    assert first > 2 * second > 2
    done = config(sizes=["12MB", "20MB"], optimize={"sensitivity": "s.json"})
    work = WORK["recipes"](done, known, 2)
    assert work is not None
    assert work.seconds["12MB"] == work.seconds["20MB"] == second
    assert work.scratch == {"12MB": 3 * 12_000_000, "20MB": 3 * 20_000_000}
    large = replace(known, model=1 << 30)
    (found,) = estimate(given, large, due={"recipes": ["12MB"]})
    assert found.scratch == (1 << 30) * 17 // 32
    (found,) = estimate(given, large, due={"recipes": ["i-mini"]})
    assert found.scratch == 0
