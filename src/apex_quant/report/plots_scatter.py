"""Plots of two quantities of each file: quality over size, quality over speed, and both at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D

from apex_quant.report.comparable import Shown
from apex_quant.report.entry import Entry
from apex_quant.report.gather import Gathered
from apex_quant.report.pareto import front
from apex_quant.report.placing import Wanted, place_labels
from apex_quant.report.quantities import QUANTITIES, Number, gigabytes, shown
from apex_quant.report.style import DPI, PlotFigure, Theme, axes, figure, footnote, inches, log_ticks, looks, plain

_SIZE: Final = 7.0  # points across a marker
_CORE: Final = 4.5  # points across the mark in the middle of a bubble
_MANY: Final = 60  # points up to which each can be pointed at


class Point(NamedTuple):
    """A file at x (bytes or tokens/s) with its number on the y axis; `across`: the interval of x."""

    entry: Entry
    x: float
    number: Number
    verified: bool
    across: tuple[float, float] | None = None


def plot_kld_vs_size(gathered: Gathered, theme: Theme) -> PlotFigure | None:
    """Mean KLD over size, with the Pareto front."""
    return _over_size(gathered, theme, "kld-vs-size", "kld", "Divergence over size", front_line=True)


def plot_tail_vs_size(gathered: Gathered, theme: Theme) -> PlotFigure | None:
    """99.9 % KLD over size: the worst token in a thousand."""
    return _over_size(gathered, theme, "tail-vs-size", "kld_p99_9", "The worst token in a thousand, over size",
                      front_line=True)  # fmt: skip


def plot_ppl_vs_size(gathered: Gathered, theme: Theme) -> PlotFigure | None:
    """Perplexity over size, with the reference's as a line and its interval as a band."""
    return _over_size(gathered, theme, "ppl-vs-size", "ppl", "Perplexity over size", front_line=False)


def plot_kld_vs_speed(gathered: Gathered, theme: Theme) -> PlotFigure | None:
    """Mean KLD over generation speed."""
    return _over_speed(gathered, theme, "kld-vs-speed", "kld", "Divergence over speed")


def plot_ppl_vs_speed(gathered: Gathered, theme: Theme) -> PlotFigure | None:
    """Perplexity over generation speed."""
    return _over_speed(gathered, theme, "ppl-vs-speed", "ppl", "Perplexity over speed")


def plot_bubbles(gathered: Gathered, theme: Theme) -> PlotFigure | None:
    """Mean KLD (perplexity where there is none) over size; the area of a bubble is the generation speed."""
    key = "kld" if gathered.shown("kld") else "ppl"
    speeds = {one.entry.label: one for one in gathered.shown("tg")}
    points = [point for point in _points(gathered, key, _bytes) if point.entry.label in speeds]
    if len(points) < 2:
        return None
    fastest = max(speeds[point.entry.label].number.value for point in points)
    title = QUANTITIES[key].title
    subtitle = f"{title} over size; the area of a bubble is its speed. Lower left is better, larger is faster"
    fig = figure("bubbles", theme, "Size, quality and speed", subtitle)
    ax = axes(fig, inches(fig, 0.85, 0.98, 1.3, _top(points)))
    sizes = {
        point.entry.label: 30 * float(np.sqrt(speeds[point.entry.label].number.value / fastest)) for point in points
    }
    _limits(fig, ax, points, key, gigabytes_of, "size", extra=0.1)
    test = speeds[points[0].entry.label].number.test or "tg"
    _draw(fig, ax, gathered, points, key, lambda point: (
        f"{gigabytes(int(point.x))}, {shown('tg', speeds[point.entry.label].number.value)} tokens/s ({test})"),
        bubble=lambda point: sizes[point.entry.label])  # fmt: skip
    _scale_of_bubbles(fig, fastest, test)
    _finish(fig, ax, gathered, points, key)
    return fig


def _scale_of_bubbles(fig: PlotFigure, fastest: float, test: str) -> None:
    """Three sizes with their speeds, at the right."""
    width, height = fig.get_size_inches()
    ax = fig.add_axes((1 - 1.2 / width, 1 - 3.2 / height, 1.15 / width, 2.2 / height))
    ax.set_axis_off()
    ax.set_xlim(0, 1.15)
    ax.set_ylim(0, 2.2)
    ax.text(0.05, 2.05, f"tokens/s, {test}", fontsize=8.5, color=fig.theme.quiet, va="center")
    for place, part in enumerate((1.0, 0.5, 0.25)):
        y = 1.65 - 0.5 * place
        ax.plot([0.27], [y], "o", markersize=30 * part**0.5, color=fig.theme.quiet, alpha=0.45, markeredgewidth=0)
        ax.text(0.56, y, shown("tg", fastest * part), fontsize=8.5, color=fig.theme.ink, va="center")


