"""The bindings' low-level module, imported once, with what must hold for everything that loads a model through it."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

from apex_quant.native.library import compiled_with_amx


@functools.cache
def bindings() -> Any:
    """The low-level module of the bindings: 0.3 s to import. ImportError without it.

    GNU OpenMP's threads spin at every barrier, by default for milliseconds: where other processes want the processor
    too, two threads were up to four times slower than one (embedded model, 2 cores), and with one core busy scoring
    choices was ten times slower. A spin of 100 is too short where nothing else runs: 1.6 times slower than 2000, which
    is as fast as the default there.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    lib = importlib.import_module("llama_cpp.llama_cpp")
    if compiled_with_amx():
        _without_extra_buffers(lib)
    return lib


def _without_extra_buffers(lib: Any) -> None:
    """Weights stay as they lie in the file, by default and for everybody (docs/decisions/0007-amx.md)."""
    original = lib.llama_model_default_params

    def plain() -> Any:
        params = original()
        params.use_extra_bufts = False
        return params

    lib.llama_model_default_params = plain
