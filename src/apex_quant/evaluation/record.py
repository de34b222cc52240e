"""The child's job of `reference`: a model's predictions into a .apexref or a stock _logits_ file, chunk by chunk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import ApexError, InputError
from apex_quant.evaluation import stock_logits
from apex_quant.evaluation.rebuild import STATES, OutputMatrix
from apex_quant.evaluation.reference import MAGIC, PART_ROWS, PREAMBLE, encode_logits, pack
from apex_quant.evaluation.scores import F32, NotFinite, Scorer, scorer
from apex_quant.evaluation.state import State
from apex_quant.evaluation.steps import Batching, Plan, Step, plan_texts
from apex_quant.evaluation.watch import Routing, watcher
from apex_quant.evaluation.worker import Lane
from apex_quant.gguf import AtomicFile, open_model
from apex_quant.native.bindings import bindings
from apex_quant.native.worker import Emit, Json, Stopped
from apex_quant.runtime.options import SessionOptions
from apex_quant.runtime.session import Session

with contextlib.suppress(ImportError):  # early, as in worker.py
    bindings()

AGREES = 1e-6  # mean KLD of rebuilt logits, up to which hidden states stand for them


class Recorder:
    """Writes one file. `state.facts`: what is decided (`header`), and what is written (`parts`, `size`)."""

    def __init__(self, lane: Lane, plan: Plan, payload: Json, emit: Emit, one: Scorer) -> None:
        self.lane, self.plan, self.payload, self.emit, self.scorer = lane, plan, payload, emit, one
        self.stock: bool = payload["stock"]
        self.path = Path(payload["state"])
        out = Path(payload["out"])
        partial = out.with_name(out.name + ".partial")
        found = State.load(self.path, payload["spec"])
        self.state = found if found is not None and partial.exists() else State(payload["spec"])
        self.resumed = self.state.done
        self.file = AtomicFile(out, resume=self.state.done > 0)
        facts = self.state.facts
        facts.setdefault("size", 0 if self.stock else PREAMBLE.size)
        facts.setdefault("parts", [])
        self.file.truncate(facts["size"])
        self.header: Json | None = facts.get("header")
        self._waiting: dict[int, list[tuple[list[NDArray[Any]], NDArray[Any], Routing | None]]] = {}
        self._written: dict[int, list[Any]] = {}
        self._saved_at = time.monotonic()

    def run(self, batching: Batching, stop: threading.Event) -> None:
        """Decode everything, and complete the file. Raises Stopped, after saving, when asked to stop."""
        if self.stock and not self.state.done:
            vocabulary = self.lane.session.vocabulary
            assert vocabulary is not None
            self._append(stock_logits.head(self.plan.ctx, vocabulary.size, self.plan.tokens))
        self._tick()
        for steps in self.plan.steps(self.state.done, batching):
            size = self.state.facts["size"]
            for step in steps:
                self._step(step)
                if stop.is_set():
                    self.state.facts["size"] = size  # the group of chunks starts again
                    self._save()
                    raise Stopped
            chunks = steps[0].chunks
            if not self.stock:
                for chunk in chunks:
                    self._flush(chunk, 1)
                self.state.facts["parts"] += [self._written.pop(chunk) for chunk in chunks]
            self.state.done = chunks.stop
            self._tick()
            if time.monotonic() - self._saved_at >= self.payload["save_seconds"]:
                self._save()
        if not self.stock:
            self._write_header()
        self.file.commit()
        self.path.unlink(missing_ok=True)

    def _step(self, step: Step) -> None:
        self.lane.decode(step)
        if not step.rows:
            return
        logits = self.lane.session.logits()
        targets = self.plan.targets()[step.chunks.start : step.chunks.stop, step.scored].reshape(-1)
        try:
            nll = self.scorer.nll(logits, targets)
        except NotFinite as error:
            width = step.rows // len(step.chunks)
            raise InputError(
                f"the model gives logits that are NaN or infinite: chunk {step.chunks[error.row // width]}, "
                f"position {self.plan.first + step.scored.start + error.row % width}"
            ) from None
        if self.stock:
            self._stock_rows(step, logits)
            return
        routing = self.lane.routing(step)
        if self.header is None:
            self.header = self._decide(logits, routing)
            self.state.facts["header"] = self.header
        width = step.rows // len(step.chunks)
        for number, chunk in enumerate(step.chunks):
            first, last = number * width, (number + 1) * width
            for start in range(first, last, PART_ROWS):  # no more at a time than a part of the larger form has
                rows = slice(start, min(start + PART_ROWS, last))
                part = None
                if routing is not None:
                    part = Routing(routing.layers, routing.experts[:, rows], routing.weights[:, rows])
                self._waiting.setdefault(chunk, []).append((self._body(logits, rows), nll[rows], part))
                self._flush(chunk, self.header["rows"])

    def _stock_rows(self, step: Step, logits: F32) -> None:
        """Rows have their place: chunks that are decoded side by side are far from each other in the file."""
        words = stock_logits.row_words(logits.shape[1])
        start = stock_logits.HEAD_BYTES + self.plan.tokens.size * 4
        width = step.rows // len(step.chunks)
        for number, chunk in enumerate(step.chunks):
            place = chunk * self.plan.scored + step.scored.start
            for first in range(0, width, PART_ROWS):
                rows = slice(number * width + first, number * width + min(first + PART_ROWS, width))
                data = stock_logits.encode(logits[rows])
                self.file.pwrite(data.tobytes(), start + 2 * words * (place + first))
        end = start + 2 * words * step.chunks.stop * self.plan.scored
        self.state.facts["size"] = max(self.state.facts["size"], end)

    def _body(self, logits: F32, rows: slice) -> list[NDArray[Any]]:
        assert self.header is not None
        if self.header["form"] == "logprobs":
            return encode_logits(logits[rows])
        assert self.lane.watcher is not None
        assert self.lane.watcher.hidden is not None
        return [STATES[self.header["dtype"]].encode(self.lane.watcher.hidden[rows])]

    def _flush(self, chunk: int, rows: int) -> None:
        """Write the parts of a chunk that are whole, of `rows` tokens each; the rest too when `rows` is 1."""
        assert self.header is not None
        waiting = self._waiting.get(chunk, [])
        last, size = rows == 1, self.header["rows"]
        while (known := sum(len(one[1]) for one in waiting)) >= size or (last and known):
            body = [np.concatenate([one[0][i] for one in waiting]) for i in range(len(waiting[0][0]))]
            nll = np.concatenate([one[1] for one in waiting])
            routed = [one[2] for one in waiting if one[2] is not None]
            routing = None
            if routed:
                kind = np.uint8 if self.header["routers"]["experts"] <= 256 else np.uint16
                experts: NDArray[Any] = np.concatenate([one.experts for one in routed], axis=1).astype(kind)
                routing = experts, np.concatenate([one.weights for one in routed], axis=1)
            take, rest = slice(0, size), slice(size, None)
            given = None if routing is None else (routing[0][:, take], routing[1][:, take])
            data = pack(self.header["form"], [array[take] for array in body], nll[take], given)
            self._written.setdefault(chunk, []).append(self._append(data))
            waiting = []
            if len(nll) > size:
                left = None if routing is None else Routing(routed[0].layers, routing[0][:, rest], routing[1][:, rest])
                waiting = [([array[rest] for array in body], nll[rest], left)]
        self._waiting[chunk] = waiting
        if last:
            del self._waiting[chunk]

    def _append(self, data: bytes) -> list[Any]:
        at = self.state.facts["size"]
        self.file.pwrite(data, at)
        self.state.facts["size"] = at + len(data)
        return [at, len(data), hashlib.sha256(data).hexdigest()]

    def _decide(self, logits: F32, routing: Routing | None) -> Json:
        """The header, but for what comes at the end: hidden states, when rebuilt logits are the library's."""
        session = self.lane.session
        assert session.vocabulary is not None
        counts = np.bincount(self.plan.domain, minlength=len(self.plan.domains))
        header: Json = {
            "schema": self.payload["schema"],
            "model": self.payload["identity"],
            "environment": self.payload["environment"],
            "vocabulary": session.vocabulary.size,
            "n_embd": session.n_embd,
            "ctx": self.plan.ctx,
            "first": self.plan.first,
            "bos": self.plan.bos,
            "texts": [
                {"name": name, "chunks": int(count)} for name, count in zip(self.plan.domains, counts, strict=True)
            ],
            "tokens_sha256": hashlib.sha256(self.plan.tokens.tobytes()).hexdigest(),
            "routers": None,
        }
        if routing is not None:
            k = routing.experts.shape[2]
            header["routers"] = {"layers": list(routing.layers), "k": k, "experts": self.payload["experts"]}
        found = None if self.payload["form"] == "logprobs" else self._rebuild(logits)
        if found is not None:
            return {**header, "form": "hidden", "rows": self.plan.scored, **found}
        logits = logits[:PART_ROWS]
        body = encode_logits(logits)
        error = self._error(logits, body[2].astype(np.uint16) * np.uint16(256) + body[3], body[0], body[1])
        return {**header, "form": "logprobs", "rows": min(PART_ROWS, self.plan.scored), "output": None, "error": error}

    def _error(self, logits: F32, words: NDArray[np.uint16], step: F32, low: F32) -> Json:
        found = self.scorer.divergence([(0, logits)], words.astype(np.float32) * step + low, logits.argmax(axis=1))
        return _stated(found.kld)

    def _rebuild(self, logits: F32) -> Json | None:
        """The type and scale with which hidden states give these logits, with the error; None where none does."""
        watching = self.lane.watcher
        if watching is None or watching.hidden is None or len(watching.hidden) != len(logits):
            return None
        hidden = watching.hidden
        best: Json | None = None
        with open_model(self.payload["model"]) as model:
            try:
                matrix = OutputMatrix.of(model, watching.head)
            except ApexError:
                return None
            if matrix.shape != (hidden.shape[1], logits.shape[1]):
                return None
            scale = float(model.get("{arch}.logit_scale", 0.0) or 0.0)
            for factor in [1.0, *([scale, 1 / scale] if scale not in (0.0, 1.0) else [])]:
                for name, kind in STATES.items():
                    if hidden.shape[1] % kind.block:
                        continue
                    kept = kind.decode(kind.encode(hidden))
                    if not np.isfinite(kept).all():
                        continue
                    matrix.scale = factor
                    error = _stated(self.scorer.divergence(matrix.blocks(kept), logits, logits.argmax(axis=1)).kld)
                    if best is None or error["mean"] < best["error"]["mean"]:
                        best = {"dtype": name, "error": error, "factor": factor}
            if best is None or best["error"]["mean"] >= AGREES:
                return None
            matrix.scale = best.pop("factor")
            return {**best, "output": matrix.to_json()}

    def _write_header(self) -> None:
        assert self.header is not None
        copy = None
        if self.payload["copy_output"] and self.header["form"] == "hidden":
            with open_model(self.payload["model"]) as model:
                matrix = OutputMatrix.of(model, self.header["output"]["tensor"])
                copy = self._append(matrix.data(0, matrix.nbytes))
        tokens = self._append(np.ascontiguousarray(self.plan.tokens, "<i4").tobytes())
        whole = {**self.header, "output_copy": copy, "tokens": tokens, "parts": self.state.facts["parts"]}
        data = json.dumps(whole).encode()
        at = self._append(data)
        self.file.pwrite(PREAMBLE.pack(MAGIC, at[0], at[1], hashlib.sha256(data).digest()), 0)

    def _tick(self) -> None:
        counters = {"done": self.state.done, "planned": len(self.plan.tokens), "resumed": self.resumed}
        self.emit({"event": "progress", "what": "reference", **counters})

    def _save(self) -> None:
        self.file.sync()
        self.state.save(self.path)
        self._saved_at = time.monotonic()


