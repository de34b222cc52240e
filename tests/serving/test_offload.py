"""Bytes by place, against what the library says that it allocated for a model that it really loads."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from apex_quant.gguf import open_model
from apex_quant.model.kv_cache import kv_cache
from apex_quant.serving.offload import Placement, placements, use, weights
from tests.helpers.random_models import write_random_gguf

MIB = 1 << 20

LOAD = """
import sys
from llama_cpp import llama_cpp as lib
params = lib.llama_model_default_params()
params.n_gpu_layers, params.use_extra_bufts, params.load_mode = 0, False, lib.LLAMA_LOAD_MODE_NONE
assert lib.llama_model_load_from_file(sys.argv[1].encode(), params)
"""


@pytest.mark.parametrize("architecture", ["llama", "qwen35moe", "gemma4", "glm4moe", "nemotron_h_moe", "gpt-oss"])
def test_weights_are_what_the_library_allocates(architecture: str, tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "m.gguf", architecture, dtype="Q8_0", sparse=True)
    done = subprocess.run([sys.executable, "-c", LOAD, path], capture_output=True, text=True, check=True)
    told = sum(float(size) for size in re.findall(r"CPU\S* model buffer size = +([\d.]+) MiB", done.stderr))
    with open_model(path) as model:
        where = weights(model)
        _, host = use(where, kv_cache(model, ctx=256), Placement(0), 0, 0)
    assert host.weights / MIB == pytest.approx(told, abs=0.00501)
    assert (where.unloaded > 0) == (architecture in ("qwen35moe", "glm4moe"))


def test_nothing_is_lost_between_the_places(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "m.gguf", "qwen3moe", layers="MMM")
    with open_model(path) as model:
        where, cache = weights(model), kv_cache(model, ctx=1000, type_k="q8_0")
    every = list(placements(3, experts=True))
    assert [
        one.words(12) for one in (Placement(0), Placement(13), Placement(13, 2), Placement(3), Placement(3, 9))
    ] == [
        "all in main memory",
        "all on the device",
        "experts of the first 2 layers in RAM",
        "the last 2 of 12 layers and the output on the device",
        "the last 2 of 12 layers and the output on the device, experts of the first 9 layers in main memory",
    ]
    assert every[0] == Placement(4)
    assert every[-1] == Placement(0)
    assert Placement(4, 3) in every
    last = None
    for place in every:
        device, host = use(where, cache, place, 0, 0)
        # rows of 256 need no padding in main memory; on the device BF16 rows need none either
        assert device.weights + host.weights == sum(row.rest[0] + row.experts[0] for row in where.layers) + (
            where.input + where.output[0]
        )
        assert device.kv + host.kv == cache.bytes
        assert last is None or device.total <= last
        last = device.total
    assert use(where, cache, Placement(4, 2), 0, 0)[1].kv == 0


def test_blocks_for_next_token_prediction_count_as_layers(tmp_path: Path) -> None:
    """llama.cpp counts --n-gpu-layers from the end, those blocks included: one less leaves the first layer behind."""
    path = write_random_gguf(tmp_path / "m.gguf", "qwen35moe", layers="LLLFN")
    with open_model(path) as model:
        where, cache = weights(model), kv_cache(model, ctx=512)
    assert (len(where.layers), where.counted) == (4, 5)
    assert next(iter(placements(where.counted, experts=True))) == Placement(6)
    assert use(where, cache, Placement(6), 0, 0)[1].total == where.input
    behind = use(where, cache, Placement(5), 0, 0)[1]
    assert behind.weights == where.input + where.layers[0].rest[0] + where.layers[0].experts[0]
    assert behind.recurrent == cache.layers[0].bytes


def test_rows_are_padded_on_the_device(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "m.gguf", "llama", layers="D", dtype="Q8_0")
    with open_model(path) as model:
        row = weights(model).layers[0].rest
        padded = [info for info in model.tensors.values() if info.type.is_quantized and info.shape[0] % 512]
        layer = [info for info in padded if info.name.startswith("blk.")]
    assert len(layer) == 6  # ffn_down's rows have 512
    assert 0 <= row[1] - row[0] - 6 * 8 * 34 < 10 * 128