def _over_size(
    gathered: Gathered, theme: Theme, name: str, key: str, title: str, *, front_line: bool
) -> PlotFigure | None:
    points = _points(gathered, key, _bytes)
    reference = gathered.reference
    if not points or (len(points) == 1 and points[0].entry is reference):
        return None
    whole = next((point for point in points if point.entry is reference), None)
    others = [point for point in points if point is not whole]
    apart = whole is not None and bool(others) and whole.x > 1.5 * max(point.x for point in others)
    on_axis = others if apart else points  # a reference of twice the size would squeeze the rest
    quantity = QUANTITIES[key]
    fig = figure(name, theme, title, f"{quantity.axis} over the size of the file. Lower left is better")
    ax = axes(fig, inches(fig, 0.85, 0.98, 0.45, _top(on_axis)))
    _limits(fig, ax, on_axis, key, gigabytes_of, "size", level=whole)
    if whole is not None:
        _reference_line(ax, fig, whole.number, key, whole.entry.label)
    rows = [one for one in gathered.shown(key) if any(point.entry is one.entry for point in on_axis)]
    lines: list[list[float]] = []
    if whole is not None:
        y = ax.transData.transform((on_axis[0].x, whole.number.value))[1]
        lines.append([0.0, y, float(fig.bbox.x1), y])
    if front_line:
        best = front(rows)
        if len(best) > 1:
            # a step, for between two files nothing of lower value can be had
            xs = np.repeat([float(one.entry.bytes or 0) for one in best], 2)[1:]
            ys = np.repeat([one.number.value for one in best], 2)[:-1]
            ax.plot(xs, ys, color=theme.quiet, linewidth=1.1, linestyle=(0, (5, 3)), zorder=1.5, gid=f"{name}-front")
            fig.notes.append("dashed: the Pareto front of the values")
            pixels = ax.transData.transform(np.column_stack([xs, ys]))
            lines += np.hstack([pixels[:-1], pixels[1:]]).tolist()
    _draw(fig, ax, gathered, on_axis, key, lambda point: gigabytes(int(point.x)), lines=lines)
    _finish(fig, ax, gathered, on_axis, key)
    return fig


def _over_speed(gathered: Gathered, theme: Theme, name: str, key: str, title: str) -> PlotFigure | None:
    speeds = {one.entry.label: one.number for one in gathered.shown("tg")}
    points = []
    for one in gathered.shown(key):
        speed = speeds.get(one.entry.label)
        if speed is not None:
            found = speed.interval()
            across = found[:2] if found is not None else None
            points.append(Point(one.entry, speed.value, one.number, one.verified, across))
    if len([point for point in points if not point.entry.is_reference]) < 2:
        return None
    test = next(iter(speeds.values())).test or "tg"
    quantity = QUANTITIES[key]
    fig = figure(name, theme, title, f"{quantity.axis} over tokens per second ({test}). Lower right is better")
    ax = axes(fig, inches(fig, 0.85, 0.98, 0.45, _top(points)))
    _limits(fig, ax, points, key, plain, f"generation speed ({test}, tokens/s)")
    if any(point.across for point in points):
        fig.notes.append("speeds with one standard deviation of the repetitions")
    _draw(fig, ax, gathered, points, key, lambda point: f"{shown('tg', point.x)} tokens/s")
    _finish(fig, ax, gathered, points, key)
    return fig


def _bytes(one: Shown) -> float | None:
    return one.entry.bytes


def gigabytes_of(size: float) -> str:
    """A tick of a size axis."""
    return gigabytes(round(size)).replace(".0 ", " ")


def _points(gathered: Gathered, key: str, x: Callable[[Shown], float | None]) -> list[Point]:
    found = [(one, x(one)) for one in gathered.shown(key)]
    return [Point(one.entry, float(at), one.number, one.verified) for one, at in found if at and one.number.value > 0]


def _top(points: Sequence[Point]) -> float:
    """The margin above the axes in inches: with room for the legend of families where there are several."""
    return 1.12 if len({point.entry.family for point in points}) > 1 else 0.85


