"""The plots by their structure: what is drawn, with which intervals, in which colours, and that no labels overlap."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import Collection, LineCollection, PathCollection
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

from apex_quant import embedded_model
from apex_quant.errors import UsageError
from apex_quant.evaluation.schema import ModelInfo
from apex_quant.report import style
from apex_quant.report.gather import Gathered, gather
from apex_quant.report.pareto import front, rivals
from apex_quant.report.placing import Wanted, crosses, overlaps, place_labels
from apex_quant.report.plots import PLOTS, write_plots
from apex_quant.report.plots_maps import apart, colour_of
from tests.report.results_data import folder_of_all, metrics, write

WITHOUT = {"precision"}  # of the made-up results: no file lies beside them


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Gathered:
    return gather([folder_of_all(tmp_path_factory.mktemp("results"))], family=["Unsloth=UD-*"])


@cache
def example() -> Gathered:
    return gather(["example:qwen3.5-35b-a3b"])


def drawn(name: str, gathered: Gathered, theme: str = "light") -> style.PlotFigure:
    fig = PLOTS[name].draw(gathered, theme)
    assert fig is not None
    return fig


def fills_of(collection: Collection) -> list[str]:
    """The colours of its shapes, #rrggbb."""
    return [to_hex((r, g, b)) for r, g, b, _ in np.asarray(collection.get_facecolor(), float).tolist()]


def assert_nothing_overlaps(fig: style.PlotFigure) -> None:
    """No two labels have a pixel in common, and all lie inside the figure."""
    boxes = [label.get_window_extent(fig.renderer) for label in fig.labels]
    for (i, a), (j, b) in itertools.combinations(enumerate(boxes), 2):
        apart = a.x1 <= b.x0 + 0.5 or b.x1 <= a.x0 + 0.5 or a.y1 <= b.y0 + 0.5 or b.y1 <= a.y0 + 0.5
        assert apart, f"{fig.labels[i].get_text()!r} lies on {fig.labels[j].get_text()!r}"
    for label, box in zip(fig.labels, boxes, strict=True):
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1
        assert inside, f"{label.get_text()!r} leaves the figure"
    texts = [text for text in fig.texts if text.get_text()]
    for text, other in itertools.combinations(texts, 2):
        assert not text.get_window_extent(fig.renderer).overlaps(other.get_window_extent(fig.renderer))


@pytest.mark.parametrize("name", [name for name in PLOTS if name not in WITHOUT])
def test_every_plot_is_drawn_and_its_labels_do_not_overlap(name: str, gathered: Gathered) -> None:
    for one in (gathered, example()):
        fig = PLOTS[name].draw(one)
        if fig is None:
            assert one is example()
            assert name in ("domains", "routers")  # not published
            continue
        assert fig.name == name
        assert fig.marks
        assert fig.alt
        assert_nothing_overlaps(fig)


def test_points_and_intervals_are_the_numbers(gathered: Gathered) -> None:
    fig = drawn("kld-vs-size", gathered)
    (ax,) = fig.axes
    rows = gathered.shown("kld")
    points = np.vstack([np.asarray(one.get_offsets()) for one in ax.collections if isinstance(one, PathCollection)])
    assert sorted(map(tuple, points)) == sorted((float(one.entry.bytes or 0), one.number.value) for one in rows)
    (lines,) = [one for one in ax.collections if isinstance(one, LineCollection)]
    ends = sorted((float(s[0][0]), float(s[0][1]), float(s[1][1])) for s in lines.get_segments())
    assert ends == sorted((float(one.entry.bytes or 0), one.number.low, one.number.high) for one in rows)
    assert {label.get_text() for label in fig.labels} == {one.entry.label for one in rows}
    assert {mark.label for mark in fig.marks} == {one.entry.label for one in rows}
    best = next(line for line in ax.lines if line.get_gid() == "kld-vs-size-front")
    values = [one.number.value for one in front(rows)]
    assert np.asarray(best.get_ydata()).tolist() == [y for y in values for _ in range(2)][:-1]  # a step
    low, high = ax.get_ylim()
    assert low < min(one.number.low or 1 for one in rows)
    assert high > max(one.number.high or 0 for one in rows)


