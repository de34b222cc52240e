"""APEX: fit Mixture-of-Experts language models into small memory, with proof.

The functions here are what the commands of the same name do. They are loaded on first use, so that importing the
package costs nothing and needs no native library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from apex_quant.version import VERSION as __version__

if TYPE_CHECKING:
    from apex_quant.allocation.frontier import frontier as frontier
    from apex_quant.allocation.measure import measure as measure
    from apex_quant.allocation.optimize import measured_twin as measured_twin
    from apex_quant.allocation.optimize import optimize as optimize
    from apex_quant.calibration.calibrate import Calibration as Calibration
    from apex_quant.calibration.calibrate import calibrate as calibrate
    from apex_quant.data import embedded_model as embedded_model
    from apex_quant.encode.diff import diff as diff
    from apex_quant.encode.quantize import quantize as quantize
    from apex_quant.encode.verify import verify as verify
    from apex_quant.evaluation.compare import compare as compare
    from apex_quant.evaluation.evaluate import evaluate as evaluate
    from apex_quant.evaluation.kv import kv as kv
    from apex_quant.evaluation.make_reference import make_reference as make_reference
    from apex_quant.gguf import merge as merge
    from apex_quant.gguf import open_model as open_model
    from apex_quant.gguf import split as split
    from apex_quant.model.inspect import inspect as inspect
    from apex_quant.pipeline.engine import run as run
    from apex_quant.pipeline.status import status as status
    from apex_quant.recipe.plan import plan as plan
    from apex_quant.recipe.planned import PlanOptions as PlanOptions
    from apex_quant.report.card import card as card
    from apex_quant.report.choose import choose as choose
    from apex_quant.report.plot_frontier import plot_frontier as plot_frontier
    from apex_quant.runtime.options import SessionOptions as SessionOptions
    from apex_quant.serving.chat import chat as chat
    from apex_quant.serving.exports import export as export
    from apex_quant.serving.fit import fit as fit
    from apex_quant.serving.serve import serve as serve

_WHERE = {
    "embedded_model": "data",
    "Calibration": "calibration.calibrate",
    "calibrate": "calibration.calibrate",
    "measure": "allocation.measure",
    "quantize": "encode.quantize",
    "plan": "recipe.plan",
    "PlanOptions": "recipe.planned",
    "SessionOptions": "runtime.options",
    "inspect": "model.inspect",
    "open_model": "gguf",
    "merge": "gguf",
    "split": "gguf",
    "verify": "encode.verify",
    "evaluate": "evaluation.evaluate",
    "kv": "evaluation.kv",
    "make_reference": "evaluation.make_reference",
    "compare": "evaluation.compare",
    "optimize": "allocation.optimize",
    "measured_twin": "allocation.optimize",
    "frontier": "allocation.frontier",
    "run": "pipeline.engine",
    "status": "pipeline.status",
    "diff": "encode.diff",
    "fit": "serving.fit",
    "serve": "serving.serve",
    "export": "serving.exports",
    "chat": "serving.chat",
    "card": "report.card",
    "plot_frontier": "report.plot_frontier",
    "choose": "report.choose",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'apex_quant' has no attribute {name!r}")
    return getattr(importlib.import_module(f"apex_quant.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
