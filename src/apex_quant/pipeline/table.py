"""The phases, in the order in which they run (docs/run.md)."""

from __future__ import annotations

from typing import Final

from apex_quant.pipeline import steps_checks as checks
from apex_quant.pipeline import steps_files as files
from apex_quant.pipeline import steps_model as model
from apex_quant.pipeline import steps_publish as final
from apex_quant.pipeline import steps_source as source
from apex_quant.pipeline.context import Context
from apex_quant.pipeline.phases import Phase, always, nothing


def _yes(context: Context) -> bool:
    return True


PHASES: Final[tuple[Phase, ...]] = (
    Phase(
        "source", (), "the full-precision weights: downloaded, or found",
        source.source_items, source.source_work, source.source_claims, always, nothing,
    ),
    Phase(
        "convert", ("source",), "a checkpoint becomes a GGUF, by llama.cpp's own converter",
        source.convert_items, source.convert_work, source.convert_claims, source.convert_unused, source.convert_disk,
    ),
    Phase(
        "reference", ("convert",), "what the full-precision model predicts on held-out text",
        model.reference_items, model.reference_work, model.reference_claims, model.reference_unused,
        model.reference_disk, weights=_yes,
    ),
    Phase(
        "calibrate", ("convert",), "the importance matrix",
        model.calibrate_items, model.calibrate_work, model.calibrate_claims, model.calibrate_unused, nothing,
        weights=_yes,
    ),
    Phase(
        "recipes", ("convert", "calibrate"), "which type each tensor gets, and the size to the byte",
        files.recipe_items, files.recipe_work, files.recipe_claims, always, nothing, weights=_yes,
    ),
    Phase(
        "quantize", ("convert", "calibrate", "recipes"), "the files, all tiers in one pass over the weights",
        files.quantize_items, files.quantize_work, files.quantize_claims, always, files.quantize_disk, weights=_yes,
    ),
    Phase(
        "verify", ("quantize",), "every file is whole, follows from its source, and still writes text",
        checks.verify_items, checks.verify_work, checks.verify_claims, always, nothing,
        weights=checks.verify_weights,
    ),
    Phase(
        "evaluate", ("reference", "quantize"), "perplexity, KLD, routers, tasks and speed of every file",
        checks.evaluate_items, checks.evaluate_work, checks.evaluate_claims, checks.evaluate_unused, nothing,
        weights=checks.evaluate_weights,
    ),
    Phase(
        "baselines", ("reference",), "other people's files, measured in the same way",
        checks.baselines_items, checks.baselines_work, checks.baselines_claims, checks.baselines_unused, nothing,
        weights=checks.evaluate_weights,
    ),
    Phase(
        "report", ("evaluate", "baselines"), "report, plots and model card",
        final.report_items, final.report_work, final.report_claims, final.report_unused, nothing,
    ),
    Phase(  # of the phases between, proof.py asks
        "publish", ("quantize",), "to the hub, after --yes",
        final.publish_items, final.publish_work, final.publish_claims, final.publish_unused, nothing,
    ),
)  # fmt: skip
