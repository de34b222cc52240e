"""`optimize`: which tensor deserves which type, by measurement, for any size.

made = optimize("MODEL-BF16.gguf", size=12_200_000_000, imatrix="imatrix.gguf", out="recipe.txt", quantize=True)
print(made.total_bytes, made.predicted_kld, made.measured_kld)

Costs come from sensitivities (measure.py), the choice from the exact solver, and the last word from whole files of two
or three near-optimal recipes, measured on the validation text.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from apex_quant.allocation import certificate as certificates
from apex_quant.allocation.beforehand import (
    BESIDE,
    check_choices,
    check_judge,
    refuse_options,
    refuse_unmeasured,
)
from apex_quant.allocation.choices import make_space
from apex_quant.allocation.constraints import EQUAL, Constraints, Speeds, as_types, read_speeds
from apex_quant.allocation.cost import CostModel
from apex_quant.allocation.inputs import OptimizeProgress, Paths, moved, sensitivities_of, working_folder
from apex_quant.allocation.loop import STEPS, Loop, ratio
from apex_quant.allocation.measure import CTX
from apex_quant.allocation.sensitivity import Sensitivities
from apex_quant.allocation.space import Fitted, Predicted, Space
from apex_quant.allocation.targets import Target, target_of
from apex_quant.allocation.texts import heldout_read, judged_by
from apex_quant.allocation.validate import Candidate, Validator
from apex_quant.encode.job import JobProgress
from apex_quant.encode.quantize import quantize as quantize_
from apex_quant.errors import UsageError
from apex_quant.gguf import GGUFModel, open_model
from apex_quant.gguf.atomic import write_file
from apex_quant.importance import Importance
from apex_quant.recipe.plan import plan
from apex_quant.recipe.planned import PlanOptions
from apex_quant.runtime.options import SessionOptions


@dataclass(frozen=True)
class Optimized:
    """A finished allocation.

    `predicted_kld` is what the costs say. `measured_kld` is {} without validation, else the mean KLD on the validation
    text with its interval; `corrected_kld` is then the prediction times what all measured candidates showed it to be
    too low or too high by. `gap` and `proved`: how far the recipe may be from the least predicted cost.
    `shadow_price`: nats of predicted KLD that one more megabyte (10^6 bytes) saves. `groups`: how many of them were
    measured and how many estimated. `output`: the quantized file.
    """

    recipe: Path
    total_bytes: int
    target_bytes: int | None
    bpw: float
    predicted_kld: float
    corrected_kld: float | None
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
    groups: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": str(self.recipe),
            "total_bytes": self.total_bytes,
            "target_bytes": self.target_bytes,
            "bpw": self.bpw,
            "predicted_kld": self.predicted_kld,
            "corrected_kld": self.corrected_kld,
            "measured_kld": self.measured_kld,
            "gap": self.gap,
            "shadow_price": self.shadow_price,
            "proved": self.proved,
            "target": dict(self.target),
            "groups": dict(self.groups),
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
    equal: Sequence[str] | None = None,
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
    measuring: Mapping[str, Any] | None = None,
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

    `equal` None is constraints.EQUAL, which validation may drop where siblings of different types measure lower.

    `sensitivity`: a file of measure(), which is called without one (with the arguments `measuring`), its result kept
    beside the model. `imatrix`: without one, types that need importance are left out. `validate`: encode two or three
    near-optimal recipes and up to `steps` exchanges, measure them on the built-in validation text (or `text`, at most
    `chunks` of each) against `reference` (default: the model itself) and take the best; with `kld` the size is found
    again once, from what the first file measured. `out`: the recipe, a tensor-type file or .json; the certificate is
    written beside it. `quantize` keeps the encoded file there too, called `name`. `work` is the folder of encoded
    candidates, which is kept (default: one beside `out` that is removed at the end); after an interruption the same
    call goes on from it.

    Raises UsageError (no target, or nothing fits: with the nearest feasible size; or a file is there without `force`),
    InputError, ResourceError, NativeError.
    """
    report = progress or (lambda _: None)
    session = session or SessionOptions()
    if threads is not None:
        session = session.model_copy(update={"threads": threads})
    if isinstance(speeds, str | Path):
        speeds = read_speeds(speeds)
    constraints = Constraints(
        types=as_types(list(types) if types is not None and not isinstance(types, str) else types),
        minimum=dict(minimum or {}),
        fixed=dict(fixed or {}),
        equal=EQUAL if equal is None else tuple(equal),
        speeds=speeds,
        max_slowdown=max_slowdown,
    )
    if steps < 0:
        raise UsageError(f"{steps} exchange steps")
    if not validate:
        refuse_unmeasured(reference=reference, text=text or None, chunks=chunks, work=work)
    plan_options = options or PlanOptions()
    refuse_options(plan_options, BESIDE, "optimize")
    asked: dict[str, Any] = {"size": size, "bpw": bpw, "fit": fit, "ctx": ctx, "kld": kld, "like_size": like_size}
    judge = Path(reference) if reference is not None else None
    with ExitStack() as held:
        opened = held.enter_context(open_model(model))
        matrix = held.enter_context(Importance.read(imatrix)) if imatrix is not None else None
        paths = Paths.of(opened, out, name, quantize=quantize, force=force)
        if validate:
            check_judge(opened, judge, text, chunks)
        if sensitivity is None:
            check_choices(opened, matrix, constraints, plan_options, asked)
        measured, notes = sensitivities_of(
            opened, sensitivity, imatrix, fill=plan_options.fill, session=session, measuring=measuring, report=report
        )
        space = make_space(
            opened,
            CostModel.from_sensitivities(measured),
            importance=matrix,
            constraints=constraints,
            options=plan_options,
        )
        target = target_of(space, **asked)
        report(OptimizeProgress("solving"))
        first = space.fit(target.bytes) if target.bytes is not None else space.within(target.kld or 0.0)
        notes += space.notes
        if validate:
            folder = held.enter_context(working_folder(Path(work) if work else paths.work, keep=work is not None))
            validator = Validator(
                opened, folder, matrix, Path(imatrix) if imatrix is not None else None, plan_options,
                reference=judge, text=text,
                ctx=int(measured.settings.get("ctx", CTX)), chunks=chunks, session=session, threads=threads,
                encoding=lambda event: report(OptimizeProgress("encoding", event)),
                measuring=lambda event: report(OptimizeProgress("evaluating", event)),
            )  # fmt: skip
            notes += judged_by(validator.texts, measured)
            made = _validated(space, first, target, validator, steps=steps, part=equal is None)
        else:
            made = _solved(space, first, target)
        notes += made.notes
        said = {**target.to_json(), **made.kept}
        document = certificates.certificate(
            made.problem[0], made.chosen, made.proof, target={**said, "bytes": made.limit}, sensitivities=measured,
            validated=made.about, heldout=heldout_read(validator.texts if validate else None, measured),
            candidates=made.candidates, notes=notes,
            settings={"steps": steps, "validated": validate, "part": equal is None, "name": paths.output.name},
        )  # fmt: skip
        output: Path | None = None
        if quantize and made.best is not None and len(made.chosen.plan.layouts) == 1:
            if not made.best.path.exists():  # measured in an earlier run, and moved away then
                validator.encode([(made.best.file, made.best.path)])
            output = moved(made.best.path, paths.output)
        elif quantize:
            output = _encoded(opened, made.chosen, imatrix, paths, threads, plan_options, force, report)
        _write(paths.recipe, made.chosen)
        certificates.save(document, paths.certificate)
        return Optimized(
            recipe=paths.recipe,
            total_bytes=made.chosen.plan.total_bytes,
            target_bytes=target.bytes,
            bpw=made.chosen.plan.bpw,
            predicted_kld=made.chosen.predicted,
            corrected_kld=made.chosen.predicted * made.ratio if made.ratio is not None else None,
            measured_kld=made.best.kld if made.best is not None else {},
            gap=made.proof["gap"],
            shadow_price=made.problem[0].price(made.problem[1].solution) * 1e6,
            proved=made.proof["proved"],
            candidates=tuple(made.candidates),
            comparisons=tuple(made.comparisons),
            certificate=paths.certificate,
            output=output,
            types={name: kind.name for name, kind in made.chosen.types.items()},
            notes=tuple(notes),
            target=said,
            groups=measured.kinds,
        )


