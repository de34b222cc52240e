"""How numbers are shown: with no more digits than their interval supports, and with the place they stand at.

A Traced is a text, the number it was made of, and its trace: SOURCE#POINTER, where SOURCE names a results file of the
report ("r1", "r2", ...) and POINTER is a JSON pointer (RFC 6901) into it. Tests read reports back by these.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from apex_quant.evaluation.schema import Results
from apex_quant.report.entry import Entry
from apex_quant.report.gather import Gathered
from apex_quant.report.quantities import QUANTITIES, Number, shown

UNITS: Final = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
TABLE: Final = (
    "kld", "kld_p99_9", "kld_max", "top1", "ppl", "router", "hellaswag", "winogrande", "mmlu", "arc", "truthfulqa",
    "pp", "tg",
)  # fmt: skip
"""Quantities of the comparison table, where any file has them."""
HELD: Final = {"interval": "95 % interval", "error": "± standard error", "deviation": "± standard deviation"}
"""What stands beside a value, as Cell.held says it."""
_MARKUP: Final = re.compile(r"[\\`*{}|~$@]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|:(?=//)|\.(?<=www\.)", re.ASCII | re.I)
"""What is markup anywhere: underscores inside of words, lone brackets and most punctuation are not."""
_STARTS: Final = re.compile(r"(?<=^\d)[.)](?=\s|$)|^[-+=#:](?=[\s#=-]|$)", re.ASCII)
"""What is markup at the beginning of a line."""


@dataclass(frozen=True)
class Traced:
    """`text` times `scale` is `value`, up to rounding; `trace` is where that stands."""

    text: str
    value: float | int
    trace: str
    scale: float = 1.0


@dataclass(frozen=True)
class Cell:
    """One place of a table. `note` says why there is no value, or why it has no interval; `held` what the interval
    is; `test` which speed test it is."""

    main: Traced | None
    low: Traced | None = None
    high: Traced | None = None
    error: Traced | None = None
    held: str = ""
    note: str = ""
    test: str | None = None

    @property
    def text(self) -> str:
        """'0.0206 [0.0191, 0.0222]', '6.55 ± 0.04', '–'."""
        if self.main is None:
            return "–"
        if self.low is not None and self.high is not None:
            return f"{self.main.text} [{self.low.text}, {self.high.text}]"
        return f"{self.main.text} ± {self.error.text}" if self.error is not None else self.main.text


class Sources:
    """The results files of a report, numbered in the order of its files."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.every: list[Results] = []
        self._names: dict[int, str] = {}
        for entry in entries:
            for source in entry.sources:
                if id(source) not in self._names:
                    self.every.append(source)
                    self._names[id(source)] = f"r{len(self.every)}"

    def name(self, source: Results) -> str:
        """'r1'."""
        return self._names[id(source)]

    def trace(self, source: Results, pointer: str) -> str:
        """'r1#/metrics/kld/mean/value'."""
        return f"{self.name(source)}#{pointer}"


def rounded(value: float, low: float, high: float) -> tuple[str, str, str]:
    """The three with as many decimal places as half the interval's width supports: one significant digit of it when it
    starts with 3.6 or more, else two (the Particle Data Group's rule); but at least three significant digits of the
    value, for differences may be known better than values, and a bound that is not zero never reads as zero."""
    if max(abs(value), abs(low), abs(high)) > 1e15:  # no number of ours; decimal places mean nothing there
        return f"{value:.4g}", f"{low:.4g}", f"{high:.4g}"
    half = (high - low) / 2
    scale = half if half > 0 else abs(value)
    if not scale > 0:
        return f"{value:g}", f"{low:g}", f"{high:g}"
    places = min(15, max(0, -math.floor(math.log10(scale / 3.55))))
    if value:
        places = min(15, max(places, 2 - math.floor(math.log10(abs(value)))))
    while places < 15 and any(bound != 0 and float(f"{bound:.{places}f}") == 0 for bound in (low, high)):
        places += 1
    value_text, low_text, high_text = (f"{one:.{places}f}" for one in (value, low, high))
    return value_text, low_text, high_text


def cell(entry: Entry, key: str, sources: Sources) -> Cell:
    """A quantity of a file as a table shows it."""
    number = entry.number(key)
    if number is None:
        return Cell(None, note=entry.absence(key) or "not measured")
    return cell_of(number, key, sources.name(entry.source_of(key)))


