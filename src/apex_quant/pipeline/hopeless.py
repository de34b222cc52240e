"""What would fail hours into a run is refused before it begins: what was given is looked at, and the model's header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np

from apex_quant.encode.quantize import refuse_unsafe
from apex_quant.errors import InputError, UsageError
from apex_quant.gguf import GGUFModel, TensorInfo, open_model
from apex_quant.importance import Entry, Importance
from apex_quant.pipeline.config import RunConfig, is_word
from apex_quant.pipeline.context import Context
from apex_quant.pipeline.look import Look
from apex_quant.pipeline.wanted import Wanted, needing_importance, plan_options, wanted
from apex_quant.recipe.plan import plan
from apex_quant.recipe.planned import Plan

_EMBEDDING: Final = "token_embd.weight"


def refuse_hopeless(context: Context, looks: Sequence[Look]) -> None:
    """Look at what the phases that are due will read, as far as it is here. Only reads.

    Raises InputError for a file of the user's that is missing or no importance matrix, and for weights that are
    quantized already; UsageError for a size that no choice of types has; and what plan() raises.
    """
    due = {one.phase.name: {item.name for item, _ in one.due} for one in looks if one.due}
    for key, names in _named(context.config, due):
        for name in names:
            if not is_word(key, name) and not Path(name).exists():
                raise InputError(f"{name}: no such file or folder", hint=f"it stands in {key}")
    given = context.config.calibrate.imatrix
    with ExitStack() as held:
        is_read = due.keys() & {"calibrate", "recipes", "quantize"} and needing_importance(context.config)
        matrix = held.enter_context(Importance.read(given)) if given is not None and is_read else None
        path = _model(context, due)
        if path is not None and due.keys() & {"recipes", "quantize"}:
            opened = held.enter_context(open_model(path))
            making = due.get("recipes", set()) | due.get("quantize", set())
            _refuse_outputs(
                context.config, opened, [one for one in wanted(context.config) if one.name in making], matrix
            )


def _named(config: RunConfig, due: Mapping[str, object]) -> Iterator[tuple[str, Sequence[str]]]:
    """Names of files of the user's that the phases which are due will read, by the key that has them."""
    if "reference" in due:
        yield "reference.text", config.reference.text
    if "calibrate" in due and config.calibrate.imatrix is None:
        yield "calibrate.corpus", config.calibrate.corpus
    if due.keys() & {"evaluate", "baselines"}:
        yield "evaluate.task_files", list(config.evaluate.task_files.values())


def _model(context: Context, due: Mapping[str, object]) -> Path | None:
    """The full-precision GGUF where it is here already."""
    config = context.config
    if config.is_gguf and not config.is_hub:
        return Path(config.source)
    phase, label = ("source", "files") if config.is_gguf else ("convert", "model")
    record = context.record(phase)
    if record is None or due.keys() & {"source", "convert"}:
        return None
    paths = [context.state.where(file) for file in record.outputs.get(label, [])[:1]]
    return next((path for path in paths if path.exists()), None)


def _refuse_outputs(config: RunConfig, model: GGUFModel, outputs: Sequence[Wanted], matrix: Importance | None) -> None:
    options = plan_options(config)
    for one in outputs:
        if one.size is not None:
            continue
        known = matrix if one.weighted else None
        made = plan(model, one.asked, imatrix=known, options=options)
        _refuse_quantized(config, made)
        if known is not None:  # what is still to be calibrated is not known
            refuse_unsafe(made, options, has_matrix=True)
    if sizes := [one.size for one in outputs if one.size is not None]:
        least = smallest(config, model, matrix)
        if min(sizes) < least:
            raise UsageError(
                f"no file of this model has {min(sizes)} bytes: the smallest with these types has {least} bytes "
                f"({least / 1e6:.2f} MB)",
                hint="ask for more than that, or allow smaller types (optimize.types)",
            )


def _refuse_quantized(config: RunConfig, made: Plan) -> None:
    if made.requantized and not config.quantize.allow_requantize:
        raise InputError(
            f"{made.model}: {len(made.requantized)} tensors are already quantized ({made.requantized[0]} and others)",
            hint="take the full-precision file; --set quantize.allow_requantize=true does it anyway, at a loss",
        )


def smallest(config: RunConfig, model: GGUFModel, matrix: Importance | None = None) -> int:
    """Bytes of the smallest file that `sizes` could become, with the best that calibration may bring where there is no
    matrix yet. What is measured may leave less choice, never more. Raises UsageError where no type is left."""
    from apex_quant.allocation.beforehand import Free
    from apex_quant.allocation.choices import make_space
    from apex_quant.allocation.constraints import Constraints, as_types

    space = make_space(
        model,
        Free(model),
        importance=matrix if matrix is not None else _all_reached(model),
        constraints=Constraints(types=as_types(config.optimize.types or None)),
        options=plan_options(config),
        pruned=False,
    )
    return space.bounds()[0]


def _all_reached(model: GGUFModel) -> Importance:
    """A matrix, of ones, for all that calibration can reach: an embedding only where it is the output matrix, too."""
    tied = "output.weight" not in model.tensors
    reached = {
        name: info for name, info in model.tensors.items() if len(info.shape) > 1 and (tied or name != _EMBEDDING)
    }
    return Importance({name: _ones(info) for name, info in reached.items()})


def _ones(info: TensorInfo) -> Entry:
    rows = info.shape[2] if len(info.shape) > 2 else 1
    return Entry(np.ones(rows, dtype=np.int64), info.shape[0], lambda start, n: np.ones(n, dtype=np.float32))
