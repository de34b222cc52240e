"""What of a folder may be published: which files, what they are, and whether their models were proven.

A model is published when the journal of the run that made it says finished (its data hash stands in the header, so
shards cut from it later are known too), nothing quarantined it, and the hub takes its size.
"""

from __future__ import annotations

import fnmatch
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from apex_quant.encode.journal import Journal
from apex_quant.errors import InputError, UsageError
from apex_quant.gguf import GGUFModel, open_model
from apex_quant.gguf.reader import SHARD_NAME
from apex_quant.model.patterns import PROJECTOR_ARCHITECTURES
from apex_quant.recipe.metadata import DATA_HASH

MOST_BYTES: Final = 48_000_000_000  # of one file: the hub's web downloads end at 50 GB
MOST_FILES: Final = 10_000
_MOST_JSON: Final = 256 << 20
QUARANTINE: Final = ".quarantine.json"
_CHECKING: Final = (".verify", ".evaluate")  # phases of `apex run` that leave a note each
SUMS: Final = "SHA256SUMS"
_STATE, _RELEASE = "state.json", "release"  # of `apex run`, and the folder in it that is published

Kind = Literal["model", "projector", "imatrix", "recipe", "results", "report", "card", "sums"]
# first match wins; of the path inside the folder, lower case
_KINDS: Final[tuple[tuple[str, Kind], ...]] = (
    ("report/*", "report"),
    ("readme.md", "card"),
    ("license*", "card"),
    ("*.gguf", "model"),
    ("*.imatrix", "imatrix"),
    ("*imatrix*.dat", "imatrix"),
    ("recipes/*", "recipe"),
    ("*recipe*.txt", "recipe"),
    ("*recipe*.json", "recipe"),
    ("*recipe*.toml", "recipe"),
    ("*.json", "results"),
    ("*.npz", "results"),
)
_NEVER: Final = (".partial", ".journal", QUARANTINE, ".next", ".lock", ".tmp")


@dataclass(frozen=True)
class LocalFile:
    """A file to publish: its path in the repository, its place here, and its size and time when it was listed."""

    path: str
    file: Path
    kind: Kind
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Model:
    """A GGUF model among the files: one path, or its shards in order."""

    paths: tuple[str, ...]
    first: Path


@dataclass(frozen=True)
class Publishable:
    """The files, the models among them, and what stays here."""

    files: tuple[LocalFile, ...]
    models: tuple[Model, ...]
    left_out: tuple[str, ...]


def publishable(directory: str | Path) -> Publishable:
    """List what a folder has to publish. Reads headers only; `verify` the models before they leave.

    Raises UsageError for no folder, that of a run (its release lies a level below), one without anything to publish,
    or files over 48 GB; InputError for models that are quarantined, unfinished or not what their journal says, all of
    them named in one message.
    """
    root = Path(directory)
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder", hint="apex publish takes the folder with the files to publish")
    if (root / _STATE).is_file() and (root / _RELEASE).is_dir():
        raise UsageError(
            f"{root} is the folder of a run: what it publishes lies in {root / _RELEASE}",
            hint=f"apex publish {root / _RELEASE} ORG/NAME; or --phase publish of the run itself",
        )
    files, left_out = _listed(root)
    models, others = _models(files)
    files = [replace(file, kind=others.get(file.path, file.kind)) for file in files]
    files, unproven = _results_only(files)
    left_out += unproven
    whole = {model.paths[0] for model in models if len(model.paths) == 1}
    cut = {f"{SHARD_NAME.fullmatch(model.paths[0])['prefix']}.gguf" for model in models if len(model.paths) > 1}  # type: ignore[index]
    # a file stays here when its shards are beside it
    replaced = {file.path for file in files if file.path in whole & cut}
    left_out += sorted(f"{path} (its shards are published)" for path in replaced)
    files = [file for file in files if file.path not in replaced]
    models = [model for model in models if model.paths[0] not in replaced]
    if not files:
        raise UsageError(f"{root} has nothing to publish", hint="docs/publish.md lists what is published")
    _refuse_large(files)
    _refuse_unproven(models, {file.path: file for file in files})
    return Publishable(tuple(files), tuple(models), tuple(left_out))


def _listed(root: Path) -> tuple[list[LocalFile], list[str]]:
    """The files of a known kind, sorted, and the names of the others. Links to folders are not followed."""
    files: list[LocalFile] = []
    left_out: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder, name)
            path = file.relative_to(root).as_posix()
            if path == SUMS or name.startswith("."):
                continue
            kind = None if name.endswith(_NEVER) else kind_of(path)
            if kind is None or not file.is_file():
                left_out.append(path)
                continue
            status = file.stat()
            files.append(LocalFile(path, file, kind, status.st_size, status.st_mtime_ns))
            if len(files) > MOST_FILES:
                raise UsageError(
                    f"{root} has more than {MOST_FILES} files to publish", hint="is this the right folder?"
                )
    return sorted(files, key=lambda file: file.path), left_out


def kind_of(path: str) -> Kind | None:
    """What a file of this name is, or None for one that is not published."""
    return next((kind for pattern, kind in _KINDS if fnmatch.fnmatchcase(path.lower(), pattern)), None)


