"""The child's job: errors of all types, then probe by probe: disturb, decode the text, compare, restore.

Each finished probe is a line of the journal, on disk before the next begins.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from apex_quant.allocation.errors_table import error_table
from apex_quant.allocation.journal import Journal
from apex_quant.allocation.kept import KeptLogits
from apex_quant.allocation.patches import Disturber, Sums, Weights
from apex_quant.errors import InputError
from apex_quant.evaluation.scores import scorer
from apex_quant.evaluation.steps import Batching, Plan, plan_texts
from apex_quant.evaluation.watch import Routing, Watcher, watcher
from apex_quant.gguf import GGUFModel, ggml_type, open_model
from apex_quant.importance import Importance
from apex_quant.importance.fill import applied
from apex_quant.native.bindings import bindings
from apex_quant.native.worker import Emit, Json, Stopped
from apex_quant.runtime.options import SessionOptions
from apex_quant.runtime.patch import Patcher
from apex_quant.runtime.session import Session

with contextlib.suppress(ImportError):  # early, while the parent still reads the text; Session says what is missing
    bindings()

LEAST_CHUNKS = 4  # a budget never shortens the text below this


class Probing:
    """One session, its text and its undisturbed logits."""

    def __init__(self, session: Session, watching: Watcher | None, plan: Plan, batching: Batching, one: Any) -> None:
        self.session, self.watcher, self.batching, self.scorer = session, watching, batching, one
        self.plan = plan
        vocabulary = session.vocabulary.size if session.vocabulary is not None else 0
        self.kept = KeptLogits(len(plan.tokens) * plan.scored, vocabulary, one)
        self.routing: list[Routing | None] = []
        self.passes = 0
        self.seconds = 0.0

    def remember(self, stop: threading.Event) -> None:
        """The undisturbed pass."""
        self._through(stop, None)

    def compare(self, stop: threading.Event) -> Json:
        """A pass: mean KLD, its standard error over chunks, what each chunk has, and the routers' flips."""
        kld = np.zeros((len(self.plan.tokens), self.plan.scored))
        flips = self._through(stop, kld)
        means = kld.mean(axis=1)
        error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float(means[0])
        return {
            "kld": float(means.mean()),
            "error": error,
            "n": len(means),
            "flips": flips,
            "by_chunk": [float(f"{value:.6g}") for value in means],
        }

    def _through(self, stop: threading.Event, kld: Any) -> float | None:
        started, number, changed = time.monotonic(), 0, []
        for steps in self.plan.steps(0, self.batching):
            for step in steps:
                if stop.is_set():
                    raise Stopped
                if self.watcher is not None:
                    self.watcher.begin()
                self.session.decode(step.tokens, position=step.position, outputs=step.outputs)
                if not step.rows:
                    continue
                outputs = np.tile(step.outputs, len(step.chunks))
                routing = self.watcher.routing(outputs) if self.watcher is not None else None
                if kld is None:
                    self.kept.add(self.session.logits())
                    self.routing.append(routing)
                else:
                    where = (slice(step.chunks.start, step.chunks.stop), step.scored)
                    targets = self.plan.targets()[where].reshape(-1)
                    found = self.kept.divergence(number, self.session.logits(), targets)
                    kld[where] = found.reshape(len(step.chunks), -1)
                    before = self.routing[number]
                    if routing is not None and before is not None and routing.layers == before.layers:
                        changed.append(routing.moved(before)[0])
                number += 1
        self.passes += 1
        self.seconds = time.monotonic() - started
        if not changed:
            return None
        return float(sum(part.sum() for part in changed) / sum(part.size for part in changed))


