"""Jobs of verify and evaluate (native/workers.py): one file each, or some metrics of one, on whatever machine.

What they are told is plain data; what they make lies in files on the shared disk, and their state, too.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from apex_quant.errors import InputError, NativeError
from apex_quant.native.worker import Json
from apex_quant.native.workers import Notify
from apex_quant.pipeline.smoke import generate, judge
from apex_quant.runtime.options import SessionOptions

VERIFY: Final = "apex_quant.pipeline.jobs:verify_file"
EVALUATE: Final = "apex_quant.pipeline.jobs:evaluate_file"


def verify_file(payload: Json, threads: int | None, emit: Notify) -> Json:
    """{"problems", "facts"} of a file: structure, hashes, values, tensors encoded again from `source`, and its text
    beside `expected` (empty: none is generated). Raises what verify() raises for the source, and NativeError when a
    signal other than a failed assertion's ended the process that ran it."""
    problems, facts = _checked(payload, _most(payload["options"]["threads"], threads), emit)
    if payload["generate"] and not problems:
        wrong, written = _written(payload, threads)
        problems += wrong
        facts["texts"] = [one["text"] for one in written]
    return {"problems": problems, "facts": facts}


def _checked(payload: Json, threads: int | None, emit: Notify) -> tuple[list[str], dict[str, Any]]:
    from apex_quant.encode.verify import verify

    try:
        found = verify(
            payload["path"],
            source=payload["source"],
            imatrix=payload["imatrix"],
            everything=payload["everything"],
            threads=threads,
            progress=emit,
        )
    except InputError as error:
        return [error.message], {}
    failed = [f"{check.name}: {check.detail}" for check in found.checks if check.ok is False]
    return failed, {"checks": {check.name: check.detail for check in found.checks if check.ok}}


def _written(payload: Json, threads: int | None) -> tuple[list[str], Sequence[dict[str, Any]]]:
    options = _options(payload, threads)
    try:
        written = generate(Path(payload["path"]), payload["prompts"], payload["generate"], options)
    except (InputError, NativeError) as error:  # it is this file that llama.cpp cannot run: the source it could
        if isinstance(error, NativeError) and error.signal not in (None, signal.SIGABRT):
            raise  # memory ran out, somebody killed it, this machine: only an assertion (SIGABRT) speaks of the file
        return [f"llama.cpp cannot run it: {error.message}"], []
    return judge(written, payload["expected"]), written


def evaluate_file(payload: Json, threads: int | None, emit: Notify) -> Json:
    """evaluate() with `payload` as its options; the results are in payload["out"]. Raises as evaluate()."""
    from apex_quant.evaluation.evaluate import evaluate
    from apex_quant.evaluation.harness import HarnessPlan
    from apex_quant.evaluation.speed import SpeedPlan

    given = {key: value for key, value in payload.items() if key not in ("model", "options", "speed", "harness")}
    harness = payload["harness"]
    evaluate(
        payload["model"],
        **given,
        speed=SpeedPlan() if payload["speed"] else None,
        harness=HarnessPlan(**{**harness, "tasks": tuple(harness["tasks"])}) if harness else None,
        options=_options(payload, threads),
        progress=emit,
    )
    return {}


def _options(payload: Json, threads: int | None) -> SessionOptions:
    options = SessionOptions.model_validate(payload["options"])
    return options.model_copy(update={"threads": _most(options.threads, threads)})


def _most(wanted: int | None, here: int | None) -> int | None:
    """Threads: what the user wants, as far as this place has them."""
    return min(wanted, here) if wanted and here else wanted or here
