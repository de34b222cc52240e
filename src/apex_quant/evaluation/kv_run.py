"""One call of `kv`: what is planned for the child, and what its numbers come to."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from apex_quant.errors import InputError, NativeError, ResourceError, UsageError
from apex_quant.evaluation import environment, pertoken
from apex_quant.evaluation.identity import identity, sampled
from apex_quant.evaluation.kv_summary import Measured, assemble
from apex_quant.evaluation.kv_types import Pair, bits_of
from apex_quant.evaluation.make_reference import make_reference
from apex_quant.evaluation.reference import SCHEMA as REFERENCE_SCHEMA
from apex_quant.evaluation.reference import describe, vocabulary_size
from apex_quant.evaluation.speed import measure_speed
from apex_quant.evaluation.state import State
from apex_quant.evaluation.steps import Batching, Scored, first_scored
from apex_quant.evaluation.texts import read_texts
from apex_quant.evaluation.token_job import EvaluationProgress, Report
from apex_quant.gguf import GGUFModel, write_file
from apex_quant.model.facts import facts
from apex_quant.native import Child, library_info
from apex_quant.runtime.options import SessionOptions

SCHEMA: Final = "apex.kv/1"
JOB: Final = "apex_quant.evaluation.kv_job"
SPEED: Final = {"prompts": (512,), "generate": (32,), "repetitions": 3}
LARGEST: Final = 64 << 20  # bytes of kv.json
_FORMAT: Final = 1  # of the numbers; part of what an earlier run must agree on
_CHECKS: Final = 4  # stock pairs that are simulated beside the turbo types

Rotation = Literal["on", "off", "both"]


class Run:
    """One call."""

    def __init__(self, opened: GGUFModel, target: Path, options: SessionOptions, report: Report) -> None:
        self.opened, self.target, self.options, self.report = opened, target, options, report
        self.notes: list[str] = []
        self.made: list[Path] = []  # to be removed at the end

    def plan(self, reference: str | Path | None, source: str | Path | None, text: Sequence[str | Path] | None,
             ctx: Sequence[int], chunks: int | None, scored: Scored, rotation: Rotation, asked: Sequence[Pair],
             wanted: Sequence[Pair], save_seconds: float) -> None:  # fmt: skip
        """What is to be run, and the hash that says so."""
        self.sizes, self.rotation, self.scored, self.chunks = list(ctx), rotation, scored, chunks
        self.asked, self.wanted, self.text = asked, wanted, text
        self.reference, self.stored = None, None
        if reference is not None:
            self.reference, self.stored = describe(reference, source, self.opened)
        self.reference_path = reference
        measured = self._measured(ctx, text)
        texts: tuple[dict[str, Any], ...] = ()
        if self.stored is None:
            read = read_texts(self.opened, text)
            texts, self.notes = read.texts, [*self.notes, *read.notes]
        self.rows = plan_rows(asked, wanted, rotation)
        vocabulary = vocabulary_size(self.opened)
        contexts = []
        for place, one in enumerate(measured):
            batching = Batching.of(one, vocabulary, 1)
            contexts.append({"ctx": one, "batching": vars(batching), "needed": place == 0, "reference": None})
        self.payload: dict[str, Any] = {
            "model": str(self.opened.path),
            "texts": texts,
            "scored": scored,
            "chunks": chunks,
            "contexts": contexts,
            "attention": bool(wanted),
        }
        options = self.options.model_dump(mode="json", exclude={"threads"})
        said = [_FORMAT, library_info().version, sampled(self.opened), self.payload, options, self.reference]
        encoded = json.dumps(said, sort_keys=True).encode("utf-8", "surrogatepass")
        self.run_spec = hashlib.sha256(encoded).hexdigest()
        whole = json.dumps([self.run_spec, self.rows, self.sizes])
        self.spec = hashlib.sha256(whole.encode()).hexdigest()
        self.payload |= {"rows": self.rows, "options": self.options.model_dump(mode="json"),
                         "save_seconds": save_seconds}  # fmt: skip

    def _measured(self, ctx: Sequence[int], text: Sequence[str | Path] | None) -> list[int]:
        """Contexts at which divergence is measured: the shortest is, whatever the model was trained on."""
        if self.stored is not None:
            if text:
                raise UsageError("the text is that of the reference file", hint="leave --text away")
            if self.chunks is not None:
                raise UsageError("a reference file is used whole", hint="leave --chunks away")
            if self.stored.ctx not in ctx:
                self.notes.append(f"divergence is measured at the reference's context of {self.stored.ctx} tokens")
            self.scored = "half" if self.stored.first == first_scored(self.stored.ctx, "half") else "all"
            return [self.stored.ctx]
        trained = facts(self.opened).context_length
        fits = [one for one in ctx if trained is None or one <= trained]
        for one in ctx:
            if one not in fits:
                self.notes.append(f"the model was trained on {trained} tokens: no divergence at {one}")
        if not fits:
            self.notes[-1] = f"the model was trained on {trained} tokens, not on {ctx[0]}"
            return [ctx[0]]
        return fits

    def measure(self, lock: int, *, speed: bool) -> dict[str, Any]:
        started = time.monotonic()
        about = identity(self.opened)
        self._references()
        for one in self.payload["contexts"]:
            key = hashlib.sha256(json.dumps([self.run_spec, one["ctx"]]).encode()).hexdigest()
            prefix = self.target.with_name(f"{self.target.name}.{one['ctx']}-{key[:8]}")
            one |= {"spec": key, "prefix": str(prefix), "base": f"{prefix}.f16.apexref"}
        self.payload["record"] = {
            "identity": {"name": self.opened.path.name, "sha256": about.sha256, "bytes": about.bytes,
                         "architecture": self.opened.architecture},
            "environment": environment.collect(),
            "schema": REFERENCE_SCHEMA,
        }  # fmt: skip
        with Child(JOB) as child:
            found = child.run(
                f"{JOB}:run", self.payload, self._event, step=f"measuring cache types of {self.opened.path.name}",
                pass_fds=[lock],
            )  # fmt: skip
        measured = [Measured(one, self._numbers(one)) for one in found["contexts"] if "rows" in one]
        self.notes += [
            f"no divergence at {one['ctx']}: {one['problem']}" for one in found["contexts"] if "problem" in one
        ]
        speeds = self._speeds() if speed else {}
        document, arrays = assemble(self.opened, measured, self.rows, self.sizes, speeds, self.notes)
        settings = {
            "ctx": [one.ctx for one in measured], "chunks": self.chunks, "scored": self.scored,
            "rotation": self.rotation, "options": self.options.model_dump(mode="json"), "threads": found["threads"],
        }  # fmt: skip
        whole = {
            "schema": SCHEMA,
            "model": {"path": self.opened.path.name, "sha256": about.sha256, "bytes": about.bytes, "bpw": about.bpw},
            "reference": self._about_reference(),
            **document,
            "speed": speed,
            "settings": settings,
            "environment": environment.collect(),
            "spec": self.spec,
            "seconds": round(time.monotonic() - started, 2),
        }
        self._write(whole, arrays)
        self._clean(found)
        return whole

    def _references(self) -> None:
        """The full-precision model's record at every measured context: made here from a GGUF, once."""
        if self.reference is None:
            return
        for one in self.payload["contexts"]:
            if self.reference["form"] != "gguf":
                one["reference"] = {key: self.reference.get(key) for key in ("form", "path", "source")}
                continue
            said = json.dumps([self.reference["spec"], self.run_spec, one["ctx"]])
            key = hashlib.sha256(said.encode()).hexdigest()[:8]
            path = self.target.with_name(f"{self.target.name}.{one['ctx']}-{key}.full.apexref")
            self.made.append(path)
            if not path.exists():
                make_reference(
                    self.reference["path"], path, text=self.text, ctx=one["ctx"], chunks=self.chunks,
                    scored=self.scored, options=self.options, progress=self.report,
                )  # fmt: skip
            one["reference"] = {"form": "apexref", "path": str(path), "source": self.reference["path"]}

    def _about_reference(self) -> dict[str, Any] | None:
        if self.reference is None:
            return None
        return {
            key: value for key, value in self.reference.items() if key not in ("name", "source", "spec", "path")
        } | {"path": self.reference["name"]}

    def _event(self, event: dict[str, Any]) -> None:
        counters = {key: event[key] for key in ("what", "done", "planned", "resumed", "tokens")}
        self.report(EvaluationProgress(**counters))

    def _numbers(self, context: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Arrays of each row of one context."""
        made = {}
        for row in context["rows"]:
            if "problem" in row:
                continue
            spec = next(one["spec"] for one in self.payload["contexts"] if one["ctx"] == context["ctx"])
            known = State.load(Path(row["state"]), f"{spec} {row['id']}")
            if known is None:
                raise NativeError(f"{row['state']}: the numbers are gone or damaged", hint="run it again")
            made[row["id"]] = known.arrays
        return made

    def _speeds(self) -> dict[str, Any]:
        """pp and tg of every pair that is really there; of those that cannot be run, why."""
        path = self.target.with_name(f"{self.target.name}.speeds")
        self.made.append(path)
        key = f"{self.run_spec} {SPEED}"
        known = read_json(path)
        speeds: dict[str, Any] = known["rows"] if known is not None and known.get("spec") == key else {}
        rows = [row for row in self.rows if not row["simulated"] and row["rotation"]]
        for number, row in enumerate(rows):
            self.report(EvaluationProgress("speed", number, len(rows), 0, 0))
            if row["id"] in speeds:
                continue
            options = self.options.model_copy(update={"type_k": row["k"], "type_v": row["v"]})
            try:
                found = measure_speed(self.opened.path, options=options, bandwidth=False, **SPEED)  # type: ignore[arg-type]
            except (NativeError, ResourceError, InputError) as error:
                speeds[row["id"]] = {"note": error.message}
            else:
                names = [name for name in found if name[:2] in ("pp", "tg")]
                speeds[row["id"]] = {name: found[name] for name in names} | {"busy": found.get("busy")}
            write_json(path, {"spec": key, "rows": speeds})
        return speeds

    def _write(self, document: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Numbers per token wait beside the archive until the document names them: a kill in between loses neither
        an earlier result nor leaves an archive that no document knows."""
        archive = self.target.with_suffix(".npz")
        waiting = archive.with_name(archive.name + pertoken.NEXT)
        document["per_token"] = {"path": archive.name, "sha256": pertoken.write(waiting, arrays)}
        write_json(self.target, document)
        waiting.replace(archive)

    def _clean(self, found: dict[str, Any]) -> None:
        for context in found["contexts"]:
            self.made += [Path(row["state"]) for row in context.get("rows", ())]
        self.made += [Path(one["base"]) for one in self.payload["contexts"]]
        for path in self.made:
            path.unlink(missing_ok=True)


def plan_rows(asked: Sequence[Pair], wanted: Sequence[Pair], rotation: Rotation) -> list[dict[str, Any]]:
    """What is run at each context. `simulated`: False, "type" for what is asked for, "check" for the stock pairs that
    say how far off simulations are."""
    rows: list[dict[str, Any]] = []

    def add(pair: Pair, rotated: bool, simulated: str | bool) -> None:
        words = [*(["sim"] if simulated else []), pair.k, pair.v, *([] if rotated else ["plain"])]
        rows.append({"id": "-".join(words), "k": pair.k, "v": pair.v, "rotation": rotated, "simulated": simulated})

    for pair in asked:
        quantized = min(bits_of(pair.k), bits_of(pair.v)) < 16
        if rotation != "off" or not quantized:
            add(pair, True, False)
        if rotation != "on" and quantized:
            add(pair, False, False)
    for pair in wanted:
        add(pair, True, "type")
    if wanted and rotation != "off":
        quantized_pairs = [pair for pair in asked if max(bits_of(pair.k), bits_of(pair.v)) < 16]
        for pair in sorted(quantized_pairs, key=lambda one: one.bits)[:_CHECKS]:
            add(pair, True, "check")
    return rows


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None for a file that is none or is not there."""
    if not path.exists():
        return None
    try:
        document = json.loads(pertoken.read_bounded(path, LARGEST, "a JSON document"))
    except (InputError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Replace the file, whole or not at all."""
    write_file(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