class Job:
    """One measurement. `payload` as measure.py makes it."""

    def __init__(self, payload: Json, emit: Emit, held: ExitStack) -> None:
        self.payload, self.emit = payload, emit
        self.started = time.monotonic()
        self.budget: float | None = payload["budget"]
        self.options = SessionOptions.model_validate(payload["options"])
        self.journal = Journal(Path(payload["journal"]), payload["spec"])
        self.resumed = len(self.journal.rows)
        self.source = held.enter_context(open_model(payload["model"]))
        self.loaded: GGUFModel = self.source
        if payload["loaded"] != payload["model"]:
            self.loaded = held.enter_context(open_model(payload["loaded"]))
        self.importance: Importance | None = None
        if payload["imatrix"] is not None:
            self.importance = applied(held.enter_context(Importance.read(payload["imatrix"])), payload["prior"])
        watching = watcher(payload["experts_used"])
        self.session = held.enter_context(Session(payload["loaded"], self.options, watching))
        self.patcher = Patcher(self.session, self.loaded)
        self.disturber = Disturber(self.session.threads)
        held.callback(self.disturber.close)
        self.scorer = held.enter_context(scorer(self.session.threads))
        self.watching = watching
        self.probes: list[Json] = self._reachable(payload["probes"])
        self.spent = 0  # tokens decoded by this run

    def _weights(self, name: str) -> Weights:
        return Weights(self.source, self.source.tensors[name], self.importance)

    def _reachable(self, probes: list[Json]) -> list[Json]:
        """Without tensors that the graph does not read (NextN blocks), and without probes of nothing else."""
        kept = []
        for probe in probes:
            types = {name: kind for name, kind in probe["types"].items() if name in self.patcher.names}
            if types:
                kept.append({**probe, "types": types})
        return kept

    def errors(self, stop: threading.Event) -> Json:
        """The table of errors, by content from the cache."""

        kinds = {name: [ggml_type(one) for one in types] for name, types in self.payload["errors"].items()}

        def each(number: int, name: str) -> None:
            if stop.is_set():
                raise Stopped
            self._tell("errors of types", number, len(kinds), 0, None)

        return error_table(kinds, self._weights, self.disturber, each)

    def run(self, stop: threading.Event) -> Json:
        plan = self._text()  # an InputError now and not after all errors
        errors = self.errors(stop)
        batching = Batching(**self.payload["batching"])
        todo = [probe for probe in self.probes if probe["key"] not in self.journal.rows]
        probing = self._prepare(plan, batching, len(todo), stop)
        complete = True
        for number, probe in enumerate(todo):
            if self._over_budget(number, probing):
                complete = False
                break
            self._tell("probes", self.resumed + number, len(self.probes), self.resumed, self._left(number, len(todo)))
            self.journal.add(self._probe(probe, probing, stop))
        return {
            "errors": errors,
            "complete": complete,
            "resumed": self.resumed,
            "reached": sorted(self.patcher.names),
            "spent": self.spent,
            "kept": {"whole": probing.kept.whole, "logits": probing.kept.kept, "rest": probing.kept.rest},
            "seconds": time.monotonic() - self.started,
            "threads": self.session.threads,
        }

    def _text(self) -> Plan:
        """Chunks of all texts in turn, so that any beginning of them is as diverse as the whole."""
        texts, asked = self.payload["texts"], self.payload["chunks"]
        each = -(-asked // len(texts))
        plan = plan_texts(self.session, texts, self.options.ctx, "all", each)
        place = np.zeros(len(plan.domain), int)
        for domain in np.unique(plan.domain):
            where = plan.domain == domain
            place[where] = np.arange(where.sum())
        order = np.lexsort((plan.domain, place))[:asked]
        return Plan(plan.tokens[order], plan.domain[order], plan.domains, plan.first, plan.bos)

    def _prepare(self, plan: Plan, batching: Batching, todo: int, stop: threading.Event) -> Probing:
        """The undisturbed pass, on as much text as the budget allows; then the floor, after a patch was taken back."""
        if self.journal.header:
            plan = _shorter(plan, int(self.journal.header["chunks"]))
        self._tell("undisturbed pass", 0, 1, 0, None)
        probing = Probing(self.session, self.watching, plan, batching, self.scorer)
        probing.remember(stop)
        self.spent += plan.tokens.size
        if not self.journal.header:
            chunks = len(plan.tokens)
            if self.budget is not None:
                left = max(self.budget - (time.monotonic() - self.started), 1.0)
                affordable = int(chunks * left / max(probing.seconds * (todo + 1), 1e-6))
                chunks = max(min(LEAST_CHUNKS, chunks), min(chunks, affordable))
            if chunks < len(plan.tokens):
                plan = _shorter(plan, chunks)
                probing = Probing(self.session, self.watching, plan, batching, self.scorer)
                probing.remember(stop)
                self.spent += plan.tokens.size
            if self.probes:
                name, kind = next(iter(self.probes[0]["types"].items()))
                self._disturb({name: kind}, noise=False)
                self.patcher.restore(name)
            floor = probing.compare(stop)
            self.spent += plan.tokens.size
            scored = len(plan.tokens) * plan.scored
            self.journal.add(
                {"chunks": len(plan.tokens), "scored": scored, "tokens": _digest(plan), "floor": floor,
                 "domains": list(plan.domains), "spent": self.spent}
            )  # fmt: skip
        return probing

    def _probe(self, probe: Json, probing: Probing, stop: threading.Event) -> Json:
        started = time.monotonic()
        try:
            sums = self._disturb(probe["types"], noise=probe["noise"])
            found = probing.compare(stop)
        finally:
            for name in probe["types"]:
                self.patcher.restore(name)
        self.spent += probing.plan.tokens.size
        weighted = sum(one.weighted for one in sums.values()) / len(sums)
        return {
            **{key: probe[key] for key in ("key", "group", "kind", "joint", "noise", "types")},
            **found,
            "weighted_error": weighted,
            "tokens": int(probing.plan.tokens.size),
            "seconds": round(time.monotonic() - started, 3),
        }

    def _disturb(self, types: Mapping[str, str], *, noise: bool) -> dict[str, Sums]:
        found = {}
        for name, kind in types.items():
            loaded = self.loaded.tensors[name].type

            def put(start: int, data: Any, name: str = name) -> None:
                self.patcher.write(name, start, data)

            found[name] = self.disturber.write(self._weights(name), kind, loaded, put, noise=noise)
        return found

    def _over_budget(self, done: int, probing: Probing) -> bool:
        """Whether one more probe would end after the budget."""
        if self.budget is None:
            return False
        now = time.monotonic() - self.started
        return done > 0 and now + probing.seconds > self.budget

    def _left(self, done: int, todo: int) -> float | None:
        times = [row["seconds"] for row in self.journal.rows.values()][-20:]
        return (todo - done) * float(np.mean(times)) if times else None

    def _tell(self, what: str, done: int, planned: int, resumed: int, left: float | None) -> None:
        self.emit({"event": "progress", "what": what, "done": done, "planned": planned, "resumed": resumed,
                   "tokens": self.spent, "left": left})  # fmt: skip


def _shorter(plan: Plan, chunks: int) -> Plan:
    return Plan(plan.tokens[:chunks], plan.domain[:chunks], plan.domains, plan.first, plan.bos)


def _digest(plan: Plan) -> str:
    return hashlib.sha256(np.ascontiguousarray(plan.tokens, "<i4").tobytes()).hexdigest()


def run(payload: Json, emit: Emit, stop: threading.Event, fds: Sequence[int]) -> Json:
    """Entry point of the child process."""
    with ExitStack() as held:
        job = Job(payload, emit, held)
        if job.session.vocabulary is None:
            raise InputError(f"{payload['model']}: the model has no vocabulary, so no text can be read with it")
        return job.run(stop)
