"""`quantize`: one model in, every requested file out, in one pass."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apex_quant.encode.groups import EVERY
from apex_quant.encode.job import EXECUTOR, JobProgress, JobResult, run_job
from apex_quant.encode.output import WrittenFile
from apex_quant.encode.tasks import uses_importance
from apex_quant.errors import InputError, ResourceError, UsageError
from apex_quant.gguf import open_model
from apex_quant.importance import Importance
from apex_quant.native import Child, Workers, library_info
from apex_quant.recipe.plan import plan
from apex_quant.recipe.planned import Plan, PlanOptions
from apex_quant.recipe.tiers import Tier, published_tiers


@dataclass(frozen=True)
class QuantizedOutput:
    """One finished output. `seconds` is its share of the pass: thread time by tensor, shared encodings split.

    `unchanged` says that an earlier run of the same call had made it, and nothing was done now.
    """

    tier: str
    path: Path
    bytes: int
    bpw: float
    seconds: float
    unchanged: bool
    files: tuple[WrittenFile, ...]
    plan: Plan

    @property
    def sha256(self) -> str:
        """Of the (first) file, computed when it is asked for."""
        return self.files[0].sha256

    def to_json(self) -> dict[str, Any]:
        return {
            "tier": self.tier,
            "path": str(self.path),
            "bytes": self.bytes,
            "bpw": self.bpw,
            "sha256": self.sha256,
            "seconds": round(self.seconds, 3),
            "unchanged": self.unchanged,
            "files": [file.to_json() for file in self.files],
            "warnings": list(self.plan.warnings),
        }


@dataclass(frozen=True)
class Quantized:
    """All outputs of one call, and the counters of the pass (None for a dry run)."""

    outputs: tuple[QuantizedOutput, ...]
    plans: tuple[Plan, ...]
    job: JobResult | None
    seconds: float


def quantize(
    model: str | Path,
    tier: str | Tier | Sequence[str | Tier] | None = None,
    *,
    imatrix: str | Path | Importance | None = None,
    out: str | Path | None = None,
    threads: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    options: PlanOptions | None = None,
    fill: str | None = None,
    progress: Callable[[JobProgress], None] | None = None,
    workers: Workers | None = None,
) -> Quantized:
    """Quantize `model` (a GGUF, any shard) to one or more tiers in one pass over its data.

    `tier`: names of tiers, .toml files or llama-quantize mixes, or 'all' for the nine published tiers; None with
    options.recipe or options.like. `out`: a file name for a single output, else a folder (default: the current
    one) for MODEL-APEX-TIER.gguf names. `fill` is options.fill: 'prior' shrinks the importance of thinly covered
    experts towards their tensor's mean, 'none' is llama-quantize's rule. `threads` defaults to the processors this
    process may use. The same call after an interruption goes on from where it stopped and ends with the same bytes.
    `workers`: machines that encode groups of tensors (model, matrix and outputs lie on a disk that all of them see).

    Raises UsageError, InputError, ResourceError or NativeError; finished work is kept.
    """
    started = time.monotonic()
    options = options or PlanOptions()
    if fill is not None:
        options = replace(options, fill=fill)
    tiers = expand_tiers(tier)
    with ExitStack() as stack:
        # the child needs 0.3 s to start, which pass while the outputs are planned here
        usable = not dry_run and workers is None and library_info().problem is None
        child = stack.enter_context(Child(EXECUTOR, single_blas=True)) if usable else None
        opened = stack.enter_context(open_model(model))
        if workers is not None and isinstance(imatrix, Importance):
            raise UsageError("other machines need the importance matrix as a file", hint="write it, and give its path")
        matrix_path, matrix = _importance(imatrix, stack)
        plans = [plan(opened, one, imatrix=matrix, options=options) for one in tiers]
        for one in plans:
            refuse_unsafe(one, options, has_matrix=one.importance)
            if matrix is not None and one.importance:
                for t in one.tensors:
                    if t.type is not t.source_type and uses_importance(t.type):
                        matrix.fits(opened.tensors[t.source])  # an InputError now and not after hours
        if dry_run:
            return Quantized((), tuple(plans), None, time.monotonic() - started)
        targets = target_paths(plans, out)
        problem = library_info().problem
        if problem:
            raise ResourceError(f"{problem}, so nothing can be encoded", hint="`apex doctor` says how to get it")
        threads = threads or (usable_cpus() if workers is None else EVERY)
        done, job = run_job(
            opened,
            list(zip(plans, targets, strict=True)),
            imatrix=matrix_path,
            imatrix_sha256=matrix.sha256 if matrix else None,
            threads=threads,
            force=force,
            about={"command": sys.argv, "threads": threads},
            progress=progress,
            child=child,
            workers=workers,
        )
    outputs = []
    for output in done:
        assert output.written is not None
        outputs.append(
            QuantizedOutput(
                tier=output.plan.tier,
                path=output.written[0].path,
                bytes=sum(file.bytes for file in output.written),
                bpw=output.plan.bpw,
                seconds=output.journal.seconds,
                unchanged=output.found_finished,
                files=tuple(output.written),
                plan=output.plan,
            )
        )
    return Quantized(tuple(outputs), tuple(plans), job, time.monotonic() - started)


def usable_cpus() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def expand_tiers(tier: str | Tier | Sequence[str | Tier] | None) -> list[str | Tier | None]:
    """A tier argument as a list: 'all' becomes the nine tiers, commas separate, repeats are dropped."""
    if tier is None:
        return [None]
    given = [tier] if isinstance(tier, str | Tier) else list(tier)
    expanded: list[str | Tier | None] = []
    for one in given:
        parts: list[str | Tier] = list(one.split(",")) if isinstance(one, str) else [one]
        for part in parts:
            named = [t.name for t in published_tiers()] if part == "all" else [part]
            expanded += [name for name in named if name not in expanded]
    if not expanded:
        raise UsageError("no tier was named", hint="`apex tiers` lists them")
    return expanded


def _importance(imatrix: str | Path | Importance | None, stack: ExitStack) -> tuple[Path | None, Importance | None]:
    """The matrix as a file for the child and as an object for the plan."""
    if imatrix is None:
        return None, None
    if isinstance(imatrix, Importance):
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="apex-")))
        imatrix.write(folder / "imatrix.gguf")
        imatrix = folder / "imatrix.gguf"
    path = Path(imatrix)
    return path, stack.enter_context(Importance.read(path))


def refuse_unsafe(one: Plan, options: PlanOptions, *, has_matrix: bool) -> None:
    """Stop before any work on what would fail after hours of it. Raises UsageError or InputError."""
    if one.missing_importance:
        names = ", ".join(one.missing_importance[:3]) + (", ..." if len(one.missing_importance) > 3 else "")
        count = len(one.missing_importance)
        raise UsageError(
            f"tier {one.tier}: {count} tensors get types that need an importance matrix"
            + (f", and the given one has nothing for them: {names}" if has_matrix else f": {names}"),
            hint="calibrate again so that these tensors are reached, or give them another type with --override"
            if has_matrix
            else "give one with --imatrix; quality, balanced and compact do not need one",
        )
    if one.needs_importance:
        raise UsageError(
            f"tier {one.tier} is defined as encoded with an importance matrix",
            hint="give one with --imatrix, or take the tier without the i-",
        )
    if one.requantized and not options.allow_requantize:
        name = one.requantized[0]
        raise InputError(
            f"{one.model}: {len(one.requantized)} tensors are already quantized ({name} and others)",
            hint="quantize from F32, F16 or BF16; --allow-requantize does it anyway, at a loss",
        )


def target_paths(plans: Sequence[Plan], out: str | Path | None) -> list[Path]:
    """Where each plan's file goes. Raises UsageError when two would share a name or a folder is missing."""
    base = Path(out) if out is not None else Path()
    if out is not None and base.suffix == ".gguf" and not base.is_dir():
        if len(plans) != 1:
            raise UsageError(f"{base} names one file, but {len(plans)} outputs are wanted", hint="give a folder")
        targets = [base]
    else:
        targets = [base / one.file_name for one in plans]
    if len(set(targets)) != len(targets):
        raise UsageError("two outputs would have the same name", hint="make them in separate calls with -o")
    for folder in {path.parent for path in targets}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder}: cannot be made a folder: {error.strerror}") from None
    return targets
