"""Plots over the layers of a model: how often routers chose other experts, and which precision every part has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from apex_quant.report.entry import Entry, RouterLayer
from apex_quant.report.gather import Gathered
from apex_quant.report.plots_rows import chosen
from apex_quant.report.plots_scatter import aside
from apex_quant.report.precision import Cell, PrecisionMap
from apex_quant.report.quantities import gigabytes, shown
from apex_quant.report.style import DPI, PlotFigure, Theme, axes, figure, fit, footnote, inches, looks

MOST_LINES: Final = 10
MOST_MAPS: Final = 12
_STYLES: Final[tuple[Any, ...]] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_BITS: Final = (1.5, 8.5)  # of the colour scale, logarithmic: IQ1 to Q8_0
_UNQUANTIZED: Final = "#b9bec4"  # BF16, F16, F32
_ROLES: Final = {
    "routed_expert": "routed experts", "shared_expert": "shared experts", "dense_ffn": "dense FFN",
    "attention": "attention", "ssm": "SSM, linear attention", "router": "router", "norm": "norms",
    "embedding": "embedding", "output": "output", "nextn": "NextN", "projector": "projector", "other": "other",
}  # fmt: skip


def plot_routers(gathered: Gathered, theme: Theme) -> PlotFigure | None:
    """A line for each file, its label at the end; the overall share has the interval."""
    every = [one.entry for one in gathered.shown("router")] or list(gathered.entries)
    rows = {id(entry): entry.routers() for entry in every}
    every = [entry for entry in every if len(rows[id(entry)]) > 1]
    entries = chosen(every, gathered, MOST_LINES)
    if not entries:
        return None
    fig = figure("routers", theme, "Routers by layer", "share of tokens (%) whose set of experts is another one than "
                 "the reference's")  # fmt: skip
    ax = axes(fig, inches(fig, 0.75, 0.98, 2.35, 0.85))
    layers = sorted({row.layer for entry in entries for row in rows[id(entry)]})
    top = max(100 * row.changed.value for entry in entries for row in rows[id(entry)])
    ax.set_xlim(layers[0] - 0.3, layers[-1] + 0.3)
    ax.set_ylim(0, max(top * 1.06, 0.1))
    ax.set_autoscale_on(False)
    ax.set_xticks(layers[:: max(1, math.ceil(len(layers) / 16))])
    ax.set_xlabel("layer", fontsize=9.5)
    look = looks(gathered, theme)
    seen: dict[str, int] = {}
    ends = []
    for entry in entries:
        colour, marker = look[entry.family]
        style = _STYLES[seen.setdefault(entry.family, 0) % len(_STYLES)]
        seen[entry.family] += 1
        found = rows[id(entry)]
        line = Line2D([row.layer for row in found], [100 * row.changed.value for row in found], color=colour,
                      linestyle=style, linewidth=1.5, marker=marker, markersize=3.5, zorder=3)  # fmt: skip
        line.set_gid(fig.mark(f"{entry.label}: {_overall(entry)}; most in layer {_worst(found)}", entry.label))
        ax.add_line(line)
        ends.append((100 * found[-1].changed.value, found[-1].layer, f"{entry.label}  {_overall(entry)}", colour))
    _end_labels(fig, ax, ends)
    few = [f"{len(entries)} of {len(every)} files"] if len(entries) < len(every) else []
    footnote(fig, [*_beside_lines(entries), *few, *aside(gathered, "router")])
    return fig


def _beside_lines(entries: Sequence[Entry]) -> list[str]:
    """What the numbers in the labels are."""
    overall = [number for entry in entries if (number := entry.number("router")) is not None]
    sure = [number for number in overall if number.low is not None and number.high is not None]
    if not sure:
        return (
            ["beside the lines: over all layers", "no intervals are known"] if overall else ["no intervals are known"]
        )
    where = "" if len(sure) == len(entries) else " where one is known"
    return [f"beside the lines: over all layers, with the 95 % interval{where}", "single layers have none"]


def _overall(entry: Entry) -> str:
    number = entry.number("router")
    if number is None:
        return ""
    text = f"{shown('router', number.value)} %"
    if number.low is None or number.high is None:
        return text
    return f"{text} [{shown('router', number.low)}, {shown('router', number.high)}]"


def _worst(rows: Sequence[RouterLayer]) -> str:
    worst = max(rows, key=lambda row: row.changed.value)
    return f"{worst.layer}: {shown('router', worst.changed.value)} %"


def _end_labels(fig: PlotFigure, ax: Axes, ends: Sequence[tuple[float, int, str, str]]) -> None:
    """Labels right of the axes, in the order of the lines' ends, pushed apart until none touch."""
    texts = []
    for y, x, said, _ in sorted(ends, reverse=True):
        text = ax.annotate(said, (1, y), (26, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                           va="center", fontsize=8.5, color=fig.theme.ink, annotation_clip=False)  # fmt: skip
        room = fig.bbox.x1 - ax.get_window_extent(fig.renderer).x1 - 26 * DPI / 72 - 4
        texts.append((fit(fig, text, room), y, x))
    if not texts:
        return
    height = max(text.get_window_extent(fig.renderer).height for text, *_ in texts) + 2
    pixels = [float(ax.transData.transform((x, y))[1]) for _, y, x in texts]
    area = ax.get_window_extent(fig.renderer)
    places = apart(pixels, height, area.y0, area.y1)
    for (text, _, _), (y, x, _, colour), pixel, at in zip(
        texts, sorted(ends, reverse=True), pixels, places, strict=True
    ):
        text.set_position((26, (at - pixel) * 72 / DPI))
        fig.labels.append(text)
        xs = [ax.transData.transform((x, y))[0] + 3, area.x1 + 12, area.x1 + 33]
        inverse = ax.transData.inverted().transform(list(zip(xs, [pixel, pixel, at], strict=True)))
        ax.add_line(Line2D(inverse[:, 0], inverse[:, 1], color=colour, linewidth=0.8, alpha=0.7, clip_on=False))


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places for labels wanted at falling heights, `gap` between neighbours, moved as little as goes from top to bottom
    and inside low to high where there is room."""
    places: list[float] = []
    for y in wanted:
        places.append(min(y, places[-1] - gap) if places else min(y, high))
    under = low - places[-1] if places else 0
    if under > 0:  # push up from the bottom
        places[-1] += under
        for k in range(len(places) - 2, -1, -1):
            places[k] = max(places[k], places[k + 1] + gap)
    return places


def plot_precision(gathered: Gathered, theme: Theme) -> PlotFigure | None:
    """For each file a map: layers across, roles down, coloured by bits per weight."""
    if not any(entry.gguf or entry.plan for entry in gathered.entries):
        return None
    every = [entry for entry in gathered.entries if entry.gguf or entry.plan]
    entries = [entry for entry in chosen(every, gathered, MOST_MAPS) if entry.precision is not None]
    maps = [entry.precision for entry in entries if entry.precision is not None]
    if not maps:
        return None
    roles = [role for role in _ROLES if role != "norm" and any(role in one.roles for one in maps)]
    row = 0.17 * len(roles) + 0.42
    fig = figure("precision", theme, "Precision map", "bits per weight of each role (down) in each layer (across); "
                 "the last column lies outside the layers", width=9.5, height=1.85 + row * len(maps))  # fmt: skip
    height = fig.get_size_inches()[1]
    for place, (entry, one) in enumerate(zip(entries, maps, strict=True)):
        top = 1.4 + place * row
        ax = axes(fig, inches(fig, 1.85, height - top - row + 0.42, 0.25, top), grid="")
        _map(fig, ax, entry, one, roles, last=place == len(maps) - 1)
    _colour_key(fig)
    few = [f"{len(entries)} of {len(every)} files"] if len(entries) < len(every) else []
    footnote(fig, ["norms are left out", *few])
    return fig


def _map(fig: PlotFigure, ax: Axes, entry: Entry, one: PrecisionMap, roles: Sequence[str], *, last: bool) -> None:
    columns = {layer: place + (0.4 if layer is None else 0.0) for place, layer in enumerate(one.layers)}
    ax.set_xlim(0, max(columns.values()) + 1)
    ax.set_ylim(len(roles), 0)
    ax.set_autoscale_on(False)
    ax.set_facecolor(fig.theme.band)
    cells = [cell for cell in one.cells if cell.role in roles]
    corners = [(columns[cell.layer], roles.index(cell.role)) for cell in cells]
    squares = PolyCollection(
        [[(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)] for x, y in corners],
        facecolors=[colour_of(cell.bits) for cell in cells], edgecolors=fig.theme.ground, linewidths=0.4,
    )  # fmt: skip
    said = f"{entry.label}: {', '.join(_role(role, cells) for role in roles if any(c.role == role for c in cells))}"
    squares.set_gid(fig.mark(said, entry.label))
    ax.add_collection(squares, autolim=False)
    ax.set_yticks([place + 0.5 for place in range(len(roles))], [_ROLES[role] for role in roles])
    ax.tick_params(axis="y", labelsize=7.2, length=0)
    numbered = [layer for layer in one.layers if layer is not None]
    ticks = numbered[:: max(1, math.ceil(len(numbered) / 20))] if last else []
    ax.set_xticks([columns[layer] + 0.5 for layer in ticks], [str(layer) for layer in ticks])
    for spine in ax.spines.values():
        spine.set_visible(False)
    title = f"{entry.label}, {gigabytes(entry.bytes or 0)}" + (f", {entry.bpw:.2f} bpw" if entry.bpw else "")
    fig.labels.append(ax.text(0, -0.25, title, fontsize=9, weight="bold", color=fig.theme.ink, va="bottom"))


def _role(role: str, cells: Sequence[Cell]) -> str:
    """'routed experts 2.06 to 3.44 bits'."""
    bits = [cell.bits for cell in cells if cell.role == role]
    low, high = f"{min(bits):.2f}", f"{max(bits):.2f}"
    return f"{_ROLES[role]} {low if low == high else f'{low} to {high}'} bits"


def colour_of(bits: float) -> str:
    """On a logarithmic scale of bits per weight: viridis, whose lightness rises evenly; grey for what is not
    quantized."""
    if bits > 1.5 * _BITS[1]:
        return _UNQUANTIZED
    low, high = (math.log2(end) for end in _BITS)
    part = (math.log2(min(max(bits, _BITS[0]), _BITS[1])) - low) / (high - low)
    return str(to_hex(colormaps["viridis"](part)))


def _colour_key(fig: PlotFigure) -> None:
    width, height = fig.get_size_inches()
    ax = fig.add_axes((1.85 / width, 1 - 0.92 / height, 4.2 / width, 0.13 / height))
    low, high = (math.log2(end) for end in _BITS)
    edges = np.linspace(low, high, 65)
    strips = [[(x0, 0), (x1, 0), (x1, 1), (x0, 1)] for x0, x1 in pairwise(edges)]
    ax.add_collection(PolyCollection(strips, facecolors=[colour_of(2.0 ** s[0][0]) for s in strips], edgecolors="face",
                                     linewidths=0.3), autolim=False)  # fmt: skip
    ax.add_patch(Rectangle((high + 0.12, 0), 0.18, 1, facecolor=_UNQUANTIZED, linewidth=0))
    ax.set_xlim(low, high + 0.3)
    ax.set_ylim(0, 1)
    ax.set_yticks([])
    ax.set_xticks(
        [*(math.log2(bits) for bits in (2, 3, 4, 5, 6, 8)), high + 0.21], ["2", "3", "4", "5", "6", "8", "16+"]
    )
    ax.tick_params(labelsize=7.5, length=2, colors=fig.theme.quiet, pad=1.5)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.text(high + 0.4, 0.5, "bits per weight", fontsize=8, va="center", color=fig.theme.quiet)
