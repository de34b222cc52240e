"""Our files against other families at equal bytes: the ratio of divergences, with what is known of its interval."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from apex_quant.report.family import OURS
from apex_quant.report.gather import Gathered
from apex_quant.report.pareto import EqualBytes, rivals
from apex_quant.report.plots_scatter import aside
from apex_quant.report.quantities import gigabytes, shown
from apex_quant.report.style import DPI, PlotFigure, Theme, axes, figure, fit, footnote, inches, log_ticks, looks, plain

_ROW = 0.34  # inches
_MOST = 40


def plot_rivals(gathered: Gathered, theme: Theme) -> PlotFigure | None:
    """One row for each of our files and each family that has files below and above its size."""
    found = rivals(gathered)
    if not found:
        return None
    rows = sorted(found, key=lambda one: (-(one.shown.entry.bytes or 0), one.shown.entry.label, one.family))
    cut, rows = len(rows) > _MOST, rows[:_MOST]
    ours = OURS if OURS in gathered.families else rows[0].shown.entry.family
    height = 2.15 + _ROW * len(rows)
    subtitle = f"mean KLD of {ours[:24]}'s file, divided by what the other family offers at its size"
    fig = figure("rivals", theme, f"{ours[:24]} against other families at equal bytes", subtitle, height=height)
    ax = axes(fig, inches(fig, 3.3, 1.05, 0.75, 0.95), grid="x")
    ends = [end for one in rows for end in (one.ratio, one.low or one.ratio, one.high or one.ratio)]
    reach = max(float(np.exp(np.abs(np.log(ends)).max())) * 1.15, 1.3)
    log_ticks(ax, "x", 1 / reach, reach, lambda value: f"{plain(value)}×", most=8)
    ax.set_autoscale_on(False)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.axvspan(1 / reach, 1, color=theme.band, zorder=0, linewidth=0)
    ax.axvline(1, color=theme.quiet, linewidth=1, zorder=1)
    look = looks(gathered, theme)
    for place, one in enumerate(rows):
        _row(fig, ax, place, one, look[one.family])
    width = fig.get_size_inches()[0]
    left, right = 3.3 / width, 1 - 0.75 / width
    middle, top = (left + right) / 2, 1 - 0.9 / height
    for x, words, side in (
        (middle - 0.01, f"← {ours[:24]} lower", "right"),
        (middle + 0.01, "the other family lower →", "left"),
    ):
        fig.text(x, top, words, ha=side, va="bottom", fontsize=8.5, color=theme.quiet)
    unsure = any(one.low is None for one in rows)
    notes = ["the other family's KLD is interpolated between its two files around: its logarithm, linear over bytes"]
    notes += ["hollow: no interval is known, so no difference is shown to be real"] if unsure else []
    notes += ["lines: from both 95 % intervals, not paired"] if any(one.low is not None for one in rows) else []
    outside = {one.entry.label for one in gathered.shown("kld") if one.entry.family == ours and one.entry.bytes}
    outside -= {one.shown.entry.label for one in found}
    notes += [f"not within another family's range: {', '.join(sorted(outside)[:8])}"] if outside else []
    footnote(fig, [*notes, *([f"the first {_MOST} of {len(found)}"] if cut else []), *aside(gathered, "kld")])
    return fig


def _row(fig: PlotFigure, ax: Axes, place: int, one: EqualBytes, look: tuple[str, str]) -> None:
    colour, marker = look
    if one.low is not None and one.high is not None:
        ax.add_line(Line2D([one.low, one.high], [place, place], color=colour, linewidth=1.4, zorder=3))
    entry = one.shown.entry
    said = (
        f"{entry.label}, {gigabytes(entry.bytes or 0)}: KLD {shown('kld', one.shown.number.value)}, {one.family} at "
        f"its size {shown('kld', one.rival)}, from {one.below.entry.label} and {one.above.entry.label}"
    )
    face = colour if one.low is not None else fig.theme.ground
    point = Line2D([one.ratio], [place], marker=marker, markersize=7.5, linestyle="", zorder=4, markeredgecolor=colour,
                   markeredgewidth=1.4, markerfacecolor=face)  # fmt: skip
    point.set_gid(fig.mark(said, entry.label))
    ax.add_line(point)
    cells = (
        (f"{entry.label}, {gigabytes(entry.bytes or 0)}", 0, -3.18 * 72, "left", 9.0, fig.theme.ink, 1.9),
        (f"vs {one.family}", 0, -8, "right", 9.0, colour, 1.15),
        (f"{one.ratio:.2f}×", 1, 6, "left", 8.5, fig.theme.ink, 0.6),
    )
    for text, x, offset, side, size, ink, room in cells:
        made = ax.annotate(text, (x, place), (offset, 0), xycoords=("axes fraction", "data"), color=ink, fontsize=size,
                           textcoords="offset points", ha=side, va="center", annotation_clip=False)  # fmt: skip
        fig.labels.append(fit(fig, made, room * DPI))