@dataclass(frozen=True)
class _Made:
    """What is delivered: `chosen`, of at most `limit` bytes, to be held against the space and optimum `problem`; with
    validation `best` is its candidate, `about` says by what candidates were measured, `ratio` what predictions are off
    by, `kept` whether a KLD that was asked for is kept."""

    chosen: Predicted
    limit: int
    problem: tuple[Space, Fitted]
    best: Candidate | None = None
    about: dict[str, Any] | None = None
    ratio: float | None = None
    candidates: Sequence[dict[str, Any]] = ()
    comparisons: Sequence[str] = ()
    kept: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @cached_property
    def proof(self) -> dict[str, Any]:
        """How far it is from the least predicted cost."""
        return certificates.proof(*self.problem, self.chosen, self.limit)


def _solved(space: Space, first: Fitted, target: Target) -> _Made:
    """The solver's optimum, without any measurement."""
    if target.bytes is not None:
        return _Made(first, target.bytes, (space, first))
    note = f"a KLD of {target.kld:g} is predicted, and was not measured (--no-validate)"
    return _Made(first, first.plan.total_bytes, (space, first), notes=[note])


def _validated(space: Space, first: Fitted, target: Target, validator: Validator, *, steps: int, part: bool) -> _Made:
    """The validation loop. A target of KLD becomes one of bytes first: that at which the prediction, times what the
    first file showed it to be off by, is the target."""
    measured: list[Candidate] = []
    if target.kld is not None:
        measured += validator.measure({"first size": first})
        validator.drop(measured)
        first = space.within(target.kld / ratio(measured))
    limit = target.bytes if target.bytes is not None else first.plan.total_bytes
    loop = Loop(space, first, validator, limit, steps=steps, part=part)
    best = loop.run()
    measured += [one for one in loop.measured if all(one is not other for other in measured)]
    problem = loop.problem_of(best.file)
    notes, kept = [], dict[str, Any]()
    if problem[0] is not space:
        notes.append(
            f"siblings have types of their own ({', '.join(space.constraints.equal)} differ in some layers): measured "
            f"lower; --equal {','.join(space.constraints.equal)} forbids it"
        )
    if target.kld is not None:
        kept["kept"] = best.value <= target.kld
        if not kept["kept"]:
            low = best.kld["low"]
            how = "reached within the error alone" if low is not None and low <= target.kld else "missed"
            notes.append(
                f"the target is {how}: {best.value:.4g} nats were measured and {target.kld:g} asked for, after the "
                "size was corrected once; ask for less"
            )
    return _Made(
        best.file, limit, problem, best, validator.about, ratio(measured),
        [one.to_json() for one in measured], loop.said(best), kept, notes,
    )  # fmt: skip


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
    options = options or PlanOptions()
    refuse_options(options, {"fill", "allow_requantize"}, "--measured")
    planned = plan(model, tier, imatrix=imatrix, options=options)
    folder, name = Path(out) if out is not None else Path(), planned.file_name.removesuffix(".gguf") + "-Measured.gguf"
    if folder.suffix == ".gguf" and not folder.is_dir():
        folder, name = folder.parent, folder.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made a folder: {error.strerror}") from None
    recipe = folder / f"{name.removesuffix('.gguf')}.recipe.txt"
    return optimize(
        model, size=planned.total_bytes, imatrix=imatrix, out=recipe, quantize=True, name=name, options=options, **more,
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


def _write(path: Path, chosen: Predicted) -> None:
    """The recipe, whole or not at all."""
    recipe = chosen.plan.recipe
    text = json.dumps(recipe.to_json(), indent=2) + "\n" if path.suffix == ".json" else recipe.text()
    write_file(path, text)


__all__ = ["OptimizeProgress", "Optimized", "measured_twin", "optimize"]
