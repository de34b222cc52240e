"""What a quantized file says about itself, and that equal plans say it in equal bytes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from apex_quant.errors import UsageError
from apex_quant.gguf import TYPES, GGUFModel, ValueType, open_model
from apex_quant.importance import Importance
from apex_quant.recipe.metadata import RESERVED, display_name, needed_llama_cpp, parse_kv_override
from apex_quant.recipe.plan import plan
from apex_quant.recipe.planned import Plan, PlanOptions
from tests.helpers.imatrix import random_imatrix
from tests.helpers.random_models import Models, write_random_gguf


def written(decided: Plan, path: Path) -> GGUFModel:
    """The planned file with a hole for its data, opened."""
    (layout,) = decided.layouts
    with path.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.total_bytes)
    return open_model(path)


def source(path: Path, **metadata: Any) -> Path:
    """A sparse model with these keys; double underscores stand for dots."""
    keys = {key.replace("__", "."): value for key, value in metadata.items()}
    return write_random_gguf(path, "qwen3moe", sparse=True, metadata=keys)


def unnamed(path: Path, name: str | None) -> Path:
    """A model whose general.name is `name` (the helper's own name, cut or filled to its length)."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    if name is not None:
        writer.add_name(name)
    for key in ("block_count", "embedding_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("X-BF16", "X"),
        ("X-BF16-00001-of-00002", "X"),
        ("Qwen3.5-35B-A3B-f16", "Qwen3.5-35B-A3B"),
        ("Qwen3.5-35B-A3B.BF16", "Qwen3.5-35B-A3B"),
        ("gpt_oss 20b_MXFP4", "gpt_oss-20b"),
        ("X-F16-BF16", "X"),
        ("X-Q4_K_M", "X-Q4_K_M"),
        ("phi-3.5", "phi-3.5"),
        ("été-BF16", "été"),
        ("a;b$(c)", "a-b-c"),
        ("model", "Given-Name"),
        ("model-00001-of-00002", "Given-Name"),
        ("ggml-model-f16", "Given-Name"),
        ("0123456789abcdef0123456789abcdef01234567", "Given-Name"),
        ("sha256-" + "0123456789abcdef" * 4, "Given-Name"),
        ("BF16", "BF16"),
    ],
)
def test_display_name(stem: str, name: str, tmp_path: Path) -> None:
    with open_model(unnamed(tmp_path / "x.gguf", "Given Name")) as model:
        model.path = tmp_path / f"{stem}.gguf"
        assert display_name(model) == name
        model.path = tmp_path / stem  # a suffix of another kind is part of the name
        assert display_name(model) == name


def test_display_name_without_any(tmp_path: Path) -> None:
    for given in (None, "", "Safetensors", "Model"):
        with open_model(unnamed(tmp_path / "model.gguf", given)) as model:
            assert display_name(model) == "model"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("Qwen3.5 35B A3B", "Qwen3.5 35B A3B"),
        ("Safetensors", "Some Model 7B"),
        ("snapshots", "Some Model 7B"),
        ("9f7b0f0e1d2c3b4a59687766554433221100ffee", "Some Model 7B"),
        ("  ", "Some Model 7B"),
        (None, None),
    ],
)
def test_general_name(given: str | None, kept: str | None, tmp_path: Path) -> None:
    with (
        open_model(unnamed(tmp_path / "Some-Model-7B-BF16.gguf", given)) as model,
        written(plan(model, "Q8_0"), tmp_path / "out") as out,
    ):
        assert out.get("general.name") == kept


def test_name_given_by_the_user(tmp_path: Path) -> None:
    path = unnamed(tmp_path / "Some-Model.gguf", "Safetensors")
    decided = plan(path, "Q8_0", options=PlanOptions(override_kv=["general.name=str:My Own"]))
    with written(decided, tmp_path / "out") as out:
        assert out.get("general.name") == "My Own"


