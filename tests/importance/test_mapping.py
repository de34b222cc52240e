"""Names that share an entry, and the renumbering of layers."""

from __future__ import annotations

import pytest

from apex_quant.errors import InputError, UsageError
from apex_quant.importance import Importance, prune, same_input


class Tensor:
    def __init__(self, name: str, *shape: int) -> None:
        self.name, self.shape = name, shape


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("blk.7.ffn_gate_up_exps.weight", ("blk.7.ffn_gate_exps.weight", "blk.7.ffn_up_exps.weight")),
        ("blk.7.ffn_gate_exps.weight", ("blk.7.ffn_gate_up_exps.weight",)),
        ("blk.7.ffn_up_exps.weight", ("blk.7.ffn_gate_up_exps.weight",)),
        ("blk.10.ffn_up_shexp.weight", ("blk.10.ffn_gate_up_shexp.weight",)),
        ("blk.0.ffn_gate.weight", ("blk.0.ffn_gate_up.weight",)),
        ("blk.0.ffn_gate_up.weight", ("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight")),
        ("blk.0.attn_qkv.weight", ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight")),
        ("blk.0.attn_k.weight", ("blk.0.attn_qkv.weight",)),
        ("blk.0.ffn_down_exps.weight", ()),
        ("blk.0.ffn_gate_inp.weight", ()),
        ("blk.0.ffn_gate_exps.bias", ()),
        ("output.weight", ()),
    ],
)
def test_same_input(name: str, others: tuple[str, ...]) -> None:
    assert same_input(name) == others


def test_fused_and_split_find_each_other() -> None:
    up, fused = "blk.0.ffn_up_exps.weight", "blk.0.ffn_gate_up_exps.weight"
    split = Importance.from_arrays({up: ([[2.0, 4.0], [3.0, 6.0], [1.0, 1.0]], [2, 3, 0])})
    tensor = Tensor(fused, 2, 10, 3)
    assert split.find(fused) == up
    weights = split.for_tensor(tensor)
    assert weights is not None
    assert weights.tolist() == [[1.0, 2.0], [1.0, 2.0], [1.0, 1.0]]
    assert split.experts_without_data(tensor) == [2]
    # a sibling is no stand-in: the entry of gate was left out on purpose
    assert split.for_tensor(Tensor("blk.0.ffn_gate_exps.weight", 2, 5, 3)) is None
    whole = Importance.from_arrays({fused: ([[2.0, 4.0]], [2])})
    for name in (up, "blk.0.ffn_gate_exps.weight"):
        found = whole.for_tensor(Tensor(name, 2, 5))
        assert found is not None
        assert found.tolist() == [[1.0, 2.0]]
    assert whole.find("blk.1.ffn_up_exps.weight") is None


def test_own_entry_comes_first() -> None:
    up, fused = "blk.0.ffn_up_exps.weight", "blk.0.ffn_gate_up_exps.weight"
    both = Importance.from_arrays({up: ([1.0], 1), fused: ([5.0], 1)})
    assert both.find(fused) == fused
    assert both.find(up) == up


def test_size_rule() -> None:
    importance = Importance.from_arrays({"blk.0.attn_k_b.weight": ([1.0] * 6, 2), "token_embd.weight": ([1.0] * 9, 1)})
    heads = importance.for_tensor(Tensor("blk.0.attn_k_b.weight", 3, 4, 2))  # one count for all heads, as stock
    assert heads is not None
    assert heads.shape == (2, 3)
    assert importance.experts_without_data(Tensor("blk.0.attn_k_b.weight", 3, 4, 2)) == []
    assert importance.for_tensor(Tensor("token_embd.weight", 3, 3)) is None
    with pytest.raises(InputError, match=r"blk\.0\.attn_k_b\.weight has 6 values.*3 channels x 3 = 9"):
        importance.for_tensor(Tensor("blk.0.attn_k_b.weight", 3, 4, 3))


def test_prune_renumbers_as_stock() -> None:
    names = ["output.weight", *(f"blk.{i}.{part}.weight" for i in range(5) for part in ("attn_q", "ffn_up"))]
    kept, count = prune(names, [3, 1])
    assert count == 3
    assert kept["output.weight"] == "output.weight"
    assert {name.split(".")[1]: new.split(".")[1] for name, new in kept.items() if "blk" in name} == {
        "0": "0",
        "2": "1",
        "4": "2",
    }
    assert len(kept) == 7
    assert prune(names, [0])[0]["blk.1.attn_q.weight"] == "blk.0.attn_q.weight"
    assert prune(names, {4})[1] == 4


def test_prune_refuses() -> None:
    with pytest.raises(UsageError, match="no layer 7, 9"):
        prune(["blk.0.a.weight"], [9, 0, 7])
    with pytest.raises(UsageError, match="every layer"):
        prune(["blk.0.a.weight", "output.weight"], [0])
    with pytest.raises(UsageError, match="no layers"):
        prune(["blk.0.a.weight"], [])
