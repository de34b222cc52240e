"""Which file: against brute force over all files, with ties, without headers, with experts in main memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_quant.errors import InputError, UsageError
from apex_quant.gguf import open_model
from apex_quant.model.kv_cache import kv_cache
from apex_quant.report.choose import UNKNOWN_BYTES, choose, compute_buffers, parse_ctx
from apex_quant.report.gather import Gathered, gather
from tests.helpers.random_models import write_random_gguf
from tests.report.results_folder import add, with_headers

GIB = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("results")
    with_headers(made)
    return made


@pytest.fixture(scope="module")
def gathered(folder: Path) -> Gathered:
    return gather([folder])


@settings(max_examples=60, deadline=None)
@given(
    vram=st.integers(1, 3 * GIB), ctx=st.sampled_from([1, 512, 32768, 1 << 20]), kind=st.sampled_from(["f16", "q8_0"])
)
def test_is_the_best_that_fits(gathered: Gathered, folder: Path, vram: int, ctx: int, kind: str) -> None:
    """The sum by hand from each file's own header, and the least of all divergences."""
    fitting: dict[str, float] = {}
    for entry in gathered.entries:
        path = folder / entry.file_name
        with open_model(path) as model:
            cache = kv_cache(model, ctx=ctx, type_k=kind, type_v=kind).bytes
        number = entry.number("kld")
        assert number is not None
        if path.stat().st_size + cache + UNKNOWN_BYTES <= vram:  # random models have no vocabulary
            fitting[entry.label] = number.value
    found = choose(gathered, vram=vram, ctx=ctx, type_k=kind, type_v=kind)
    assert (found.best.label if found.best else None) == min(fitting, key=lambda label: fitting[label], default=None)
    assert {one.label for one in found.candidates if one.fits} == set(fitting)
    if found.best is None:
        assert "no measured file fits" in found.sentence
        assert found.ties == ()


def test_says_why(folder: Path) -> None:
    found = choose(folder, vram=16 * GIB)
    best = found.best
    assert best is not None
    assert best.kv_bytes
    assert found.sentence.startswith("large: lowest mean KLD of the 3 that fit, ")
    assert f"[{best.low:.4g}, {best.high:.4g}]" in found.sentence
    assert best.total_bytes == best.bytes + best.kv_bytes + best.compute_bytes
    assert found.ties == found.unpaired == ()
    assert any("allowance" in note for note in found.notes)
    document = found.to_json()
    assert document["best"]["total_bytes"] == best.total_bytes
    assert [one["label"] for one in document["candidates"]] == ["large", "medium", "small"]


def test_ties_are_said(tmp_path: Path) -> None:
    for seed, (name, scale) in enumerate([("m-a", 1.0), ("m-b", 1.0), ("m-worse", 2.0)]):
        add(tmp_path, name, scale=scale, seed=seed)
    found = choose(tmp_path, vram=16 * GIB)
    assert found.best is not None
    other = {"a": "b", "b": "a"}[found.best.label]
    assert found.ties == (other,)
    assert f"no difference could be shown to {other}" in found.sentence
    assert "worse" not in found.sentence


def test_without_headers_or_numbers_per_token(tmp_path: Path) -> None:
    add(tmp_path, "m-a", scale=1.0, size=10**9)
    add(tmp_path, "m-b", scale=2.0, size=10**8, seed=1).with_suffix(".npz").unlink()
    found = choose(tmp_path, vram=3 * GIB)
    assert found.best is not None
    assert (found.best.label, found.best.kv_bytes, found.best.compute_bytes) == ("a", None, UNKNOWN_BYTES)
    assert "KV cache is not counted" in found.sentence
    assert found.unpaired == ("b",)
    assert any("no header at hand: a, b" in note for note in found.notes)


