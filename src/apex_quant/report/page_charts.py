"""The page's own charts: small SVGs drawn from the numbers, readable without scripts, in light and dark, on paper.

A mark is a group with a label that says its values (shown under the pointer and on focus) and traces of the numbers it
is drawn from. Families differ by shape and by colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

from markupsafe import Markup

from apex_quant.report.formats import Traced

WIDTH: Final = 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 44
_LETTER, _LINE = 7.4, 15  # of a label, in units of the drawing: wide letters at the size narrow screens have
COLOURS: Final = 7
_LARGEST: Final = 1e15
_PLACES: Final = (
    (10, 4, "start"), (-10, 4, "end"), (8, -8, "start"), (8, 18, "start"), (-8, -8, "end"), (-8, 18, "end"),
    (0, -12, "middle"), (0, 22, "middle"),
)  # fmt: skip
_PAD: Final = 4.0  # at both sides of a name
_FAR: Final = (24, 36, 52, 72, 96, 124)  # distances at which a line leads from the mark to its label
_ANGLES: Final = tuple(
    math.radians(angle) for angle in (0, 180, 45, 315, 135, 225, 90, 270, 22, 338, 158, 202, 68, 292, 112, 248)
)
_Scale = Callable[[float], float]
_Box = tuple[float, float, float, float]  # x0, y0, x1, y1; of a line its two ends


@dataclass(frozen=True)
class Point:
    """A mark: `style` (colour and shape), position, interval of y, what it says, what it was drawn from. `outline`: a
    shape of OUTLINES other than its style's."""

    label: str
    style: int
    x: float
    y: float
    low: float | None
    high: float | None
    says: str
    traces: tuple[Traced, ...] = ()
    outline: str | None = None


class Drawn(NamedTuple):
    """A chart, and how many of its marks have no name beside them for want of room."""

    svg: Markup
    unnamed: int


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


def _bar_shape(x: float, y: float, high: float) -> str:
    return f"M{x - 1:.1f} {y - high:.1f}h2v{2 * high}h-2z"


OUTLINES: Final[dict[str, Callable[[float, float, float], str]]] = {
    "circle": lambda x, y, r: f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
    "square": lambda x, y, r: f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
    "up": lambda x, y, r: f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {2 * r + 1}h{-2 * r - 2}z",
    "diamond": lambda x, y, r: f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}z",
    "down": lambda x, y, r: f"M{x:.1f} {y + r + 1:.1f}l{r + 1} {-2 * r - 1}h{-2 * r - 2}z",
    "tall": lambda x, y, r: _bar_shape(x, y, r + 2),
    "short": lambda x, y, r: _bar_shape(x, y, r - 2),
    "thin": lambda x, y, r: f"M{x:.1f} {y - r - 1:.1f}l{r - 2} {r + 1}l{2 - r} {r + 1}l{2 - r} {-r - 1}z",
    "cross": lambda x, y, r: (
        f"M{x - r + 1:.1f} {y - r + 1:.1f}l{2 * r - 2} {2 * r - 2}m0 {2 - 2 * r}l{2 - 2 * r} {2 * r - 2}"
    ),
}
"""Paths of marks around x, y of about this radius."""
_OF_FAMILIES: Final = ("circle", "square", "up", "diamond", "down")


def outlined(name: str, x: float, y: float, r: float = 5) -> Markup:
    """One of OUTLINES."""
    wide = Markup(' stroke-width="2"') if name == "cross" else Markup()
    return Markup('<path d="{}"{}/>').format(OUTLINES[name](x, y, r), wide)


def shape(style: int, x: float, y: float, r: float = 5) -> Markup:
    """One of five outlines, so that colour is not needed to tell families apart."""
    return outlined(_OF_FAMILIES[style % len(_OF_FAMILIES)], x, y, r)


def mark_of(style: int | str) -> Markup:
    """What a legend shows: the mark of a style in its colour, or one of OUTLINES in none."""
    if isinstance(style, str):
        return Markup('<g class="any">{}</g>').format(outlined(style, 8, 8))
    return Markup('<g class="c{}">{}</g>').format(style % COLOURS, shape(style, 8, 8))


def scatter(
    points: Sequence[Point], x: Axis, y: Axis, title: str, *, front: bool = True, line: float | None = None
) -> Drawn:
    """Marks with vertical intervals; `front` joins those that nothing at most as far right lies below; `line` is a
    reference's y. Labels stand where there is room, with lines to marks that are not near."""
    height = 330
    points = [one for one in points if _drawable(one)]
    if not points:
        return Drawn(Markup(), 0)
    bounds = [end for one in points for end in (one.y, one.low, one.high) if end is not None]
    bounds += [] if line is None else [line]
    to_x, x_ticks = _scale(x, [one.x for one in points], _LEFT, WIDTH - _RIGHT)
    to_y, y_ticks = _scale(y, bounds, height - _BOTTOM, _TOP)
    parts = [_grid(x_ticks, y_ticks, to_x, to_y, height), _titles(x.title, y.title, height)]
    if line is not None:
        parts.append(Markup('<path class="ref" d="M{} {}H{}"/>').format(_LEFT, f"{to_y(line):.1f}", WIDTH - _RIGHT))
    marks = [(to_x(one.x) - 6, to_y(one.y) - 6, to_x(one.x) + 6, to_y(one.y) + 6) for one in points]
    taken = []
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
    room = _Room(height, marks, taken)
    for one in points:
        px, py = to_x(one.x), to_y(one.y)
        bar = _bar(px, to_y(one.low), px, to_y(one.high)) if one.low is not None and one.high is not None else Markup()
        parts.append(_mark(one, px, py, bar))
    near = [room.near(one.label, to_x(one.x), to_y(one.y)) for one in points]
    late = [one for one, made in zip(points, near, strict=True) if made is None]
    far = [room.far(one.label, to_x(one.x), to_y(one.y)) for one in late]
    labels = [made for made in (*near, *far) if made is not None]
    return Drawn(_svg(title, height, [*parts, *labels]), far.count(None))


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
        one.style % COLOURS, one.says, traces, values, one.says, bar,
        shape(one.style, x, y, r) if one.outline is None else outlined(one.outline, x, y, r), f"{x:.1f}", f"{y:.1f}",
    )  # fmt: skip


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