def _limits(
    fig: PlotFigure, ax: Axes, points: Sequence[Point], key: str, show: Callable[[float], str], name: str,
    *, level: Point | None = None, extra: float = 0.0,
) -> None:  # fmt: skip
    """Both axes logarithmic, with room around what is drawn, intervals included."""
    xs = [end for point in points for end in (point.x, *(point.across or ()))]
    drawn = [point.number for point in points] + ([level.number] if level is not None else [])
    spans = [number.interval() for number in drawn]
    ys = [number.value for number in drawn] + [end for span in spans if span is not None for end in span[:2]]
    floor = min(number.value for number in drawn) / 20  # an interval that reaches zero ends at the axis
    ys = [max(y, floor) for y in ys]
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    dx, dy = (0.06 + extra) * np.log(max(x_high / x_low, 1.15)), (0.07 + extra) * np.log(max(y_high / y_low, 1.05))
    area = ax.get_window_extent(fig.renderer)
    width, height = area.width / DPI, area.height / DPI
    log_ticks(ax, "x", x_low * np.exp(-dx), x_high * np.exp(1.4 * dx), show, most=int(width / 0.8))
    log_ticks(ax, "y", y_low * np.exp(-dy), y_high * np.exp(dy), plain, most=int(height / 0.38))
    ax.set_autoscale_on(False)
    ax.set_xlabel(name, fontsize=9.5, color=fig.theme.ink)
    ax.set_ylabel(QUANTITIES[key].axis, fontsize=9.5, color=fig.theme.ink)


def _reference_line(ax: Axes, fig: PlotFigure, number: Number, key: str, label: str) -> None:
    found = number.interval()
    if found is not None:
        ax.axhspan(found[0], found[1], color=fig.theme.band, zorder=0.5, linewidth=0)
    line = ax.axhline(number.value, color=fig.theme.quiet, linewidth=1.0, zorder=1, gid="")
    line.set_gid(fig.mark(f"{label}: {QUANTITIES[key].title} {shown(key, number.value)} (reference)", label))
    fig.notes.append(f"line: {label}, the reference" + (", with its interval" if found is not None else ""))


def _draw(
    fig: PlotFigure, ax: Axes, gathered: Gathered, points: Sequence[Point], key: str, about: Callable[[Point], str],
    *, lines: Sequence[Sequence[float]] = (), bubble: Callable[[Point], float] | None = None,
) -> None:  # fmt: skip
    """Intervals, markers and labels, `bubble` points across around the markers. Hollow markers: how sure the value is
    is not known."""
    look = looks(gathered, fig.theme)
    segments, colours = [], []
    groups: dict[tuple[str, str, bool], list[tuple[Point, float]]] = {}
    obstacles: list[list[float]] = []
    best = {id(one.entry) for one in front([Shown(p.entry, p.number, True) for p in points])}
    wanted = []
    bottom = ax.get_ylim()[0]
    size = _SIZE
    core = None if bubble is None else _CORE / 2 + 1
    for point in points:
        colour, marker = look[point.entry.family]
        found = point.number.interval()
        spans = [((point.x, max(found[0], bottom)), (point.x, found[1]))] if found is not None else []
        if point.across is not None:
            spans.append(((point.across[0], point.number.value), (point.across[1], point.number.value)))
        segments += spans
        colours += [colour] * len(spans)
        obstacles += [_box(ax, span) for span in spans]
        reach = size if bubble is None else bubble(point)
        groups.setdefault((colour, marker, found is not None), []).append((point, reach))
        wanted.append(Wanted(point.entry.label, point.x, point.number.value, reach / 2 + 1, colour,
                             0 if id(point.entry) in best else 1, core))  # fmt: skip
    ax.add_collection(LineCollection(segments, colors=colours, linewidths=1.3, zorder=3, capstyle="round"),
                      autolim=False)  # fmt: skip
    for (colour, marker, sure), members in groups.items():
        said = [fig.mark(_said(point, key, about(point)), point.entry.label) for point, _ in members]
        _markers(fig, ax, members, said, colour, marker, sure, bubble is not None)
    left_out = place_labels(fig, ax, wanted, obstacles, lines)
    if left_out:
        fig.notes.append(f"{len(left_out)} of {len(points)} labels are left out here; the page names every point")