def test_what_has_no_interval_is_hollow_and_said() -> None:
    fig = drawn("kld-vs-size", example())
    ground = style.THEMES["light"].ground
    points = [one for one in fig.axes[0].collections if isinstance(one, PathCollection)]
    assert all(fills_of(one)[0] == ground for one in points)
    assert any("hollow" in note for note in fig.notes)
    fig = drawn("ppl-vs-size", example())
    fills = [fills_of(one)[0] for one in fig.axes[0].collections if isinstance(one, PathCollection)]
    unknown = sum(one.number.interval() is None for one in example().shown("ppl"))
    assert fills.count(ground) == unknown == 6
    assert any("standard errors" in note for note in fig.notes)


def test_families_differ_by_marker_and_colour(gathered: Gathered) -> None:
    look = style.looks(example(), style.THEMES["light"])
    assert (
        len({colour for colour, _ in look.values()}) == len({marker for _, marker in look.values()}) == len(look) == 5
    )
    fig = drawn("kld-vs-size", gathered)
    (legend,) = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == ["APEX", "Unsloth"]


def contrast(a: str, b: str) -> float:
    """WCAG 2.1: contrast ratio of two colours."""

    def light(colour: str) -> float:
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", style.THEMES.values(), ids=lambda theme: theme.name)
def test_colours_can_be_read_on_their_ground(theme: style.Theme) -> None:
    assert contrast(theme.ink, theme.ground) > 7
    assert contrast(theme.quiet, theme.ground) > 4.5
    assert all(contrast(colour, theme.ground) >= 3 for colour in theme.families)
    colours = [theme.ground, theme.ink, theme.quiet, theme.grid, theme.band, *theme.families]
    assert len(set(colours)) == len(colours)  # each can be told from the others when a figure changes its theme


def test_colours_differ_for_the_colour_blind() -> None:
    # Viénot, Brettel and Mollon 1999, on linear RGB: protanopia and deuteranopia
    blind = [np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]]),
             np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])]  # fmt: skip
    for theme in style.THEMES.values():
        linear = np.array([[c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
                           for colour in theme.families[:3]])  # fmt: skip
        for matrix in blind:
            seen = np.clip(linear @ matrix.T, 0, 1) ** (1 / 2.2)
            assert min(np.abs(a - b).max() for a, b in itertools.combinations(seen, 2)) > 0.12


def test_a_figure_in_another_theme_is_as_if_drawn_in_it(gathered: Gathered) -> None:
    for name in ("kld-vs-size", "accuracy"):
        fig = drawn(name, gathered)
        style.png(fig)
        assert style.png(style.rethemed(fig, style.THEMES["dark"])) == style.png(drawn(name, gathered, "dark"))


def test_accuracy_has_the_references_line_and_wilson_intervals(gathered: Gathered) -> None:
    fig = drawn("accuracy", gathered)
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["HellaSwag", "MMLU"]
    assert gathered.reference is not None
    base = gathered.reference.number("hellaswag")
    assert base is not None
    ax = fig.axes[0]
    assert any(np.allclose(np.asarray(line.get_xdata(), float), 100 * base.value) for line in ax.lines)
    lines = [one for one in ax.collections if isinstance(one, LineCollection)]
    spans = {tuple(round(float(x), 6) for x in one.get_segments()[0][:, 0]) for one in lines}
    wanted = {one.entry.number("hellaswag") for one in gathered.shown("hellaswag")}
    assert spans == {(round(100 * (n.low or 0), 6), round(100 * (n.high or 0), 6)) for n in wanted if n is not None}
    widths = sorted(round(patch.get_width(), 9) for patch in ax.patches if patch.get_gid())  # type: ignore[attr-defined]
    assert widths == sorted(round(100 * one.number.value, 9) for one in gathered.shown("hellaswag"))


def test_rivals_at_equal_bytes(gathered: Gathered) -> None:
    found = rivals(gathered)
    theirs = sorted(
        (one.entry.bytes or 0, one.number.value) for one in gathered.shown("kld") if one.entry.family == "Unsloth"
    )
    sizes, klds = np.array(theirs, float).T
    assert {one.shown.entry.label for one in found} == {"Balanced", "Quality", "Compact"}  # Mini is below their range
    for one in found:
        expected = math.exp(np.interp(float(one.shown.entry.bytes or 0), sizes, np.log(klds)))
        assert one.rival == pytest.approx(expected)
        assert one.ratio == pytest.approx(one.shown.number.value / expected)
        assert one.low == pytest.approx(one.ratio * 0.9 / 1.1)
        assert one.high == pytest.approx(one.ratio * 1.1 / 0.9)
    fig = drawn("rivals", gathered)
    assert any("Mini" in note for note in fig.notes)


def test_rivals_with_an_unknown_interval_are_hollow() -> None:
    fig = drawn("rivals", example())
    ground = style.THEMES["light"].ground
    points = [line for line in fig.axes[0].lines if line.get_marker() not in ("None", None, "")]
    assert points
    assert all(line.get_markerfacecolor() == ground for line in points)


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 9)), min_size=1, max_size=12))
def test_front_is_what_nothing_beats(pairs: list[tuple[int, float]]) -> None:
    class Fake:
        def __init__(self, size: int, value: float) -> None:
            self.entry = type("E", (), {"bytes": size, "label": ""})
            self.number = type("N", (), {"value": value})

    rows = [Fake(*pair) for pair in pairs]
    found = {(one.entry.bytes, one.number.value) for one in front(rows)}  # type: ignore[arg-type]
    brute = {(s, v) for s, v in pairs if not any(t <= s and w <= v and (t, w) != (s, v) for t, w in pairs)}
    assert found == brute


