"""Facts from metadata: llama.cpp's rules for missing keys and arrays; lies are InputErrors that name the key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from apex_quant.errors import InputError
from apex_quant.gguf import Value, ValueType, open_model
from apex_quant.model import ModelFacts, facts, facts_of
from tests.helpers.random_models import write_random_gguf
from tests.helpers.stock import stock_quantize

Q3_K_S = 11


def metadata(architecture: str = "llama", **keys: Value | int | str) -> dict[str, Value]:
    """Metadata with two layers and width 64; dots in keys are written as two underscores."""
    plain: dict[str, Value | int | str] = {"block_count": 2, "embedding_length": 64, **keys}
    return {
        key.replace("__", ".") if key.startswith("general") else f"{architecture}.{key.replace('__', '.')}": (
            Value.u32(value) if isinstance(value, int) else Value.string(value) if isinstance(value, str) else value
        )
        for key, value in plain.items()
    }


def of(architecture: str = "llama", **keys: Value | int | str) -> ModelFacts:
    return facts_of(metadata(architecture, **keys), architecture)


def i32(*numbers: int) -> Value:
    return Value.array(ValueType.INT32, numbers)


def test_missing_keys() -> None:
    found = of()
    assert (found.block_count, found.n_layer_all, found.trunk_layers, found.nextn_layers) == (2, 2, 2, 0)
    assert (found.n_head, found.n_head_kv, found.n_ff, found.n_gqa) == ((0, 0), (0, 0), (0, 0), 0)
    assert (found.n_expert, found.n_expert_used, found.is_moe) == (0, (0, 0), False)
    assert (found.name, found.file_type, found.context_length) == (None, None, None)


def test_kv_heads_default_to_heads() -> None:
    assert of(attention__head_count=8).n_head_kv == (8, 8)
    assert of(attention__head_count=8).n_gqa == 1
    assert of(attention__head_count=8, attention__head_count_kv=3).n_gqa == 2


def test_arrays_have_one_entry_for_each_layer() -> None:
    found = of(attention__head_count=i32(4, 8), attention__head_count_kv=i32(0, 2))
    assert (found.n_head, found.n_head_kv, found.n_gqa) == ((4, 8), (0, 2), 0)
    with pytest.raises(InputError, match=re.escape("llama.attention.head_count has 3 entries for 2 layers")):
        of(attention__head_count=i32(4, 8, 8))


def test_experts_by_layer() -> None:
    found = of("nemotron_h_moe", expert_count=16, expert_used_count=i32(0, 6))
    assert [found.experts_used(layer) for layer in (0, 1, None)] == [0, 6, 6]


@pytest.mark.parametrize(
    ("layers", "heads", "kv", "experts", "expected"),
    [(80, 64, 8, 0, True), (80, 64, 64, 0, False), (79, 64, 8, 0, False), (80, 64, 8, 8, False)],
)
def test_70b(layers: int, heads: int, kv: int, experts: int, expected: bool, tmp_path: Path) -> None:
    """Oracle: in a Q3_K_S file llama.cpp raises attn_v from Q3_K to Q5_K for 70B alone (Q8_0 for 8 experts)."""
    keys: dict[str, str | int | float | bool] = (
        {"llama.expert_count": experts, "llama.expert_used_count": 2} if experts else {}
    )
    path = write_random_gguf(
        tmp_path / "m.gguf", "llama", sparse=True, layers="D" * layers, heads=heads, kv=kv, head=4, metadata=keys
    )
    with open_model(path) as model:
        assert facts(model).is_70b is expected
    log = stock_quantize(path, tmp_path / "out.gguf", Q3_K_S, dry_run=True)["log"]
    line = next(line for line in log.splitlines() if "blk.0.attn_v.weight" in line)
    assert ("(q5_K)" in line) is expected


@pytest.mark.parametrize(
    ("architecture", "layers", "expected"),
    [("qwen2", 80, True), ("olmo", 80, True), ("jais2", 68, True), ("jais2", 80, False), ("qwen3", 80, False)],
)
def test_70b_of_other_architectures(architecture: str, layers: int, expected: bool) -> None:
    assert of(architecture, block_count=layers, attention__head_count=8).is_70b is expected


def test_layers_that_llama_cpp_adds() -> None:
    assert of("graniteswitch").n_layer_all == 3
    assert of("nanbeige", num_loops=3).n_layer_all == 6
    assert of("nanbeige").n_layer_all == 2


def test_nextn_layers() -> None:
    assert of("glm4moe", nextn_predict_layers=1).trunk_layers == 1
    keys = metadata("deepseek4", nextn_predict_layers=1)
    # converted without its NextN block, deepseek4 still states it
    assert facts_of(keys, "deepseek4", ["blk.1.nextn.eh_proj.weight"]).trunk_layers == 1
    assert facts_of(keys, "deepseek4", []).trunk_layers == 2


def test_one_expert_is_dense_in_hunyuan() -> None:
    assert of("hunyuan-dense", expert_count=1, expert_used_count=1).n_expert == 0


def test_projector_files_have_no_layers() -> None:
    found = facts_of({"general.name": Value.string("mmproj")}, "clip")
    assert (found.block_count, found.trunk_layers, found.name, found.n_gqa) == (0, 0, "mmproj", 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"block_count": "two"}, "llama.block_count must be a whole number"),
        ({"block_count": 0}, "llama.block_count must be at least 1"),
        ({"block_count": 513}, "llama.block_count is 513, outside 0 to 512"),
        ({"block_count": Value.i32(-1)}, "llama.block_count is -1, outside"),
        ({"block_count": Value.f32(2.0)}, "llama.block_count must be a whole number"),
        ({"block_count": Value.bool_(True)}, "llama.block_count must be a whole number"),
        ({"block_count": i32(1, 2)}, "llama.block_count must be a whole number"),
        ({"embedding_length": Value.u64(1 << 40)}, "llama.embedding_length is 1099511627776, outside"),
        ({"nextn_predict_layers": 3}, "llama.nextn_predict_layers is 3, outside 0 to 2"),
        ({"expert_count": 1025}, "llama.expert_count is 1025, outside 0 to 1024"),
        ({"expert_count": 4}, "llama.expert_used_count is 0 of 4 experts"),
        ({"expert_used_count": 4}, "llama.expert_used_count is 4 of 0 experts"),
        ({"attention__head_count": Value.array(ValueType.FLOAT32, [1.0, 2.0])}, "must be an array of whole numbers"),
        ({"attention__head_count": Value.array(ValueType.STRING, ["1", "2"])}, "must be a whole number"),
        ({"attention__head_count_kv": i32(1, -1)}, "llama.attention.head_count_kv is -1, outside"),
        ({"general__name": 3}, "general.name must be a string"),
        ({"general__type": "imatrix"}, "is an importance matrix, not a model"),
    ],
)
def test_lies_name_their_key(keys: dict[str, Value | int | str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        facts_of(metadata("llama", **keys), "llama")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("key", ["block_count", "embedding_length"])
def test_required_keys(key: str) -> None:
    keys = metadata()
    del keys[f"llama.{key}"]
    with pytest.raises(InputError, match=f"some.gguf: metadata key llama.{key} is missing"):
        facts_of(keys, "llama", where="some.gguf")


def test_no_architecture() -> None:
    with pytest.raises(InputError, match=re.escape("general.architecture is missing")):
        facts_of({}, "")
