"""The curve: falling, convex prices, sizes kept, and its plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apex_quant.allocation.frontier import frontier
from apex_quant.errors import InputError, UsageError
from tests.allocation.costs import drawn
from tests.helpers.imatrix import random_imatrix
from tests.helpers.random_models import write_random_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("frontier")
    path = write_random_gguf(where / "moe.gguf", "qwen3moe", sparse=True)
    random_imatrix(path).write(where / "imatrix.gguf")
    drawn(path).save(where / "s.json")
    return where


def test_the_curve_falls(folder: Path) -> None:
    made = frontier(
        folder / "moe.gguf", sensitivity=folder / "s.json", imatrix=folder / "imatrix.gguf", points=6,
        out=folder / "curve.svg",
    )  # fmt: skip
    assert len(made.points) == 6
    for before, after in zip(made.points, made.points[1:], strict=False):
        assert before.total_bytes < after.total_bytes
        assert before.predicted_kld > after.predicted_kld
    assert all(point.total_bytes <= point.target_bytes for point in made.points)
    assert all(sum(point.types.values()) <= point.total_bytes for point in made.points)
    assert {row["tier"] for row in made.tiers} >= {"i-quality", "micro"}
    document = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert document["points"][0]["shadow_price"] >= 0
    assert (folder / "curve.svg").read_text().count("<svg") == 1


def test_without_importance_the_tiers_that_need_it_are_named(folder: Path) -> None:
    made = frontier(folder / "moe.gguf", sensitivity=folder / "s.json", points=2)
    assert any(line.startswith("micro") for line in made.left_out)
    assert {row["tier"] for row in made.tiers} >= {"quality"}


def test_wrong_use(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        frontier(folder / "moe.gguf", sensitivity=folder / "s.json", points=1)
    with pytest.raises(UsageError, match="plot"):
        frontier(folder / "moe.gguf", sensitivity=folder / "s.json", out=tmp_path / "x.txt")
    other = write_random_gguf(tmp_path / "other.gguf", "qwen3moe", experts=4, sparse=True)
    with pytest.raises(InputError, match="another model"):
        frontier(other, sensitivity=folder / "s.json")
