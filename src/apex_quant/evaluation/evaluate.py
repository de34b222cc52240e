"""`evaluate`: perplexity, divergence from a reference, routers and accuracy of a model, each with its error.

results = evaluate("MODEL-I-Quality.gguf", reference="MODEL-BF16.gguf", out="results.json")
print(results.metrics["kld"]["mean"])

Every metric is measured in a child process and is in results.json as soon as it is finished; the same call after an
interruption goes on with the chunk or task it was at.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apex_quant.errors import InputError, ResourceError, UsageError, did_you_mean
from apex_quant.evaluation import environment, results, state
from apex_quant.evaluation.choices import TASKS as TASKS_OF_EACH
from apex_quant.evaluation.choices import evaluate_choices
from apex_quant.evaluation.harness import HarnessPlan, chosen_tasks, find_lm_eval, run_harness
from apex_quant.evaluation.identity import identity
from apex_quant.evaluation.schema import TASKS, ModelInfo, Results, different_references
from apex_quant.evaluation.selection import SEED
from apex_quant.evaluation.speed import SpeedPlan, measure_speed, plan_tests
from apex_quant.evaluation.steps import Scored
from apex_quant.evaluation.taskfiles import read_tasks
from apex_quant.evaluation.taskhub import task_file
from apex_quant.evaluation.token_job import CTX, WORKER, EvaluationProgress, Report, TokenJob
from apex_quant.gguf import GGUFModel, open_model
from apex_quant.native import Child, library_info
from apex_quant.runtime.options import SessionOptions

ON_TEXT = ("ppl", "kld", "router")
METRICS = (*ON_TEXT, *TASKS, "speed")
SAVE_SECONDS = 30.0


def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    source: str | Path | None = None,
    only: Collection[str] | None = None,
    text: Sequence[str | Path] | None = None,
    ctx: int = CTX,
    chunks: int | None = None,
    scored: Scored = "half",
    floor: bool = False,
    tasks: int = TASKS_OF_EACH,
    task_files: Mapping[str, str | Path] | None = None,
    seed: int = SEED,
    speed: SpeedPlan | None = None,
    harness: HarnessPlan | None = None,
    out: str | Path | None = None,
    options: SessionOptions | None = None,
    progress: Report | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> Results:
    """Measure `model` and give what results.json says; with `out` it is there, with numbers per token beside it.

    `reference`: a GGUF, run side by side; a .apexref or a stock _logits_ file, whose text and context are taken then.
    `source`: the GGUF whose output matrix a .apexref needs, when it does not lie beside it. `only`: some of METRICS;
    without it perplexity, with a reference divergence and routers, the tasks that `task_files` has, and speed if
    `speed` says how.

    `text`: files, instead of the built-in held-out text. `chunks`: at most so many of each text. `scored`: "half" is
    llama.cpp's convention, "all" every token after an eighth of the context. `floor`: also measure the divergence
    that a uniform Q8_0 file of the reference has.

    `tasks`: of each benchmark (0: all). `task_files`: kind -> path or hub:USER/DATA/FILE. `seed` 1 draws
    llama-perplexity's tasks. `speed`: what is timed, by default pp512 and tg128. `harness`: tasks in which the model
    writes answers (harness.py). `options`: how models are loaded; what is decoded together is decided here.

    Raises UsageError, InputError, ResourceError (BusyError while another process evaluates into `out`) or NativeError;
    metrics that were finished before are kept.
    """
    files = {kind: str(file) for kind, file in (task_files or {}).items()}
    wanted = _wanted(only, reference is not None, files, speed is not None, harness)
    timing = speed or SpeedPlan()
    plan_tests(timing.prompts, timing.generate, timing.depths)  # refuses before hours are spent
    problem = library_info().problem
    if problem:
        raise ResourceError(f"{problem}, so nothing can be run", hint="`apex doctor` says how to get it")
    with ExitStack() as held:
        on_text = [name for name in wanted if name in ON_TEXT]
        child = held.enter_context(Child(WORKER)) if on_text else None  # it imports while this process reads and hashes
        opened = held.enter_context(open_model(model))
        target = _target(Path(out), opened) if out is not None else None
        if target is None:
            target = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="apex-eval-"))) / "results.json"
        lock = held.enter_context(state.locked(target))
        one = _Evaluation(opened, target, lock, options or SessionOptions(), progress or (lambda _: None), save_seconds)
        files = {kind: _task_file(kind, files.get(kind)) for kind in wanted if kind in TASKS}
        if harness is not None and one.unanswered(harness)[0]:
            find_lm_eval()
        if child is not None:
            job = TokenJob(opened, reference, source, one.options, target, one.report, save_seconds)
            job.plan(text, ctx, chunks, scored)
            one.on_text(child, job, on_text, floor=floor)
        for kind, path in files.items():
            one.on_tasks(kind, path, tasks, seed)
        if "speed" in wanted:
            one.on_speed(timing)
        if harness is not None:
            one.on_harness(harness)
        made = results.load(target)
        if out is None:
            made.per_token, made._path = None, None
        return made


def _wanted(
    only: Collection[str] | None,
    has_reference: bool,
    files: Mapping[str, str],
    has_speed: bool,
    harness: HarnessPlan | None,
) -> list[str]:
    """The metrics to measure, in order. Raises UsageError."""
    for name in (*(only or ()), *files):
        if name not in METRICS or (name in files and name not in TASKS):
            raise UsageError(
                f"no metric is called {name!r}.{did_you_mean(name, list(METRICS))}", hint=f"known: {', '.join(METRICS)}"
            )
    if harness is not None:
        chosen_tasks(harness.tasks, harness.allow_code)
    chosen = {*(ON_TEXT if has_reference else ("ppl",)), *files} if only is None else set(only)
    if has_speed:
        chosen.add("speed")
    if not chosen and harness is None:
        raise UsageError("nothing to measure")
    if not has_reference and (needs := [name for name in ("kld", "router") if name in chosen]):
        raise UsageError(f"{needs[0]} needs a reference", hint="--reference MODEL-BF16.gguf, or a .apexref file")
    return [name for name in METRICS if name in chosen]


def _task_file(kind: str, file: str | None) -> str:
    """Where the tasks are, read once: a file that is missing or broken is found before hours are spent. Raises
    UsageError, InputError or ResourceError."""
    path = task_file(kind, file)
    read_tasks(path, kind)
    return str(path)


def _target(out: Path, model: GGUFModel) -> Path:
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder")
    if out.suffix in ("", ".npz", ".gguf") or out.is_dir():
        raise UsageError(f"{out}: results go to a file such as results.json")
    return out


class _Evaluation:
    """What one call adds to one results.json."""

    def __init__(
        self, model: GGUFModel, out: Path, lock: int, options: SessionOptions, report: Report, save_seconds: float
    ) -> None:
        self.model, self.out, self.lock = model, out, lock
        self.options, self.report, self.save_seconds = options, report, save_seconds
        self.known = results.load(out) if out.exists() else None
        about = identity(model)
        tier, recipe = (model.get(key) for key in ("apex.tier", "apex.recipe.sha256"))
        self.info = ModelInfo(
            path=model.path.name,
            sha256=about.sha256,
            bytes=about.bytes,
            bpw=about.bpw,
            architecture=model.architecture,
            recipe_sha256=str(recipe) if recipe else None,
            tier=str(tier) if tier else None,
        )
        if self.known is not None and self.known.model.sha256 != self.info.sha256:  # before hours are spent
            raise InputError(f"{out}: has results of another model, {self.known.name}", hint="choose another -o")

    def on_text(self, child: Child, job: TokenJob, wanted: Sequence[str], *, floor: bool) -> None:
        """Measure what is not there yet, or is of another call."""
        there = self.known.metrics if self.known is not None else {}
        missing = [name for name in wanted if there.get(name, {}).get("spec") != job.spec]
        if missing == ["router"] and not job.facts.is_moe:
            missing = []
        if not missing and (not floor or there["kld"].get("floor")):
            return
        reference = job.about_reference()
        theirs = self.known.reference if self.known is not None else None
        if reference and theirs and different_references(reference, theirs):  # before hours are spent
            raise InputError(
                f"{self.out}: was measured against another reference, {theirs.get('path')}", hint="choose another -o"
            )
        found, warnings = job.measure(child, wanted, self.lock, floor=floor and "kld" in wanted)
        self._add(found, [*job.notes, *warnings], job.settings, reference)
        job.clean()

    def on_tasks(self, kind: str, file: str, tasks: int, seed: int) -> None:
        """Measure one benchmark, unless it is there."""
        settings = {"tasks": tasks, "seed": seed, "options": self.options.model_dump(mode="json", exclude={"threads"})}
        if self._has_tasks(kind, file, settings):
            return
        path = self.out.with_name(f"{self.out.name}.{kind}.state")
        value, arrays = evaluate_choices(
            self.model.path,
            kind,
            file,
            tasks=tasks,
            seed=seed,
            options=self.options,
            out=path,
            progress=self._tell,
            save_seconds=self.save_seconds,
            pass_fds=[self.lock],
        )
        bare = {name.partition("/")[2]: array for name, array in arrays.items()}
        self._add([(kind, value, bare)], value.get("notes", ()), {kind: settings}, None)
        path.unlink(missing_ok=True)

    def _has_tasks(self, kind: str, file: str, settings: dict[str, Any]) -> bool:
        """Whether the same call was finished before, with the same library and the same file."""
        if self.known is None or kind not in self.known.metrics or self.known.settings.get(kind) != settings:
            return False
        if self.known.environment.get("library") != environment.collect()["library"]:
            return False
        known = self.known.metrics[kind].get("file_sha256")
        return bool(read_tasks(file, kind).sha256 == known)

    def on_speed(self, timing: SpeedPlan) -> None:
        """Time the model, unless the same was timed on this machine with this library while nothing else ran."""
        options = self.options.model_dump(mode="json")
        settings = {**asdict(timing), "options": options}
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
        about = environment.collect()
        if self.known is not None and self.known.settings.get("speed") == settings:
            there, then = self.known.metrics.get("speed"), self.known.environment
            if there and not there["busy"] and all(then.get(key) == about[key] for key in ("library", "cpu")):
                return
        value = measure_speed(
            self.model.path, **asdict(timing), options=self.options, progress=self._tell, pass_fds=[self.lock]
        )
        self._add([("speed", value, None)], [value["busy_note"]] if value["busy"] else [], {"speed": settings}, None)

    def on_harness(self, plan: HarnessPlan) -> None:
        """Ask what is not answered yet, with the same settings; each task is kept as soon as it is finished."""
        left, settings = self.unanswered(plan)
        if left:
            run_harness(
                self.model.path,
                left,
                limit=plan.limit,
                chat=plan.chat,
                parallel=plan.parallel,
                allow_code=plan.allow_code,
                options=self.options,
                on_result=lambda name, value: self._add([(name, value, None)], (), {name: settings}, None),
                progress=self._tell,
            )

    def unanswered(self, plan: HarnessPlan) -> tuple[list[str], dict[str, Any]]:
        """Tasks of the plan that have no answers with the same settings, and those settings."""
        asked = {"limit": plan.limit, "chat": plan.chat, "parallel": plan.parallel}
        settings = {**asked, "options": self.options.model_dump(mode="json", exclude={"threads"})}
        there = self.known.metrics if self.known is not None else {}
        before = self.known.settings if self.known is not None else {}
        return [name for name in plan.tasks if name not in there or before.get(name) != settings], settings

    def _tell(self, event: dict[str, Any]) -> None:
        self.report(EvaluationProgress(event["what"], event["done"], event["planned"], event["resumed"], 0))

    def _add(
        self,
        found: Sequence[tuple[str, dict[str, Any], dict[str, Any] | None]],
        warnings: Sequence[str],
        settings: dict[str, Any],
        reference: dict[str, Any] | None,
    ) -> None:
        base = Results(model=self.info, reference=reference, settings=settings, environment=environment.collect())
        for name, value, arrays in found:
            self.known = results.update(self.out, name, value, base=base, arrays=arrays, warnings=warnings)


__all__ = ["CTX", "METRICS", "EvaluationProgress", "HarnessPlan", "Report", "SpeedPlan", "evaluate"]