def _models(files: list[LocalFile]) -> tuple[list[Model], dict[str, Kind]]:
    """The models, shards together, and the GGUF files that are something else. InputError for a missing shard."""
    groups: dict[str, list[LocalFile]] = {}
    for file in files:
        if file.kind == "model":
            shard = SHARD_NAME.fullmatch(file.path)
            groups.setdefault(f"{shard['prefix']}/{shard['count']}" if shard else file.path, []).append(file)
    models: list[Model] = []
    others: dict[str, Kind] = {}
    for group in groups.values():
        with open_model(group[0].file) as opened:
            kind = _kind_inside(opened)
        if kind == "model":
            models.append(Model(tuple(file.path for file in group), group[0].file))
        else:
            others |= {file.path: kind for file in group}
    return models, others


def _kind_inside(opened: GGUFModel) -> Kind:
    """A projector stays as the converter wrote it: there is no journal of it, and nothing in it is measured."""
    if opened.get("general.type") == "imatrix":
        return "imatrix"
    return "projector" if opened.architecture in PROJECTOR_ARCHITECTURES else "model"


def _results_only(files: list[LocalFile]) -> tuple[list[LocalFile], list[str]]:
    """Of .json and .npz files, results of apex eval and their archives; state of other programs stays here."""
    archives = {
        (file.file.parent / str(document["per_token"].get("path"))).resolve()
        for file in files
        if file.kind == "results"
        and (document := _results(file)) is not None
        and isinstance(document.get("per_token"), dict)
    }
    kept = [
        file
        for file in files
        if file.kind != "results" or file.file.resolve() in archives or _results(file) is not None
    ]
    left = [file.path for file in files if file not in kept]
    return kept, left


def _results(file: LocalFile) -> dict[str, Any] | None:
    """The document, when it is one of apex eval."""
    if not file.path.endswith(".json") or file.bytes > _MOST_JSON:
        return None
    try:
        document = json.loads(file.file.read_bytes())
    except (ValueError, RecursionError):
        return None
    known = isinstance(document, dict) and str(document.get("schema")).startswith("apex.results/")
    return document if known else None


def _refuse_large(files: list[LocalFile]) -> None:
    for file in files:
        if file.bytes > MOST_BYTES:
            raise UsageError(
                f"{file.path} has {file.bytes / 1e9:.1f} GB, over the {MOST_BYTES / 1e9:.0f} GB that one file may have",
                # below the limit, for the header comes on top of the tensors
                hint=f"apex split {file.file} -o {str(file.file).removesuffix('.gguf')} --split-max-size 47G"
                if file.kind == "model"
                else "leave it out of the folder, or compress it",
            )


def _refuse_unproven(models: list[Model], files: dict[str, LocalFile]) -> None:
    refused = {model.paths[0]: why for model in models if (why := _problem(model, files)) is not None}
    if refused:
        raise InputError(
            "; ".join(f"{path}: {why}" for path, why in refused.items()),
            hint="only finished, verified files are published: make it again with apex quantize, or move it out of the "
            "folder",
        )


def _problem(model: Model, files: dict[str, LocalFile]) -> str | None:
    """Why this model is not published, by what lies beside it and its header; None when nothing speaks against it."""
    folder = model.first.parent
    for name in _names(model):
        for phase in ("", *_CHECKING):
            note = folder / (name + phase + QUARANTINE)
            if note.exists():
                return f"quarantined: {_quarantine_reason(note)}"
    journals = [Journal(path.with_name(path.name.removesuffix(".journal"))) for path in folder.glob("*.journal")]
    for journal in journals:
        journal.load()
    finished = [journal.finished for journal in journals if journal.finished is not None]
    with open_model(model.first) as opened:
        stated = str(opened.get(DATA_HASH) or "").strip()
    mine = [entry for entry in finished if entry["data_sha256"] == stated]
    if not stated or not mine:
        return "no journal beside it says that apex finished it"
    for path in model.paths:
        said = [one["bytes"] for entry in mine for one in entry["files"] if one["path"] == Path(path).name]
        if said and files[path].bytes not in said:
            return f"{Path(path).name} has {files[path].bytes} bytes, its journal says {said[0]}"
    return None


def _names(model: Model) -> list[str]:
    """File names that a quarantine note may bear: of each file and of the whole, with and without .gguf."""
    names = [Path(path).name for path in model.paths]
    names += [found["prefix"] for name in names[:1] if (found := SHARD_NAME.fullmatch(name)) is not None]
    stems = [name.removesuffix(".gguf") for name in names]
    return list(dict.fromkeys([*names, *stems, *(f"{stem}.gguf" for stem in stems)]))


def _quarantine_reason(note: Path) -> str:
    try:
        document = json.loads(note.read_bytes()[:1_000_000])
    except (OSError, ValueError, RecursionError):
        return f"{note.name} says so"
    found = document.get("reason") if isinstance(document, dict) else None
    return found[:300] if isinstance(found, str) and found else f"{note.name} says so"
