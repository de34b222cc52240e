"""The page's own charts: small SVGs drawn from the numbers, readable without scripts, in light and dark, on paper.

A mark is a group with a label that says its values (shown under the pointer and on focus) and traces of the numbers it
is drawn from. Families differ by shape and by colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from markupsafe import Markup

from apex_quant.report.formats import Traced

WIDTH: Final = 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 44
_LETTER, _LINE = 7.4, 15  # of a label, in units of the drawing: wide letters at the size narrow screens have
COLOURS: Final = 7
_LARGEST: Final = 1e15
_PLACES: Final = (
    (10, 4, "start"), (-10, 4, "end"), (8, -8, "start"), (8, 18, "start"), (-8, -8, "end"), (-8, 18, "end"),
    (0, -12, "middle"), (0, 22, "middle"), (8, -20, "start"), (-8, 30, "end"),
)  # fmt: skip
_Scale = Callable[[float], float]


@dataclass(frozen=True)
class Point:
    """A mark: `style` (colour and shape), position, interval of y, what it says, what it was drawn from."""

    label: str
    style: int
    x: float
    y: float
    low: float | None
    high: float | None
    says: str
    traces: tuple[Traced, ...] = ()


@dataclass(frozen=True)
class Axis:
    """`title` with its unit; `log` scale; fixed `ends` or those of the data."""

    title: str
    log: bool = False
    ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Row:
    """A row of a dot plot: marks from left to right with one line through them."""

    label: str
    points: tuple[Point, ...]


def shape(style: int, x: float, y: float, r: float = 5) -> Markup:
    """One of five outlines, so that colour is not needed to tell families apart."""
    outlines = (
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {2 * r + 1}h{-2 * r - 2}z",
        f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}z",
        f"M{x:.1f} {y + r + 1:.1f}l{r + 1} {-2 * r - 1}h{-2 * r - 2}z",
    )
    return Markup('<path d="{}"/>').format(outlines[style % len(outlines)])


def scatter(
    points: Sequence[Point], x: Axis, y: Axis, title: str, *, front: bool = True, line: float | None = None
) -> Markup:
    """Marks with vertical intervals; `front` joins those that nothing at most as far right lies below; `line` is a
    reference's y. Labels stand where there is room; the others are said by their marks."""
    height = 330
    points = [one for one in points if _drawable(one)]
    if not points:
        return Markup()
    bounds = [end for one in points for end in (one.y, one.low, one.high) if end is not None]
    bounds += [] if line is None else [line]
    to_x, x_ticks = _scale(x, [one.x for one in points], _LEFT, WIDTH - _RIGHT)
    to_y, y_ticks = _scale(y, bounds, height - _BOTTOM, _TOP)
    parts = [_grid(x_ticks, y_ticks, to_x, to_y, height), _titles(x.title, y.title, height)]
    if line is not None:
        parts.append(Markup('<path class="ref" d="M{} {}H{}"/>').format(_LEFT, f"{to_y(line):.1f}", WIDTH - _RIGHT))
    taken = [(to_x(one.x) - 6, to_y(one.y) - 6, to_x(one.x) + 6, to_y(one.y) + 6) for one in points]
    if front:
        steps = _front(points, to_x, to_y)
        parts.append(_path(steps))
        taken += _along(steps)
    if line is not None:
        taken.append((_LEFT, to_y(line) - 1, WIDTH, to_y(line) + 1))
    taken += [
        (to_x(one.x) - 3, to_y(one.high), to_x(one.x) + 3, to_y(one.low))
        for one in points
        if one.low is not None and one.high is not None
    ]
    labels = []
    for one in points:
        px, py = to_x(one.x), to_y(one.y)
        bar = _bar(px, to_y(one.low), px, to_y(one.high)) if one.low is not None and one.high is not None else Markup()
        parts.append(_mark(one, px, py, bar))
        labels.append(_label(one.label, px, py, taken, height))
    return _svg(title, height, [*parts, *labels])


