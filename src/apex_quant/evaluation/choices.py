"""`evaluate_choices`: one multiple-choice benchmark on one model, in a child process that can be stopped and goes on.

metric, arrays = evaluate_choices("MODEL.gguf", "hellaswag", "hellaswag_val_full.txt", out="work.state")
print(metric["value"], metric["low"], metric["high"])
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import NativeError, ResourceError, UsageError
from apex_quant.evaluation.identity import sampled
from apex_quant.evaluation.selection import SEED, select
from apex_quant.evaluation.state import State
from apex_quant.evaluation.statistics import mean_interval, wilson
from apex_quant.evaluation.taskfiles import TaskFile, read_tasks
from apex_quant.evaluation.taskhub import task_file
from apex_quant.gguf import open_model
from apex_quant.native import Child, library_info
from apex_quant.runtime.options import SessionOptions

JOB: Final = "apex_quant.evaluation.choice_job"
TASKS: Final = 400  # of each benchmark, as llama-perplexity takes of HellaSwag
SAVE_SECONDS: Final = 30.0
WORDING: Final[dict[str, str]] = {
    "text": "context, a space, ending; mean log-probability per token after what the four endings have in common",
    "csv": "sentence with each choice; mean log-probability per token after the choice",
    "bin": "question as in the file, a space, answer; mean log-probability per token after what the answers have in "
    "common",
}
_FORMAT = 1  # of the state on disk and of what its numbers mean

Event = dict[str, Any]  # {"what": the kind, "done", "planned", "resumed"}, in tasks


def evaluate_choices(
    model: str | Path,
    kind: str,
    file: str | Path | None = None,
    *,
    tasks: int = TASKS,
    seed: int = SEED,
    options: SessionOptions | None = None,
    out: str | Path,
    progress: Callable[[Event], None] | None = None,
    save_seconds: float = SAVE_SECONDS,
    pass_fds: Sequence[int] = (),
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Accuracy of `model` on `tasks` tasks (0: all) of a file for `kind` (taskfiles.KINDS).

    `file`: a path, hub:USER/DATA/FILE, or None for the kind's own file on the hub. `seed` 1 draws llama-perplexity's
    tasks. `out`: where unfinished work is kept; finished work too, until the caller removes it, so that the same call
    gives the same result at once. `options` say how the model is loaded and computed; how much is decoded together is
    decided here. `pass_fds` stay open as long as the child lives (locks).

    Gives the metric for results.json, and arrays KIND/task I32 [n] (number in the file), KIND/task_hash U64 [n],
    KIND/choice I16 [n], KIND/correct bool [n], KIND/logprob F32 [answers of all tasks] with KIND/offsets I64 [n + 1],
    and for TruthfulQA KIND/mc2 F32 and KIND/mc2_place I32 (row of the task). Raises UsageError, InputError,
    ResourceError or NativeError.
    """
    problem = library_info().problem
    if problem:
        raise ResourceError(f"{problem}, so nothing can be run", hint="`apex doctor` says how to get it")
    out = Path(out)
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder")
    with Child(JOB) as child:
        path = task_file(kind, file)
        found = read_tasks(path, kind)
        chosen_tasks = [found.tasks[number] for number in select(found.form, len(found.tasks), tasks, seed)]
        asked = {"kind": kind, "form": found.form, "tasks": [task.to_json() for task in chosen_tasks]}
        chosen = options or SessionOptions()
        with open_model(model) as opened:
            spec = _spec(sampled(opened), asked, chosen)
            state = State.load(out, spec)
            if state is None or not state.finished:
                payload = {
                    **asked,
                    "model": str(opened.path),
                    "options": chosen.model_dump(mode="json"),
                    "state": str(out),
                    "spec": spec,
                    "save_seconds": save_seconds,
                }
                step = f"evaluating {opened.path.name} on {kind}"
                child.run(f"{JOB}:run", payload, progress or (lambda _: None), step=step, pass_fds=pass_fds)
                state = State.load(out, spec)
    if state is None or not state.finished or len(state.arrays["correct"]) != len(chosen_tasks):
        raise NativeError(f"{out}: the numbers are gone or damaged", hint="evaluate again")
    metric = {**_metric(state, found, path, seed), "spec": spec}
    return metric, {f"{kind}/{name}": array for name, array in state.arrays.items()}


def _spec(model: str, asked: dict[str, Any], options: SessionOptions) -> str:
    """A hash of everything that decides the result, but for the number of threads."""
    decisive = options.model_dump(mode="json", exclude={"threads", "ctx", "sequences", "decode_tokens", "unified"})
    said = json.dumps([model, _FORMAT, library_info().version, asked, decisive], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _metric(state: State, found: TaskFile, path: Path, seed: int) -> dict[str, Any]:
    correct = state.arrays["correct"]
    metric: dict[str, Any] = {
        **wilson(int(correct.sum()), len(correct)).to_json(),
        "wording": WORDING[found.form],
        "file": path.name,
        "file_sha256": found.sha256,
        "available": len(found.tasks),
        "seed": seed,
        "like": f"llama-perplexity {state.facts['like']}",
    }
    if found.notes:
        metric["notes"] = list(found.notes)
    if "mc2" in state.arrays:
        masses = state.arrays["mc2"].astype(np.float64)
        masses = masses[np.isfinite(masses)]
        metric["mc2"] = mean_interval(masses, np.arange(len(masses))).to_json()
    return metric
