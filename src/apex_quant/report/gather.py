"""`gather`: everything a report is made of, from results files and what lies beside them.

gathered = gather(["results/"], family=["Unsloth=UD-*"])
for entry in gathered.entries:
    print(entry.label, entry.bytes, entry.number("kld"))

Nothing that is broken stops it: what cannot be read is in `missing`, with a sentence that says what to do.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from apex_quant.errors import ApexError, InputError, UsageError, did_you_mean
from apex_quant.evaluation import pertoken
from apex_quant.evaluation.results import load
from apex_quant.evaluation.schema import NotResultsError, Results
from apex_quant.report.comparable import SetAside, Shown, comparable
from apex_quant.report.entry import Entry
from apex_quant.report.examples import EXAMPLE, example
from apex_quant.report.experts import Coverage, coverage
from apex_quant.report.family import Family, family_of, matches, parse_families
from apex_quant.report.imports import NotImportableError, import_results
from apex_quant.report.labels import short_labels
from apex_quant.report.quantities import QUANTITIES

MOST_FILES: Final = 5000
_FULL: Final = ("BF16", "F16", "F32", "FP16")
_MAX_PLAN: Final = 64 << 20


@dataclass(frozen=True)
class Missing:
    """Something a reader might expect and will not find: `place` (a file or folder), what kind, and a sentence."""

    place: str
    kind: str
    """corrupt, unfinished, other_file, not_measured, set_aside"""
    sentence: str

    def to_json(self) -> dict[str, str]:
        return {"place": self.place, "kind": self.kind, "sentence": self.sentence}


@dataclass
class Gathered:
    """`entries` in the order of their sizes, largest first; `reference` is one of them, or None.

    `about_reference`: what the results say of what divergences are from, also where no entry is about it. `coverage`:
    of the importance matrices that lie beside the results. `passed_over`: JSON files of something else.
    """

    places: tuple[str, ...]
    entries: tuple[Entry, ...]
    reference: Entry | None
    about_reference: dict[str, Any] | None
    families: tuple[str, ...]
    coverage: tuple[Coverage, ...]
    found_missing: tuple[Missing, ...] = ()
    passed_over: tuple[str, ...] = ()
    _shown: dict[str, tuple[list[Shown], list[SetAside]]] = field(default_factory=dict, repr=False)

    def shown(self, key: str) -> list[Shown]:
        """Numbers of a quantity that may stand on one axis, in the order of entries."""
        return self._split(key)[0]

    def set_aside(self, key: str) -> list[SetAside]:
        """Those that may not, each with a sentence."""
        return self._split(key)[1]

    @property
    def missing(self) -> list[Missing]:
        """All that is missing: what could not be read, and files whose numbers are not comparable with the rest. Grows
        with what is read later (archives, headers)."""
        rows = list(self.found_missing)
        for entry in self.entries:
            rows += [Missing(entry.files[0], "other_file", line) for line in entry.missing]
        for key in QUANTITIES:
            rows += [Missing(one.number.file, "set_aside", one.sentence) for one in self.set_aside(key)]
        return rows

    @cached_property
    def by_label(self) -> dict[str, Entry]:
        return {entry.label: entry for entry in self.entries}

    def to_json(self, *, tensors: bool = True, per_token: bool = True) -> dict[str, Any]:
        """Everything as JSON holds it; see Entry.to_json for what may be left away."""
        return {
            "entries": [entry.to_json(tensors=tensors, per_token=per_token) for entry in self.entries],
            "reference": None if self.reference is None else self.reference.label,
            "about_reference": self.about_reference,
            "families": list(self.families),
            "coverage": [one.to_json() for one in self.coverage],
            "missing": [one.to_json() for one in self.missing],
            "passed_over": list(self.passed_over),
        }

    def _split(self, key: str) -> tuple[list[Shown], list[SetAside]]:
        if key not in self._shown:
            self._shown[key] = comparable(self.entries, key)
        return self._shown[key]


def gather(
    places: Sequence[str | Path], *, reference: str | None = None, family: Sequence[str | Family] = ()
) -> Gathered:
    """Read results files, folders of them, others' results (imports.py) and examples ("example:NAME").

    `reference`: name or glob of the file that the others are measured against, where the results do not say it.
    `family`: NAME=GLOB for each family of files, as in family.py.

    Raises UsageError when nothing or several things are called `reference`, InputError for a place that does not
    exist or where there is nothing at all. What is there but unreadable is in `missing`.
    """
    families = [*parse_families([one for one in family if isinstance(one, str)]),
                *(one for one in family if not isinstance(one, str))]  # fmt: skip
    reading = _Reading()
    for place in places:
        reading.place(str(place))
    if not reading.results and not reading.missing:
        raise InputError(
            f"no results in {', '.join(map(str, places))}", hint="apex eval MODEL -o results.json makes them"
        )
    groups = _groups(reading.results)
    chosen = _reference(groups, reference)
    names = [group[0].name for group in groups]
    hints = [group[0].path.stem if group[0].path is not None else "" for group in groups]
    if len(set(hints)) < len(hints):
        hints = [group[0].path.parent.name if group[0].path is not None else "" for group in groups]
    files = _file_names([one for group in groups for one in group])
    entries = []
    for number, (group, label) in enumerate(zip(groups, short_labels(names, hints), strict=True)):
        model = group[0].model.model_dump()
        is_reference = number == chosen
        kind = family_of(group[0].name, model, families, is_reference=is_reference)
        entry = Entry(label, kind, tuple(group), tuple(files[id(one)] for one in group), is_reference=is_reference)
        _beside(entry, reading.plans)
        entries.append(entry)
    found = entries[chosen] if chosen is not None else None
    entries.sort(key=lambda entry: (-(entry.bytes or 0), entry.label))
    counts = Counter(entry.family for entry in entries)
    order = sorted(counts, key=lambda name: (-counts[name], name))
    return Gathered(
        places=tuple(str(place) for place in places),
        entries=tuple(entries),
        reference=found,
        about_reference=_about_reference(entries),
        families=tuple(order),
        coverage=tuple(reading.coverage()),
        found_missing=tuple(reading.missing),
        passed_over=tuple(path.name for path in reading.passed_over),
    )


class _Reading:
    """Places to results, and what was not read."""

    def __init__(self) -> None:
        self.results: list[Results] = []
        self.missing: list[Missing] = []
        self.passed_over: list[Path] = []
        self.folders: dict[Path, None] = {}
        self.plans: dict[str, Path] = {}  # by the file name and the recipe's hash they are of
        self._seen: set[Path] = set()

    def place(self, place: str) -> None:
        if place.startswith(EXAMPLE):
            self._add(example(place.removeprefix(EXAMPLE)), named=True)
            return
        path = Path(place)
        if not path.is_dir():
            if not os.path.lexists(path):
                raise InputError(f"{path}: no such file or folder")
            self._add(path, named=True)
            self.folders[path.parent] = None
            return
        self.folders[path] = None
        try:
            names = sorted(path.iterdir())
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        found = [name for name in names if name.suffix == ".json"]
        for name in found[:MOST_FILES]:
            self._add(name, named=False)
        if len(found) > MOST_FILES:
            self._note(path, "other_file", f"{path.name}: {len(found)} JSON files, the first {MOST_FILES} are read")
        for name in names:
            if name.suffix == ".state":
                what = name.name.removesuffix(".state")
                self._note(name, "unfinished", f"{what}: the measurement was interrupted; the same command goes on")

    def _add(self, path: Path, *, named: bool) -> None:
        resolved = path.absolute()
        if resolved in self._seen:
            return
        self._seen.add(resolved)
        try:
            if path.suffix != ".json":
                self.results += import_results(path)
                return
            try:
                self.results.append(load(path))
            except NotResultsError:
                try:
                    self.results += import_results(path)
                except NotImportableError:
                    if named and not self._plan(path):
                        raise
                    if not named:
                        self._plan(path)
                        self.passed_over.append(path)
        except ApexError as error:
            self._note(path, "corrupt", _one_line(error.message))

    def _plan(self, path: Path) -> bool:
        """Whether it is what `apex plan --json` printed; it is remembered then."""
        try:
            document = json.loads(pertoken.read_bounded(path, _MAX_PLAN, "the document"))
        except (ApexError, ValueError, RecursionError):
            return False
        if not isinstance(document, dict) or not isinstance(document.get("tensors"), list):
            return False
        keys = [document.get("file_name"), document.get("recipe_sha256")]
        self.plans |= {key: path for key in keys if isinstance(key, str) and key}
        return True

    def coverage(self) -> list[Coverage]:
        """Of the importance matrices in the folders."""
        found = []
        for folder in self.folders:
            for path in sorted(folder.glob("*.gguf")):
                if "imatrix" in path.name.lower():
                    try:
                        one = coverage(path)
                    except ApexError as error:
                        self._note(path, "corrupt", _one_line(error.message))
                        continue
                    if one is not None:
                        found.append(one)
        return found

    def _note(self, path: Path, kind: str, sentence: str) -> None:
        self.missing.append(Missing(path.name, kind, sentence))


def _groups(every: Sequence[Results]) -> list[list[Results]]:
    """Results of the same file, measured into several results files, belong together unless they contradict."""
    groups: list[list[Results]] = []
    by_hash: dict[str, list[list[Results]]] = defaultdict(list)
    for one in every:
        # imports know no hash: of those the name decides
        known = one.model.sha256 or (f"imported {one.name}" if "imported" in one.settings else "")
        same = by_hash[known] if known else []
        fitting = next(
            (group for group in same if not any(set(other.metrics) & set(one.metrics) for other in group)), None
        )
        if fitting is not None:
            fitting.append(one)
            continue
        groups.append([one])
        same.append(groups[-1])
    return groups


def _reference(groups: Sequence[Sequence[Results]], asked: str | None) -> int | None:
    """Which group is about the reference. Raises UsageError."""
    names = [group[0].name for group in groups]
    if asked is not None:
        found = [number for number, name in enumerate(names) if name == asked.removesuffix(".gguf")]
        found = found or [number for number, name in enumerate(names) if matches(name, asked)]
        if not found:
            raise UsageError(f"no results are of {asked!r}.{did_you_mean(asked, names)}", hint="see apex results")
        if len(found) > 1:
            raise UsageError(f"{asked!r} fits {len(found)} files, {names[found[0]]} and {names[found[1]]} among them")
        return found[0]
    hashes = {
        str(one.reference[key])
        for group in groups
        for one in group
        if one.reference
        for key in ("model_sha256", "sha256")
        if one.reference.get(key)
    }
    for number, group in enumerate(groups):
        if group[0].model.sha256 in hashes:
            return number
    full = [
        number
        for number, group in enumerate(groups)
        if any(matches(names[number], kind) for kind in _FULL) and not any("kld" in one.metrics for one in group)
    ]
    return max(full, key=lambda number: groups[number][0].model.bytes or 0, default=None)


def _about_reference(entries: Sequence[Entry]) -> dict[str, Any] | None:
    """What most of them were measured against."""
    found = [entry.source_of("kld").reference for entry in entries]
    said = [json.dumps(one, sort_keys=True, default=str) for one in found if one]
    if not said:
        return None
    most = Counter(said).most_common(1)[0][0]
    made: dict[str, Any] = json.loads(most)
    return made


def _file_names(every: Sequence[Results]) -> dict[int, str]:
    """What traces call each file: its name; from the folder they share on where names are alike."""
    paths = [one.path for one in every]
    names = [path.name if path is not None else one.name for path, one in zip(paths, every, strict=True)]
    distinct = {path.absolute() for path in paths if path is not None}
    if len({path.name for path in distinct}) == len(distinct):
        return {id(one): name for one, name in zip(every, names, strict=True)}
    top = os.path.commonpath([path.parent for path in distinct])
    return {
        id(one): name if path is None else path.absolute().relative_to(top).as_posix()
        for one, name, path in zip(every, names, paths, strict=True)
    }


def _beside(entry: Entry, plans: dict[str, Path]) -> None:
    """Find the GGUF and the plan of a file. A GGUF of another size is another file."""
    folder = entry.results.path.parent if entry.results.path is not None else None
    if folder is not None and entry.file_name.endswith(".gguf") and entry.imported is None:
        for path in (folder / entry.file_name, folder.parent / entry.file_name):
            if not path.is_file():
                continue
            if entry.bytes is not None and "-of-" not in path.name and path.stat().st_size != entry.bytes:
                entry.missing.append(
                    f"{entry.label}: {path.name} beside the results has {path.stat().st_size} bytes, the measured file "
                    f"had {entry.bytes}: it is another file and nothing of it is shown"
                )
                break
            entry.gguf = path
            break
    keys = (entry.file_name, entry.results.model.recipe_sha256)
    entry.plan = next((plans[key] for key in keys if key and key in plans), None)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
