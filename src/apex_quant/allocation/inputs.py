"""What optimize() and frontier() start from and where they write: sensitivities, paths, progress."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_quant.allocation import sensitivity
from apex_quant.allocation.sensitivity import Sensitivities
from apex_quant.errors import InputError, UsageError
from apex_quant.evaluation.identity import identity, sampled
from apex_quant.gguf import GGUFModel
from apex_quant.importance import Importance
from apex_quant.recipe.metadata import display_name
from apex_quant.runtime.options import SessionOptions


@dataclass(frozen=True)
class OptimizeProgress:
    """What is being done; `event` is that of the step (measuring, encoding, evaluating), where it has one."""

    what: str
    event: Any = None


@dataclass(frozen=True)
class Paths:
    """Where everything goes."""

    recipe: Path
    certificate: Path
    output: Path

    @classmethod
    def of(cls, model: GGUFModel, out: str | Path | None, name: str | None, force: bool) -> Paths:
        recipe = Path(out) if out is not None else Path(f"{display_name(model)}-APEX-Measured.recipe.txt")
        if recipe.suffix == ".gguf" or recipe.is_dir():
            raise UsageError(f"{recipe}: the recipe goes to a file such as recipe.txt")
        if not recipe.parent.is_dir():
            raise UsageError(f"{recipe.parent}: no such folder")
        stem = recipe.name.removesuffix(".txt").removesuffix(".json").removesuffix(".recipe")
        output = recipe.with_name(name or f"{display_name(model)}-APEX-Measured.gguf")
        if output.exists() and any(output.samefile(file.path) for file in model.files):
            raise UsageError(f"{output}: is the model itself", hint="choose another folder for -o")
        if recipe.exists() and not force:
            raise UsageError(f"{recipe} exists already", hint="--force replaces it")
        return cls(recipe, recipe.with_name(f"{stem}.certificate.json"), output)


def sensitivities_of(
    model: GGUFModel,
    given: str | Path | Sensitivities | None,
    imatrix: str | Path | None,
    *,
    fill: str = "prior",
    session: SessionOptions | None = None,
    report: Callable[[OptimizeProgress], None] | None = None,
) -> Sensitivities:
    """Those given, or those of measure() with its defaults, kept beside the model under a name that says of what.

    Raises InputError when they are another model's, or were measured with another importance matrix.
    """
    with ExitStack() as held:
        matrix = held.enter_context(Importance.read(imatrix)) if imatrix is not None else None
        hashed = matrix.sha256 if matrix is not None else None
    if given is None:
        from apex_quant.allocation.measure import measure

        name = f"{display_name(model)}.{sampled(model)[:8]}-{(hashed or 'plain')[:8]}.sensitivity.json"
        folder = model.path.parent if os.access(model.path.parent, os.W_OK) else Path()
        say = report or (lambda _: None)
        return measure(
            model.path,
            out=folder / name,
            imatrix=imatrix,
            fill=fill,
            options=session,
            progress=lambda event: say(OptimizeProgress("measuring", event)),
        )
    measured = given if isinstance(given, Sensitivities) else sensitivity.load(given)
    if measured.model.sha256 != identity(model).sha256:
        raise InputError(
            f"the sensitivities are those of another model, {measured.model.name}", hint="measure this one"
        )
    theirs = (measured.imatrix or {}).get("sha256")
    if hashed is not None and theirs is not None and theirs != hashed:
        raise InputError("the sensitivities were measured with another importance matrix", hint="measure again")
    return measured
