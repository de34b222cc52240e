"""Phases verify, evaluate and baselines: every file is proven, or quarantined with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from apex_quant.native import Job
from apex_quant.pipeline.context import Context
from apex_quant.pipeline.jobs import VERIFY, evaluate_file
from apex_quant.pipeline.measuring import (
    HARNESS,
    NATIVE,
    Target,
    measure_files,
    other_processors,
    parts_folder,
    reference,
    request,
    run_told,
)
from apex_quant.pipeline.phases import Done, Item
from apex_quant.pipeline.proof import proof
from apex_quant.pipeline.quarantine import note_of, quarantine
from apex_quant.pipeline.smoke import PROMPTS, ceiling, generate_once, written_before
from apex_quant.pipeline.steps_files import matrix
from apex_quant.pipeline.wanted import ceilings, wanted


def _prompts(context: Context) -> tuple[str, ...]:
    return context.config.verify.prompts or PROMPTS


def _greedy(context: Context) -> Path:
    return context.work / "reference" / "greedy.json"


def verify_items(context: Context) -> list[Item]:
    given = context.config.verify
    parameters = {
        "name": context.name,
        "rebuild": given.rebuild,
        "generate": given.generate,
        "prompts": list(_prompts(context)),
    }
    items = []
    for one in wanted(context.config):
        file = context.artifact("quantize", "model", one.name)
        items.append(Item(one.name, parameters, {"file": file.digest}, {"weighted": one.weighted}))
    return items


def verify_claims(context: Context, item: Item) -> Iterable[Path]:
    return [note_of(context.artifact("quantize", "model", item.name).path, "verify")]


def verify_weights(context: Context) -> bool:
    """Tensors are encoded again, or the full model has still to write its text."""
    given = context.config.verify
    if given.rebuild != "none" or not given.generate:
        return given.rebuild != "none"
    return written_before(_greedy(context), context.model().digest, _prompts(context), given.generate) is None


def verify_work(context: Context, items: Sequence[Item]) -> Iterator[Done]:
    """Structure, hashes, values, a sample encoded again, and a little text. A file that fails is quarantined."""
    given, source = context.config.verify, context.model()
    if (why := ceiling_unused(context)) is not None:
        context.note("verify", f"no file's mean KLD is held against the ceiling of its tier: {why}")
    expected = []
    if given.generate:
        expected = generate_once(
            source.path, source.digest, _greedy(context), _prompts(context), given.generate,
            context.config.session_options(),
        )  # fmt: skip
    jobs = [_verification(context, item, expected) for item in items]
    for done in run_told(context, "verify", jobs):
        item, problems, facts = items[done.number], done.result["problems"], done.result["facts"]
        path = context.artifact("quantize", "model", item.name).path
        outputs = {}
        if problems:
            outputs["quarantine"] = [quarantine(path, "verify", problems, facts)]
            facts["quarantined"] = "; ".join(problems)
            context.note("verify", f"{path.name} is quarantined: {facts['quarantined']}")
        yield Done(item, outputs, {**facts, "ok": not problems}, seconds=done.seconds)


def _verification(context: Context, item: Item, expected: Sequence[dict[str, Any]]) -> Job:
    given, files = context.config.verify, context.artifact("quantize", "model", item.name).paths
    rebuilds = given.rebuild != "none"
    source = context.model().paths if rebuilds else ()
    weights = matrix(context, item.about["weighted"]) if rebuilds else None
    payload = {
        "path": str(files[0]),
        "source": str(source[0]) if source else None,
        "imatrix": str(weights) if weights is not None else None,
        "everything": given.rebuild == "all",
        "generate": given.generate,
        "prompts": list(_prompts(context)),
        "expected": list(expected),
        "options": context.config.session_options().model_dump(mode="json"),
    }
    reads = [*files, *source, *([weights] if weights is not None else [])]
    return Job(VERIFY, lambda: payload, f"verifying {files[0].name}", reads)


# --- evaluate ---


def ceiling_unused(context: Context) -> str | None:
    """Why no mean KLD is measured, so that the last of the checks cannot be made; None where it is."""
    given = context.config
    if "evaluate" in given.phases.skip:
        return "phase evaluate is skipped"
    if given.evaluate.suite in NATIVE and given.evaluate.only and "kld" not in given.evaluate.only:
        return "evaluate.only leaves kld out"
    return None if given.evaluate.suite in NATIVE else f"evaluate.suite is {given.evaluate.suite}"


def evaluate_unused(context: Context) -> str | None:
    return "the evaluation suite is none" if context.config.evaluate.suite == "none" else None


def _settings(context: Context) -> tuple[dict[str, Any], dict[str, str]]:
    """Parameters and inputs that every measurement shares."""
    given = context.config.evaluate
    parameters: dict[str, Any] = {"suite": given.suite}
    if given.suite in NATIVE:
        parameters |= {"only": list(given.only), "floor": given.floor, "tasks": given.tasks, "seed": given.seed}
        # of files their content counts, which is among the inputs
        parameters["task_files"] = {
            task: Path(name).name if Path(name).exists() else name for task, name in given.task_files.items()
        }
    if given.suite in HARNESS:
        parameters["harness"] = given.harness.model_dump(mode="json")
    against = reference(context)
    inputs = {"reference": against.digest} if against is not None else {}
    files = context.files(list(given.task_files.values()))
    return parameters, {**inputs, **{f"tasks {name}": digest for name, digest in files.items()}}


def evaluate_items(context: Context) -> list[Item]:
    parameters, inputs = _settings(context)
    parameters = {"name": context.name, **parameters}
    items, outputs = [], wanted(context.config)
    limits = ceilings(context.config, outputs)
    for one in outputs:
        file = context.artifact("quantize", "model", one.name)
        checked = None if ("verify", one.name) in context.pending else proof(context, "verify", one.name)
        if checked is None or not checked.facts.get("quarantined"):
            limit = limits.get(one.name)
            decided = {**parameters, "kld_ceiling": limit} if limit is not None else parameters
            items.append(Item(one.name, decided, {"file": file.digest, **inputs}))
    return items


def evaluate_claims(context: Context, item: Item) -> Iterable[Path]:
    path = context.artifact("quantize", "model", item.name).path
    stem = path.name.removesuffix(".gguf")
    results = context.release / "results"
    out = results / f"{stem}.json"
    return [out, results / f"{stem}.npz", note_of(path, "evaluate"), parts_folder(context, out)]


def evaluate_weights(context: Context) -> bool:
    return context.config.evaluate.floor and context.config.evaluate.suite in NATIVE


def evaluate_work(context: Context, items: Sequence[Item]) -> Iterator[Done]:
    """Each file against the reference; a mean KLD above its tier's ceiling quarantines it. Raises as evaluate()."""
    targets = [
        Target(context.artifact("quantize", "model", item.name).paths, next(iter(evaluate_claims(context, item))))
        for item in items
    ]
    measured, limits = {}, ceilings(context.config, wanted(context.config))
    for number, found, seconds in measure_files(context, "evaluate", targets):
        item, (path, *_), out = items[number], *targets[number]
        measured[path.name] = found
        kld = (found.metrics.get("kld") or {}).get("mean")
        limit = ceiling(item.name, context.facts("quantize", item.name)["bpw"], limits)
        facts: dict[str, Any] = {"kld": kld, "ceiling": limit if kld is not None else None}
        outputs = results_of(out)
        if kld is not None and kld["value"] is not None and kld["value"] > limit:
            reason = f"mean KLD {kld['value']:.4g} is above {limit:g}, the ceiling of {item.name}"
            facts["quarantined"] = reason
            outputs["quarantine"] = [quarantine(path, "evaluate", [reason], facts)]
            context.note("evaluate", f"{path.name} is quarantined: {reason}")
        for warning in found.warnings:
            context.note("evaluate", f"{path.name}: {warning}")
        yield Done(item, outputs, facts, seconds=seconds)
    if (differing := other_processors(measured)) is not None:
        context.note("evaluate", differing)


