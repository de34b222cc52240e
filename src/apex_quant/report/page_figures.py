"""Which charts the page has, and what each is drawn from: a table of charts, and the marks of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from apex_quant.report.entry import Entry
from apex_quant.report.formats import Cell, Sources, Traced, bytes_unit, cell_of, size_cell
from apex_quant.report.gather import Gathered
from apex_quant.report.page_charts import Axis, Drawn, Point, Row, lines, mark_of, ranges, scatter
from apex_quant.report.quantities import QUANTITIES, TASK_KEYS, Number

MOST_ROWS: Final = 60
MOST_LINES: Final = 8
_TAILS: Final = {
    "kld_median": ("median", "tall"), "kld": ("mean", "circle"), "kld_p90": ("90 %", "short"),
    "kld_p95": ("95 %", "up"), "kld_p99": ("99 %", "thin"), "kld_p99_9": ("99.9 %", "diamond"),
    "kld_max": ("largest", "cross"),
}  # fmt: skip
"""What the marks of a distribution are called, and their outlines: those of the picture, plots_rows.py."""


@dataclass(frozen=True)
class Figure:
    """A chart with its heading and what a reader must know to read it."""

    title: str
    caption: str
    svg: Markup
    legend: tuple[tuple[str, Markup], ...] = ()
    """What its colours and shapes mean, where they are not families."""


def figures(gathered: Gathered, sources: Sources) -> list[Figure]:
    """All charts that there are numbers for."""
    made: list[Figure | None] = [
        _against_size("kld", True, gathered, sources),
        _against_size("kld_p99_9", True, gathered, sources),
        _against_size("ppl", False, gathered, sources),
        _against_speed("kld", gathered, sources),
        _tails(gathered, sources),
        *(_accuracy(key, gathered, sources) for key in TASK_KEYS),
        _domains(gathered, sources),
        _routers(gathered, sources),
    ]
    return [one for one in made if one is not None]


def _against_size(key: str, log: bool, gathered: Gathered, sources: Sources) -> Figure | None:
    shown = [one for one in gathered.shown(key) if one.entry.bytes and one.entry is not gathered.reference]
    if not shown:
        return None
    unit = bytes_unit(one.entry.bytes or 0 for one in shown)
    points = []
    for one in shown:
        size = size_cell(one.entry, unit, sources)
        points.append(_point(one.entry, one.number, key, size, unit[1], gathered, sources))
    title = QUANTITIES[key].title
    reference = gathered.reference.number(key) if gathered.reference is not None and key == "ppl" else None
    said = (
        "Vertical bars are 95 % intervals" if any(one.low is not None for one in points) else "No intervals are known"
    )
    said += "; the dashed step joins files that no smaller one is below."
    said += " The dotted line is the reference." if reference is not None else ""
    made = scatter(points, Axis(f"size, {unit[1]}"), Axis(QUANTITIES[key].axis, log), f"{title} against size",
                   line=reference.value if reference is not None else None)  # fmt: skip
    return Figure(f"{title[0].upper()}{title[1:]} against size", said + _unnamed(made), made.svg)


def _against_speed(key: str, gathered: Gathered, sources: Sources) -> Figure | None:
    speeds = {one.entry.label: one.number for one in gathered.shown("tg")}
    shown = [one for one in gathered.shown(key) if one.entry.label in speeds and one.entry is not gathered.reference]
    if not shown:
        return None
    points = []
    for one in shown:
        speed = cell_of(speeds[one.entry.label], "tg", sources.name(one.entry.source_of("tg")))
        points.append(_point(one.entry, one.number, key, speed, "tokens/s", gathered, sources))
    made = scatter(points, Axis(QUANTITIES["tg"].axis), Axis(QUANTITIES[key].axis, True),
                   f"{QUANTITIES[key].title} against generation speed", front=False)  # fmt: skip
    said = "Down and to the right is better. Speeds hold for the device they were measured on."
    return Figure("Mean KLD against generation speed", said + _unnamed(made), made.svg)


def _point(entry: Entry, number: Number, key: str, x: Cell, x_unit: str, gathered: Gathered, sources: Sources) -> Point:
    y = cell_of(number, key, sources.name(entry.source_of(key)))
    held = number.interval()
    assert x.main is not None
    says = f"{entry.label}: {QUANTITIES[key].title} {y.text}, {x.text} {x_unit}"
    low, high = (held[0], held[1]) if held is not None else (None, None)
    return Point(
        entry.label, style_of(entry, gathered), x.main.value / x.main.scale, number.value, low, high, says,
        _traces(y, x),
    )  # fmt: skip


def _accuracy(key: str, gathered: Gathered, sources: Sources) -> Figure | None:
    rows = []
    shown = gathered.shown(key)
    for one in shown[:MOST_ROWS]:
        found = cell_of(one.number, key, sources.name(one.entry.source_of(key)))
        low, high = one.number.low, one.number.high
        scaled = [None if end is None else 100 * end for end in (low, high)]
        says = f"{one.entry.label}: {QUANTITIES[key].title} {found.text} %, {one.number.n or 'unknown number of'} tasks"
        style = style_of(one.entry, gathered)
        point = Point(one.entry.label, style, 100 * one.number.value, 0, scaled[0], scaled[1], says, _traces(found))
        rows.append(Row(one.entry.label, (point,)))
    if not rows:
        return None
    reference = next((one.number for one in shown if one.entry is gathered.reference), None)
    line = None if reference is None else 100 * reference.value
    held = any(one.number.low is not None for one in shown)
    said = "Bars are 95 % Wilson intervals" if held else "The results state no intervals"
    said += ", the dotted line is the reference. " if line is not None else ". "
    said += _left_out(len(shown))
    title = QUANTITIES[key].title
    return Figure(f"{title} accuracy", said, ranges(rows, Axis(f"{title}, %"), f"{title} accuracy", line=line))


def _tails(gathered: Gathered, sources: Sources) -> Figure | None:
    shown = [one for one in gathered.shown("kld") if one.entry is not gathered.reference]
    rows, drawn = [], set()
    for one in shown[:MOST_ROWS]:
        points = []
        for key in _TAILS:
            number = one.entry.number(key)
            if number is not None and number.value > 0:
                found = cell_of(number, key, sources.name(one.entry.source_of(key)))
                says = f"{one.entry.label}: {QUANTITIES[key].title} {found.text} nats"
                points.append(Point("", style_of(one.entry, gathered), number.value, 0, None, None, says,
                                    _traces(found), _TAILS[key][1]))  # fmt: skip
                drawn.add(key)
        if points:
            rows.append(Row(one.entry.label, tuple(points)))
    if not any(len(row.points) > 1 for row in rows):
        return None
    said = "KLD of single tokens: its mean, its quantiles and the largest, as far as measured. "
    legend = tuple((name, mark_of(outline)) for key, (name, outline) in _TAILS.items() if key in drawn)
    svg = ranges(rows, Axis("KLD of a token, nats", log=True), "KLD distribution")
    return Figure("How the divergence is distributed", said + _left_out(len(shown)), svg, legend)


def _domains(gathered: Gathered, sources: Sources) -> Figure | None:
    rows = []
    shown = [one.entry for one in gathered.shown("kld") if one.entry is not gathered.reference]
    names = sorted({name for entry in shown for name in entry.domains("kld")})
    for entry in shown[: MOST_ROWS // 3]:
        points = []
        for name, value in sorted(entry.domains("kld").items()):
            found = cell_of(value, "kld", sources.name(entry.source_of("kld")))
            says = f"{entry.label}, {name}: mean KLD {found.text} nats"
            says += "" if value.low is not None else f" ({found.note})"
            points.append(Point("", names.index(name), value.value, 0, value.low, value.high, says, _traces(found)))
        if points:
            rows.append(Row(entry.label, tuple(points)))
    if not rows:
        return None
    svg = ranges(rows, Axis("mean KLD, nats", log=True), "Mean KLD by domain")
    said = "Bars are 95 % intervals, where there is text enough for one. " + _left_out(len(shown), MOST_ROWS // 3)
    legend = tuple((name, mark_of(number)) for number, name in enumerate(names))
    return Figure("Mean KLD by kind of text", said, svg, legend)


def _routers(gathered: Gathered, sources: Sources) -> Figure | None:
    rows = []
    shown = [one.entry for one in gathered.shown("router") if one.entry is not gathered.reference]
    for number, entry in enumerate(shown[:MOST_LINES]):
        name = sources.name(entry.source_of("router"))
        points = []
        for row in entry.routers():
            found = cell_of(row.changed, "router", name)
            says = f"{entry.label}, layer {row.layer}: {found.text} % of tokens"
            points.append(Point("", number, row.layer, 100 * row.changed.value, None, None, says, _traces(found)))
        if points:
            rows.append(Row(entry.label, tuple(points)))
    if not rows:
        return None
    svg = lines(rows, Axis("layer"), Axis("tokens with another set of experts, %"), "Router choices changed, by layer")
    said = f"Each line is a file. {_left_out(len(shown), MOST_LINES)}"
    legend = tuple((row.label, mark_of(row.points[0].style)) for row in rows)
    return Figure("Router choices changed, by layer", said, svg, legend)


def style_of(entry: Entry, gathered: Gathered) -> int:
    """The number of its family: its colour and shape."""
    return gathered.families.index(entry.family)


def _traces(*cells: Cell) -> tuple[Traced, ...]:
    return tuple(one for cell in cells for one in (cell.main, cell.low, cell.high, cell.error) if one is not None)


def _unnamed(made: Drawn) -> str:
    if not made.unnamed:
        return ""
    names = "1 name is" if made.unnamed == 1 else f"{made.unnamed} names are"
    return f" {names} left out for want of room; point at a mark to see its."


def _left_out(count: int, most: int = MOST_ROWS) -> str:
    return f"{count - most} more files are in the table only." if count > most else ""
