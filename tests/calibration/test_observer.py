"""The sums against llama-imatrix's loops written out plainly: same order, same float32, same shapes."""

from __future__ import annotations

import numpy as np
import pytest

from apex_quant.calibration.observer import ImportanceObserver
from apex_quant.errors import InputError
from apex_quant.runtime.observe import Product
from apex_quant.runtime.tensors import F32, I32

rng = np.random.default_rng(7)


def product(
    weight: str, *, matrices: int = 1, rows: int = 32, n: int = 24, by_id: bool = False, source: int = 1
) -> Product:
    return Product(weight, by_id, (n, 8, matrices, 1), (n, rows, 1, 1), source, 9 if by_id else 0)


def plain_dense(x: F32, inner: int, outer: int) -> F32:
    """imatrix.cpp, the branch for MUL_MAT."""
    sums = np.zeros((inner * outer, x.shape[-1]), np.float32)
    for i3 in range(x.shape[0]):
        for i2 in range(x.shape[1]):
            for row in x[i3, i2]:
                sums[(i3 % outer) * inner + i2 % inner] += row * row
    return sums


def plain_experts(x: F32, ids: I32, experts: int) -> tuple[F32, I32]:
    """imatrix.cpp, the branch for MUL_MAT_ID."""
    sums, counts = np.zeros((experts, x.shape[-1]), np.float32), np.zeros(experts, np.int32)
    for choice in range(ids.shape[1]):
        for token in range(ids.shape[0]):
            expert = ids[token, choice]
            row = x[token, choice % x.shape[1]]
            sums[expert] += row * row
            counts[expert] += 1
    return sums, counts


def values(*shape: int) -> F32:
    return (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[-1]))).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1, 40, 24), (2, 3, 17, 24), (1, 1, 5000, 24)])
def test_dense_sums_to_the_bit(shape: tuple[int, ...]) -> None:
    observer, total = ImportanceObserver(), np.zeros((1, 24), np.float32)
    x = values(*shape)
    observer.take(product("blk.0.attn_q.weight"), x, None)
    total = plain_dense(x, 1, 1)
    found = observer.sums["blk.0.attn_q.weight"]
    assert (found.squares == total).all()
    assert found.counts.tolist() == [x.size // 24]
    np.testing.assert_allclose(found.plain[0], x.reshape(-1, 24).sum(axis=0, dtype=np.float64), atol=1e-2)


def test_matrices_of_a_3d_weight_have_one_count() -> None:
    """attn_k_b and attn_v_b: sums for each head, one count, as stock writes them."""
    observer, x = ImportanceObserver(), values(2, 4, 20, 24)
    observer.take(product("blk.0.attn_k_b.weight", matrices=4), x, None)
    found = observer.sums["blk.0.attn_k_b.weight"]
    assert (found.squares == plain_dense(x, 4, 1)).all()
    assert found.counts.tolist() == [2 * 20]


@pytest.mark.parametrize("slots", [1, 2])
def test_expert_sums_to_the_bit(slots: int) -> None:
    observer, experts = ImportanceObserver(), 5
    x = values(1, 300, slots, 24)
    full = rng.permuted(np.tile(np.arange(4, dtype=np.int32), (300, 1)), axis=1)  # expert 4 is never chosen
    ids = full[:, :2]  # not contiguous, as the library's
    observer.take(product("blk.3.ffn_up_exps.weight", matrices=experts, by_id=True), x, ids)
    sums, counts = plain_experts(x[0], ids, experts)
    found = observer.sums["blk.3.ffn_up_exps.weight"]
    assert (found.squares == sums).all()
    assert (found.counts == counts).all()
    assert counts[4] == 0
    assert (observer.expert_counts()[3] == counts).all()


def test_same_input_is_read_once() -> None:
    observer = ImportanceObserver()
    for _ in range(2):  # two graphs
        assert observer.wants(product("blk.0.attn_q.weight"))
        assert not observer.wants(product("blk.0.attn_k.weight"))
        assert observer.wants(product("blk.0.attn_output.weight", source=2))
    assert observer.shared == {"blk.0.attn_k.weight": "blk.0.attn_q.weight"}
    separate = ImportanceObserver(share=False)
    assert separate.wants(product("blk.0.attn_q.weight"))
    assert separate.wants(product("blk.0.attn_k.weight"))


def test_what_stock_leaves_out() -> None:
    observer = ImportanceObserver(heads=False)
    assert not observer.wants(product("blk.0.attn_q.weight", rows=15))
    assert not observer.wants(product("output.weight"))
    assert not observer.wants(product("cache_k_l0"))
    assert ImportanceObserver().wants(product("output.weight"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_activations_that_are_not_finite(bad: float) -> None:
    observer, x = ImportanceObserver(), values(1, 1, 20, 24)
    x[0, 0, 7, 5] = bad
    with pytest.raises(InputError, match=r"layer 11: the input of blk\.11\.ffn_down\.weight .*channel 5"):
        observer.take(product("blk.11.ffn_down.weight"), x, None)


def test_router_mass_and_margin() -> None:
    observer = ImportanceObserver()
    probabilities = rng.dirichlet(np.ones(6), 50).astype(np.float32)
    order = np.argsort(-probabilities, axis=1).astype(np.int32)
    observer.take_node("ffn_moe_probs-2", "SOFT_MAX", probabilities[None, None], None)
    observer.take_node("ffn_moe_argsort-2", "ARGSORT", probabilities[None, None], order[None, None])
    ids = order[:, :2]
    observer.take(product("blk.2.ffn_up_exps.weight", matrices=6, by_id=True), values(1, 50, 1, 24), ids)
    ranked = -np.sort(-probabilities.astype(np.float64), axis=1)
    router = observer.routers[2]
    np.testing.assert_allclose(router.mass, probabilities.sum(axis=0, dtype=np.float64), rtol=1e-6)
    assert router.tokens == 50
    assert router.margin == pytest.approx((ranked[:, 1] - ranked[:, 2]).sum(), rel=1e-5)


def test_restored_sums_go_on_to_the_bit() -> None:
    one, two = ImportanceObserver(), ImportanceObserver()
    parts = [values(1, 1, 33, 24) for _ in range(2)]
    named = product("blk.0.attn_q.weight")
    for part in parts:
        one.take(named, part, None)
    two.take(named, parts[0], None)
    three = ImportanceObserver()
    three.restore({key: array.copy() for key, array in two.arrays().items()}, two.shared)
    three.take(named, parts[1], None)
    assert (three.sums[named.weight].squares == one.sums[named.weight].squares).all()
    assert (three.sums[named.weight].plain == one.sums[named.weight].plain).all()