def _along(steps: Sequence[tuple[float, float]]) -> list[_Box]:
    """What the line covers, which labels keep away from."""
    return [
        (min(a[0], b[0]) - 1, min(a[1], b[1]) - 1, max(a[0], b[0]) + 1, max(a[1], b[1]) + 1) for a, b in pairwise(steps)
    ]


class _Room:
    """Where names may stand: not on `marks`, on what else was drawn, on each other or on each other's lines."""

    def __init__(self, height: int, marks: Sequence[_Box], drawn: Sequence[_Box]) -> None:
        self.inside = (float(_LEFT), 0.0, float(WIDTH), float(height - _BOTTOM))
        self.marks, self.drawn = marks, drawn
        self.names: list[_Box] = []
        self.lines: list[_Box] = []

    def near(self, text: str, x: float, y: float) -> Markup | None:
        """The name beside its mark; None where there is no room."""
        width = _LETTER * len(text)
        for dx, dy, anchor in _PLACES:
            left = x + dx - {"start": 0, "end": width, "middle": width / 2}[anchor]
            box = (left, y + dy - _LINE + 3, left + width, y + dy + 3)
            if self._free(box, self.drawn) and not self._nearer(box, x, y):
                self.names.append(box)
                return _text(text, x + dx, y + dy, anchor)
        return None

    def far(self, text: str, x: float, y: float) -> Markup | None:
        """The name further away, with a line that crosses no other mark or name; None where there is no room. On what
        else was drawn it may stand, before it is left out."""
        for drawn in (self.drawn, ()):
            for box in _around(_LETTER * len(text), x, y):
                lead = _lead(x, y, box)
                others = (*self.names, *(one for one in self.marks if not _overlap(one, (x - 1, y - 1, x + 1, y + 1))))
                if self._free(box, drawn) and not any(_crosses(lead, other) for other in others):
                    self.names.append(box)
                    self.lines.append(lead)
                    path = Markup('<path class="lead" d="M{} {}L{} {}"/>').format(*(f"{end:.1f}" for end in lead))
                    return path + _text(text, box[0], box[3] - 3, "start")
        return None

    def _nearer(self, box: _Box, x: float, y: float) -> bool:
        """Whether another mark is nearer to the name, which would be taken for that one's."""
        others = [_gap((a + c) / 2, (b + d) / 2, box) for a, b, c, d in self.marks]
        return sum(gap <= _gap(x, y, box) + 0.5 for gap in others) > 1

    def _free(self, box: _Box, drawn: Sequence[_Box]) -> bool:
        x0, y0, x1, y1 = self.inside
        if box[0] <= x0 or box[1] <= y0 or box[2] >= x1 or box[3] >= y1:
            return False
        box = (box[0] - _PAD, box[1], box[2] + _PAD, box[3])
        taken = (*self.marks, *drawn, *self.names)
        return not any(_overlap(box, one) for one in taken) and not any(_crosses(one, box) for one in self.lines)


def _around(width: float, x: float, y: float) -> Iterator[_Box]:
    """Places for a name, nearest first: the side that faces the mark is so far away."""
    for distance in _FAR:
        for angle in _ANGLES:
            dx, dy = math.cos(angle), -math.sin(angle)
            left, top = x + dx * distance - width * (1 - dx) / 2, y + dy * distance - _LINE * (1 - dy) / 2
            yield left, top, left + width, top + _LINE


def _lead(x: float, y: float, box: _Box) -> _Box:
    """From the edge of a mark to the nearest place of a box."""
    to_x, to_y = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
    way = math.hypot(to_x - x, to_y - y) or 1.0
    return x + 6 * (to_x - x) / way, y + 6 * (to_y - y) / way, to_x, to_y


def _gap(x: float, y: float, box: _Box) -> float:
    return math.hypot(min(max(x, box[0]), box[2]) - x, min(max(y, box[1]), box[3]) - y)


def _crosses(line: _Box, box: _Box) -> bool:
    """Whether a segment passes through a box (Liang and Barsky 1984)."""
    low, high = 0.0, 1.0
    for start, end, least, most in ((line[0], line[2], box[0], box[2]), (line[1], line[3], box[1], box[3])):
        way = end - start
        if way == 0:
            if not least < start < most:
                return False
            continue
        a, b = sorted(((least - start) / way, (most - start) / way))
        low, high = max(low, a), min(high, b)
    return low < high


def _text(text: str, x: float, y: float, anchor: str) -> Markup:
    made = Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>')
    return made.format(f"{x:.1f}", f"{y:.1f}", anchor, text)


def _overlap(a: _Box, b: _Box) -> bool:
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
