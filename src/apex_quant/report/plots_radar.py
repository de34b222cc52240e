"""Profiles: each file of the front on several scales at once, the reference behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon

from apex_quant.report.entry import Entry
from apex_quant.report.gather import Gathered
from apex_quant.report.plots_rows import chosen
from apex_quant.report.plots_scatter import aside, sureness
from apex_quant.report.quantities import QUANTITIES, Number, gigabytes, shown
from apex_quant.report.style import DPI, PlotFigure, Theme, figure, fit, footnote, inches, looks

MOST: Final = 8
_COLUMNS: Final = 4
_KEYS: Final = ("kld", "kld_p99_9", "top1", "ppl", "hellaswag", "winogrande", "mmlu", "arc", "truthfulqa", "tg")
_LOG: Final = ("kld", "kld_p99_9", "bytes")
_MOST_SCALES: Final = 8
_INNER: Final = 0.18  # where the worst lies, so that profiles have an area


class _Scale(NamedTuple):
    """One spoke: `low` is drawn at the centre's ring, `high` at the rim; logarithmic where `log`."""

    key: str
    name: str
    worst: float
    best: float
    log: bool

    def at(self, value: float) -> float:
        """0 to 1 and _INNER."""
        value, worst, best = (math.log(x) if self.log else x for x in (value, self.worst, self.best))
        part = 0.5 if worst == best else (value - worst) / (best - worst)
        return _INNER + (1 - _INNER) * min(1.0, max(0.0, part))


def plot_radar(gathered: Gathered, theme: Theme) -> PlotFigure | None:
    """One profile a file, at most eight; the rim is the best of the files shown, the inner ring the worst."""
    numbers = {key: {id(one.entry): one.number for one in gathered.shown(key)} for key in _KEYS}
    every = [entry for entry in gathered.entries if not entry.is_reference]
    shared = [key for key in _KEYS if sum(id(entry) in numbers[key] for entry in every) >= max(2, 0.75 * len(every))]
    every = [entry for entry in every if entry.bytes and all(id(entry) in numbers[key] for key in shared)]
    shared = shared[: _MOST_SCALES - 1]
    entries = chosen(every, gathered, MOST)
    if len(entries) < 2 or len(shared) < 2:
        return None
    scales = [_scale(key, [numbers[key][id(entry)] for entry in entries]) for key in shared]
    sizes = [float(entry.bytes or 1) for entry in entries]
    scales.append(_Scale("bytes", "size", max(sizes), min(sizes), True))
    columns = min(_COLUMNS, len(entries))
    lines = math.ceil(len(entries) / columns)
    fig = figure("radar", theme, "Profiles", "outer ring: the best of these files, inner ring: the worst; further out "
                 "is better on every scale", width=max(7.0, 2.75 * columns), height=1.6 + 2.75 * lines)  # fmt: skip
    step = fig.get_size_inches()[0] / columns
    for place, entry in enumerate(entries):
        left, top = (place % columns) * step, 0.85 + 2.75 * (place // columns)
        height = fig.get_size_inches()[1]
        ax = fig.add_axes(inches(fig, left + 0.42, height - top - 2.42, fig.get_size_inches()[0] - left - step + 0.42,
                                 top + 0.32))  # fmt: skip
        found = {key: numbers[key][id(entry)] for key in shared}
        _profile(fig, ax, gathered, entry, scales, found)
    drawn = [numbers[key][id(entry)] for key in shared if key != "tg" for entry in entries]
    ranges = ", ".join(_range(scale) for scale in scales)
    few = [f"{len(entries)} of {len(every)} files"] if len(entries) < len(every) else []
    footnote(fig, [f"scales, inner to outer ring: {ranges}", *sureness(drawn)[:2], *few, *aside(gathered, "kld")])
    return fig


def _scale(key: str, found: Sequence[Number]) -> _Scale:
    values = [number.value for number in found]
    best, worst = (min, max) if QUANTITIES[key].better == "lower" else (max, min)
    log = key in _LOG and min(values) > 0
    return _Scale(key, QUANTITIES[key].short or QUANTITIES[key].title, worst(values), best(values), log)


def _range(scale: _Scale) -> str:
    if scale.key == "bytes":
        return f"size {gigabytes(round(scale.worst))} to {gigabytes(round(scale.best))}"
    return f"{scale.name} {shown(scale.key, scale.worst)} to {shown(scale.key, scale.best)}"


def _profile(
    fig: PlotFigure, ax: Axes, gathered: Gathered, entry: Entry, scales: Sequence[_Scale], found: dict[str, Number]
) -> None:
    theme = fig.theme
    colour = looks(gathered, theme)[entry.family][0]
    angles = np.pi / 2 - 2 * np.pi * np.arange(len(scales)) / len(scales)
    spokes = np.column_stack([np.cos(angles), np.sin(angles)])
    ax.set_xlim(-1.3, 1.3)
    ax.set_ylim(-1.3, 1.3)
    ax.set_aspect("equal")
    ax.set_axis_off()
    for radius in (_INNER, 1.0):
        ax.add_patch(Polygon(radius * spokes, closed=True, fill=False, edgecolor=theme.grid, linewidth=0.8, zorder=0))
    for spoke in spokes:
        ends = np.array([_INNER, 1.0])
        ax.add_line(Line2D(ends * spoke[0], ends * spoke[1], color=theme.grid, linewidth=0.8, zorder=0))
    values = [float(entry.bytes or 1) if scale.key == "bytes" else found[scale.key].value for scale in scales]
    radii = np.array([scale.at(value) for scale, value in zip(scales, values, strict=True)])
    corners = radii[:, None] * spokes
    ax.add_patch(Polygon(corners, closed=True, facecolor=colour, alpha=0.25, linewidth=0, zorder=2))
    shape = Polygon(corners, closed=True, fill=False, edgecolor=colour, linewidth=1.5, zorder=3)
    said = ", ".join(_value(scale, value) for scale, value in zip(scales, values, strict=True))
    shape.set_gid(fig.mark(f"{entry.label}: {said}", entry.label))
    ax.add_patch(shape)
    for scale, spoke, radius in zip(scales, spokes, radii, strict=True):
        span = found[scale.key].interval() if scale.key in found else None
        if span is not None:
            low, high = (scale.at(max(end, 1e-12)) for end in span[:2])
            ax.add_line(Line2D([low * spoke[0], high * spoke[0]], [low * spoke[1], high * spoke[1]], color=colour,
                               linewidth=2.2, alpha=0.8, zorder=4, solid_capstyle="butt"))  # fmt: skip
        hollow = span is None and scale.key not in ("bytes", "tg")
        ax.add_line(Line2D([radius * spoke[0]], [radius * spoke[1]], marker="o", markersize=4, linestyle="", zorder=5,
                           color=colour, markerfacecolor=theme.ground if hollow else colour))  # fmt: skip
        side = "center" if abs(spoke[0]) < 0.3 else "left" if spoke[0] > 0 else "right"
        x = spoke[0] * 1.1
        fig.labels.append(
            ax.text(x, spoke[1] * 1.14, scale.name, ha=side, va="center", fontsize=7.8, color=theme.quiet)
        )
    title = ax.text(0, 1.42, f"{entry.label}, {gigabytes(entry.bytes or 0)}", ha="center", va="bottom", fontsize=10,
                    color=theme.ink, weight="bold")  # fmt: skip
    fig.labels.append(fit(fig, title, 2.6 * DPI))


def _value(scale: _Scale, value: float) -> str:
    return gigabytes(round(value)) if scale.key == "bytes" else f"{scale.name} {shown(scale.key, value)}"
