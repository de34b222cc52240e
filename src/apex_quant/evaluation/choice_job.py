"""The child's job: multiple-choice tasks through the model, batch by batch; what each answer got goes to disk.

A session has as much room as llama-perplexity makes by default, 2048 tokens in 4 sequences, and more where a task
needs more: with the same room it makes the same batches. More tasks together are not faster on a processor.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apex_quant.evaluation.choice import Prepared, needs, prepare, prepare_mc2, score_choices, score_mc2
from apex_quant.evaluation.state import State
from apex_quant.evaluation.taskfiles import Form, Task
from apex_quant.native.bindings import bindings
from apex_quant.native.worker import Emit, Json, Stopped
from apex_quant.runtime.options import SessionOptions
from apex_quant.runtime.session import Session

with contextlib.suppress(ImportError):  # early, while the parent still reads the tasks; Session says what is missing
    bindings()

ROOM, SEQUENCES, DECODE = 2048, 4, 2048  # llama-perplexity's defaults: tokens, sequences, tokens of one decode
_SMALLEST = {"ctx": 16, "sequences": 1, "unified": True, "embeddings": False}  # while only the tokenizer is needed


class _Job:
    """One kind of tasks on one model. `state.done` tasks are scored, the first ones in the order of selection."""

    def __init__(self, session: Session, payload: Json, emit: Emit) -> None:
        self.session, self.emit = session, emit
        self.kind: str = payload["kind"]
        self.form: Form = payload["form"]
        self.tasks = [Task.from_json(one) for one in payload["tasks"]]
        self.path, self.save_seconds = Path(payload["state"]), float(payload["save_seconds"])
        self.state = State.load(self.path, payload["spec"]) or State(payload["spec"])
        self.arrays: dict[str, list[Any]] = {
            name: list(self.state.arrays.get(name, ())) for name in ("choice", "correct", "logprob", "mc2")
        }
        self.with_mc2 = self.kind == "truthfulqa" and any(task.mc2.texts for task in self.tasks)
        self.resumed = self._steps_done
        self._saved_at = time.monotonic()

    @property
    def _steps_done(self) -> int:
        return len(self.arrays["correct"]) + len(self.arrays["mc2"])

    def run(self, stop: threading.Event) -> None:
        """Score everything that is still to be scored. Raises Stopped, after saving, when asked to stop."""
        if self.state.finished:
            return
        self._tick()
        try:
            for _ in self._work():
                self.state.done = len(self.arrays["correct"])
                self._tick()
                if stop.is_set():
                    raise Stopped
                if time.monotonic() - self._saved_at >= self.save_seconds:
                    self._save()
            self.state.finished = True
        finally:
            self._save()

    def _work(self) -> Iterator[None]:
        """After every batch its numbers are in `arrays`."""
        done = len(self.arrays["correct"])
        if done < len(self.tasks):
            prepared = [prepare(self.session, task, self.form) for task in self.tasks]
            self.state.facts["like"] = self._reopen(prepared)
            for batch in score_choices(self.session, prepared, self.form, done=range(done)):
                for one in batch:
                    self.arrays["choice"].append(one.choice)
                    self.arrays["correct"].append(one.correct)
                    self.arrays["logprob"] += one.scores.tolist()
                yield
        if self.with_mc2:
            having = [task for task in self.tasks if task.mc2.texts]
            prepared = [prepare_mc2(self.session, task) for task in having]
            self._reopen(prepared)
            for masses in score_mc2(self.session, prepared, done=range(len(self.arrays["mc2"]))):
                self.arrays["mc2"] += [mass for _, mass in masses]
                yield

    def _reopen(self, prepared: Sequence[Prepared]) -> str:
        """Room for the largest task; llama-perplexity's options for the same room."""
        tokens, sequences = needs(prepared)
        sequences = max(SEQUENCES, sequences)
        ctx = max(16, -(-max(ROOM, tokens) // sequences))
        self.session.reopen(ctx=ctx, sequences=sequences, decode_tokens=DECODE)
        return f"-np {sequences} -c {ctx}"

    def _tick(self) -> None:
        having = sum(bool(task.mc2.texts) for task in self.tasks) if self.with_mc2 else 0
        counters = {"done": self._steps_done, "planned": len(self.tasks) + having, "resumed": self.resumed}
        self.emit({"event": "progress", "what": self.kind, **counters})

    def _save(self) -> None:
        done = self.tasks[: len(self.arrays["correct"])]
        counts = [len(task.mc1.texts) for task in done]
        having = [place for place, task in enumerate(done) if task.mc2.texts][: len(self.arrays["mc2"])]
        arrays: dict[str, NDArray[Any]] = {
            "task": np.array([task.number for task in done], np.int32),
            "task_hash": np.array([task.digest() for task in done], np.uint64),
            "choice": np.array(self.arrays["choice"], np.int16),
            "correct": np.array(self.arrays["correct"], np.bool_),
            "logprob": np.array(self.arrays["logprob"], np.float32),
            "offsets": np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64),
        }
        if self.with_mc2:
            arrays |= {"mc2": np.array(self.arrays["mc2"], np.float32), "mc2_place": np.array(having, np.int32)}
        self.state.arrays = arrays
        self.state.save(self.path)
        self._saved_at = time.monotonic()


def run(payload: Json, emit: Emit, stop: threading.Event, fds: Sequence[int]) -> Json:
    """Entry point of the child process; `payload` as choices.py makes it."""
    options = SessionOptions.model_validate({**payload["options"], **_SMALLEST})
    started = time.monotonic()
    with Session(payload["model"], options) as session:
        job = _Job(session, payload, emit)
        job.run(stop)
    return {"seconds": time.monotonic() - started, "resumed": job.resumed}