def results_of(out: Path) -> dict[str, list[Path]]:
    """results.json and the archive of numbers per token that it names."""
    from apex_quant.evaluation.results import load

    found = load(out)
    archive = [out.parent / found.per_token.path] if found.per_token is not None else []
    return {"results": [out], **({"per_token": archive} if archive else {})}


# --- baselines ---


def baselines_unused(context: Context) -> str | None:
    if not context.config.baselines:
        return "no baselines are given"
    return evaluate_unused(context)


def baselines_items(context: Context) -> list[Item]:
    parameters, inputs = _settings(context)
    return [Item(spec, {"spec": spec, **parameters}, inputs) for spec in context.config.baselines]


def _place(context: Context, spec: str) -> Path:
    safe = "".join(c if c.isalnum() or c in "._+-" else "-" for c in spec)
    return context.release / "results" / "baselines" / safe


def baselines_claims(context: Context, item: Item) -> Iterable[Path]:
    return [_place(context, item.name)]


def _at_commit(context: Context, spec: str) -> str:
    """The spec at the commit at which this run first took its repository: what an interrupted run has measured stays
    true when there is a newer one. Raises what looking it up raises."""
    from apex_quant.hub import BASELINE, looked_up

    words = BASELINE.fullmatch(spec)
    assert words is not None  # the configuration has looked
    repo, revision = words["repo"], words["revision"]
    if (commit := context.pinned(repo, revision, "baselines")) == revision:
        commit = looked_up(repo, revision, progress=context.tell).commit
        context.pin(repo, revision, commit, "baselines")
        context.state.save()
    return f"{repo}@{commit}:{words['pattern']}:{words['label'] or repo}"


def baselines_work(context: Context, items: Sequence[Item]) -> Iterator[Done]:
    """Other people's files, downloaded and measured as ours are. Raises as baseline_files() and evaluate()."""
    from apex_quant.hub import baseline_files

    for item in items:
        folder = _place(context, item.name)
        folder.mkdir(parents=True, exist_ok=True)
        outputs: dict[str, list[Path]] = {"results": [], "per_token": []}
        facts = []
        for one in baseline_files(_at_commit(context, item.name), progress=context.tell):
            # by its path there: files of several folders may have one name
            out = folder / f"{one.files[0].path.removesuffix('.gguf').replace('/', '-')}.json"
            evaluate_file(request(context, Target([one.path], out)), None, context.tell)
            for label, paths in results_of(out).items():
                outputs[label] += paths
            size = sum(file.size for file in one.files)
            facts.append({"label": one.label, "file": one.path.name, "repo": one.repo, "commit": one.commit,
                          "bytes": size})  # fmt: skip
        yield Done(item, outputs, {"models": facts})
