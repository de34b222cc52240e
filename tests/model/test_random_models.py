"""The random models are real enough for stock llama.cpp: it quantizes and loads every one of them."""

from __future__ import annotations

from ctypes import c_void_p, create_string_buffer
from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_cpp import llama_cpp as lib

from apex_quant.gguf import open_model
from apex_quant.model import facts
from tests.helpers.random_models import Models, random_shapes, write_random_gguf
from tests.helpers.shapes import ARCHITECTURES
from tests.helpers.stock import stock_quantize

Q4_K_M = 15


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stock_quantizes_it(architecture: str, models: Models, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    log = stock_quantize(models(architecture), out, Q4_K_M)["log"]
    assert "fallback" not in log  # row lengths divide by 256
    source, quantized = gguf.GGUFReader(models(architecture)), gguf.GGUFReader(out)
    shapes = random_shapes(architecture)
    assert {t.name: tuple(map(int, t.shape)) for t in source.tensors} == shapes
    assert {t.name: tuple(map(int, t.shape)) for t in quantized.tensors} == shapes
    kinds = {t.tensor_type.name for t in quantized.tensors}
    assert {"Q4_K", "Q6_K", "F32"} <= kinds


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def silence(level: int, text: bytes, data: c_void_p) -> None:
    """Keeps the library's log out of the test output."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stock_loads_it_and_agrees_on_the_facts(architecture: str, models: Models) -> None:
    lib.llama_log_set(silence, c_void_p(0))
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    loaded = lib.llama_model_load_from_file(str(models(architecture)).encode(), params)
    assert loaded
    with open_model(models(architecture)) as model:
        ours = facts(model)
    stock = {
        "layers": lib.llama_model_n_layer(loaded),
        "n_embd": lib.llama_model_n_embd(loaded),
        "n_head": lib.llama_model_n_head(loaded),
        "n_head_kv": lib.llama_model_n_head_kv(loaded),
        "context": lib.llama_model_n_ctx_train(loaded),
    }
    text = create_string_buffer(64)
    lib.llama_model_meta_val_str(loaded, b"general.architecture", text, 64)
    lib.llama_model_free(loaded)
    assert stock == {
        "layers": ours.trunk_layers,
        "n_embd": ours.n_embd,
        "n_head": ours.n_head[0],
        "n_head_kv": ours.n_head_kv[0],
        "context": ours.context_length,
    }
    assert text.value.decode() == ours.architecture


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_real_sizes_take_no_disk(architecture: str, tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "real.gguf", architecture, scale="real", sparse=True)
    assert path.stat().st_size > 30e9
    assert path.stat().st_blocks * 512 < 8e6
    stock_quantize(path, tmp_path / "never.gguf", Q4_K_M, dry_run=True)
    assert not (tmp_path / "never.gguf").exists()


def test_data_depends_on_seed_and_name_only(tmp_path: Path) -> None:
    files = [
        write_random_gguf(tmp_path / f"{i}.gguf", "llama", seed=seed, layers="DD", ff=ff)
        for i, (seed, ff) in enumerate([(0, 256), (0, 512), (1, 256)])
    ]
    assert (
        files[0].read_bytes() == write_random_gguf(tmp_path / "again.gguf", "llama", layers="DD", ff=256).read_bytes()
    )
    queries = []
    for file in files:
        tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
        assert tensors["blk.1.ffn_down.weight"].shape[0] == (512 if file is files[1] else 256)
        queries.append(np.array(tensors["blk.1.attn_q.weight"].data))
    assert np.array_equal(queries[0], queries[1])
    assert not np.array_equal(queries[0], queries[2])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "Q8_0"])
def test_types(dtype: str, tmp_path: Path) -> None:
    path = write_random_gguf(
        tmp_path / "m.gguf",
        "gpt-oss",
        dtype=dtype,  # type: ignore[arg-type]
        expert_dtype="MXFP4",
        layers="M",
        metadata={"general.license": "mit"},
    )
    with open_model(path) as model:
        kinds = {name.removeprefix("blk.0."): info.type.name for name, info in model.tensors.items()}
        assert model.get("general.license") == "mit"
    assert kinds["attn_q.weight"] == dtype
    assert kinds["ffn_up_exps.weight"] == "MXFP4"
    assert kinds["attn_norm.weight"] == kinds["ffn_up_exps.bias"] == kinds["ffn_gate_inp.weight"] == "F32"
