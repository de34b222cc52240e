"""Streamed moments against moments of the whole array, and their memory."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_quant.gguf import open_model
from apex_quant.model import Role, stats
from apex_quant.model.inspect import model_roles
from apex_quant.model.stats import Moments, weight_statistics
from tests.helpers.random_models import Models, write_random_gguf
from tests.helpers.stock import stock_quantize

Q2_K = 10


def whole(values: np.ndarray) -> tuple[float, float, float, float]:
    """Mean, standard deviation, Pearson kurtosis and largest magnitude by their definitions."""
    x = values.astype(np.longdouble).ravel()
    d = x - x.mean()
    square = d * d
    variance = square.mean()
    kurtosis = (square * square).mean() / variance**2
    return float(x.mean()), float(np.sqrt(variance)), float(kurtosis), float(abs(x).max())


def streamed(moments: Moments) -> tuple[float, float, float, float]:
    return moments.mean, moments.std, moments.kurtosis, moments.max_abs


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 400), min_size=1, max_size=6), st.floats(-1e4, 1e4))
def test_chunks_add_up_to_the_whole(seed: int, sizes: list[int], mean: float) -> None:
    rng = np.random.default_rng(seed)
    chunks = [rng.laplace(mean, 1.0, size) for size in [*sizes, 5]]
    total = sum((Moments.of(chunk) for chunk in chunks), Moments())
    assert total.n == sum(sizes) + 5
    assert streamed(total) == pytest.approx(whole(np.concatenate(chunks)), rel=1e-9, abs=1e-9)


def test_kurtosis_of_known_distributions() -> None:
    rng = np.random.default_rng(0)
    assert Moments.of(rng.standard_normal(1 << 20)).kurtosis == pytest.approx(3, abs=0.03)
    assert Moments.of(rng.uniform(-1, 1, 1 << 20)).kurtosis == pytest.approx(1.8, abs=0.01)
    assert Moments.of(np.array([-1.0, 1.0])).kurtosis == 1


def test_nothing_constant_and_nonfinite() -> None:
    assert math.isnan(Moments().std)
    assert math.isnan(Moments.of(np.full(9, 2.5)).kurtosis)
    found = Moments.of(np.array([1, np.nan, 3, np.inf, -np.inf], dtype=np.float32)) + Moments.of(np.array([np.nan]))
    assert (found.n, found.mean, found.max_abs, found.nonfinite) == (2, 2.0, 3.0, 4)
    assert math.isnan(Moments.of(np.array([1e200, -1e200])).kurtosis)  # overflows, does not raise


@pytest.mark.parametrize("source", ["BF16", "Q2_K"])
def test_tensors_roles_and_layers(source: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "CHUNK", 1 << 14)  # many chunks in each tensor
    path = models("gpt-oss")
    if source == "Q2_K":
        path = tmp_path / "quantized.gguf"
        stock_quantize(models("gpt-oss"), path, Q2_K)
    values = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    told: list[int] = []
    with open_model(path) as model:
        roles = model_roles(model)
        found = weight_statistics(model, roles, progress=told.append)
        assert sum(told) == sum(info.nbytes for info in model.tensors.values())
    assert not found.skipped

    assert [row.name for row in found.tensors] == list(roles)
    for row in found.tensors:
        assert row.name
        assert row.n == values[row.name].size
        row_values = (row.mean, row.std, row.kurtosis, row.max_abs)
        assert row_values == pytest.approx(whole(values[row.name]), rel=1e-6, abs=1e-9)
        assert row.tensor_kurtosis == pytest.approx(row.kurtosis, rel=1e-12)

    for rows in (found.roles, found.layers):
        for row in rows:
            members = [
                values[name]
                for name, role in roles.items()
                if role.role is row.role
                and (rows is found.roles or role.layer == row.layer)
                and values[name].ndim > 1
                and name.endswith(".weight")
            ]
            pooled = np.concatenate([member.ravel() for member in members])
            assert row.n == pooled.size
            assert (row.mean, row.std, row.kurtosis, row.max_abs) == pytest.approx(whole(pooled), rel=1e-6, abs=1e-9)
            kurtosis = np.average([whole(m)[2] for m in members], weights=[m.size for m in members])
            assert row.tensor_kurtosis == pytest.approx(kurtosis, rel=1e-6)
    assert [row.role for row in found.roles] == [
        Role.routed_expert,
        Role.attention,
        Role.router,
        Role.embedding,
        Role.output,
    ]
    assert [row.layer for row in found.layers if row.role is Role.attention] == list(range(6))


def test_memory_is_bounded(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "m.gguf", "llama", sparse=True, layers="D", vocab=1 << 16)
    assert path.stat().st_size > 60e6
    with open_model(path) as model:
        roles = model_roles(model)
        tracemalloc.start()
        found = weight_statistics(model, roles)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert sum(row.n for row in found.tensors) > 30e6  # 120 MB as float32
    assert peak < 40e6


def test_tensors_without_weights_are_listed(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "eagle3")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_tensor("d2t", np.arange(32, dtype=np.int64))
    writer.add_tensor("fc.weight", np.eye(32, dtype=np.float64))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    with open_model(tmp_path / "m.gguf") as model:
        found = weight_statistics(model, model_roles(model))
    assert [(row.name, row.reason) for row in found.skipped] == [("d2t", "I64 holds integers")]
    assert [row.mean for row in found.tensors] == [1 / 32]
