"""Phases recipes and quantize: which type each tensor gets, and the files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from apex_quant.gguf import shard_name, write_file
from apex_quant.pipeline.context import Context, PhaseEvent
from apex_quant.pipeline.phases import Done, Item
from apex_quant.pipeline.wanted import Wanted, plan_options, wanted
from apex_quant.recipe.plan import plan
from apex_quant.recipe.planned import Plan


def importance(context: Context, one: Wanted) -> dict[str, str]:
    """The matrix as an input, for what is encoded with it."""
    return {"imatrix": context.artifact("calibrate", "imatrix").digest} if one.weighted else {}


def matrix(context: Context, weighted: bool) -> Path | None:
    return context.artifact("calibrate", "imatrix").path if weighted else None


def recipe_items(context: Context) -> list[Item]:
    model = context.model().digest
    items = []
    for one in wanted(context.config):
        inputs = {"model": model, **importance(context, one)}
        sensitivity = context.config.optimize.sensitivity
        if one.size is not None and sensitivity != "measure":
            inputs["sensitivity"] = context.state.sha256(Path(sensitivity))
        items.append(Item(one.name, {"name": context.name, **one.parameters}, inputs, {"wanted": one}))
    return items


def recipe_claims(context: Context, item: Item) -> Iterable[Path]:
    return [context.release / "recipes" / f"{context.name}-{_safe(item.name)}.txt"]


def recipe_work(context: Context, items: Sequence[Item]) -> Iterator[Done]:
    """Plans, and for sizes the measured allocation. Raises what plan() and optimize() raise."""
    for item in items:
        one: Wanted = item.about["wanted"]
        (out,) = recipe_claims(context, item)
        facts: dict[str, Any] = {}
        outputs = {"recipe": [out]}
        if one.size is None:
            made = plan(
                context.model().path, one.asked, imatrix=matrix(context, one.weighted),
                options=plan_options(context.config),
            )  # fmt: skip
            write_file(out, made.recipe.text())
            file_name = made.file_name
        else:
            certificate, facts = _allocated(context, item, out)
            outputs["certificate"] = [certificate]
            options = plan_options(context.config, recipe=out)
            made = plan(context.model().path, imatrix=matrix(context, one.weighted), options=options)
            file_name = f"{made.model}-APEX-{one.name}.gguf"
        for warning in made.warnings:
            context.note("recipes", f"{one.name}: {warning}")
        yield Done(item, outputs, {**facts, **_planned(made, file_name)})


def _planned(made: Plan, file_name: str) -> dict[str, Any]:
    count = len(made.layouts)
    stem = file_name.removesuffix(".gguf")
    return {
        "file_name": file_name,
        "files": [file_name] if count == 1 else [shard_name(stem, number, count) for number in range(count)],
        "bytes": made.total_bytes,
        "bpw": made.bpw,
        "importance": made.importance,
        "warnings": list(made.warnings),
    }


def _allocated(context: Context, item: Item, out: Path) -> tuple[Path, dict[str, Any]]:
    """A recipe of at most `size` bytes with the least measured divergence: its certificate, and what is known of it.

    Raises what measure() and optimize() raise.
    """
    from apex_quant.allocation.measure import measure
    from apex_quant.allocation.optimize import optimize
    from apex_quant.allocation.sensitivity import Sensitivities

    given, size = context.config.optimize, item.about["wanted"].size
    session, weights = context.config.session_options(), matrix(context, True)
    fill = context.config.quantize.fill
    sensitivities: Path | Sensitivities = Path(given.sensitivity)
    if given.sensitivity == "measure":
        # measured once for all sizes, and again when what decides it changes: that is in the name
        folder = context.work / "reference"
        more: dict[str, Any] = {} if given.tokens is None else {"tokens": given.tokens}
        sensitivities = measure(
            context.model().path,
            out=lambda spec: folder / f"sensitivities-{spec[:12]}.json",
            imatrix=weights,
            fill=fill,
            options=session,
            progress=context.tell,
            **more,
        )
    made = optimize(
        context.model().path,
        size=size,
        types=given.types or None,
        sensitivity=sensitivities,
        imatrix=weights,
        out=out,
        threads=context.config.threads,
        session=session,
        options=plan_options(context.config),
        force=True,  # what lies there of another key was cleared away
        progress=lambda event: context.tell(event.event or PhaseEvent("note", "recipes", f"{item.name}: {event.what}")),
    )
    found = made.to_json()
    for note in made.notes:
        context.note("recipes", f"{item.name}: {note}")
    kept = ("total_bytes", "target_bytes", "predicted_kld", "measured_kld", "gap", "proved")
    return made.certificate, {"optimized": {key: found[key] for key in kept}}


# --- quantize ---


def quantize_items(context: Context) -> list[Item]:
    items, model = [], context.model().digest
    for one in wanted(context.config):
        recipe = context.artifact("recipes", "recipe", one.name).digest
        inputs = {"model": model, "recipe": recipe, **importance(context, one)}
        # the recipe has the types; these have what else goes into the file
        parameters = {key: value for key, value in one.parameters.items() if key in _WRITTEN}
        items.append(Item(one.name, {"name": context.name, **parameters}, inputs, {"wanted": one}))
    return items


_WRITTEN = ("fill", "override_kv", "prune_layers", "split", "keep_split", "published", "mix", "size")


def quantize_claims(context: Context, item: Item) -> Iterable[Path]:
    facts = context.facts("recipes", item.name)
    return [context.release / name for name in dict.fromkeys([*facts["files"], facts["file_name"]])]


def quantize_work(context: Context, items: Sequence[Item]) -> Iterator[Done]:
    """All tiers in one pass over the weights, sizes one by one. Raises what quantize() raises."""
    by_name = {item.name: item for item in items}
    tiers: list[Wanted] = [item.about["wanted"] for item in items if item.about["wanted"].size is None]
    sizes: list[Wanted] = [item.about["wanted"] for item in items if item.about["wanted"].size is not None]
    # a mix takes the matrix when it is given one, so those that are to go without have a pass of their own
    apart = [one for one in tiers if "mix" in one.parameters and not one.weighted]
    together = [one for one in tiers if one not in apart]
    if not any(one.weighted for one in together):
        apart, together = [], tiers
    for group in (together, apart, *([one] for one in sizes)):
        if group:
            yield from _pass(context, group, by_name)


def _pass(context: Context, group: Sequence[Wanted], items: dict[str, Item]) -> Iterator[Done]:
    from apex_quant.encode.quantize import quantize

    config = context.config
    options, out = plan_options(config), context.release
    if group[0].size is not None:
        facts = context.facts("recipes", group[0].name)
        options = replace(options, recipe=context.artifact("recipes", "recipe", group[0].name).path)
        out = context.release / facts["file_name"]
    made = quantize(
        context.model().path,
        [one.asked for one in group if one.asked is not None] or None,
        imatrix=matrix(context, any(one.weighted for one in group)),
        out=out,
        threads=config.quantize.threads or config.threads,
        force=True,  # what lies there of another key was cleared away; what is finished is found, not made again
        options=options,
        progress=context.tell,
        workers=context.cluster,
    )
    for one, output in zip(group, made.outputs, strict=True):
        facts = {"tier": output.tier, "bytes": output.bytes, "bpw": output.bpw, "importance": output.plan.importance}
        paths = [file.path for file in output.files]
        yield Done(items[one.name], {"model": paths}, facts, seconds=output.seconds)


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._+-" else "-" for c in name)