def ranges(rows: Sequence[Row], x: Axis, title: str, *, line: float | None = None) -> Markup:
    """Rows of marks with horizontal intervals (`low`, `high` of each point are in x)."""
    rows = _drawable_rows(rows)
    if not rows:
        return Markup()
    height = _TOP + _BOTTOM + 22 * len(rows)
    left = min(190.0, 16 + _LETTER * max(len(row.label) for row in rows))
    every = [point for row in rows for point in row.points]
    bounds = [end for one in every for end in (one.x, one.low, one.high) if end is not None]
    to_x, ticks = _scale(x, bounds + ([] if line is None else [line]), left, WIDTH - _RIGHT)
    parts = [_grid(ticks, (), to_x, to_x, height, left), _titles(x.title, "", height, left)]
    if line is not None:
        parts.append(Markup('<path class="ref" d="M{0} {1}V{2}"/>').format(f"{to_x(line):.1f}", _TOP, height - _BOTTOM))
    for number, row in enumerate(rows):
        y = _TOP + 22 * number + 11
        label = row.label if len(row.label) * _LETTER < left else row.label[: int(left / _LETTER) - 1] + "…"
        parts.append(Markup('<text x="4" y="{}">{}</text>').format(y + 4, label))
        ends = [to_x(one.x) for one in row.points]
        if len(ends) > 1:
            path = Markup('<path class="grid" d="M{} {}H{}"/>')
            parts.append(path.format(f"{min(ends):.1f}", y, f"{max(ends):.1f}"))
        for one in row.points:
            bar = Markup()
            if one.low is not None and one.high is not None:
                bar = _bar(to_x(one.low), y, to_x(one.high), y)
            parts.append(_mark(one, to_x(one.x), y, bar))
    return _svg(title, height, parts)


def lines(rows: Sequence[Row], x: Axis, y: Axis, title: str) -> Markup:
    """One line for each row, with a mark for each point."""
    height = 330
    rows = _drawable_rows(rows)
    if not rows:
        return Markup()
    every = [point for row in rows for point in row.points]
    to_x, x_ticks = _scale(x, [one.x for one in every], _LEFT, WIDTH - _RIGHT)
    to_y, y_ticks = _scale(y, [one.y for one in every], height - _BOTTOM, _TOP)
    parts = [_grid(x_ticks, y_ticks, to_x, to_y, height), _titles(x.title, y.title, height)]
    for row in rows:
        where = "L".join(f"{to_x(one.x):.1f} {to_y(one.y):.1f}" for one in row.points)
        style = row.points[0].style % COLOURS if row.points else 0
        parts.append(Markup('<path class="c{}" fill-opacity="0" stroke-width="1.5" d="M{}"/>').format(style, where))
        parts += [_mark(one, to_x(one.x), to_y(one.y), Markup(), 3) for one in row.points]
    return _svg(title, height, parts)


def _drawable(one: Point) -> bool:
    """Results may state any number; beyond this none is one of ours, and the page's arithmetic would overflow."""
    return all(end is None or abs(end) <= _LARGEST for end in (one.x, one.y, one.low, one.high))


def _drawable_rows(rows: Sequence[Row]) -> list[Row]:
    kept = [Row(row.label, tuple(filter(_drawable, row.points))) for row in rows]
    return [row for row in kept if row.points]


def _svg(title: str, height: int, parts: Iterable[Markup]) -> Markup:
    head = Markup('<svg class="chart" role="group" aria-label="{}" viewBox="0 0 {} {}">')
    return head.format(title, WIDTH, height) + Markup("").join(parts) + Markup("</svg>")


def _mark(one: Point, x: float, y: float, bar: Markup, r: float = 5) -> Markup:
    traces = " ".join(traced.trace for traced in one.traces)
    values = " ".join(repr(traced.value) for traced in one.traces)
    group = Markup(
        '<g class="mark c{}" role="img" aria-label="{}" data-traces="{}" data-values="{}"><title>{}</title>{}{}'
        '<circle class="halo" cx="{}" cy="{}" r="10"/></g>'
    )
    return group.format(
        one.style % COLOURS, one.says, traces, values, one.says, bar, shape(one.style, x, y, r), f"{x:.1f}", f"{y:.1f}"
    )


def _bar(x0: float, y0: float, x1: float, y1: float) -> Markup:
    """An interval with its ends."""
    cap = "m-3 0h6" if x0 == x1 else "m0 -3v6"
    path = f"M{x0:.1f} {y0:.1f}{cap}M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}{cap}"
    return Markup('<path class="bar" d="{}"/>').format(path)


