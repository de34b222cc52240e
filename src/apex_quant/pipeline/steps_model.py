"""Phases reference and calibrate: what the full-precision model predicts, and which of its inputs matter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from apex_quant.pipeline.context import Context
from apex_quant.pipeline.disk import link
from apex_quant.pipeline.phases import Done, Item
from apex_quant.pipeline.wanted import needing_importance


def measured(context: Context) -> str | None:
    """Why nothing is measured against the reference, or None."""
    suite = context.config.evaluate.suite
    return None if suite in ("native", "all") else f"evaluation is {suite}: nothing is compared with the full model"


def reference_unused(context: Context) -> str | None:
    """Only evaluation reads it."""
    config = context.config
    if "evaluate" in config.phases.skip and (not config.baselines or "baselines" in config.phases.skip):
        return "evaluation is left out"
    return measured(context)


def reference_items(context: Context) -> list[Item]:
    given = context.config.reference
    parameters = {
        "name": context.name,
        "form": given.form,
        "ctx": given.ctx,
        "chunks": given.chunks,
        "every_token": given.every_token,
        "copy_output": context.config.copies_output,
    }
    texts = {f"text {name}": digest for name, digest in context.files(given.text).items()}
    return [Item("", parameters, {"model": context.model().digest, **texts})]


def reference_claims(context: Context, item: Item) -> Iterable[Path]:
    ending = "_logits_" if item.parameters["form"] == "stock" else "apexref"
    return [context.work / "reference" / f"{context.name}.{ending}"]


def reference_work(context: Context, items: Sequence[Item]) -> Iterator[Done]:
    """Raises what make_reference() raises."""
    from apex_quant.evaluation.make_reference import make_reference

    given = context.config.reference
    for item in items:
        (out,) = reference_claims(context, item)
        facts = context.noted("reference", item)
        if not out.exists():
            made = make_reference(
                context.model().path,
                out,
                text=given.text or None,
                ctx=given.ctx,
                chunks=given.chunks,
                scored="all" if given.every_token else "half",
                form=given.form,
                copy_output=item.parameters["copy_output"],
                options=context.config.session_options(),
                progress=context.tell,
            )
            facts = {"form": made.form, "tokens": made.tokens, "error": made.error, "warnings": list(made.warnings)}
            context.keep_note("reference", item, facts)
        yield Done(item, {"reference": [out]}, facts)


# --- calibrate ---


def calibrate_unused(context: Context) -> str | None:
    return None if needing_importance(context.config) else "no tier is encoded with an importance matrix"


def calibrate_items(context: Context) -> list[Item]:
    given = context.config.calibrate
    if given.imatrix is not None:
        path = Path(given.imatrix)
        return [
            Item(
                "",
                {"name": context.name, "imatrix": "given"},
                {"imatrix": context.state.sha256(path)},
                {"given": [path]},
            )
        ]
    parameters = {
        "name": context.name,
        "corpus": [name for name in given.corpus if not Path(name).exists()],
        "mix": given.mix,
        "tokens": given.tokens,
        "ctx": given.ctx,
        "cover": given.cover,
        "floor": given.floor,
        "seed": given.seed,
        "heads": given.heads,
    }
    texts = {f"corpus {name}": digest for name, digest in context.files(given.corpus).items()}
    return [Item("", parameters, {"model": context.model().digest, **texts})]


def calibrate_claims(context: Context, item: Item) -> Iterable[Path]:
    given = context.config.calibrate.imatrix
    ending = ".dat" if given is not None and given.endswith(".dat") else ".gguf"
    return [context.release / f"{context.name}.imatrix{ending}"]


def calibrate_work(context: Context, items: Sequence[Item]) -> Iterator[Done]:
    """Raises what calibrate() raises."""
    from apex_quant.calibration.calibrate import calibrate
    from apex_quant.text import parse_mix

    given = context.config.calibrate
    for item in items:
        (out,) = calibrate_claims(context, item)
        if given.imatrix is not None:
            yield Done(item, {"imatrix": [link(Path(given.imatrix), out)]}, {"given": given.imatrix})
            continue
        made = calibrate(
            context.model().path,
            out,
            corpus=given.corpus,
            mix=parse_mix(given.mix) if given.mix else None,
            tokens=given.tokens,
            cover=given.cover,
            floor=given.floor,
            seed=given.seed,
            heads=given.heads,
            options=context.config.session_options(ctx=given.ctx),
            force=True,  # what lies there of another key was cleared away; what is finished is found, not made again
            progress=context.tell,
        )
        thin = sum(len(row["experts"]) for row in made.uncovered)
        facts = {"tokens": made.tokens, "experts": made.experts, "uncovered": thin, "warnings": list(made.warnings)}
        for warning in made.warnings:
            context.note("calibrate", warning)
        if thin:
            context.note("calibrate", f"{thin} of {made.experts} experts saw fewer than {made.floor} tokens")
        yield Done(item, {"imatrix": [out]}, facts)
