"""Errors of types: against PyPI gguf's dequantizers and the formula, weighted, sampled, from the cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from numpy.typing import NDArray

from apex_quant import embedded_model
from apex_quant.allocation import errors_table
from apex_quant.allocation.errors_table import errors_of, sample
from apex_quant.allocation.groups import CANDIDATES
from apex_quant.allocation.patches import Disturber, Weights
from apex_quant.encode.encoder import GgmlEncoder
from apex_quant.gguf import GGUFModel, ggml_type, open_model
from apex_quant.importance import Importance

EXPERTS = "blk.2.ffn_up_exps.weight"
DENSE = "blk.3.attn_k.weight"
F32 = NDArray[np.float32]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model() -> Iterator[GGUFModel]:
    with open_model(embedded_model()) as opened:
        yield opened


@pytest.fixture(scope="module")
def disturber() -> Iterator[Disturber]:
    made = Disturber(1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def importance(model: GGUFModel) -> Importance:
    rng = np.random.default_rng(1)
    counts = np.array([50, 0, 7, 90, 3, 11])
    sums = (rng.gamma(0.5, 1.0, (6, 256)) * counts[:, None]).astype(np.float32)
    return Importance.from_arrays(
        {EXPERTS: (sums, counts), DENSE: (rng.gamma(0.5, 9.0, (1, 256)).astype(np.float32), [9])}
    )


def expected(model: GGUFModel, name: str, kind: str, importance: Importance | None) -> tuple[float, float]:
    """By the formula, all rows, blocks decoded by PyPI gguf."""
    info = model.tensors[name]
    weights = dequantize(np.frombuffer(model.read(info), np.uint8), gguf.GGMLQuantizationType.BF16)
    slices = weights.reshape(-1, info.shape[1], info.shape[0])
    means = importance.for_tensor(info) if importance is not None else None
    encoder, total = GgmlEncoder(), np.zeros(4)
    for place, rows in enumerate(slices):
        out = np.empty(len(rows) * ggml_type(kind).row_bytes(rows.shape[1]), np.uint8)
        mean = None if means is None or kind == "Q8_0" else means[place]
        encoder.encode(ggml_type(kind), np.ascontiguousarray(rows), mean, out)
        back = dequantize(out, gguf.GGMLQuantizationType[kind]).reshape(rows.shape)
        h: Any = importance.entries[name].sums[place] if importance is not None else np.ones(rows.shape[1])
        square, error = np.square(rows, dtype=np.float64), np.square(rows.astype(np.float64) - back)
        total += (error.sum(), square.sum(), (error * h).sum(), (square * h).sum())
    return total[0] / total[1], total[2] / total[3]


@pytest.mark.parametrize("name", [EXPERTS, DENSE])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q3_K", "IQ4_XS", "Q5_0"])
def test_of_all_rows(name: str, kind: str, model: GGUFModel, importance: Importance, disturber: Disturber) -> None:
    weights = Weights(model, model.tensors[name], importance)
    found = errors_of(weights, [ggml_type(kind)], disturber, most=1 << 30)[kind]
    relative, weighted = expected(model, name, kind, importance)
    assert found["relative"] == pytest.approx(relative, rel=1e-5)
    assert found["weighted"] == pytest.approx(weighted, rel=1e-5)


def test_without_importance(model: GGUFModel, disturber: Disturber) -> None:
    found = errors_of(Weights(model, model.tensors[DENSE], None), [ggml_type("Q4_K")], disturber, most=1 << 30)["Q4_K"]
    assert found["weighted"] == found["relative"] == pytest.approx(expected(model, DENSE, "Q4_K", None)[0], rel=1e-5)


def test_a_sample_is_near(model: GGUFModel, importance: Importance, disturber: Disturber) -> None:
    weights = Weights(model, model.tensors[EXPERTS], importance)
    kinds = [ggml_type(name) for name in ("Q8_0", "Q4_K", "Q3_K", "Q2_K")]
    near = errors_of(weights, kinds, disturber)
    whole = errors_of(weights, kinds, disturber, most=1 << 30)
    for kind in kinds:
        assert near[kind.name]["weighted"] == pytest.approx(whole[kind.name]["weighted"], rel=0.06)
    assert len(near) == 4


def test_rows_of_all_slices(model: GGUFModel) -> None:
    weights = Weights(model, model.tensors[EXPERTS], None)
    rows = np.array(sample(weights, 1 << 14))
    assert 56 <= len(rows) == len(set(rows.tolist())) <= 64
    assert set(rows // 256) == set(range(6))
    few = np.array(sample(weights, 1))
    assert few.min() >= 0
    assert few.max() < weights.rows


def test_errors_fall_with_bits(model: GGUFModel, importance: Importance, disturber: Disturber) -> None:
    kinds = [ggml_type(name) for name in CANDIDATES if not name.startswith(("IQ1", "IQ2", "IQ3"))]  # grids take seconds
    found = errors_of(Weights(model, model.tensors[DENSE], importance), kinds, disturber)
    ladder = ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"]
    values = [found[name]["weighted"] for name in ladder]
    assert values == sorted(values)


def test_the_cache(
    model: GGUFModel, importance: Importance, disturber: Disturber, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Weights(model, model.tensors[DENSE], importance)
    kinds = [ggml_type("Q4_0"), ggml_type("Q8_0")]
    first = errors_of(weights, kinds, disturber)
    files = list((tmp_path / "cache" / "apex-quant" / "errors").rglob("*.json"))
    assert len(files) == 1
    assert set(json.loads(files[0].read_text())) == {"Q4_0", "Q8_0"}

    def refuse(*_: object) -> None:
        raise AssertionError("encoded again")

    with monkeypatch.context() as patched:
        patched.setattr(disturber, "quantized", refuse)
        assert errors_of(weights, kinds, disturber) == first
        with pytest.raises(AssertionError):  # other importance, other errors
            errors_of(Weights(model, model.tensors[DENSE], None), kinds, disturber)
    for broken in ("{", "[1]", '{"Q4_0": 3}', '{"Q4_0": {"relative": -1, "weighted": 0}}', "[" * 60_000):
        files[0].write_text(broken)
        assert errors_of(weights, kinds, disturber) == first


def test_a_cache_that_cannot_be_written(
    model: GGUFModel, disturber: Disturber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors_table, "cache_folder", lambda: Path("/proc/nowhere"))
    assert errors_of(Weights(model, model.tensors[DENSE], None), [ggml_type("Q4_0")], disturber)["Q4_0"]["relative"] > 0


def test_a_row_of_many_experts() -> None:
    """Of 256 experts with long rows: as many of them as there are rows, and not the same row of each."""
    weights: Any = SimpleNamespace(n=2048, rows=256 * 512, rows_per_slice=512)
    rows = np.array(sample(weights, errors_table.SAMPLE))
    assert len(rows) == 32
    assert len(set(rows // 512)) == 32
    assert len(set(rows % 512)) > 20


def test_how_few_rows_there_were(model: GGUFModel, disturber: Disturber) -> None:
    kinds = {name: [ggml_type("Q4_0")] for name in (DENSE, EXPERTS)}
    for seconds, least in ((None, errors_table.SAMPLE), (1e-9, errors_table._LEAST)):
        found = errors_table.error_table(
            kinds, lambda name: Weights(model, model.tensors[name], None), disturber, lambda *_: None, seconds=seconds
        )
        assert set(found[0]) == set(kinds)
        assert found[1] == least