def _front(points: Sequence[Point], to_x: _Scale, to_y: _Scale) -> list[tuple[float, float]]:
    """Corners of a step line through those with the lowest y so far, from left to right."""
    best, steps = math.inf, list[tuple[float, float]]()
    for one in sorted(points, key=lambda one: (one.x, one.y)):
        if one.y < best:
            best = one.y
            x, y = to_x(one.x), to_y(one.y)
            steps += [(x, steps[-1][1])] if steps else []
            steps.append((x, y))
    return steps


def _path(steps: Sequence[tuple[float, float]]) -> Markup:
    where = "L".join(f"{x:.1f} {y:.1f}" for x, y in steps)
    return Markup('<path class="front" d="M{}"/>').format(where) if len(steps) > 1 else Markup()


def _along(steps: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """What the line covers, which labels keep away from."""
    return [
        (min(a[0], b[0]) - 1, min(a[1], b[1]) - 1, max(a[0], b[0]) + 1, max(a[1], b[1]) + 1) for a, b in pairwise(steps)
    ]


def _label(text: str, x: float, y: float, taken: list[tuple[float, float, float, float]], height: int) -> Markup:
    """The text beside its mark, where it covers nothing and stays inside; nothing where there is no such place."""
    width = _LETTER * len(text)
    for dx, dy, anchor in _PLACES:
        left = x + dx - {"start": 0, "end": width, "middle": width / 2}[anchor]
        box = (left, y + dy - _LINE + 3, left + width, y + dy + 3)
        inside = box[0] > _LEFT and box[2] < WIDTH and box[1] > 0 and box[3] < height - _BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            made = Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>')
            return made.format(f"{x + dx:.1f}", f"{y + dy:.1f}", anchor, text)
    return Markup()


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _grid(
    x_ticks: Sequence[float], y_ticks: Sequence[float], to_x: _Scale, to_y: _Scale, height: int, left: float = _LEFT
) -> Markup:
    bottom = height - _BOTTOM
    parts = []
    for tick in x_ticks:
        made = Markup(
            '<path class="grid" d="M{0} {1}V{2}"/><text class="tick" x="{0}" y="{3}" text-anchor="middle">{4}</text>'
        )
        parts.append(made.format(f"{to_x(tick):.1f}", _TOP, bottom, bottom + 16, f"{tick:.4g}"))
    for tick in y_ticks:
        made = Markup(
            '<path class="grid" d="M{0} {1}H{2}"/><text class="tick" x="{3}" y="{4}" text-anchor="end">{5}</text>'
        )
        y = to_y(tick)
        parts.append(made.format(left, f"{y:.1f}", WIDTH - _RIGHT, left - 5, f"{y + 4:.1f}", f"{tick:.4g}"))
    return Markup("").join(parts)


def _titles(x: str, y: str, height: int, left: float = _LEFT) -> Markup:
    made = Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format((left + WIDTH) / 2, height - 8, x)
    if y:
        middle = (height - _BOTTOM + _TOP) / 2
        turned = Markup('<text transform="translate(13 {}) rotate(-90)" text-anchor="middle">{}</text>')
        made += turned.format(middle, y)
    return made


def _scale(axis: Axis, values: Sequence[float], start: float, end: float) -> tuple[_Scale, list[float]]:
    """From values to places, and where ticks stand."""
    log = axis.log and all(value > 0 for value in values)
    low, high = axis.ends or (min(values), max(values))
    change: _Scale = math.log10 if log else float
    a, b = change(low), change(high)
    room = 0.06 * (b - a) or 0.05 * abs(a) or 0.5
    if axis.ends is None:
        a, b = a - room, b + room
    span = b - a or 1.0

    def place(value: float) -> float:
        return start + (change(value) - a) / span * (end - start)

    return place, _log_ticks(a, b) if log else _ticks(a, b)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    raw = (high - low) / 5
    step = 10.0 ** math.floor(math.log10(raw))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if factor * step >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade, or decades where there are many; a linear choice within less than a third of one."""
    factors = (1,) if high - low > 3 else (1, 2, 5)
    found = [
        factor * 10.0**decade
        for decade in range(math.floor(low), math.ceil(high) + 1)
        for factor in factors
        if low <= math.log10(factor) + decade <= high
    ]
    found = found if len(found) > 1 else _ticks(10**low, 10**high)
    return [float(f"{tick:.6g}") for tick in found]