def test_routers_by_layer(gathered: Gathered) -> None:
    fig = drawn("routers", gathered)
    ax = fig.axes[0]
    lines = {line.get_gid(): line for line in ax.lines if line.get_gid()}
    assert len(lines) == 6
    entry = gathered.by_label["Mini"]
    mark = next(mark for mark in fig.marks if mark.label == "Mini")
    assert np.asarray(lines[mark.gid].get_ydata()) == pytest.approx(
        [100 * row.changed.value for row in entry.routers()]
    )
    assert any(label.get_text() == "Mini  9.00 % [8.10, 9.90]" for label in fig.labels)


def test_what_is_said_of_intervals_is_drawn(tmp_path: Path) -> None:
    """Results of little text have neither intervals nor a 99.9 % KLD, and no word of either stands in the plots."""
    for name, kld in (("m-a", 0.1), ("m-b", 0.2)):
        found = metrics(kld)
        none = {"low": None, "high": None, "note": "too few"}
        found["kld"] |= {"mean": found["kld"]["mean"] | none, "p99_9": {"value": None, **none}}
        found["router"]["changed_interval"] |= none
        write(tmp_path, name, kld, 10**9, metrics=found)
    gathered = gather([tmp_path])
    routers = "\n".join(text.get_text() for text in drawn("routers", gathered).texts)
    assert "95 %" not in routers
    assert "no intervals are known" in routers
    fig = drawn("kld-distribution", gathered)
    (legend,) = fig.legends
    said = [text.get_text() for text in (*fig.texts, *legend.get_texts())]
    assert not [text for text in said if "99.9 %" in text or "one in a thousand" in text]
    assert {"median", "99 %", "largest"} <= set(said)


def test_bubbles_on_each_other_are_told_apart() -> None:
    """A line leads from the mark in the middle of each to its label, and crosses no other one's mark."""
    fig = drawn("bubbles", example())
    ax = fig.axes[0]
    ends = [line for line in (np.asarray(line.get_xydata()) for line in ax.lines) if len(line) == 2]
    points = {one.entry.label: (float(one.entry.bytes or 0), one.number.value) for one in example().shown("kld")}
    at = ax.transData.transform
    for label in ("Quality", "I-Quality", "Balanced", "I-Balanced"):
        centre = at(points[label])
        near = [line for line in ends if np.hypot(*(at(line[0]) - centre)) < 6]
        assert near, label
        (box,) = [text.get_window_extent(fig.renderer) for text in fig.labels if text.get_text() == label]
        tips = [at(line[1]) for line in near]
        assert any(box.x0 - 3 <= x <= box.x1 + 3 and box.y0 - 3 <= y <= box.y1 + 3 for x, y in tips), label


