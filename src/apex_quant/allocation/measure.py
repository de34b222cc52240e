"""`measure`: how much the output of a model moves when a part of it is quantized, part by part.

found = measure("MODEL-BF16.gguf", out="sensitivity.json", imatrix="imatrix.gguf")
CostModel.from_sensitivities(found).predict({"blk.0.ffn_down_exps.weight": "Q3_K"})

The model is loaded once; real weights are quantized and dequantized in place, one group of tensors at a time, a few
thousand tokens of diverse text are decoded, and the logits compared with the undisturbed model's. A journal beside
the output keeps every finished probe: the same call after an interruption loses at most the one it was at.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_quant.allocation import sensitivity
from apex_quant.allocation.assemble import Assembly
from apex_quant.allocation.groups import (
    CANDIDATES,
    DEFAULT_GROUPS,
    JOINT,
    PROBES,
    ProbePlan,
    experts_ladder,
    joint_probes,
    make_groups,
    quantizable,
    single_probes,
    usable_types,
)
from apex_quant.allocation.journal import ROUNDING, is_of_another, read_journal
from apex_quant.allocation.sensitivity import Sensitivities
from apex_quant.allocation.texts import read_texts
from apex_quant.errors import InputError, NativeError, ResourceError, UsageError, did_you_mean
from apex_quant.evaluation.bandwidth import available_bytes
from apex_quant.evaluation.identity import sampled
from apex_quant.evaluation.reference import vocabulary_size
from apex_quant.evaluation.steps import Batching
from apex_quant.gguf import GGUFModel, ggml_type, open_model
from apex_quant.gguf.atomic import locked
from apex_quant.importance import Importance
from apex_quant.importance.fill import RULES, prior_of
from apex_quant.model.facts import facts, quantized_already
from apex_quant.native import Child, library_info
from apex_quant.runtime.options import SessionOptions

WORKER = "apex_quant.allocation.probe_job"
TOKENS = 4096
CTX = 256  # short, so that validation at the same context has the chunks that an interval takes
_FORMAT = 2  # of the journal and of what its numbers mean
_DECODE = 2048  # tokens: llama.cpp's -b
_SMALLEST = 32
_LOGIT_BYTES = 700 << 20
_LOGIT_SHARE = 1 / 32  # of the model's bytes
_FILE = "Q8_0"
_FILE_WORKER = "apex_quant.evaluation.worker"
_FILE_RATE = 1e8  # weights a second of one thread, about half of what was measured (benchmarks/RESULTS.md)
_FILE_SHARE = 0.05  # of a budget
_SPARE = 1 << 30
_OVER = 1.1  # times the budget, before it is said


@dataclass(frozen=True)
class MeasureProgress:
    """How far a measurement is: `done` of `planned` of `what`; `left` is an estimate in seconds."""

    what: str
    done: int
    planned: int
    resumed: int
    tokens: int
    left: float | None


Report = Callable[[MeasureProgress], None]


def measure(
    model: str | Path,
    *,
    out: str | Path | Callable[[str], Path] = "sensitivity.json",
    imatrix: str | Path | None = None,
    fill: str = "prior",
    tokens: int = TOKENS,
    ctx: int = CTX,
    groups: str = DEFAULT_GROUPS,
    types: Sequence[str] = PROBES,
    candidates: Sequence[str] = CANDIDATES,
    joint: int = JOINT,
    noise: bool = False,
    loaded: str | Path | None = None,
    text: Sequence[str | Path] | None = None,
    budget: float | None = None,
    seed: int = 0,
    rounding: bool = True,
    options: SessionOptions | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Report | None = None,
) -> Sensitivities:
    """Measure the sensitivities of `model`, its errors in `candidates`, and write them to `out`.

    `out` may be a function: of the hash of everything that decides the numbers, so that each measurement has a file
    of its own. `imatrix`, `fill`: as quantize() will be given; without a matrix, types that need one are left out.
    `tokens`: of text in each probe. `groups`: 'tensor', or some of role, part and layer: 'role,layer' quantizes all
    routed experts of a layer together. `types`: in which every group is probed. `joint`: so many random recipes of
    the whole model are measured too. `noise`: random matrices of rank 32 of the same error instead of the encoder's
    own blocks. `loaded`: another file of the same model (a Q8_0 one), which is disturbed instead where the model
    itself does not fit into memory; weights are read from `model` all the same. `text`: files, instead of the
    built-in probe text. `budget` in seconds takes fewer rows for errors, then shortens the text, then leaves out
    probes; what is missing is estimated from other layers. `rounding`: also measure a Q8_0 file, which is made
    beside `out` and removed: what the backend's rounding of activations costs, which no probe sees; left out where
    it would take too much room or time, or with `loaded`. `resume`: UsageError unless there is an interrupted run
    of this measurement; a run of another one under the same name is not discarded without `force`.

    Raises UsageError, InputError, ResourceError (BusyError while another process measures into `out`) or NativeError;
    finished probes are kept, and the same call goes on from there.
    """
    started = time.monotonic()
    if fill not in RULES:
        raise UsageError(f"no rule of filling is called {fill!r}.{did_you_mean(fill, list(RULES))}")
    if tokens < ctx or joint < 0 or (budget is not None and budget <= 0):
        raise UsageError(
            f"{tokens} tokens, {joint} joint probes: at least one context of {ctx} tokens, and none below 0"
        )
    # names are read in any case, and compared as they are written in files
    types, candidates = (list(dict.fromkeys(ggml_type(one).name for one in names)) for names in (types, candidates))
    problem = library_info().problem
    if problem:
        raise ResourceError(f"{problem}, so nothing can be run", hint="`apex doctor` says how to get it")
    report = progress or (lambda _: None)
    with ExitStack() as held:
        opened = held.enter_context(open_model(model))
        probed = held.enter_context(open_model(loaded)) if loaded is not None else opened
        _same_tensors(opened, probed)
        matrix = held.enter_context(Importance.read(imatrix)) if imatrix is not None else None
        read = read_texts(opened, text)
        notes = [*quantized_already(opened), *read.notes]
        rounding = rounding and probed is opened
        plan = _Plan(opened, matrix, groups, types, (*candidates, *([_FILE] * rounding)), joint, noise, seed)
        run_options = _options(options or SessionOptions(), ctx, opened)
        chunks = max(1, tokens // ctx)
        asked: dict[str, Any] = {
            "probes": [probe.to_json() for probe in plan.probes],
            "errors": plan.errors,
            "chunks": chunks,
            "prior": prior_of(matrix, fill) if matrix is not None else "none",
            "texts": list(read.texts),
            "rounding": rounding,
        }
        spec = _spec(opened, probed, matrix, asked, run_options)
        out = out(spec) if callable(out) else Path(out)
        if (found := _finished(out, spec, opened, force)) is not None:
            return found
        child = held.enter_context(Child(WORKER))
        lock = held.enter_context(locked(out, "measure", "measuring into it"))
        journal = out.with_name(out.name + ".probes")
        if resume and not read_journal(journal, spec)[0]:
            raise UsageError(
                f"{journal}: no interrupted run of this measurement",
                hint="without --resume it begins, or goes on where there is one",
            )
        if is_of_another(journal, spec):
            if not force:
                raise UsageError(
                    f"{journal} keeps an interrupted run of another measurement",
                    hint="go on with that one, choose another -o, or --force to discard it",
                )
            journal.unlink()
        batching = _batching(ctx, vocabulary_size(opened), sum(info.nbytes for info in opened.tensors.values()))
        run_options = run_options.model_copy(
            update={"sequences": batching.sequences, "decode_tokens": batching.tokens,
                    "ubatch": max(16, batching.tokens)}
        )  # fmt: skip
        payload = {
            **asked,
            "model": str(opened.path),
            "loaded": str(probed.path),
            "imatrix": str(imatrix) if imatrix is not None else None,
            "options": run_options.model_dump(mode="json"),
            "batching": vars(batching),
            "experts_used": max(facts(opened).experts_used(layer) for layer in range(facts(opened).trunk_layers))
            if facts(opened).n_expert
            else 0,
            "budget": budget,
            "rounding": None,
            "spec": spec,
            "journal": str(journal),
        }

        def on_event(event: dict[str, Any]) -> None:
            report(MeasureProgress(**{key: event[key] for key in MeasureProgress.__dataclass_fields__}))

        file = out.with_name(f"{out.name}.{_FILE.lower()}.gguf")
        held.callback(file.unlink, missing_ok=True)  # one that a killed run left, too
        if rounding and ROUNDING not in read_journal(journal, spec)[1]:
            payload["rounding"] = _file(opened, file, budget, run_options, notes)
        if budget is not None:
            payload["budget"] = budget - (time.monotonic() - started)
        result = child.run(f"{WORKER}:run", payload, on_event, step=f"measuring {opened.path.name}", pass_fds=[lock])
        header, rows = read_journal(journal, spec)
        if not header:
            raise NativeError(f"{journal}: the journal is gone or damaged", hint="measure again")
        spent = time.monotonic() - started
        if budget is not None and spent > _OVER * budget:
            notes.append(
                f"this took {spent:.0f} s of a budget of {budget:.0f}: loading, the tables of the IQ types, errors of "
                "a few rows and one probe are the least that can be done"
            )
        result["notes"] = [*notes, *result["notes"]]
        made = Assembly(opened, probed, matrix, plan.groups, read, result, header, rows).sensitivities(
            {
                "spec": spec, "complete": result["complete"], "tokens": tokens, "ctx": ctx, "groups": groups,
                "types": list(types), "joint": joint, "noise": noise, "seed": seed, "fill": asked["prior"],
                "library": library_info().version, "threads": result["threads"], "kept_logits": result["kept"],
                "joint_experts": list(experts_ladder(opened, list(plan.errors))),
                "texts": read.parts, "heldout_runs": read.heldout,
            }
        )  # fmt: skip
        made.save(out)
        if result["complete"]:
            journal.unlink(missing_ok=True)
    return sensitivity.load(out)


class _Plan:
    """Groups, probes, and the types whose errors are wanted, of one call."""

    def __init__(
        self,
        model: GGUFModel,
        matrix: Importance | None,
        groups: str,
        types: Sequence[str],
        candidates: Sequence[str],
        joint: int,
        noise: bool,
        seed: int,
    ) -> None:
        for name in (*types, *candidates):
            if not ggml_type(name).encodable or not ggml_type(name).is_quantized:
                raise UsageError(f"{name} is not a type that weights are quantized to")
        if not types:
            raise UsageError("no type to probe with", hint="--probe Q3_K")
        names = quantizable(model)
        if not names:
            raise InputError(f"{model.path.name} has no tensors that could be quantized")
        weighted = {name for name, info in names.items() if matrix is not None and matrix.fits(info)}
        self.groups = make_groups(model, groups, list(names))
        self.probes: list[ProbePlan] = single_probes(model, self.groups, types, weighted, noise=noise)
        everything = [name for group in self.groups for name in group.tensors]
        joints = joint_probes(model, everything, joint, weighted, seed)
        # in between, so that a budget that ends early leaves neither out
        cut = len(self.groups)
        self.probes[cut:cut] = joints
        used: dict[str, set[str]] = {}
        for probe in self.probes:
            for name, kind in probe.types.items():
                used.setdefault(name, set()).add(kind)
        self.errors = {
            name: [
                kind.name
                for kind in usable_types(
                    names[name], list(dict.fromkeys((*candidates, *sorted(used.get(name, ()))))),
                    importance=name in weighted,
                )
            ]
            for name in everything
        }  # fmt: skip


def _batching(ctx: int, vocabulary: int, model_bytes: int) -> Batching:
    """As many tokens in a decode as memory for their logits allows, since every decode reads the weights of all
    experts: twice in float32, in the library's graph and its output, in a share of the model's own bytes."""
    tokens, room = _DECODE, max(_LOGIT_BYTES, int(_LOGIT_SHARE * model_bytes))
    while tokens > _SMALLEST and 2 * 4 * tokens * vocabulary > room:
        tokens //= 2
    sequences = max(1, min(_DECODE // ctx, tokens))
    return Batching(sequences, max(sequences, min(tokens, ctx * sequences)))


def _file(model: GGUFModel, path: Path, budget: float | None, options: SessionOptions, notes: list[str]) -> str | None:
    """Make a uniform Q8_0 file of the model. None, and a note, where it costs too much."""
    weights = sum(info.n_elements for info in model.tensors.values())
    needed, free = int(weights * ggml_type(_FILE).bpw / 8), shutil.disk_usage(path.parent).free
    said = "what rounding of activations costs was not measured: "
    if budget is not None and weights / _FILE_RATE > _FILE_SHARE * budget:
        notes.append(f"{said}making a {_FILE} file takes too much of the budget")
        return None
    if needed > free - _SPARE:
        notes.append(f"{said}a {_FILE} file takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        return None
    # it is run while the model itself stays loaded, unmapped; on a GPU a lack of room is an error that is noted
    both, available = needed + sum(info.nbytes for info in model.tensors.values()), available_bytes()
    if options.gpu_layers == 0 and available is not None and both > available:
        notes.append(
            f"{said}the model and a {_FILE} file take {both / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are "
            "available"
        )
        return None
    with Child(_FILE_WORKER) as child:
        child.run(
            f"{_FILE_WORKER}:uniform", {"model": str(model.path), "out": str(path), "threads": options.threads},
            lambda _: None, step=f"making a {_FILE} file of {model.path.name}",
        )  # fmt: skip
    return str(path)


def _options(options: SessionOptions, ctx: int, model: GGUFModel) -> SessionOptions:
    """What a session needs whose weights are written to."""
    return options.model_copy(update={"mmap": False, "repack": False, "ctx": ctx})


def _same_tensors(model: GGUFModel, loaded: GGUFModel) -> None:
    for name, info in model.tensors.items():
        other = loaded.tensors.get(name)
        if other is None or other.shape != info.shape:
            raise InputError(
                f"{loaded.path.name} has no {name} of this shape",
                hint="--load wants another file of the same model, such as its Q8_0 form",
            )


def _spec(
    model: GGUFModel, loaded: GGUFModel, matrix: Importance | None, asked: Mapping[str, Any], options: SessionOptions
) -> str:
    """A hash of everything that decides the numbers, but for threads and budget."""
    rest = [
        _FORMAT, sampled(model), sampled(loaded), matrix.sha256 if matrix is not None else None, asked,
        options.model_dump(mode="json", exclude={"threads"}), library_info().version,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _finished(out: Path, spec: str, model: GGUFModel, force: bool) -> Sensitivities | None:
    """What an earlier run of the same call made and finished, or None. UsageError when something else has the name."""
    if not out.exists():
        if not out.parent.is_dir():
            raise UsageError(f"{out.parent}: no such folder")
        return None
    if any(out.samefile(file.path) for file in model.files):
        raise UsageError(f"{out} is the model itself", hint="choose another -o")
    if force:
        return None
    try:
        known = sensitivity.load(out)
    except InputError:
        known = None
    if known is None or known.settings.get("spec") != spec:
        raise UsageError(f"{out} exists and was measured in another way", hint="--force replaces it")
    return known if known.settings.get("complete") else None
