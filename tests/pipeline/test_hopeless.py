"""What cannot succeed is refused before the first phase, by a dry run as well, and leaves everything as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apex_quant import PlanOptions, quantize, run
from apex_quant.cli.run_init import write_config
from apex_quant.errors import ApexError, InputError, UsageError
from apex_quant.gguf import open_model
from apex_quant.importance import Importance
from apex_quant.pipeline.config import load_config
from apex_quant.pipeline.hopeless import smallest
from tests.helpers.generic_models import write_generic
from tests.pipeline.conftest import SETTINGS, small_run
from tests.pipeline.test_run import contents


def refused(source: Path, work: Path, **given: Any) -> ApexError:
    """The same error of a dry run and of a run; neither leaves anything."""
    before = sorted(work.rglob("*")) if work.exists() else None
    found = []
    for dry_run in (True, False):
        with pytest.raises(ApexError) as caught:
            run(source, work=str(work), dry_run=dry_run, **{**SETTINGS, **given})
        found.append(caught.value)
    assert (type(found[0]), found[0].message) == (type(found[1]), found[1].message)
    assert (sorted(work.rglob("*")) if work.exists() else None) == before
    return found[1]


@pytest.fixture(scope="module")
def model(finished: Path) -> Path:
    return finished / "Small-BF16.gguf"


def test_what_is_no_importance_matrix(again: Path) -> None:
    """It does not take the place of the good one, which is published."""
    before, state = contents(again / "work"), (again / "work/state.json").read_text()
    garbage = again / "garbage.gguf"
    garbage.write_text("hello\n")
    for name in ("garbage.gguf", "none.gguf"):
        error = refused(again / "Small-BF16.gguf", again / "work", calibrate={"imatrix": str(again / name)})
        assert isinstance(error, InputError)
        assert str(again / name) in error.message
    assert (contents(again / "work"), (again / "work/state.json").read_text()) == (before, state)


def test_a_matrix_of_another_model(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    Importance.from_arrays({"blk.0.attn_qkv.weight": (np.ones((1, 64)), np.ones(1))}).write(other)
    error = refused(model, tmp_path / "work", calibrate={"imatrix": str(other)})
    assert "attn_qkv" in error.message


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"calibrate": {"corpus": ["builtin", "nothere.txt"]}}, "calibrate.corpus"),
        ({"reference": {"text": ["nothere.txt"]}}, "reference.text"),
        ({"evaluate": {"only": ["hellaswag"], "task_files": {"hellaswag": "nothere.txt"}}}, "evaluate.task_files"),
    ],
)
def test_files_that_are_missing(model: Path, tmp_path: Path, given: dict[str, Any], key: str) -> None:
    error = refused(model, tmp_path / "work", **{"calibrate": {"corpus": ["builtin"]}, **given})
    assert isinstance(error, InputError)
    assert error.message == "nothere.txt: no such file or folder"
    assert key in str(error.hint)


def test_words_are_no_files(model: Path, tmp_path: Path) -> None:
    given = {"calibrate": {"corpus": ["builtin", "hub:org/data"]}}
    run(model, work=str(tmp_path / "work"), dry_run=True, **{**SETTINGS, **given})
    # nor is a file missed that no phase of this run reads
    left_out = {"calibrate": {"corpus": ["none"]}, "tiers": ["quality"]}
    run(model, work=str(tmp_path / "work"), dry_run=True, **{**SETTINGS, **left_out})


def test_a_quantized_source(model: Path, tmp_path: Path) -> None:
    small = tmp_path / "Small-Q8.gguf"
    quantize(model, "Q8_0", out=small, threads=1)
    corpus = {"calibrate": {"corpus": ["builtin"]}}
    error = refused(small, tmp_path / "work", **corpus)
    assert isinstance(error, InputError)
    assert "tensors are already quantized" in error.message
    assert "--set quantize.allow_requantize=true" in str(error.hint)
    allowed = {**SETTINGS, **corpus, "quantize": {"allow_requantize": True}}
    assert run(small, work=str(tmp_path / "work"), dry_run=True, **allowed).dry_run


def test_what_is_no_language_model(finished: Path, tmp_path: Path) -> None:
    matrix = finished / "work/release/Small-BF16.imatrix.gguf"
    assert "is an importance matrix, not a model" in refused(matrix, tmp_path / "work").message
    projector = tmp_path / "mmproj.gguf"
    write_generic(projector, "clip", {"v.patch_embd.weight": ((16, 16), "F16")})
    assert "is a projector, not a model" in refused(projector, tmp_path / "work").message


def test_the_example_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its source is no repository that anybody meant."""
    monkeypatch.chdir(tmp_path)
    example = write_config()
    for dry_run in (True, False):
        with pytest.raises(UsageError, match="source: is needed"):
            run(example, dry_run=dry_run)
    assert list(tmp_path.iterdir()) == [tmp_path / example]


def test_a_phase_alone_in_a_new_folder(model: Path, tmp_path: Path) -> None:
    assert isinstance(refused(model, tmp_path / "work", phases={"phase": "evaluate"}), UsageError)


def test_a_file_for_a_folder(model: Path, tmp_path: Path) -> None:
    (tmp_path / "work").write_text("x")
    for place in (tmp_path / "work", tmp_path / "work/inner"):
        error = refused(model, place)
        assert isinstance(error, UsageError)
        assert error.message == f"{tmp_path / 'work'}: is a file, not a folder"


def test_a_size_that_no_choice_of_types_has(model: Path, tmp_path: Path) -> None:
    corpus = {"calibrate": {"corpus": ["builtin"]}, "tiers": []}
    with open_model(model) as opened:
        least = smallest(load_config(None, {"source": str(model)}), opened)
        some = smallest(load_config(None, {"source": str(model), "optimize": {"types": ["Q4_K"]}}), opened)
    q4 = quantize(model, "Q4_K_S", dry_run=True, options=PlanOptions(pure=True)).plans[0].total_bytes
    assert least < some <= q4 * 1.01
    error = refused(model, tmp_path / "work", sizes=[least - 1], **corpus)
    assert isinstance(error, UsageError)
    assert f"has {least} bytes" in error.message
    assert run(model, work=str(tmp_path / "work"), dry_run=True, **{**SETTINGS, **corpus, "sizes": [least]}).dry_run


def test_finished_phases_need_nothing(again: Path) -> None:
    """What is done and unchanged is not looked at again."""
    made = small_run(again)
    assert not [one.name for one in made.phases if one.ran]
