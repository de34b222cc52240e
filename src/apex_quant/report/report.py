"""`report`: plots, one HTML page, Markdown and CSV from results files alone.

made = report(["results/"], "report", family=["Unsloth=UD-*"])
print(made.paths, made.sentences)

Folders with partial, older or broken results give a report too; what is missing is in it and in `missing`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from apex_quant.errors import InputError, ResourceError, UsageError, did_you_mean
from apex_quant.gguf.atomic import require_space, write_file
from apex_quant.report.choose import with_results
from apex_quant.report.family import Family
from apex_quant.report.formats import (
    Sources,
    bpw_cell,
    bytes_unit,
    cell,
    csv_text,
    markdown,
    markdown_table,
    measured,
    missing_lines,
    size_cell,
)  # fmt: skip
from apex_quant.report.gather import Gathered, gather
from apex_quant.report.html import no_claims, render
from apex_quant.report.pairs import Pairs
from apex_quant.report.quantities import QUANTITIES
from apex_quant.report.sentences import Sentences, sentences

FORMATS: Final = ("html", "png", "svg", "md", "csv")
NAMES: Final = {"html": "index.html", "md": "report.md", "csv": "results.csv"}
PLOTS: Final = "plots"


@dataclass(frozen=True)
class Report:
    """`paths`: what was written: "html", "md", "csv", and plots by their file names. `missing`: sentences about what
    could not be used. `sentences`: what may be quoted; `caution`: how many intervals were looked at for them."""

    paths: dict[str, Path]
    missing: tuple[str, ...]
    sentences: tuple[str, ...]
    caution: str

    def to_json(self) -> dict[str, Any]:
        return {
            "paths": {name: str(path) for name, path in self.paths.items()},
            "missing": list(self.missing),
            "sentences": list(self.sentences),
            "caution": self.caution,
        }


def report(
    places: str | Path | Sequence[str | Path] | Gathered,
    out: str | Path = "report",
    *,
    reference: str | None = None,
    family: Sequence[str | Family] = (),
    formats: Sequence[str] = FORMATS,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Write the report of `places` (results files, folders of them, others' results) into the folder `out`.

    `reference`, `family`: as in gather(). `formats`: some of FORMATS; png and svg are the plots, in `out`/plots.
    `progress` is told what is being done. Files are replaced, each whole or not at all.

    Raises UsageError for unknown formats, an `out` that cannot be a folder, and as gather() does, InputError where no
    results can be read, ResourceError when nothing can be written.
    """
    for word in formats:
        if word not in FORMATS:
            hint = f"known: {', '.join(FORMATS)}"
            raise UsageError(f"no format is called {word!r}.{did_you_mean(word, list(FORMATS))}", hint=hint)
    if not formats:
        raise UsageError("no format to write", hint=f"known: {', '.join(FORMATS)}")
    tell = progress or (lambda _: None)
    folder = Path(out)
    there = next((path for path in (folder, *folder.absolute().parents) if os.path.lexists(path)), folder)
    if not there.is_dir():
        raise UsageError(f"{there}: not a folder, so no report can go there", hint="-o names a folder")
    tell("reading results")
    gathered = (
        places if isinstance(places, Gathered) else gather(with_results(places), reference=reference, family=family)
    )
    require_entries(gathered)
    tell("comparing")
    pairs = Pairs()
    found = sentences(gathered, pairs)
    drawn = [word for word in formats if word in ("png", "svg")]
    plots = _plots(gathered, folder / PLOTS, drawn, tell) if drawn else []
    made: dict[str, Callable[[], str]] = {
        "html": lambda: render(gathered, found, pairs, pictures=sorted(f"{PLOTS}/{path.name}" for path in plots)),
        "md": lambda: markdown_text(gathered, found),
        "csv": lambda: csv_text(gathered.entries, Sources(gathered.entries)),
    }
    paths: dict[str, Path] = {}
    for word, make in made.items():
        if word in formats:
            tell(f"writing {NAMES[word]}")
            paths[word] = write(folder / NAMES[word], make())
    missing = missing_lines(gathered)
    paths |= {path.name: path for path in plots}
    return Report(paths, tuple(missing), tuple(found.quoted), found.caution)


def require_entries(gathered: Gathered) -> None:
    """Raises InputError, with what was wrong, where no results could be read."""
    if not gathered.entries:
        raise InputError(
            "no results that can be read, so there is nothing to describe: " + "; ".join(missing_lines(gathered)[:3]),
            hint="apex eval MODEL -o results.json makes them",
        )


def markdown_text(gathered: Gathered, found: Sentences) -> str:
    """The table, what may be said and what is missing, as Markdown."""
    sources = Sources(gathered.entries)
    keys = measured(gathered.entries)
    unit = bytes_unit(entry.bytes or 0 for entry in gathered.entries)
    heads = ["File", f"Size, {unit[1]}", "bpw", *(markdown(QUANTITIES[key].axis) for key in keys)]
    rows = []
    for entry in gathered.entries:
        cells = [
            size_cell(entry, unit, sources),
            bpw_cell(entry, sources),
            *(cell(entry, key, sources) for key in keys),
        ]
        rows.append([markdown(entry.label), *(markdown(one.text) for one in cells)])
    quoted = [f"> {markdown(sentence)}\n" for sentence in found.quoted] or [markdown(no_claims(found)) + "\n"]
    parts = ["# Report\n", *quoted, found.caution and f"{found.caution}\n", markdown_table(heads, rows) + "\n"]
    parts += ["Intervals are at 95 %; a number without one states none. “±” is a standard error, of speeds a standard "
              "deviation.\n"]  # fmt: skip
    lines = missing_lines(gathered)
    parts += ["## Not usable\n", *(f"- {markdown(line)}" for line in lines)] if lines else []
    groups: dict[str, list[str]] = {}
    for entry in gathered.entries:
        groups.setdefault(", ".join(entry.not_measured()) or "nothing", []).append(entry.label)
    lines_ = [f"{', '.join(labels)}: {what}" for what, labels in groups.items()]
    parts += ["\n## Not measured\n", *(f"- {markdown(line)}" for line in lines_)]
    return "\n".join(part for part in parts if part) + "\n"


def write(path: Path, text: str) -> Path:
    """Replace a text file whole. Raises ResourceError."""
    data = text.encode("utf-8", "replace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{path.parent}: cannot be made: {error.strerror}") from None
    require_space(path, len(data))
    return write_file(path, data)


def _plots(gathered: Gathered, folder: Path, formats: Sequence[str], tell: Callable[[str], None]) -> list[Path]:
    from apex_quant.report.plots import write_plots

    tell("drawing plots")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{folder}: cannot be made: {error.strerror}") from None
    return write_plots(gathered, folder, formats)
