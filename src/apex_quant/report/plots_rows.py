"""Plots with a row for each file: the distribution of divergences, accuracies, divergence by domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from apex_quant.report.entry import Entry
from apex_quant.report.gather import Gathered
from apex_quant.report.labels import printable
from apex_quant.report.pareto import front
from apex_quant.report.plots_scatter import aside, sureness
from apex_quant.report.quantities import QUANTITIES, TASK_KEYS, Number, shown
from apex_quant.report.style import DPI, PlotFigure, Theme, axes, figure, fit, footnote, inches, log_ticks, looks, plain

MOST_ROWS: Final = 40
_ROW: Final = 0.3  # inches
_MARKS: Final = (  # quantity, marker, size, what the key calls it
    ("kld_median", "|", 9.0, "median"), ("kld", "o", 6.5, "mean"), ("kld_p90", "|", 6.0, "90 %"),
    ("kld_p99", "d", 5.0, "99 %"), ("kld_p99_9", "D", 5.5, "99.9 %"), ("kld_max", "x", 5.0, "largest"),
)  # fmt: skip
_READ: Final = {
    "kld_median": "half of all tokens are left of the median",
    "kld_p99_9": "one in a thousand right of 99.9 %",
}


def chosen(entries: Sequence[Entry], gathered: Gathered, most: int = MOST_ROWS) -> list[Entry]:
    """At most so many: those on the front of KLD over size, and of the others evenly many of all sizes, in the order
    given."""
    if len(entries) <= most:
        return list(entries)
    kept = {id(one.entry) for one in front(gathered.shown("kld"))} & {id(one) for one in entries}
    rest = [one for one in entries if id(one) not in kept]
    if len(kept) < most:
        kept |= {id(rest[round(k)]) for k in np.linspace(0, len(rest) - 1, most - len(kept))}
    return [one for one in entries if id(one) in kept][:most]


def plot_distribution(gathered: Gathered, theme: Theme) -> PlotFigure | None:
    """Median, mean, 90, 99, 99.9 % and largest KLD, over the density of all tokens where they are kept."""
    numbers = {key: {id(one.entry): one.number for one in gathered.shown(key)} for key, *_ in _MARKS}
    every = [one.entry for one in gathered.shown("kld")]
    entries = chosen(every, gathered)
    values = [number.value for key in numbers for number in numbers[key].values() if number.value > 0]
    if not entries or not values:
        return None
    marks = [one for one in _MARKS if any(_positive(numbers[one[0]].get(id(entry))) for entry in entries)]
    height = 2.1 + 1.35 * _ROW * len(entries)
    says = [text for key, text in _READ.items() if any(key == one[0] for one in marks)]
    fig = figure("kld-distribution", theme, "Divergence of single tokens",
                 "KLD per token (nats)" + (f": {', '.join(says)}" if says else ""), height=height)  # fmt: skip
    ax = axes(fig, inches(fig, 2.35, 0.98, 0.3, 1.12), grid="x")
    low, high = max(min(values) / 3, 1e-7), max(values) * 1.4
    log_ticks(ax, "x", low, high, plain)
    ax.set_autoscale_on(False)
    _rows(fig, ax, gathered, entries)
    drawn: list[Number] = []
    for place, entry in enumerate(entries):
        colour = looks(gathered, theme)[entry.family][0]
        _density(ax, entry, place, colour, (low, high))
        for key, marker, size, _ in marks:
            number = numbers[key].get(id(entry))
            if number is None or not _positive(number):
                continue
            if key in ("kld", "kld_p99_9"):
                drawn.append(number)
            _point(fig, ax, entry, key, number, place, colour, marker, size)
    _key(fig, theme, marks)
    density = ["hills: how many tokens"] if any(entry.distribution for entry in entries) else []
    footnote(fig, [*density, *sureness(drawn), *_fewer(entries, every), *aside(gathered, "kld", log=True)])
    return fig


def plot_accuracy(gathered: Gathered, theme: Theme) -> PlotFigure | None:
    """A panel for each benchmark, a bar for each file, with the reference's accuracy as a line and its interval."""
    tasks = {key: {id(one.entry): one.number for one in gathered.shown(key)} for key in TASK_KEYS}
    tasks = {key: found for key, found in tasks.items() if found}
    every = [entry for entry in gathered.entries if any(id(entry) in found for found in tasks.values())]
    entries = chosen(every, gathered)
    if not entries:
        return None
    return _panels(gathered, theme, "accuracy", "Accuracy", "share of right answers (%). Nearness of bars says little: "
                   "`apex compare` pairs the tasks",
                   {QUANTITIES[key].title: (key, found) for key, found in tasks.items()}, entries, every,
                   bars=True)  # fmt: skip


