"""APEX: fit Mixture-of-Experts language models into small memory, with proof.

The functions here are what the commands of the same name do. They are loaded on first use, so that importing the
package costs nothing and needs no native library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from apex_quant.version import VERSION as __version__

if TYPE_CHECKING:
    from apex_quant.calibration.calibrate import Calibration as Calibration
    from apex_quant.calibration.calibrate import calibrate as calibrate
    from apex_quant.data import embedded_model as embedded_model
    from apex_quant.encode.diff import diff as diff
    from apex_quant.encode.quantize import quantize as quantize
    from apex_quant.encode.verify import verify as verify
    from apex_quant.evaluation.compare import compare as compare
    from apex_quant.evaluation.evaluate import evaluate as evaluate
    from apex_quant.evaluation.make_reference import make_reference as make_reference
    from apex_quant.gguf import merge as merge
    from apex_quant.gguf import open_model as open_model
    from apex_quant.gguf import split as split
    from apex_quant.model.inspect import inspect as inspect
    from apex_quant.recipe.plan import plan as plan
    from apex_quant.recipe.planned import PlanOptions as PlanOptions
    from apex_quant.runtime.options import SessionOptions as SessionOptions

_WHERE = {
    "embedded_model": "data",
    "Calibration": "calibration.calibrate",
    "calibrate": "calibration.calibrate",
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
    "make_reference": "evaluation.make_reference",
    "compare": "evaluation.compare",
    "diff": "encode.diff",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'apex_quant' has no attribute {name!r}")
    return getattr(importlib.import_module(f"apex_quant.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
