"""What optimize() and frontier() start from and where they write: sensitivities, paths, a working folder."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_quant.allocation import sensitivity
from apex_quant.allocation.sensitivity import Sensitivities
from apex_quant.errors import InputError, ResourceError, UsageError, did_you_mean
from apex_quant.evaluation.identity import identity, sampled
from apex_quant.gguf import GGUFModel
from apex_quant.gguf.atomic import AtomicFile
from apex_quant.importance import Importance
from apex_quant.importance.fill import RULES, prior_of
from apex_quant.recipe.metadata import display_name
from apex_quant.runtime.options import SessionOptions

_COPY = 16 << 20
_KINDS = {
    "real": "were measured", "noise": "were measured by noise", "estimated": "are estimated from other layers",
    "guessed": "are guessed from their error alone", "unknown": "are not known",
}  # fmt: skip


@dataclass(frozen=True)
class OptimizeProgress:
    """What is being done; `event` is that of the step (measuring, encoding, evaluating), where it has one."""

    what: str
    event: Any = None


@dataclass(frozen=True)
class Paths:
    """Where everything goes. `work`: encoded candidates and what was measured, until a run has finished."""

    recipe: Path
    certificate: Path
    output: Path
    work: Path

    @classmethod
    def of(cls, model: GGUFModel, out: str | Path | None, name: str | None, *, quantize: bool, force: bool) -> Paths:
        """Raises UsageError for what cannot be written, or is there already without `force`."""
        recipe = Path(out) if out is not None else Path(f"{display_name(model)}-APEX-Measured.recipe.txt")
        if recipe.suffix == ".gguf" or recipe.is_dir():
            raise UsageError(f"{recipe}: the recipe goes to a file such as recipe.txt")
        if not recipe.parent.is_dir():
            raise UsageError(f"{recipe.parent}: no such folder")
        stem = recipe.name.removesuffix(".txt").removesuffix(".json").removesuffix(".recipe")
        paths = cls(
            recipe,
            recipe.with_name(f"{stem}.certificate.json"),
            recipe.with_name(name or f"{display_name(model)}-APEX-Measured.gguf"),
            recipe.with_name(f"{stem}.apex-work"),
        )
        if paths.output.exists() and any(paths.output.samefile(file.path) for file in model.files):
            raise UsageError(f"{paths.output}: is the model itself", hint="choose another folder for -o")
        for path in (paths.recipe, paths.certificate, *([paths.output] if quantize else [])):
            if path.exists() and not force:
                raise UsageError(f"{path} exists already", hint="--force replaces it")
        return paths


@contextmanager
def working_folder(path: Path, *, keep: bool) -> Iterator[Path]:
    """A folder that one process at a time works in. It stays when the work is interrupted or fails, so that the same
    call goes on from there; with `keep` also afterwards. Raises UsageError where there can be none, BusyError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: cannot be made a folder: {error.strerror}") from None
    lock = AtomicFile(path / "lock")  # never completed
    try:
        yield path
    finally:
        lock.abandon()
    if not keep:
        shutil.rmtree(path, ignore_errors=True)


def moved(path: Path, target: Path) -> Path:
    """`path` under the name `target`, which it replaces whole or not at all; copied where that is on another disk."""
    try:
        path.replace(target)
        return target
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise ResourceError(f"{target}: cannot be written: {error.strerror}") from None
    with AtomicFile(target) as file, path.open("rb") as source:
        place = 0
        while part := source.read(_COPY):
            file.pwrite(part, place)
            place += len(part)
    path.unlink()
    return target


def sensitivities_of(
    model: GGUFModel,
    given: str | Path | Sensitivities | None,
    imatrix: str | Path | None,
    *,
    fill: str = "prior",
    session: SessionOptions | None = None,
    measuring: Mapping[str, Any] | None = None,
    report: Callable[[OptimizeProgress], None] | None = None,
) -> tuple[Sensitivities, list[str]]:
    """(sensitivities, what is to be known of them). Those given, or those of measure() with its defaults but for the
    arguments `measuring`, kept beside the model under a name that has the hash of all that decides them.

    Raises InputError when they are another model's, or were measured with another importance matrix.
    """
    rule: str | None = None
    hashed: str | None = None
    if fill not in RULES:
        raise UsageError(f"no rule of filling is called {fill!r}.{did_you_mean(fill, list(RULES))}")
    if imatrix is not None:
        with Importance.read(imatrix) as matrix:
            hashed, rule = matrix.sha256, prior_of(matrix, fill)
    if given is None:
        from apex_quant.allocation.measure import measure

        asked = {name: value for name, value in (measuring or {}).items() if value is not None}
        stem = f"{display_name(model)}.{sampled(model)[:8]}-{(hashed or 'plain')[:8]}"
        folder = model.path.parent if os.access(model.path.parent, os.W_OK) else Path()
        say = report or (lambda _: None)
        measured = measure(
            model.path,
            out=lambda spec: folder / f"{stem}-{spec[:8]}.sensitivity.json",
            imatrix=imatrix,
            fill=fill,
            options=session,
            progress=lambda event: say(OptimizeProgress("measuring", event)),
            **asked,
        )
        return measured, quality(measured)
    measured = given if isinstance(given, Sensitivities) else sensitivity.load(given)
    if measured.model.sha256 != identity(model).sha256:
        raise InputError(
            f"the sensitivities are those of another model, {measured.model.name}", hint="measure this one"
        )
    theirs = (measured.imatrix or {}).get("sha256")
    if hashed is not None and theirs is not None and theirs != hashed:
        raise InputError("the sensitivities were measured with another importance matrix", hint="measure again")
    notes = quality(measured)
    prior = (measured.imatrix or {}).get("prior")
    if (hashed is None) != (theirs is None):
        there, here = ("without" if one is None else "with" for one in (theirs, hashed))
        notes.append(
            f"the sensitivities were measured {there} an importance matrix and the file is encoded {here} one: errors "
            "of types are not those that it will have"
        )
    elif prior != rule:
        notes.append(f"the sensitivities were measured with experts filled by {prior!r}; the file has {rule!r}")
    return measured, notes


def quality(measured: Sensitivities) -> list[str]:
    """What has to be said where not everything was measured."""
    kinds = measured.kinds
    if not set(kinds) - {"real", "noise"}:
        return []
    counts = ", ".join(f"{count} {_KINDS[kind]}" for kind, count in kinds.items())
    return [
        f"of {len(measured.groups)} groups {counts}, since the budget of apex measure ended: what is optimal for such "
        "costs may be far from it for the model; the same command with a larger --budget goes on"
    ]