def plot_domains(gathered: Gathered, theme: Theme) -> PlotFigure | None:
    """A panel for each domain of the text, mean KLD of each file."""
    rows = {id(one.entry): one.entry.domains("kld") for one in gathered.shown("kld")}
    names = list(dict.fromkeys(name for found in rows.values() for name in found))[:8]
    every = [one.entry for one in gathered.shown("kld") if rows[id(one.entry)]]
    entries = chosen(every, gathered)
    panels = {name: ("kld", {key: found[name] for key, found in rows.items() if name in found}) for name in names}
    if (
        not entries
        or len(names) < 2
        or not any(one.value > 0 for _, found in panels.values() for one in found.values())
    ):
        return None
    return _panels(gathered, theme, "domains", "Divergence by domain", "mean KLD (nats) on each kind of text", panels,
                   entries, every, bars=False)  # fmt: skip


def _panels(
    gathered: Gathered, theme: Theme, name: str, title: str, subtitle: str,
    panels: Mapping[str, tuple[str, Mapping[int, Number]]], entries: Sequence[Entry], every: Sequence[Entry], *,
    bars: bool,
) -> PlotFigure:  # fmt: skip
    """Small multiples that share their rows."""
    height = 2.05 + _ROW * len(entries)
    width = max(9.0, 2.35 + 1.45 * len(panels))
    fig = figure(name, theme, title, subtitle, width=width, height=height)
    step = (width - 2.35 - 0.25) / len(panels)
    drawn: list[Number] = []
    values = [end for key, found in panels.values() for number in found.values() for end in _ends(number)]
    positive = [value for value in values if value > 0]
    reference = gathered.reference
    for place, (panel, (key, found)) in enumerate(panels.items()):
        left = 2.35 + place * step
        ax = axes(fig, inches(fig, left, 0.85, width - left - step + 0.28, 1.05), grid="x")
        ax.set_title(printable(panel)[:24], fontsize=9.5, color=theme.ink, loc="left")
        if bars:
            ax.set_xlim(0, 104 * max(end for number in found.values() for end in _ends(number)) or 1)
            ax.locator_params(axis="x", nbins=4)
        else:
            log_ticks(ax, "x", min(positive) / 1.2, max(positive) * 1.2, plain, most=max(2, int((step - 0.28) / 0.4)))
        ax.set_autoscale_on(False)
        _rows(fig, ax, gathered, entries, names=place == 0)
        base = found.get(id(reference)) if reference is not None else None
        scale = 100.0 if bars else 1.0
        if base is not None and reference is not None:
            span = base.interval()
            if span is not None:
                ax.axvspan(scale * span[0], scale * span[1], color=theme.band, zorder=0.3, linewidth=0)
            ax.axvline(scale * base.value, color=theme.quiet, linewidth=1, zorder=2.5)
        for row, entry in enumerate(entries):
            number = found.get(id(entry))
            if number is None or number.value * scale <= 0 < (not bars):
                continue
            drawn.append(number)
            colour, marker = looks(gathered, theme)[entry.family]
            if bars:
                _bar(fig, ax, entry, key, number, row, colour)
            else:
                _point(fig, ax, entry, key, number, row, colour, marker, 5.5, of=panel)
    notes = sureness(drawn)
    if bars and reference is not None:
        notes.append(f"line and band: {reference.label}, the reference, with its interval")
    keys = list(dict.fromkeys(key for key, _ in panels.values()))
    footnote(
        fig, [*notes, *_fewer(entries, every), *dict.fromkeys(line for key in keys for line in aside(gathered, key))]
    )
    return fig


def _rows(fig: PlotFigure, ax: Axes, gathered: Gathered, entries: Sequence[Entry], *, names: bool = True) -> None:
    """A row for each file, the first on top, with its label and its family's marker at the left."""
    ax.set_ylim(len(entries) - 0.4, -0.6)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    if not names:
        return
    look = looks(gathered, fig.theme)
    for place, entry in enumerate(entries):
        colour, marker = look[entry.family]
        text = ax.annotate(entry.label, (0, place), (-24, 0), xycoords=("axes fraction", "data"), ha="right",
                           va="center", textcoords="offset points", fontsize=9, color=fig.theme.ink,
                           annotation_clip=False)  # fmt: skip
        fig.labels.append(fit(fig, text, ax.get_window_extent(fig.renderer).x0 - 24 * DPI / 72 - 6))
        side = -13 / (ax.get_window_extent(fig.renderer).width / fig.dpi * 72)
        ax.add_line(Line2D([side], [place], marker=marker, color=colour, markersize=6, linestyle="", clip_on=False,
                           transform=ax.get_yaxis_transform()))  # fmt: skip