def test_precision_map(tmp_path: Path) -> None:
    whole = embedded_model()
    (tmp_path / "apex-tiny-moe.gguf").symlink_to(whole)
    model = ModelInfo(path="apex-tiny-moe.gguf", sha256="1" * 64, bytes=whole.stat().st_size, bpw=16.01)
    write(tmp_path, "a", 0.1, 1, model=model)
    gathered = gather([tmp_path])
    fig = drawn("precision", gathered)
    assert_nothing_overlaps(fig)
    entry = gathered.entries[0]
    assert entry.precision is not None
    cells = [cell for cell in entry.precision.cells if cell.role != "norm"]
    squares = fig.axes[0].collections[0]
    assert len(squares.get_paths()) == len(cells)
    assert fills_of(squares) == [colour_of(cell.bits) for cell in cells]
    bits = [1.6, 2.1, 2.6, 3.4, 4.5, 5.5, 6.6, 8.5]
    light = [contrast(colour_of(one), "#000000") for one in bits]
    assert light == sorted(light)


def test_nothing_is_drawn_of_what_was_not_measured(tmp_path: Path) -> None:
    write(tmp_path, "a", 0.1, 1000, metrics={"speed": metrics(1)["speed"]})
    gathered = gather([tmp_path])
    assert [name for name in PLOTS if PLOTS[name].draw(gathered) is not None] == []
    assert write_plots(gathered, tmp_path) == []


def test_one_file_alone_and_values_of_zero(tmp_path: Path) -> None:
    write(tmp_path, "m-Q8_0", 0.0, 1000)
    for name in PLOTS:
        fig = PLOTS[name].draw(gather([tmp_path]))
        if fig is not None:
            assert_nothing_overlaps(fig)


HOSTILE = ["$\\frac{1}{$", "a\nb\x00\x1b[31m", "\ud800\udfff", "漢字" * 40, "<svg onload=x>&\"'", "%s{0}", "-"]