def test_stale_keys_are_dropped(tmp_path: Path) -> None:
    path = source(
        tmp_path / "old.gguf",
        apex__tier="old", apex__data__sha256="old", apex__other="old", quantize__imatrix__file="/home/old",
        quantize__imatrix__chunks_count=3, split__no=0, split__count=1, split__tensors__count=99,
        general__file_type=99, general__quantization_version=1, general__alignment=32, apexes="kept",
        general__license="kept", tokenizer__ggml__pre="kept",
    )  # fmt: skip
    with written(plan(path, "quality"), tmp_path / "out.gguf") as out:
        assert "old" not in {str(value) for value in out.metadata.values()}
        assert not [key for key in out.metadata if key.startswith(("quantize.imatrix.", "split."))]
        assert "general.alignment" not in out.metadata
        assert "apex.other" not in out.metadata
        assert (out.get("general.file_type"), out.get("general.quantization_version")) == (18, 2)
        assert out.metadata["general.file_type"].type is ValueType.UINT32
        assert (out.get("apexes"), out.get("general.license"), out.get("tokenizer.ggml.pre")) == ("kept",) * 3


def test_source_keys_are_kept_to_the_byte(models: Models, tmp_path: Path) -> None:
    path = models("qwen35moe")
    with open_model(path) as model, written(plan(path, "micro"), tmp_path / "out.gguf") as out:
        assert list(out.metadata)[: len(model.metadata)] == list(model.metadata)
        for key, value in model.metadata.items():
            assert bytes(out.metadata[key].raw) == bytes(value.raw)
            assert out.metadata[key].type is value.type


def test_apex_keys(models: Models, tmp_path: Path) -> None:
    path = models("qwen35moe")
    random_imatrix(path).write(tmp_path / "calibration.gguf")
    with Importance.read(tmp_path / "calibration.gguf") as matrix:
        decided = plan(path, "i-mini", imatrix=matrix)
        digest = matrix.sha256
    with written(decided, tmp_path / "out.gguf") as out:
        found = {key: out.get(key) for key in out.metadata if key.startswith(("apex.", "quantize."))}
    assert found["apex.tier"] == "i-mini"
    assert found["apex.recipe.base"] == "Q3_K_M"
    assert found["apex.recipe.sha256"] == decided.recipe.sha256
    assert found["apex.zones"] == str(decided.zones)
    assert found["apex.imatrix.sha256"] == digest
    assert found["apex.encoder"] == "ggml"
    assert found["apex.llama_cpp.needs"] == "PR #5721"
    assert str(found["apex.library"]).startswith("llama-cpp-python 0.")
    assert found["quantize.imatrix.file"] == "calibration.gguf"
    assert found["quantize.imatrix.dataset"] == "random.txt"
    assert found["quantize.imatrix.entries_count"] == len(random_imatrix(path).entries)
    assert found["quantize.imatrix.chunks_count"] == 16
    for key, width in RESERVED.items():
        offset, length = decided.layouts[0].value_span(key)
        assert length == width
        assert decided.layouts[0].header[offset : offset + length] == b" " * width


def test_no_imatrix_keys_without_a_matrix_that_is_used(models: Models, tmp_path: Path) -> None:
    decided = plan(models("qwen3moe"), "quality", imatrix=random_imatrix(models("qwen3moe")))
    with written(decided, tmp_path / "out.gguf") as out:
        assert not [key for key in out.metadata if "imatrix" in key]


@pytest.mark.parametrize("tier", ["quality", "i-mini", "Q4_K_M"])
def test_equal_plans_have_equal_headers(tier: str, models: Models, tmp_path: Path) -> None:
    """Wherever the files lie, however the tier is written; and no path stands in the header."""
    first, second = tmp_path / "one" / "X-BF16.gguf", tmp_path / "another-place" / "X.gguf"
    headers = []
    for path, asked in (first, tier), (first, tier.upper()), (second, tier.lower()):
        path.parent.mkdir(exist_ok=True)
        shutil.copy(models("qwen35moe"), path)
        matrix = path.parent / "imatrix.gguf"
        random_imatrix(path).write(matrix)
        decided = plan(path, asked, imatrix=matrix)
        headers.append(decided.layouts[0].header)
        for part in (*path.parts, *matrix.parts[:-1]):
            assert part in ("/", "one") or part.encode() not in decided.layouts[0].header
    assert headers[0] == headers[1] == headers[2]