def _ends(number: Number) -> tuple[float, ...]:
    found = number.interval()
    return (number.value, *found[:2]) if found is not None else (number.value,)


def _point(
    fig: PlotFigure, ax: Axes, entry: Entry, key: str, number: Number, place: int, colour: str, marker: str,
    size: float, *, of: str = "",
) -> None:  # fmt: skip
    found = number.interval()
    if found is not None:
        low = max(found[0], ax.get_xlim()[0])
        ax.add_line(Line2D([low, found[1]], [place, place], color=colour, linewidth=1.3, zorder=3))
    hollow = found is None and key in ("kld", "kld_p99_9")
    line = Line2D([number.value], [place], marker=marker, markersize=size, linestyle="", zorder=4, color=colour,
                  markerfacecolor=fig.theme.ground if hollow else colour, markeredgewidth=1.4)  # fmt: skip
    line.set_gid(fig.mark(_said(entry, key, number, of), entry.label))
    ax.add_line(line)


def _bar(fig: PlotFigure, ax: Axes, entry: Entry, key: str, number: Number, place: int, colour: str) -> None:
    found = number.interval()
    bar = Rectangle((0, place - 0.32), 100 * number.value, 0.64, zorder=1.5, linewidth=1,
                    facecolor=colour if found is not None else "none", edgecolor=colour, alpha=0.45)  # fmt: skip
    bar.set_gid(fig.mark(_said(entry, key, number), entry.label))
    ax.add_patch(bar)
    if found is not None:
        ends = [(100 * found[0], place), (100 * found[1], place)]
        caps = [[(x, place - 0.18), (x, place + 0.18)] for x, _ in ends]
        ax.add_collection(LineCollection([ends, *caps], colors=colour, linewidths=1.3, zorder=3), autolim=False)


def _said(entry: Entry, key: str, number: Number, of: str = "") -> str:
    found = number.interval()
    unit = " %" if QUANTITIES[key].unit == "share" else ""
    text = f"{entry.label}: {QUANTITIES[key].title}{f' on {of}' if of else ''} {shown(key, number.value)}{unit}"
    if found is not None:
        text += f" [{shown(key, found[0])}, {shown(key, found[1])}]"
    return text + (f", n = {number.n:,}" if number.n is not None else "")


def _density(ax: Axes, entry: Entry, place: int, colour: str, limits: tuple[float, float]) -> None:
    """How many tokens have which divergence, as a hill over the row."""
    found = entry.distribution
    if found is None:
        return
    counts = np.array(found.counts, float)
    edges = np.array(found.edges)
    middle = np.sqrt(edges[:-1] * edges[1:])
    inside = (middle >= limits[0]) & (middle <= limits[1])
    if not inside.any() or not counts[inside].any():
        return
    x, y = middle[inside], place - 0.55 * counts[inside] / counts[inside].max()
    ax.fill_between(x, y, place, color=colour, alpha=0.2, linewidth=0, zorder=1)


def _positive(number: Number | None) -> bool:
    """Whether it has a place on a logarithmic axis."""
    return number is not None and number.value > 0


def _key(fig: PlotFigure, theme: Theme, marks: Sequence[tuple[str, str, float, str]]) -> None:
    """What the marks are that were drawn."""
    width, height = fig.get_size_inches()
    handles = [
        Line2D([], [], marker=marker, color=theme.quiet, linestyle="", markersize=size, label=name, markeredgewidth=1.4)
        for _, marker, size, name in marks
    ]
    made = fig.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.05 / width, 1 - 0.7 / height),
                      frameon=False, ncols=len(handles), fontsize=9, handletextpad=0.2, columnspacing=1.2,
                      borderaxespad=0.0)  # fmt: skip
    for text in made.get_texts():
        text.set_color(theme.ink)


def _fewer(entries: Sequence[Entry], every: Sequence[Entry]) -> list[str]:
    return [f"{len(entries)} of {len(every)} files" for _ in range(len(entries) < len(every))]