def test_any_names_and_numbers(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for k, name in enumerate(HOSTILE):
        made = metrics({0: 1e300, 2: 1e-300, 4: -1.0}.get(k, 0.01 * (k + 1)))
        made["kld"]["by_domain"] = {one: {"mean": {"value": 0.1 * (k + 1)}} for one in HOSTILE}
        made["router"]["layers"] += [{"layer": 10**9, "changed": 0.5}, {"layer": "x"}, {"changed": None}]
        more: dict[str, Any] = {"family": name} if k % 2 else {}
        model = ModelInfo(path=name, sha256=f"{k:064d}", bytes=[1, 1 << 60][k] if k < 2 else 10**k, tier=name, **more)
        write(tmp_path, f"r{k}", 0.0, 1, model=model, metrics=made)
    gathered = gather([tmp_path])
    assert len(gathered.entries) == len(HOSTILE)
    written = write_plots(gathered, tmp_path, ["svg"], themes=["light"])
    assert len(written) > 8
    for path in written:
        if path.suffix == ".svg":
            ET.fromstring(path.read_text())
    for plot in PLOTS.values():
        fig = plot.draw(gathered)
        if fig is not None:
            assert_nothing_overlaps(fig)
    assert [str(one.message) for one in recwarn if "matplotlib" in str(one.filename)] == []


def test_labels_find_room_among_a_hundred(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for k in range(100):
        write(tmp_path, f"m-APEX-T{k}" if k % 2 else f"m-Q{k}", float(0.2 * np.exp(-k / 25) * rng.lognormal(0, 0.2)),
              int(1e10 + 2e8 * k))  # fmt: skip
    gathered = gather([tmp_path])
    fig = drawn("kld-vs-size", gathered)
    assert len(fig.labels) > 15
    assert any("labels are left out" in note for note in fig.notes)
    assert_nothing_overlaps(fig)
    assert_nothing_overlaps(drawn("kld-distribution", gathered))


def test_files_and_what_is_in_them(gathered: Gathered, tmp_path: Path) -> None:
    written = write_plots(gathered, tmp_path, names=["kld-vs-size", "rivals", "precision"])
    assert [path.name for path in written] == [
        "kld-vs-size.png", "kld-vs-size.svg", "kld-vs-size-dark.png", "kld-vs-size-dark.svg",
        "rivals.png", "rivals.svg", "rivals-dark.png", "rivals-dark.svg",
    ]  # fmt: skip
    with Image.open(tmp_path / "kld-vs-size.png") as image:
        assert image.size == (1800, 1120)  # 9 by 5.6 inches at 100, twice
        assert image.convert("RGB").getpixel((3, 3)) == (255, 255, 255)
    with Image.open(tmp_path / "kld-vs-size-dark.png") as image:
        assert image.convert("RGB").getpixel((3, 3)) == tuple(bytes.fromhex(style.THEMES["dark"].ground[1:]))
    for path in (tmp_path / "kld-vs-size.svg", tmp_path / "rivals-dark.svg"):
        text = path.read_text()
        root = ET.fromstring(text)
        assert root.tag.endswith("svg")
        assert "http" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
            "http://creativecommons.org", ""
        )
        titles = [node.text for node in root.iter("{http://www.w3.org/2000/svg}title")]
        assert sum(str(title).startswith(("Mini", "Quality", "Balanced")) for title in titles) >= 2
    again = write_plots(gathered, tmp_path / ".", names=["kld-vs-size"])
    before = {path.name: path.read_bytes() for path in written}
    assert all(path.read_bytes() == before[path.name] for path in again)
    for wrong in ({"formats": ["gif"]}, {"themes": ["blue"]}, {"names": ["kld-vs-siz"]}):
        with pytest.raises(UsageError):
            write_plots(gathered, tmp_path, **wrong)


@settings(max_examples=15)
@given(st.lists(st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)), min_size=1, max_size=35))
def test_labels_beside_any_points(points: list[tuple[float, float]]) -> None:
    theme = style.THEMES["light"]
    fig = style.figure("test", theme, "t", "s")
    ax = style.axes(fig, style.inches(fig, 0.8, 0.8, 0.4, 0.9))
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    wanted = [Wanted(f"file {k}", x, y, 4.0, theme.ink, k % 2) for k, (x, y) in enumerate(points)]
    left_out = place_labels(fig, ax, wanted)
    assert len(fig.labels) + len(left_out) == len(points)
    assert_nothing_overlaps(fig)
    at = ax.transData.transform(points)
    for label in fig.labels:
        box = label.get_window_extent(fig.renderer)
        inside = (at[:, 0] > box.x0) & (at[:, 0] < box.x1) & (at[:, 1] > box.y0) & (at[:, 1] < box.y1)
        assert not inside.any()


@given(st.lists(st.floats(0, 500), min_size=1, max_size=20), st.floats(1, 20))
def test_end_labels_are_pushed_apart(wanted: list[float], gap: float) -> None:
    places = apart(sorted(wanted, reverse=True), gap, 0, 500)
    assert all(a - b >= gap - 1e-6 for a, b in itertools.pairwise(places))
    if gap * (len(wanted) - 1) <= 500:
        assert places[-1] >= -1e-6
        assert places[0] <= 500 + 1e-6


@given(*[st.tuples(*[st.integers(0, 6)] * 4)] * 2)
def test_segments_through_boxes(line: tuple[int, ...], corners: tuple[int, ...]) -> None:
    x0, x1 = sorted(corners[:2])
    y0, y1 = sorted(corners[2:])
    t = np.linspace(0, 1, 2521)  # every crossing of these whole numbers is at a multiple of 1/2520, or between two
    xs, ys = line[0] + t * (line[2] - line[0]), line[1] + t * (line[3] - line[1])
    brute = bool(((xs > x0) & (xs < x1) & (ys > y0) & (ys < y1)).any())
    found = bool(crosses(np.array(line, float), np.array([[x0, y0, x1, y1]], float))[0])
    assert found == brute or (line[:2] == line[2:] and not brute) or (x0 == x1 or y0 == y1)
    box = np.array([x0, y0, x1, y1], float)
    assert overlaps(box, box[None, :])[0] == (x0 < x1 and y0 < y1)
