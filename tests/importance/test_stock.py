"""What llama_model_quantize makes of an importance matrix equals ggml_quantize_chunk with our weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from apex_quant.errors import InputError
from apex_quant.gguf import GGUFModel, TensorInfo, open_model, stock_order
from apex_quant.gguf.types import TYPES
from apex_quant.importance import Importance, prune
from apex_quant.native import ggml
from tests.helpers.imatrix import random_imatrix
from tests.helpers.random_models import write_random_gguf
from tests.helpers.stock import StockError, stock_quantize

Q4_K_S = 14  # LLAMA_FTYPE_MOSTLY_Q4_K_S
TYPES_BY_PATTERN = [
    ("ffn_(gate|up)_exps", TYPES["IQ2_XXS"].id),
    ("ffn_down_exps", TYPES["IQ3_XXS"].id),
    ("attn_v", TYPES["Q6_K"].id),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 layers of 3 experts in F32, so that encoding needs no decoder."""
    path = tmp_path_factory.mktemp("stock") / "model.gguf"
    return write_random_gguf(path, "qwen3moe", dtype="F32", layers="MMM")


def encode(source: GGUFModel, info: TensorInfo, kind: str, weights: NDArray[np.float32] | None) -> bytes:
    values = np.frombuffer(source.read(info), np.float32).reshape(-1, *info.shape[1::-1])
    row_bytes = TYPES[kind].row_bytes(info.shape[0])
    out = np.empty((len(values), info.shape[1] * row_bytes), np.uint8)
    ggml().wait_grid(TYPES[kind])
    for i, expert in enumerate(values):
        row = None if weights is None else weights[i].ctypes.data
        ggml().quantize_chunk(
            TYPES[kind].id, expert.ctypes.data, out[i].ctypes.data, 0, info.shape[1], info.shape[0], row
        )
    return out.tobytes()


def assert_equal_to_ours(model: Path, quantized: Path, ours: Importance, names: Mapping[str, str]) -> set[str]:
    """Every quantized tensor of `quantized` is ours; `names` are {source: quantized}. Returns the types."""
    kinds = set()
    with open_model(model) as source, open_model(quantized) as made:
        assert set(made.tensors) == set(names.values())
        for name, new in names.items():
            info, result = source.tensors[name], made.tensors[new]
            if result.type.name == "F32":
                continue
            expected = encode(source, info, result.type.name, ours.for_tensor(info))
            assert made.read(result) == expected, f"{name} as {result.type}"
            kinds.add(result.type.name)
    return kinds


def names_of(model: Path) -> dict[str, str]:
    with open_model(model) as source:
        return {name: name for name in source.tensors}


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_same_bytes(model: Path, tmp_path: Path, form: str) -> None:
    made = random_imatrix(model, uncovered={"blk.1.ffn_down_exps.weight": [0, 2]})
    matrix = tmp_path / f"imatrix.{form}"
    made.write(matrix) if form == "gguf" else made.write_dat(matrix)
    stock_quantize(model, tmp_path / "q.gguf", Q4_K_S, imatrix=matrix, tensor_types=TYPES_BY_PATTERN)
    with Importance.read(matrix) as ours:
        kinds = assert_equal_to_ours(model, tmp_path / "q.gguf", ours, names_of(model))
        assert kinds == {"IQ2_XXS", "IQ3_XXS", "Q4_K", "Q6_K"}
        with open_model(model) as source:
            down = source.tensors["blk.1.ffn_down_exps.weight"]
            assert ours.experts_without_data(down) == [0, 2]


def test_same_bytes_after_pruning(model: Path, tmp_path: Path) -> None:
    matrix = tmp_path / "imatrix.gguf"
    random_imatrix(model).write(matrix)
    stock_quantize(model, tmp_path / "q.gguf", Q4_K_S, imatrix=matrix, prune_layers=[0])
    kept, count = prune(stock_order(names_of(model)), [0])
    with Importance.read(matrix) as ours, open_model(tmp_path / "q.gguf") as made:
        assert made.get("{arch}.block_count") == count == 2
        assert_equal_to_ours(model, tmp_path / "q.gguf", ours, kept)


def test_fused_experts_with_a_matrix_made_for_split_ones(tmp_path: Path) -> None:
    fused_model = write_random_gguf(tmp_path / "m.gguf", "gemma4", dtype="F32", layers="SG")
    own = random_imatrix(fused_model)
    fused = [name for name in own.entries if "ffn_gate_up_exps" in name]
    assert fused
    own.write(tmp_path / "own.gguf")
    stock_quantize(
        fused_model,
        tmp_path / "q.gguf",
        Q4_K_S,
        imatrix=tmp_path / "own.gguf",
        tensor_types=[("ffn_gate_up_exps", TYPES["IQ2_XXS"].id)],
    )
    split = Importance(dict(own.entries))
    for name in fused:
        entry = split.entries.pop(name)
        split.entries[name.replace("gate_up", "gate")] = split.entries[name.replace("gate_up", "up")] = entry
    assert "IQ2_XXS" in assert_equal_to_ours(fused_model, tmp_path / "q.gguf", split, names_of(fused_model))


def test_wrong_sizes_stop_both(model: Path, tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"
    embedding = {"token_embd.weight": ([1.0] * 7, 1)}
    bad = Importance.from_arrays({name: ([1.0] * 7, 1), **embedding})
    bad.write(tmp_path / "bad.gguf")
    with pytest.raises(StockError, match="imatrix size 7 is different"):
        stock_quantize(model, tmp_path / "q.gguf", Q4_K_S, imatrix=tmp_path / "bad.gguf")
    forgiven = Importance.from_arrays(embedding)
    forgiven.write(tmp_path / "ok.gguf")
    stock_quantize(model, tmp_path / "q.gguf", Q4_K_S, imatrix=tmp_path / "ok.gguf")
    with open_model(model) as source:
        with pytest.raises(InputError, match="has 7 values"):
            bad.for_tensor(source.tensors[name])
        assert forgiven.for_tensor(source.tensors["token_embd.weight"]) is None
