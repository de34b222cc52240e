"""The curve: falling, convex prices, sizes kept, and its plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apex_quant.allocation.frontier import frontier
from apex_quant.errors import InputError, UsageError
from apex_quant.report.plot_frontier import draw_frontier, plot_frontier
from tests.allocation.costs import drawn
from tests.helpers.cli import apex
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
        folder / "moe.gguf", sensitivity=folder / "s.json", imatrix=folder / "imatrix.gguf", points=6
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
    for kind, magic in (("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")):
        path = plot_frontier(made, folder / f"curve.{kind}")
        assert path.read_bytes().startswith(magic)
        first = path.read_bytes()
        assert plot_frontier(made, path).read_bytes() == first
    assert (folder / "curve.svg").read_text().count("<svg") == 1


def test_every_tier_is_named_in_the_plot(folder: Path) -> None:
    """Names lie neither on each other nor on marks."""
    made = frontier(folder / "moe.gguf", sensitivity=folder / "s.json", imatrix=folder / "imatrix.gguf", points=6)
    fig = draw_frontier(made)
    assert {label.get_text() for label in fig.labels} == {row["tier"] for row in made.tiers}
    boxes = [label.get_window_extent(fig.renderer) for label in fig.labels]
    for k, a in enumerate(boxes):
        assert not any(a.overlaps(b) for b in boxes[k + 1 :])
    places = [(row["total_bytes"], row["predicted_kld"]) for row in made.tiers]
    places += [(one.total_bytes, one.predicted_kld) for one in made.points]
    for x, y in fig.axes[0].transData.transform(places):
        assert not any(box.x0 < x < box.x1 and box.y0 < y < box.y1 for box in boxes)


def test_without_importance_the_tiers_that_need_it_are_named(folder: Path) -> None:
    made = frontier(folder / "moe.gguf", sensitivity=folder / "s.json", points=2)
    assert any(line.startswith("micro") for line in made.left_out)
    assert {row["tier"] for row in made.tiers} >= {"quality"}


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plot is there without being asked for, and fixed tensors are on the whole curve."""
    monkeypatch.chdir(tmp_path)
    words = ["frontier", str(folder / "moe.gguf"), "--sensitivity", str(folder / "s.json"), "--imatrix",
             str(folder / "imatrix.gguf"), "--points", "3", "--json"]  # fmt: skip
    free = apex(*words)
    assert free.status == 0, free.err
    assert (tmp_path / "moe.frontier.svg").exists()
    assert free.json["plot"] == "moe.frontier.svg"
    fixed = apex(*words, "--fix", "attention=Q2_K", "-o", str(tmp_path / "x.png"))
    assert fixed.status == 0, fixed.err
    assert fixed.json["points"][-1]["predicted_kld"] > free.json["points"][-1]["predicted_kld"]


def test_a_second_budget(folder: Path, tmp_path: Path) -> None:
    """The curve begins where files are fast enough."""
    table = tmp_path / "t.toml"
    table.write_text(
        'machine = "m"\nreference = "Q4_K"\n[seconds_per_gigaweight]\nQ8_0 = 1.5\nQ4_K = 1.0\nQ2_K = 2.0\n'
    )
    made = frontier(
        folder / "moe.gguf", sensitivity=folder / "s.json", types="q8_0,q4_k,q2_k", speeds=table, max_slowdown=1.2,
        points=3,
    )  # fmt: skip
    plain = frontier(folder / "moe.gguf", sensitivity=folder / "s.json", types="q8_0,q4_k,q2_k", points=3)
    assert made.points[0].total_bytes > plain.points[0].total_bytes


def test_wrong_use(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        frontier(folder / "moe.gguf", sensitivity=folder / "s.json", points=1)
    words = ["frontier", str(folder / "moe.gguf"), "--sensitivity", str(folder / "s.json"), "-o"]
    refused = apex(*words, str(tmp_path / "x.txt"))
    assert refused.status == 2
    assert "a plot ends in .png, .svg, .pdf" in refused.err
    other = write_random_gguf(tmp_path / "other.gguf", "qwen3moe", experts=4, sparse=True)
    with pytest.raises(InputError, match="another model"):
        frontier(other, sensitivity=folder / "s.json")