def cell_of(number: Number, key: str, source: str) -> Cell:
    """The same of a number that stands in the results file called `source`."""
    scale = 0.01 if QUANTITIES[key].unit == "share" else 1.0
    beside = number.pointer.removesuffix("/value")

    def made(text: str, value: float, name: str | None = None) -> Traced:
        pointer = number.pointer if name is None else f"{beside}/{name}"
        return Traced(text, value, f"{source}#{pointer}", scale)

    if number.low is not None and number.high is not None:
        texts = rounded(*(one / scale for one in (number.value, number.low, number.high)))
        low, high = made(texts[1], number.low, "low"), made(texts[2], number.high, "high")
        return Cell(made(texts[0], number.value), low, high, None, HELD["interval"], "", number.test)
    for name, error in (("error", number.error), ("deviation", number.deviation)):
        if error is not None:
            text, _, _ = rounded(*(one / scale for one in (number.value, number.value - error, number.value + error)))
            places = len(text.partition(".")[2])
            shown_error = made(f"{error / scale:.{places}f}", error, name)
            return Cell(made(text, number.value), None, None, shown_error, HELD[name], "", number.test)
    return Cell(made(shown(key, number.value), number.value), note=number.note or "no interval", test=number.test)


def bytes_unit(sizes: Iterable[int]) -> tuple[float, str]:
    """One unit for a whole table, by its largest size."""
    largest = max(sizes, default=0)
    return next((row for row in UNITS if largest >= row[0]), UNITS[-1])


def size_cell(entry: Entry, unit: tuple[float, str], sources: Sources) -> Cell:
    """The file's size."""
    source = next((one for one in entry.sources if one.model.bytes is not None), None)
    if source is None or source.model.bytes is None:
        return Cell(None, note="not known")
    size = source.model.bytes
    return Cell(Traced(f"{size / unit[0]:.2f}", size, sources.trace(source, "/model/bytes"), unit[0]))


def bpw_cell(entry: Entry, sources: Sources) -> Cell:
    """Bits per weight."""
    source = next((one for one in entry.sources if one.model.bpw is not None), None)
    if source is None or source.model.bpw is None:
        return Cell(None, note="not known")
    return Cell(Traced(f"{source.model.bpw:.3f}", source.model.bpw, sources.trace(source, "/model/bpw")))


def measured(entries: Sequence[Entry], keys: Sequence[str] = TABLE) -> list[str]:
    """Those of `keys` that any of the files has."""
    return [key for key in keys if any(entry.number(key) is not None for entry in entries)]


def missing_lines(gathered: Gathered) -> list[str]:
    """What could not be used, each sentence once, without folders of this machine: reports are published."""
    folders = {Path(place) if Path(place).is_dir() else Path(place).parent for place in gathered.places}
    folders |= {one.path.parent for entry in gathered.entries for one in entry.sources if one.path is not None}
    names = {f"{form}/" for folder in folders for form in (folder, folder.absolute()) if str(form) not in (".", "/")}
    lines = []
    for one in gathered.missing:
        line = one.sentence
        for name in sorted(names, key=len, reverse=True):
            line = line.replace(name, "")
        lines.append(one_line(line, 1000))
    return list(dict.fromkeys(lines))


def one_line(text: str, most: int = 300) -> str:
    """Printable text in one line: names come from files that anybody may have made."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    return clean if len(clean) <= most else clean[: most - 1] + "…"


def markdown(text: str, most: int = 4000) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no links, no table cells."""
    clean = _MARKUP.sub(
        r"\\\g<0>", one_line(text, most).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    )
    return _STARTS.sub(r"\\\g<0>", clean)


def code(text: str) -> str:
    """Text as Markdown code; inside of a table too."""
    clean = one_line(text).replace("|", "¦")
    longest = max((len(run) for run in re.findall(r"`+", clean)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest else ""
    return f"{fence}{pad}{clean}{pad}{fence}"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already; all columns but the first are right-aligned."""
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" + "---:|" * (len(heads) - 1)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def csv_text(entries: Sequence[Entry], sources: Sources) -> str:
    """All quantities of all files with their intervals, unrounded, and where each stands."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["file", "label", "family", "bytes", "bpw", "quantity", "unit", "value", "low", "high", "error",
                     "deviation", "n", "results", "pointer"])  # fmt: skip
    for entry in entries:
        about: list[Any] = [_cell(text) for text in (entry.file_name, entry.label, entry.family)]
        about += [entry.bytes, entry.bpw]
        for key, number in entry.numbers.items():
            row = [key, QUANTITIES[key].unit, number.value, number.low, number.high, number.error, number.deviation]
            row += [number.n, _cell(number.file), number.pointer]
            writer.writerow([*about, *("" if one is None else one for one in row)])
    return out.getvalue()


def _cell(text: str) -> str:
    """Spreadsheets run what begins with these."""
    text = one_line(text)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