def _markers(
    fig: PlotFigure, ax: Axes, members: Sequence[tuple[Point, float]], gids: Sequence[str], colour: str, marker: str,
    sure: bool, bubbles: bool,
) -> None:  # fmt: skip
    """Points that look alike: each for itself, so that it can be pointed at, or in one piece where there are many."""
    alone = len(fig.marks) <= _MANY
    parts = [[k] for k in range(len(members))] if alone else [list(range(len(members)))]
    for part in parts:
        at = np.array([(members[k][0].x, members[k][0].number.value) for k in part])
        made = []
        if bubbles:
            areas = [members[k][1] ** 2 for k in part]
            made.append(ax.scatter(at[:, 0], at[:, 1], s=areas, c=colour, alpha=0.25, linewidths=0.8, zorder=2))
        area = (_CORE if bubbles or not alone else _SIZE) ** 2 * (2.2 if marker == "*" else 1.0)
        made.append(ax.scatter(at[:, 0], at[:, 1], s=area, marker=marker, linewidths=1.4, edgecolors=colour, zorder=4,
                               c=colour if sure else fig.theme.ground))  # fmt: skip
        made[0].set_gid(gids[part[0]] if alone else None)


def _box(ax: Axes, span: tuple[tuple[float, float], tuple[float, float]]) -> list[float]:
    """The pixels of an interval's line."""
    (x0, y0), (x1, y1) = ax.transData.transform(span)
    return [min(x0, x1) - 1.5, min(y0, y1) - 1.5, max(x0, x1) + 1.5, max(y0, y1) + 1.5]


def _said(point: Point, key: str, about: str) -> str:
    found = point.number.interval()
    value = f"{QUANTITIES[key].title} {shown(key, point.number.value)}"
    if found is not None:
        value += f" [{shown(key, found[0])}, {shown(key, found[1])}]"
    return f"{point.entry.label} ({point.entry.family}): {value}, {about}"


def _finish(fig: PlotFigure, ax: Axes, gathered: Gathered, points: Sequence[Point], key: str) -> None:
    legend(fig, gathered, [point.entry for point in points], top=0.74)
    footnote(fig, [*sureness([point.number for point in points]), *_drain(fig), *aside(gathered, key, log=True)])


def _drain(fig: PlotFigure) -> list[str]:
    notes, fig.notes = fig.notes, []
    return notes


def legend(fig: PlotFigure, gathered: Gathered, entries: Sequence[Entry], *, top: float) -> None:
    """The families that are drawn, in one line under the subtitle; nothing where there is one."""
    look = looks(gathered, fig.theme)
    names = [name for name in look if any(entry.family == name for entry in entries)]
    if len(names) < 2:
        return
    width, height = fig.get_size_inches()
    letters = max(6, 100 // len(names[:8]) - 4)
    handles = [
        Line2D([], [], marker=look[name][1], color=look[name][0], linestyle="", markersize=6.5, label=name[:letters])
        for name in names[:8]
    ]
    made = fig.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.05 / width, 1 - (top - 0.04) / height),
                      ncols=len(handles), frameon=False, fontsize=9, handletextpad=0.2, columnspacing=1.2,
                      borderaxespad=0.0)  # fmt: skip
    for text in made.get_texts():
        text.set_color(fig.theme.ink)


def sureness(numbers: Sequence[Number]) -> list[str]:
    """What the lines through points are, and what hollow points mean."""
    kinds = {found[2] if (found := number.interval()) is not None else None for number in numbers}
    notes = []
    if "interval" in kinds:
        notes.append("lines: 95 % intervals")
    if "error" in kinds:
        what = "lines" if "interval" not in kinds else "some lines"
        notes.append(f"{what}: 1.96 standard errors over tokens, as stated, which take tokens for independent")
    if None in kinds:
        notes.append("hollow: no interval is known, so no order of near points is shown")
    return notes


def aside(gathered: Gathered, key: str, *, log: bool = False) -> list[str]:
    """How many files are not comparable, and whether some are not known to be; on logarithmic axes, how many are 0."""
    notes = []
    zeros = sum(one.number.value <= 0 for one in gathered.shown(key))
    if log and zeros:
        notes.append(f"{zeros} with a value of 0 {'has' if zeros == 1 else 'have'} no place on a logarithmic axis")
    others = gathered.set_aside(key)
    if others:
        files = "1 file is" if len(others) == 1 else f"{len(others)} files are"
        notes.append(f"{files} not shown: measured on something else")
    states = {one.verified for one in gathered.shown(key)}
    if states == {True, False}:
        notes.append("imported files are taken to be about the same text")
    return notes