def test_same_types_by_another_way_have_the_same_recipe_hash(models: Models, tmp_path: Path) -> None:
    path = models("qwen3moe")
    one = plan(path, "compact")
    (tmp_path / "recipe.txt").write_text(one.recipe.text())
    two = plan(path, "Q4_K_M", options=PlanOptions(recipe=tmp_path / "recipe.txt"))
    assert one.recipe.sha256 == two.recipe.sha256
    assert one.total_bytes - len(one.layouts[0].header) == two.total_bytes - len(two.layouts[0].header)


# --- overrides of keys ---


@pytest.mark.parametrize(
    ("text", "kind", "data"),
    [
        ("a.b=int:7", ValueType.UINT32, 7),
        ("a.b=int:-7", ValueType.UINT32, 7),  # as llama-quantize writes them
        ("a.b=float:0.5", ValueType.FLOAT32, 0.5),
        ("a.b=bool:true", ValueType.BOOL, True),
        ("a.b=bool:FALSE", ValueType.BOOL, False),
        ("a.b=str:x=y:z", ValueType.STRING, "x=y:z"),
        ("a.b=str:", ValueType.STRING, ""),
    ],
)
def test_kv_overrides(text: str, kind: ValueType, data: Any) -> None:
    key, value = parse_kv_override(text)
    assert (key, value.type, value.data) == ("a.b", kind, data)


@pytest.mark.parametrize(
    "text",
    ["", "a", "a=", "a=7", "a=int:", "a=int:x", "a=int:4294967296", "a=bool:1", "a=double:1", "=int:1", "a=float:x"],
)
def test_bad_kv_overrides(text: str) -> None:
    with pytest.raises(UsageError, match=r"not of the form KEY=int\|float\|bool\|str:VALUE"):
        parse_kv_override(text)


@pytest.mark.parametrize(
    "key",
    ["general.architecture", "general.file_type", "general.quantization_version", "general.alignment", "split.no",
     "apex.tier", "quantize.imatrix.file"],
)  # fmt: skip
def test_keys_that_are_decided_here(key: str) -> None:
    with pytest.raises(UsageError, match=f"{key} is decided"):
        parse_kv_override(f"{key}=str:x")


# --- what a reader must know ---


@pytest.mark.parametrize(
    ("names", "needed"),
    [
        ("F32 F16 Q8_0 Q6_K Q5_K Q4_K Q3_K Q2_K Q4_0 Q4_1 Q5_0 Q5_1", None),
        ("Q6_K IQ4_XS Q8_0", "PR #5747"),
        ("IQ2_XXS IQ2_S Q3_K", "PR #5721"),
        ("IQ1_M IQ2_XS IQ4_XS", "PR #6302"),
        ("MXFP4 IQ1_M", "PR #15091"),
        ("NVFP4 MXFP4", "PR #19769"),
    ],
)
def test_needed_llama_cpp(names: str, needed: str | None) -> None:
    assert needed_llama_cpp([TYPES[name] for name in names.split()]) == needed


def test_every_newer_type_has_its_pull_request() -> None:
    """All i-, ternary and FP4 types, and what came with them; the older ones are in every GGUF reader."""
    newer = {kind.name for kind in TYPES.values() if kind.kind in ("iq", "ternary", "fp4")} | {"Q1_0", "Q2_0"}
    for kind in TYPES.values():
        assert (needed_llama_cpp([kind]) is not None) == (kind.name in newer), kind.name
