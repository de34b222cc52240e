"""Labels beside points that never lie on each other, measured by the renderer: the nearest free place wins.

All lengths are pixels at the figure's own resolution; labels are kept as offsets in points, so that they stay right
at any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from apex_quant.report.style import DPI, PlotFigure

F64 = NDArray[np.float64]  # boxes: [n, 4] of x0, y0, x1, y1

_ANGLES: Final = (0, 180, 45, 315, 135, 225, 90, 270, 22, 338, 158, 202, 67, 293, 113, 247)
_DISTANCES: Final = (5.0, 13.0, 24.0, 38.0, 55.0, 78.0, 105.0, 140.0, 185.0)
_NEAR: Final = 10.0  # from here on a line leads from the label to its point
_PAD: Final = 1.5
_GAP: Final = 2.0  # between a line and its label
_FEW: Final = 40  # so many labels are all placed, however far away; of more, the first ones and evenly many others


@dataclass(frozen=True)
class Wanted:
    """A label for the point at data coordinates x, y, whose marker reaches `radius` points from there. Lower `rank`
    first. `core`: how far a mark in the middle of it reaches, to which lines lead, where markers lie on each other."""

    text: str
    x: float
    y: float
    radius: float
    colour: str
    rank: int = 1
    core: float | None = None


def place_labels(
    fig: PlotFigure, ax: Axes, wanted: Sequence[Wanted], obstacles: Sequence[Sequence[float]] = (),
    lines: Sequence[Sequence[float]] = (), *, size: float = 8.5,
) -> list[Wanted]:  # fmt: skip
    """Draw labels where they touch no other label, no marker, none of `obstacles` (boxes in pixels) and `lines`
    (x0, y0, x1, y1 in pixels), with lines to points that are not near; gives those that found no place. Limits and
    scales of `ax` must be final."""
    if not wanted:
        return []
    renderer, scale = fig.renderer, DPI / 72
    points = ax.transData.transform([(one.x, one.y) for one in wanted])
    radii = np.array([one.radius * scale for one in wanted])
    inmost = np.array([(one.radius if one.core is None else one.core) * scale for one in wanted])
    markers, cores = (np.column_stack([points - r[:, None], points + r[:, None]]) for r in (radii, inmost))
    blocked = np.vstack([markers, np.array(obstacles, np.float64).reshape(-1, 4)])
    area = ax.get_window_extent(renderer)
    bounds = (area.x0 + 2, area.y0 + 2, area.x1 + max(0.0, fig.bbox.x1 - area.x1 - 6), area.y1 - 2)
    boxes, leaders = np.empty((0, 4)), np.array(lines, np.float64).reshape(-1, 4)
    left_out = []
    taken = _taken(wanted)
    crowd = [int((np.hypot(*(points - point).T) < 60).sum()) for point in points]
    for number in sorted(range(len(wanted)), key=lambda k: (wanted[k].rank, crowd[k], wanted[k].text)):
        if number not in taken:
            left_out.append(wanted[number])
            continue
        one, point = wanted[number], points[number]
        # a label beside markers that lie on each other does not say whose it is
        led = one.core is not None and int(overlaps(markers[number], markers).sum()) > 1
        reach = (radii[number], inmost[number], led)
        note = ax.annotate(one.text, (one.x, one.y), (0, 0), textcoords="offset points", fontsize=size,
                           color=fig.theme.ink, ha="left", va="bottom", annotation_clip=False, zorder=6)  # fmt: skip
        extent = note.get_window_extent(renderer)
        inner = (extent.x0 - point[0], extent.y0 - point[1])
        others = np.delete(points, number, axis=0), np.delete(cores, number, axis=0)
        shape = (extent.width, extent.height)
        found = _place(point, reach, shape, bounds, blocked, boxes, leaders, others)
        if found is None:  # on one of the lines
            found = _place(point, reach, shape, bounds, blocked, boxes, leaders[len(lines) :], others)
        if found is None:  # a leader across another marker is better than no label
            found = _place(point, reach, shape, bounds, blocked, boxes, leaders, (others[0], others[1][:0]))
        if found is None:
            note.remove()
            left_out.append(one)
            continue
        box, leader = found
        note.set_position(((box[0] - point[0] - inner[0]) / scale, (box[1] - point[1] - inner[1]) / scale))
        boxes = np.vstack([boxes, box])
        fig.labels.append(note)
        if leader is not None:
            leaders = np.vstack([leaders, leader])
            _lead(ax, leader, fig.theme.quiet)
    return left_out


def _taken(wanted: Sequence[Wanted]) -> set[int]:
    """Which labels are tried: all of few; of many those of the lowest rank and evenly many of the others."""
    if len(wanted) <= _FEW:
        return set(range(len(wanted)))
    lowest = min(one.rank for one in wanted)
    first = [number for number, one in enumerate(wanted) if one.rank == lowest][:_FEW]
    rest = sorted(set(range(len(wanted))) - set(first), key=lambda number: (wanted[number].x, wanted[number].text))
    return {*first, *(rest[round(k)] for k in np.linspace(0, len(rest) - 1, _FEW - len(first)))}


def _place(
    point: F64, reaches: tuple[float, float, bool], size: tuple[float, float],
    bounds: tuple[float, float, float, float], blocked: F64, boxes: F64, leaders: F64, others: tuple[F64, F64],
) -> tuple[F64, F64 | None] | None:  # fmt: skip
    """The first free box for a label of this size, and the line that leads to it, if it needs one. `reaches`: of the
    marker, of the mark in its middle, and whether a line is needed however near the label is."""
    width, height = size
    radius, core, led = reaches
    for distance in _DISTANCES:
        for angle in _ANGLES:
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            reach = radius + distance
            # the side of the box that faces the point lies at `reach` in this direction
            x0 = point[0] + dx * reach - width * (1 - dx) / 2
            y0 = point[1] + dy * reach - height * (1 - dy) / 2
            box = np.array([x0, y0, x0 + width, y0 + height])
            if box[0] < bounds[0] or box[1] < bounds[1] or box[2] > bounds[2] or box[3] > bounds[3]:
                continue
            wide = box + np.array([-_PAD, -_PAD, _PAD, _PAD])
            if overlaps(wide, boxes).any() or overlaps(wide, blocked).any() or crosses(leaders, wide).any():
                continue
            to = np.clip(point, box[:2], box[2:])
            if distance < _NEAR and not led:
                # beside another point it would be taken for that one's
                gaps = np.hypot(*(np.clip(others[0], box[:2], box[2:]) - others[0]).T)
                if (gaps < float(np.hypot(*(to - point))) - 0.5).any():
                    continue
                return box, None
            way = to - point
            length = float(np.hypot(*way)) or 1.0
            leader = np.concatenate([point + way / length * core, to - way / length * _GAP])
            if not crosses(leader, np.vstack([boxes, others[1]])).any():
                return box, leader
    return None


def _lead(ax: Axes, leader: F64, colour: str) -> None:
    ends = ax.transData.inverted().transform(leader.reshape(2, 2))
    ax.add_line(Line2D(ends[:, 0], ends[:, 1], color=colour, linewidth=0.6, zorder=2, clip_on=False))


def overlaps(box: F64, others: F64) -> NDArray[np.bool_]:
    """Whether `box` [4] has area in common with each of `others` [n, 4]."""
    if not len(others):
        return np.zeros(0, bool)
    found: NDArray[np.bool_] = (
        (box[0] < others[:, 2]) & (others[:, 0] < box[2]) & (box[1] < others[:, 3]) & (others[:, 1] < box[3])
    )
    return found


def crosses(lines: F64, boxes: F64) -> NDArray[np.bool_]:
    """Whether segments pass through boxes (Liang and Barsky 1984), [..., 4] each, broadcast against each other."""
    low, high = np.zeros(1), np.ones(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        for axis in (0, 1):
            start, way = lines[..., axis], lines[..., axis + 2] - lines[..., axis]
            a, b = (boxes[..., axis] - start) / way, (boxes[..., axis + 2] - start) / way
            inside = (start > boxes[..., axis]) & (start < boxes[..., axis + 2])
            still = way == 0
            low = np.where(still, np.where(inside, low, np.inf), np.maximum(low, np.minimum(a, b)))
            high = np.where(still, high, np.minimum(high, np.maximum(a, b)))
    found: NDArray[np.bool_] = low < high
    return found
