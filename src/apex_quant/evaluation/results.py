"""results.json: what was measured on one model, with what, and how sure it is. Read, written, grown and merged.

The schema is that of `schema`; keys that this version does not know are kept. The file is replaced whole, and grown
under a lock, so that a metric that is finished is never lost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike

from apex_quant.errors import BusyError, InputError, UsageError
from apex_quant.evaluation import pertoken
from apex_quant.evaluation.pertoken import Arrays
from apex_quant.evaluation.schema import SCHEMA as SCHEMA
from apex_quant.evaluation.schema import ModelInfo, NotResultsError, PerToken, different_references, parse
from apex_quant.evaluation.schema import Results as Results
from apex_quant.gguf.atomic import AtomicFile, require_space

MAX_BYTES: Final = 64 << 20
MAX_DEPTH: Final = 50  # by_position of kld is 4 deep


def load(path: str | Path) -> Results:
    """Read results.json. Raises InputError for one that is missing, broken, not results, or of a newer apex."""
    path = Path(path)
    text = pertoken.read_bounded(path, MAX_BYTES, "results")
    try:
        document = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{path}: not a whole JSON document: {reason}") from None
    if _too_deep(document):
        raise InputError(f"{path}: nested too deep for results")
    results = parse(document, path)
    results._path = path
    return results


def save(results: Results, path: str | Path) -> Path:
    """Write results.json, whole or not at all. Raises InputError for numbers JSON has none for, ResourceError."""
    path = Path(path)
    return _replace(AtomicFile(path), results, path, None)


def update(
    path: str | Path,
    metric: str,
    value: Mapping[str, Any],
    *,
    base: Results | None = None,
    arrays: Mapping[str, ArrayLike] | None = None,
    warnings: Iterable[str] = (),
) -> Results:
    """Add one finished metric to results.json, in one step that a kill leaves either undone or done.

    `base` is what a new file starts as (model, reference, settings, environment); of an existing one it replaces the
    settings and environment it names and must be about the same model. `arrays` are the metric's numbers per token,
    without its name ("chunk", not "kld/chunk"); they replace the metric's old ones. A metric measured again replaces
    the old one. Raises InputError when the existing file is about another model, and BusyError when another process
    keeps writing it.

    The new archive waits beside the old one, complete, until results.json names its sha256, and takes its place
    after that; `pertoken.read` looks at both. So no kill in between loses what was there.
    """
    path = Path(path)
    file = _locked(path)
    try:
        old = load(path) if path.exists() else None
        results = _grown(old, base, path)
        kept, lost = _kept(old, metric)
        results.metrics = {**results.metrics, metric: dict(value)}
        results.warnings = list(dict.fromkeys([*results.warnings, *lost, *warnings]))
        kept |= {f"{metric}/{name}": np.asanyarray(array) for name, array in (arrays or {}).items()}
    except BaseException:
        file.abandon()
        raise
    _replace(file, results, path, kept)
    return results


def archive_path(path: str | Path) -> Path:
    """NAME.npz for NAME.json."""
    return Path(path).with_suffix(".npz")


def merge(items: Sequence[Results | str | Path]) -> Results:
    """Results of one model put together: for a metric that several have, the later one's. `warnings` say so.

    Raises UsageError without items, InputError when their models or references are not the same.
    """
    every = [item if isinstance(item, Results) else load(item) for item in items]
    if not every:
        raise UsageError("nothing to merge")
    merged = every[0].model_copy(deep=True)
    merged.per_token, merged._path = None, None
    for later in every[1:]:
        _same_model(merged, later)
        lines = [*merged.warnings, *later.warnings]
        for name, value in later.metrics.items():
            if merged.metrics.get(name, value) != value:
                lines.append(f"{name}: measured twice, the later one is kept")
        for part in ("settings", "environment"):
            mine, other = getattr(merged, part), getattr(later, part)
            differing = [key for key in other if mine.get(key, other[key]) != other[key]]
            lines += [f"{part} {key}: {mine[key]!r} and {other[key]!r}" for key in differing]
            setattr(merged, part, {**mine, **other})
        known = {key: item for key, item in later.model.model_dump().items() if item is not None}
        merged.model = ModelInfo(**{**merged.model.model_dump(), **known, "path": merged.model.path})
        merged.reference = later.reference or merged.reference
        merged.metrics = {**merged.metrics, **later.metrics}
        merged.warnings = list(dict.fromkeys(lines))
    return merged


def merge_files(paths: Sequence[str | Path], out: str | Path, *, force: bool = False) -> Results:
    """`merge`, with the numbers per token, into `out`. Raises also UsageError when it exists and `force` is not set."""
    out = Path(out)
    taken = [one for one in (out, archive_path(out)) if one.exists()]
    if taken and not force:
        raise UsageError(f"{taken[0]} exists already", hint="choose another name or use --force")
    every = [load(path) for path in paths]
    merged = merge(every)
    arrays: Arrays = {}
    for one in every:
        arrays = {k: v for k, v in arrays.items() if k.partition("/")[0] not in one.metrics} | one.arrays()
    _replace(_locked(out), merged, out, arrays)
    return merged


def _replace(file: AtomicFile, results: Results, path: Path, arrays: Arrays | None) -> Path:
    """Write results, with these numbers per token (None: those it names already), into the opened file at `path`."""
    archive = archive_path(path)
    waiting = archive.with_name(archive.name + pertoken.NEXT)
    with file:
        if arrays is not None:
            sha256 = pertoken.write(waiting, arrays) if arrays else ""
            results.per_token = PerToken(path=archive.name, sha256=sha256) if arrays else None
        data = _encoded(results, path)
        require_space(path, len(data))
        file.pwrite(data, 0)
    if arrays:
        waiting.replace(archive)
    results._path = path
    return path


def _kept(old: Results | None, metric: str) -> tuple[Arrays, list[str]]:
    """The numbers per token of other metrics, and what to say when they are lost: the new metric must not be."""
    if old is None:
        return {}, []
    try:
        arrays = old.arrays()
    except InputError as error:
        return {}, [f"the numbers per token of earlier metrics are lost: {error.message}"]
    return {name: array for name, array in arrays.items() if not name.startswith(metric + "/")}, []


def find(places: Sequence[str | Path]) -> tuple[list[Results], list[Path]]:
    """Results in files and in folders (their .json files, not those of folders in them), and what was passed over.

    A file that is named must be results; one in a folder may be something else, but not broken or newer results.
    Raises InputError, also when there are none at all.
    """
    found: list[Results] = []
    passed_over: list[Path] = []
    for place in map(Path, places):
        if not place.is_dir():
            found.append(load(place))
            continue
        for path in sorted(place.glob("*.json")):
            try:
                found.append(load(path))
            except NotResultsError:
                passed_over.append(path)
    if not found:
        raise InputError(
            f"no results in {', '.join(map(str, places))}", hint="apex eval MODEL -o results.json makes them"
        )
    return found, passed_over


def summary(results: Results) -> dict[str, Any]:
    """One row of a list: path, model, metrics and warnings, as in results.json."""
    document = results.to_json()
    row = {key: document[key] for key in ("model", "reference", "metrics", "warnings")}
    return {"path": None if results.path is None else str(results.path), "name": results.name, **row}


def _locked(path: Path) -> AtomicFile:
    """The new file, which is also the lock: whoever has it may read the old one and take its place."""
    try:
        return AtomicFile.when_free(path)
    except BusyError as error:
        raise BusyError(error.message, hint="choose another -o") from None


def _grown(old: Results | None, base: Results | None, path: Path) -> Results:
    if old is None:
        if base is None:
            raise UsageError(f"{path}: there is none yet, and nothing says which model it is about")
        return base.model_copy(deep=True)
    if base is not None:
        _same_model(old, base, path)
        old.reference = base.reference or old.reference
        old.settings = {**old.settings, **base.settings}
        old.environment = {**old.environment, **base.environment}
        old.warnings = [*old.warnings, *base.warnings]
    return old


def _same_model(a: Results, b: Results, path: Path | None = None) -> None:
    if a.model.sha256 is None or b.model.sha256 is None or a.model.sha256 != b.model.sha256:
        where = f"{path}: " if path else ""
        raise InputError(
            f"{where}results of different models: {a.name} (sha256 {str(a.model.sha256)[:12]}) and "
            f"{b.name} ({str(b.model.sha256)[:12]})",
            hint="one results.json is about one file; apex compare compares two",
        )
    if a.reference and b.reference and different_references(a.reference, b.reference):
        raise InputError(
            f"{path or a.name}: measured against different references",
            hint="measure all divergences against one reference, or write to another -o",
        )


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")


def _too_deep(document: Any) -> bool:
    """Whether lists and objects are nested more than MAX_DEPTH deep."""
    level = [document]
    for _ in range(MAX_DEPTH):
        items = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [item for some in items for item in some]
    return bool(level)


def _encoded(results: Results, path: Path) -> bytes:
    document = results.to_json()
    bad = _not_finite(document)
    if bad is not None:
        raise InputError(f"{path}: {bad} is not a finite number")
    return (json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def _not_finite(value: Any, where: str = "") -> str | None:
    """Where the first NaN or infinity is."""
    if isinstance(value, float):
        return None if math.isfinite(value) else where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found = (_not_finite(item, f"{where}.{key}" if where else str(key)) for key, item in items)
    return next((one for one in found if one is not None), None)
