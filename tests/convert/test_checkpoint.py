"""`describe`: what is told of a checkpoint directory, and that broken ones are said to be broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apex_quant.checkpoint import describe
from apex_quant.errors import InputError, UsageError
from tests.convert.tiny_checkpoint import Array, save_safetensors

BASE: dict[str, Any] = {"architectures": ["Qwen3_5MoeForCausalLM"], "num_hidden_layers": 2, "num_experts": 4}


def make(folder: Path, config: dict[str, Any] | None = None, **more: tuple[int, ...]) -> Path:
    """A directory with two shards and an index; `more` adds BF16 tensors (__ stands for a dot)."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(BASE | (config or {})))
    (folder / "tokenizer.json").write_text("{}")
    first: dict[str, Array] = {
        "model.layers.0.mlp.gate.weight": np.zeros((4, 8), np.uint16),
        "model.norm.weight": np.ones(8, np.float32),
    }
    second: dict[str, Array] = {name.replace("__", "."): np.zeros(shape, np.uint16) for name, shape in more.items()}
    second["model.layers.1.mlp.gate.weight"] = np.zeros((4, 8), np.uint16)
    index: dict[str, str] = {}
    for number, tensors in enumerate((first, second), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_safetensors(folder / name, tensors)
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def test_facts_of_a_plain_checkpoint(tmp_path: Path) -> None:
    found = describe(make(tmp_path / "m"))
    assert (found.architecture, found.layers, found.experts) == ("Qwen3_5MoeForCausalLM", 2, 4)
    assert (found.parameters, found.tensors, found.dtypes) == (72, 3, {"BF16": 64, "F32": 8})
    assert found.complete
    assert found.without_nextn
    assert found.warnings == ()
    assert found.estimate("bf16") - (16 << 20) == 64 * 2 + 8 * 4
    assert found.estimate("f32") - (16 << 20) == 72 * 4
    assert found.outtype("auto") == "bf16"
    json.dumps(found.to_json())
    with pytest.raises(UsageError):
        found.estimate("q8_0")


def test_towers_and_nextn_are_told_apart(tmp_path: Path) -> None:
    config = {"vision_config": {}, "text_config": {"num_hidden_layers": 2, "mtp_num_hidden_layers": 1}}
    config["vision_config"] = {"depth": 1}
    found = describe(make(tmp_path / "m", config, model__visual__patch__weight=(3, 5), mtp__fc__weight=(2, 2)))
    assert found.vision
    assert (found.nextn_layers, found.nextn_tensors, found.without_nextn) == (1, 1, False)
    assert found.estimate("f16", mmproj=True) == 30
    assert any("--mmproj" in warning for warning in found.warnings)
    without = describe(make(tmp_path / "n", config))
    assert any("NextN" in warning for warning in without.warnings)
    beyond = describe(make(tmp_path / "o", model__layers__2__x__weight=(2, 2)))
    assert beyond.nextn_tensors == 1


@pytest.mark.parametrize(
    ("settings", "method", "form"),
    [
        ({"quant_method": "fp8", "fmt": "e4m3"}, "fp8", "e4m3"),
        ({"quant_method": "mxfp4"}, "mxfp4", "mxfp4"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "compressed-tensors", "nvfp4"),
    ],
)
def test_quantized_checkpoints(tmp_path: Path, settings: dict[str, str], method: str, form: str) -> None:
    found = describe(make(tmp_path / "m", {"quantization_config": settings}))
    assert found.quantization == method
    assert (found.quantization_format or "").startswith(form)
    assert "is quantized" in found.warnings[0]


def test_missing_truncated_and_pointer_shards(tmp_path: Path) -> None:
    last = "model-00002-of-00002.safetensors"
    gone = make(tmp_path / "gone")
    (gone / last).unlink()
    cut = make(tmp_path / "cut")
    (cut / last).write_bytes((cut / last).read_bytes()[:-1])
    pointer = make(tmp_path / "pointer")
    (pointer / last).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    poor = make(tmp_path / "poor")
    save_safetensors(poor / last, {})
    unindexed = make(tmp_path / "unindexed")
    (unindexed / "model.safetensors.index.json").unlink()
    (unindexed / last).unlink()
    for folder, word in (
        (gone, "is not there"),
        (cut, "truncated"),
        (pointer, "git-lfs"),
        (poor, "lacks 1"),
        (unindexed, "is not there"),
    ):
        found = describe(folder)
        assert not found.complete
        assert len(found.missing) == 1
        assert found.missing[0].startswith(last + ": ")
        assert word in found.missing[0]


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    model = tmp_path / "x.gguf"
    model.touch()
    bare = make(tmp_path / "bare")
    for file in bare.glob("*.safetensors*"):
        file.unlink()
    for path, word in (
        (tmp_path / "nowhere", "no such directory"),
        (empty, "no config.json"),
        (model, "GGUF file already"),
        (bare, "holds no model"),
    ):
        with pytest.raises(InputError, match=word):
            describe(path)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_broken_json(tmp_path: Path, text: bytes) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        folder = make(tmp_path / name)
        (folder / name).write_bytes(text)
        with pytest.raises(InputError):
            describe(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "BF16"}}',
        b'{"a": {"dtype": "BF16", "shape": [-1], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "BF16", "shape": [1e400], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "BF16", "shape": ["x"], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "BF16", "shape": [1, 1, 1, 1, 1, 1, 1, 1, 1], "data_offsets": [0, 2]}}',
    ],
)
def test_hostile_safetensors_headers(tmp_path: Path, header: bytes) -> None:
    folder = make(tmp_path / "m")
    (folder / "model-00002-of-00002.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError):
        describe(folder)


def test_an_index_may_not_leave_its_directory(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(InputError, match="outside"):
        describe(folder)