def test_beyond_what_the_model_was_trained_on(tmp_path: Path) -> None:
    metadata: dict[str, str | int | float | bool] = {"qwen3moe.context_length": 2048}
    model = write_random_gguf(tmp_path / "m-a.gguf", "qwen3moe", layers="M", metadata=metadata)
    add(tmp_path, "m-a", scale=1.0, size=model.stat().st_size)
    assert any("trained on contexts of 2,048 tokens" in note for note in choose(tmp_path, vram=GIB, ctx=2049).notes)
    assert not any("trained" in note for note in choose(tmp_path, vram=GIB, ctx=2048).notes)


def test_a_header_of_the_same_model_does(tmp_path: Path) -> None:
    """The cache does not depend on the types of weights, so another file's header says it."""
    with_headers(tmp_path)
    (tmp_path / "tiny-small.gguf").unlink()
    found = {one.label: one for one in choose(tmp_path, vram=16 * GIB).candidates}
    assert found["small"].kv_bytes in (found["medium"].kv_bytes, found["large"].kv_bytes)


def test_experts_in_main_memory(folder: Path) -> None:
    whole = choose(folder, vram=16 * GIB).candidates[0]
    tight = whole.device_bytes - 1
    found = choose(folder, vram=tight)
    assert found.best is not None
    assert found.best.label != "large"
    found = choose(folder, vram=tight, ram=GIB)
    assert found.best is not None
    assert found.best.label == "large"
    experts = [tensor for tensor in _tensors(folder / "tiny-large.gguf") if "_exps" in tensor[0]]
    assert found.best.host_bytes == sum(size for _, size in experts)
    assert found.best.device_bytes + found.best.host_bytes == whole.device_bytes
    assert "--cpu-moe" in found.sentence
    other = choose(folder, vram=tight, ram=1).best
    assert other is not None
    assert other.label != "large"


def test_other_references_are_left_out(tmp_path: Path) -> None:
    for seed in range(2):
        add(tmp_path, f"m-{'ab'[seed]}", scale=1.0 + seed, seed=seed)
    add(tmp_path, "m-foreign", scale=0.1, seed=5, reference={"path": "other.gguf", "sha256": "e" * 64})
    found = choose(tmp_path, vram=16 * GIB)
    assert {one.label for one in found.candidates} == {"a", "b"}
    assert any("foreign" in note and "another reference" in note for note in found.notes)


def test_the_reference_is_no_choice(tmp_path: Path) -> None:
    add(tmp_path, "tiny-BF16", scale=1e-9, sha256="f" * 64)
    add(tmp_path, "tiny-Q4", scale=1.0, seed=1)
    found = choose(tmp_path, vram=16 * GIB)
    assert [one.file_name for one in found.candidates] == ["tiny-Q4.gguf"]


def test_errors(folder: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"vram": 0}, "at least 1"),
        ({"vram": 1, "ctx": 0}, "at least 1"),
        ({"vram": 1, "ram": 0}, "at least 1"),
        ({"vram": GIB, "type_k": "q9"}, "no cache type"),
    ]
    for options, says in cases:
        with pytest.raises(UsageError, match=says):
            choose(folder, **options)
    with pytest.raises(InputError, match="no such file"):
        choose(tmp_path / "none", vram=GIB)
    (tmp_path / "bare.json").write_text('{"schema": "apex.results/1", "model": {"path": "m.gguf"}}')
    with pytest.raises(InputError, match="none can be chosen"):
        choose(tmp_path, vram=GIB)


def test_contexts_and_buffers() -> None:
    assert {text: parse_ctx(text) for text in ("32k", "128K", "40000", " 1k ", "1m")} == {
        "32k": 32768, "128K": 131072, "40000": 40000, " 1k ": 1024, "1m": 1 << 20,
    }  # fmt: skip
    for bad in ("", "k", "0", "-1", "1.5k", "1g", "9" * 30, "٣"):
        with pytest.raises(UsageError, match="not a context"):
            parse_ctx(bad)
    assert compute_buffers(None, 1 << 20) == GIB
    assert compute_buffers(151936, 32768) == (256 << 20) + 512 * 4 * 151936 + 512 * 4 * 32768


def _tensors(path: Path) -> list[tuple[str, int]]:
    with open_model(path) as model:
        return [(name, info.nbytes) for name, info in model.tensors.items()]
