"""The child's job: errors of all types, then probe by probe: disturb, decode the text, compare, restore.

Each finished probe is a line of the journal, on disk before the next begins.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from apex_quant.allocation.errors_table import SAMPLE, error_table
from apex_quant.allocation.journal import ROUNDING, Journal
from apex_quant.allocation.kept import KeptLogits
from apex_quant.allocation.pace import Pace
from apex_quant.allocation.patches import Disturber, Sums, Weights
from apex_quant.errors import ApexError, InputError
from apex_quant.evaluation.scores import NotFinite, scorer
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
_ERRORS_SHARE = 0.25  # of a budget, for the table of errors at most
_JOINT_SHARE = 0.2  # of a budget, for the first joint probes before single ones
_FIRST_JOINTS = 4  # without so many the exponents cannot be fitted


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

    def compare(self, stop: threading.Event, session: Session | None = None) -> Json:
        """A pass: mean KLD, its standard error over chunks, what each chunk has, and the routers' flips. `session`: of
        another model, whose routers are not watched."""
        kld = np.zeros((len(self.plan.tokens), self.plan.scored))
        flips = self._through(stop, kld, session)
        means = kld.mean(axis=1)
        error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float(means[0])
        return {
            "kld": float(means.mean()),
            "error": error,
            "n": len(means),
            "flips": flips,
            "by_chunk": [float(f"{value:.6g}") for value in means],
        }

    def _through(self, stop: threading.Event, kld: Any, other: Session | None = None) -> float | None:
        started, number, changed = time.monotonic(), 0, []
        session, watching = (self.session, self.watcher) if other is None else (other, None)
        for steps in self.plan.steps(0, self.batching):
            for step in steps:
                if stop.is_set():
                    raise Stopped
                if watching is not None:
                    watching.begin()
                session.decode(step.tokens, position=step.position, outputs=step.outputs)
                if not step.rows:
                    continue
                outputs = np.tile(step.outputs, len(step.chunks))
                routing = watching.routing(outputs) if watching is not None else None
                if kld is None:
                    self.kept.add(session.logits())
                    self.routing.append(routing)
                else:
                    where = (slice(step.chunks.start, step.chunks.stop), step.scored)
                    targets = self.plan.targets()[where].reshape(-1)
                    found = self.kept.divergence(number, session.logits(), targets)
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
        self.pace = Pace({})
        self.notes: list[str] = []

    @property
    def left(self) -> float | None:
        """Seconds of the budget."""
        return None if self.budget is None else self.budget - (time.monotonic() - self.started)

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

        seconds = None if self.left is None else _ERRORS_SHARE * self.left
        table, least = error_table(kinds, self._weights, self.disturber, each, seconds=seconds)
        if least < SAMPLE:
            self.notes.append(
                f"errors of types are those of fewer rows, for want of time: {least} weights of some tensors, not "
                f"{SAMPLE}"
            )
        return table

    def run(self, stop: threading.Event) -> Json:
        plan = self._text()  # an InputError now and not after all errors
        errors = self.errors(stop)
        batching = Batching(**self.payload["batching"])
        todo = [probe for probe in self.probes if probe["key"] not in self.journal.rows]
        self.pace = Pace.timed(sorted({kind for probe in todo for kind in probe["types"].values()}), self.disturber)
        probing = self._prepare(plan, batching, todo, stop)
        self.pace.pass_seconds = probing.seconds
        self._file(probing, stop)
        costs = [self._amounts(probe) for probe in todo]
        order, done, broken = self._order(todo, costs), 0, list[Json]()
        for place, number in enumerate(order):
            expected = self.pace.of(costs[number])
            if self.left is not None and done and expected > self.left:
                continue  # a smaller one may still have room
            ahead = sum(self.pace.of(costs[one]) for one in order[place:])
            on_encoded = self._telling(done, ahead)
            on_encoded({})
            done += 1
            try:
                row = self._probe(todo[number], probing, stop, on_encoded)
            except NotFinite:  # not kept: the same call says it again, for the price of one probe
                broken.append(todo[number])
                continue
            self.pace.learn(costs[number], row["seconds"])
            self.journal.add(row)
        if broken:
            self.notes.append(
                f"{len(broken)} probes were left out, since the disturbed model gives logits that are NaN or infinite: "
                + _names(f"{one['group']} {one['kind']}".strip() for one in broken)
            )
        return {
            "errors": errors,
            "complete": done == len(todo),
            "notes": self.notes,
            "resumed": self.resumed,
            "reached": sorted(self.patcher.names),
            "spent": self.spent,
            "kept": {"whole": probing.kept.whole, "logits": probing.kept.kept, "rest": probing.kept.rest},
            "seconds": time.monotonic() - self.started,
            "threads": self.session.threads,
        }

    def _telling(self, done: int, ahead: float) -> Callable[[Mapping[str, int]], None]:
        """Says how far probes are, when it is told the weights by type that the one in hand has encoded; `ahead`
        seconds were left before."""

        def tell(weights: Mapping[str, int]) -> None:
            left = max(ahead - self.pace.encoded(weights), 0.0)
            self._tell("probes", self.resumed + done, len(self.probes), self.resumed, left)

        return tell

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

    def _amounts(self, probe: Json) -> dict[str, int]:
        """Weights by type that a probe encodes."""
        found: dict[str, int] = {}
        for name, kind in probe["types"].items():
            found[kind] = found.get(kind, 0) + self.source.tensors[name].n_elements
        return found

    def _order(self, todo: list[Json], costs: list[dict[str, int]]) -> list[int]:
        """As planned; where the budget is too short for all, the first joint probes come first if they are cheap:
        without any, nothing says how single costs combine."""
        planned = list(range(len(todo)))
        if self.left is None or sum(map(self.pace.of, costs)) <= self.left:
            return planned
        joints = [number for number in planned if todo[number]["joint"]][:_FIRST_JOINTS]
        if sum(self.pace.of(costs[number]) for number in joints) > _JOINT_SHARE * self.left:
            return planned
        return [*joints, *(number for number in planned if number not in joints)]

    def _file(self, probing: Probing, stop: threading.Event) -> None:
        """The divergence of a whole Q8_0 file, run as files are: with what rounding of activations costs."""
        path = self.payload["rounding"]
        if path is None or ROUNDING in self.journal.rows:
            return
        started = time.monotonic()
        self._tell("a Q8_0 file", 0, 1, 0, None)
        options = self.options.model_copy(update={"mmap": True, "repack": True})
        try:
            with open_model(path) as file, Session(path, options) as session:
                types = {name: info.type.name for name, info in file.tensors.items() if info.type.is_quantized}
                found = probing.compare(stop, session)
        except ApexError as error:
            self.notes.append(f"what rounding of activations costs was not measured: {error.message}")
            return
        finally:
            Path(path).unlink(missing_ok=True)  # the rest may take hours
        self.spent += probing.plan.tokens.size
        self.journal.add(
            {"key": ROUNDING, "group": "Q8_0 file", "kind": "file", "joint": False, "noise": False,
             "types": {name: kind for name, kind in types.items() if name in self.payload["errors"]}, **found,
             "tokens": int(probing.plan.tokens.size), "seconds": round(time.monotonic() - started, 3)}
        )  # fmt: skip

    def _prepare(self, plan: Plan, batching: Batching, todo: list[Json], stop: threading.Event) -> Probing:
        """The undisturbed pass, on as much text as the budget allows; then the floor, after a patch was taken back."""
        if self.journal.header:
            plan = _shorter(plan, int(self.journal.header["chunks"]))
        self._tell("undisturbed pass", 0, 1, 0, None)
        probing = Probing(self.session, self.watching, plan, batching, self.scorer)
        probing.remember(stop)
        self.spent += plan.tokens.size
        if not self.journal.header:
            chunks = len(plan.tokens)
            if self.left is not None:
                encoding = sum(self.pace.encoding(self._amounts(probe)) for probe in todo)
                affordable = int(chunks * (self.left - encoding) / max(probing.seconds * (len(todo) + 2), 1e-6))
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

    def _probe(
        self, probe: Json, probing: Probing, stop: threading.Event, on_encoded: Callable[[Mapping[str, int]], None]
    ) -> Json:
        """One probe's row. Encoding of a joint probe can take hours: `on_encoded` is told the weights so far."""
        started, encoded = time.monotonic(), dict[str, int]()

        def each(name: str, kind: str) -> None:
            encoded[kind] = encoded.get(kind, 0) + self.source.tensors[name].n_elements
            if stop.is_set():
                raise Stopped
            if probe["joint"]:
                on_encoded(encoded)

        try:
            sums = self._disturb(probe["types"], noise=probe["noise"], each=each)
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

    def _disturb(
        self, types: Mapping[str, str], *, noise: bool, each: Callable[[str, str], None] = lambda *_: None
    ) -> dict[str, Sums]:
        """Write these types over the loaded weights; `each` is called after each tensor with its name and type."""
        found = {}
        for name, kind in types.items():
            loaded = self.loaded.tensors[name].type

            def put(start: int, data: Any, name: str = name) -> None:
                self.patcher.write(name, start, data)

            found[name] = self.disturber.write(self._weights(name), kind, loaded, put, noise=noise)
            each(name, kind)
        return found

    def _tell(self, what: str, done: int, planned: int, resumed: int, left: float | None) -> None:
        self.emit({"event": "progress", "what": what, "done": done, "planned": planned, "resumed": resumed,
                   "tokens": self.spent, "left": left})  # fmt: skip


def _names(names: Iterable[str], most: int = 3) -> str:
    every = list(names)
    return ", ".join(every[:most]) + (", ..." if len(every) > most else "")


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