def _stated(kld: NDArray[np.float64]) -> Json:
    """What the form costs: KLD of the rebuilt logits from the library's."""
    return {"mean": abs(float(kld.mean())), "max": float(np.abs(kld).max()), "tokens": len(kld)}


def run(payload: Json, emit: Emit, stop: threading.Event, fds: Sequence[int]) -> Json:
    """Entry point of the child process; `payload` as make_reference.py makes it."""
    options = SessionOptions.model_validate(payload["options"])
    with ExitStack() as held:
        watch_head = not payload["stock"] and payload["form"] != "logprobs"
        used = 0 if payload["stock"] else payload["experts_used"]
        watching = watcher(used, head=watch_head)
        session = held.enter_context(Session(payload["model"], options, watching))
        plan = plan_texts(session, payload["texts"], options.ctx, payload["scored"], payload["chunks"])
        one = held.enter_context(scorer(session.threads))
        recorder = Recorder(Lane(session, watching), plan, payload, emit, one)
        try:
            recorder.run(Batching(**payload["batching"]), stop)
        finally:
            recorder.file.close()
        about = recorder.header or {}
        kept = {key: about.get(key) for key in ("form", "dtype", "error")}
        return {**kept, "chunks": len(plan.tokens), "resumed": recorder.resumed, "scored": plan.scored}
