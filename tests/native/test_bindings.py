"""One way into the bindings: weights stay as they lie where the library has AMX tile code (decision 7)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import apex_quant

RUN = """
import json, sys
from apex_quant.native import bindings as door
door.compiled_with_amx = lambda: json.loads(sys.argv[1])
lib = door.bindings()
before = lib.llama_model_default_params().use_extra_bufts
from apex_quant import SessionOptions
from apex_quant.runtime.session import Session
import numpy as np
with Session(sys.argv[2], SessionOptions(threads=1)) as session:
    session.decode(np.zeros((1, 40), np.int32))
    finite = bool(np.isfinite(session.logits()).all())
print(json.dumps([before, finite]))
"""


def outcome(amx: bool, model: Path) -> list[bool]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(amx), str(model)], capture_output=True, text=True, check=True
    )
    found: list[bool] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("amx")
    # Q4_K, Q6_K and Q8_0 are types that the tile code would take
    apex_quant.quantize(apex_quant.embedded_model(), "Q4_K_M", out=folder, threads=1)
    return next(folder.glob("*.gguf"))


def test_a_library_with_tile_code_gets_no_extra_buffers(quantized: Path) -> None:
    assert outcome(True, quantized) == [False, True]


def test_any_other_library_keeps_its_defaults() -> None:
    assert outcome(False, apex_quant.embedded_model()) == [True, True]


def test_a_batch_of_a_quantized_file_is_finite_with_the_library_that_is_here(quantized: Path) -> None:
    results = apex_quant.evaluate(quantized, only=["ppl"], ctx=128, chunks=1)
    assert 1 < results.metrics["ppl"]["value"] < 10_000
