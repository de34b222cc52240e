"""`optimize`: which tensor deserves which type, by measurement, for any size.

made = optimize("MODEL-BF16.gguf", size=12_200_000_000, imatrix="imatrix.gguf", out="recipe.txt", quantize=True)
print(made.total_bytes, made.predicted_kld, made.measured_kld)

Costs come from sensitivities (measure.py), the choice from the exact solver, and the last word from whole files of two
or three near-optimal recipes, measured on the probe text.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from apex_quant.allocation import certificate as certificates
from apex_quant.allocation.choices import make_space
from apex_quant.allocation.constraints import Constraints, Speeds, as_types, read_speeds
from apex_quant.allocation.cost import CostModel
from apex_quant.allocation.inputs import OptimizeProgress, Paths, sensitivities_of
from apex_quant.allocation.loop import STEPS, Loop
from apex_quant.allocation.sensitivity import Sensitivities
from apex_quant.allocation.space import Predicted
from apex_quant.allocation.targets import target_of
from apex_quant.allocation.validate import Validator
from apex_quant.encode.job import JobProgress
from apex_quant.encode.quantize import quantize as quantize_
from apex_quant.errors import UsageError
from apex_quant.gguf import GGUFModel, open_model
from apex_quant.gguf.writer import AtomicFile
from apex_quant.importance import Importance
from apex_quant.recipe.plan import plan
from apex_quant.recipe.planned import PlanOptions
from apex_quant.runtime.options import SessionOptions


@dataclass(frozen=True)
class Optimized:
    """A finished allocation. `measured_kld` is {} without validation, else the mean KLD on the validation text with
    its interval. `shadow_price`: nats of predicted KLD that one more megabyte (10^6 bytes) saves. `output`: the
    quantized file."""

    recipe: Path
    total_bytes: int
    target_bytes: int | None
    bpw: float
    predicted_kld: float
    measured_kld: dict[str, Any]
    gap: float
    shadow_price: float
    proved: bool
    candidates: tuple[dict[str, Any], ...]
    comparisons: tuple[str, ...]
    certificate: Path
    output: Path | None
    types: Mapping[str, str] = field(repr=False)
    notes: tuple[str, ...] = ()
    target: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": str(self.recipe),
            "total_bytes": self.total_bytes,
            "target_bytes": self.target_bytes,
            "bpw": self.bpw,
            "predicted_kld": self.predicted_kld,
            "measured_kld": self.measured_kld,
            "gap": self.gap,
            "shadow_price": self.shadow_price,
            "proved": self.proved,
            "target": dict(self.target),
            "candidates": list(self.candidates),
            "comparisons": list(self.comparisons),
            "certificate": str(self.certificate),
            "output": str(self.output) if self.output is not None else None,
            "notes": list(self.notes),
        }


def optimize(
    model: str | Path,
    *,
    size: int | None = None,
    bpw: float | None = None,
    fit: int | None = None,
    ctx: int = 8192,
    kld: float | None = None,
    like_size: str | Path | None = None,
    types: str | Sequence[str] | None = None,
    minimum: Mapping[str, str] | None = None,
    fixed: Mapping[str, str] | None = None,
    equal: Sequence[str] = ("gate_up",),
    speeds: str | Path | Speeds | None = None,
    max_slowdown: float = 1.0,
    sensitivity: str | Path | Sensitivities | None = None,
    imatrix: str | Path | None = None,
    out: str | Path | None = None,
    quantize: bool = False,
    validate: bool = True,
    steps: int = STEPS,
    reference: str | Path | None = None,
    text: Sequence[str | Path] | None = None,
    chunks: int | None = None,
    work: str | Path | None = None,
    threads: int | None = None,
    session: SessionOptions | None = None,
    options: PlanOptions | None = None,
    name: str | None = None,
    force: bool = False,
    progress: Callable[[OptimizeProgress], None] | None = None,
) -> Optimized:
    """Choose the type of every tensor of `model` so that the file fits a target and the mean KLD is least.

    The target is one of `size` (bytes of the whole file), `bpw` (over tensors), `fit` (bytes of memory, with the cache
    of `ctx` tokens and compute buffers taken off), `kld` (the smallest file with that predicted mean KLD) and
    `like_size` (the size of that file). `types`, `minimum` (role -> type), `fixed` (role or pattern -> type), `equal`
    (siblings of one type), `speeds` with `max_slowdown` (a second budget) are constraints.py's.

    `sensitivity`: a file of measure(), which is called without one, its result kept beside the model. `imatrix`:
    without one, types that need importance are left out. `validate`: encode two or three near-optimal recipes and up
    to `steps` exchanges, measure them on the probe text (or `text`, at most `chunks` of each) against `reference`
    (default: the model itself) and take the best. `out`: the recipe, a tensor-type file or .json; the certificate is
    written beside it. `quantize` keeps the encoded file there too, called `name`. `work` is the folder of encoded
    candidates (default: a temporary one beside `out`).

    Raises UsageError (no target, or nothing fits: with the nearest feasible size), InputError, ResourceError,
    NativeError.
    """
    report = progress or (lambda _: None)
    threads_, session = threads, session or SessionOptions()
    if threads is not None:
        session = session.model_copy(update={"threads": threads})
    if isinstance(speeds, str | Path):
        speeds = read_speeds(speeds)
    constraints = Constraints(
        types=as_types(list(types) if types is not None and not isinstance(types, str) else types),
        minimum=dict(minimum or {}),
        fixed=dict(fixed or {}),
        equal=tuple(equal),
        speeds=speeds,
        max_slowdown=max_slowdown,
    )
    if steps < 0:
        raise UsageError(f"{steps} exchange steps")
    with ExitStack() as held:
        opened = held.enter_context(open_model(model))
        matrix = held.enter_context(Importance.read(imatrix)) if imatrix is not None else None
        paths = Paths.of(opened, out, name, force)
        measured = sensitivities_of(
            opened, sensitivity, imatrix, fill=(options or PlanOptions()).fill, session=session, report=report
        )
        costs = CostModel.from_sensitivities(measured)
        plan_options = options or PlanOptions()
        space = make_space(opened, costs, importance=matrix, constraints=constraints, options=plan_options)
        target = target_of(space, size=size, bpw=bpw, fit=fit, ctx=ctx, kld=kld, like_size=like_size)
        report(OptimizeProgress("solving"))
        first = space.fit(target.bytes) if target.bytes is not None else space.within(target.kld or 0.0)
        # a target of KLD is one of bytes from here on: variants and exchanges are of equal size
        limit = target.bytes if target.bytes is not None else first.plan.total_bytes
        notes = list(space.notes)
        chosen: Predicted = first
        candidates: list[dict[str, Any]] = []
        comparisons: list[str] = []
        output: Path | None = None
        if validate:
            if work is None:
                folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix=".apex-", dir=paths.recipe.parent)))
            else:
                folder = Path(work)
                folder.mkdir(parents=True, exist_ok=True)
            validator = Validator(
                opened, folder, matrix, Path(imatrix) if imatrix is not None else None, plan_options,
                reference=Path(reference) if reference is not None else None, text=text, chunks=chunks,
                session=session, threads=threads_,
                encoding=lambda event: report(OptimizeProgress("encoding", event)),
                measuring=lambda event: report(OptimizeProgress("evaluating", event)),
            )  # fmt: skip
            loop = Loop(space, validator, limit, steps)
            best = loop.run(first)
            chosen = best.file
            candidates, comparisons = [one.to_json() for one in loop.measured], loop.said(best)
            if quantize:
                if not best.path.exists():  # measured in an earlier run, and moved away then
                    validator.encode([(best.file, best.path)])
                output = _moved(best.path, paths.output)
        elif quantize:
            output = _encoded(opened, chosen, imatrix, paths, threads_, plan_options, force, report)
        document = certificates.certificate(
            space,
            first,
            target={**target.to_json(), "bytes": limit},
            sensitivities=measured,
            candidates=candidates,
            settings={"steps": steps, "chunks": chunks, "validated": validate, "chosen": chosen.plan.recipe.to_json()},
        )
        _write(paths.recipe, chosen)
        certificates.save(document, paths.certificate)
        taken = next((one for one in candidates if one["recipe_sha256"] == chosen.plan.recipe.sha256), None)
        return Optimized(
            recipe=paths.recipe,
            total_bytes=chosen.plan.total_bytes,
            target_bytes=target.bytes,
            bpw=chosen.plan.bpw,
            predicted_kld=space.predicted(chosen.plan).predicted,
            measured_kld=dict(taken["measured_kld"]) if taken else {},
            gap=first.solution.gap,
            shadow_price=space.price(first.solution) * 1e6,
            proved=first.solution.proved,
            candidates=tuple(candidates),
            comparisons=tuple(comparisons),
            certificate=paths.certificate,
            output=output,
            types={name: kind.name for name, kind in chosen.types.items()},
            notes=tuple(notes),
            target=target.to_json(),
        )


def measured_twin(
    model: str | Path,
    tier: str,
    *,
    imatrix: str | Path | None = None,
    out: str | Path | None = None,
    options: PlanOptions | None = None,
    **more: Any,
) -> Optimized:
    """`apex quantize --tier TIER --measured`: the allocation of the size of that tier's file, encoded into `out`
    (a folder, or a .gguf name) as MODEL-APEX-TIER-Measured.gguf. `more` goes to optimize()."""
    planned = plan(model, tier, imatrix=imatrix, options=options or PlanOptions())
    folder, name = Path(out) if out is not None else Path(), planned.file_name.removesuffix(".gguf") + "-Measured.gguf"
    if folder.suffix == ".gguf" and not folder.is_dir():
        folder, name = folder.parent, folder.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made a folder: {error.strerror}") from None
    recipe = folder / f"{name.removesuffix('.gguf')}.recipe.txt"
    return optimize(
        model, size=planned.total_bytes, imatrix=imatrix, out=recipe, quantize=True, name=name,
        options=PlanOptions(fill=options.fill, allow_requantize=options.allow_requantize) if options else None, **more,
    )  # fmt: skip


def _encoded(
    model: GGUFModel,
    chosen: Predicted,
    imatrix: str | Path | None,
    paths: Paths,
    threads: int | None,
    options: PlanOptions,
    force: bool,
    report: Callable[[OptimizeProgress], None],
) -> Path:
    with tempfile.TemporaryDirectory(prefix="apex-") as folder:
        recipe = Path(folder) / "recipe.txt"
        recipe.write_text(chosen.plan.recipe.text(), encoding="utf-8")

        def on_event(event: JobProgress) -> None:
            report(OptimizeProgress("encoding", event))

        made = quantize_(
            model.path, imatrix=imatrix, out=paths.output, threads=threads, force=force,
            options=replace(options, recipe=recipe), progress=on_event,
        )  # fmt: skip
    return made.outputs[0].path


def _moved(path: Path, target: Path) -> Path:
    """The chosen candidate's file under its own name."""
    try:
        path.replace(target)
    except OSError:
        shutil.copyfile(path, target)
    return target


def _write(path: Path, chosen: Predicted) -> None:
    """The recipe, whole or not at all."""
    recipe = chosen.plan.recipe
    text = json.dumps(recipe.to_json(), indent=2) + "\n" if path.suffix == ".json" else recipe.text()
    file = AtomicFile(path)
    try:
        file.pwrite(text.encode(), 0)
        file.commit()
    except BaseException:
        file.abandon()
        raise


__all__ = ["OptimizeProgress", "Optimized", "measured_twin", "optimize"]
