"""`apex eval` and `apex reference`: their options, their progress and what they show."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from apex_quant.cli import one_line, safe
from apex_quant.cli.console import console_for, print_json
from apex_quant.cli.options import (
    Buffers,
    CpuExperts,
    Force,
    GpuLayers,
    Json,
    NoMmap,
    TensorSplit,
    Threads,
    session_options,
)
from apex_quant.cli.progress import Bar
from apex_quant.errors import UsageError

if TYPE_CHECKING:
    from apex_quant.evaluation.harness import HarnessPlan
    from apex_quant.evaluation.make_reference import MadeReference
    from apex_quant.evaluation.schema import Results
    from apex_quant.evaluation.speed import SpeedPlan
    from apex_quant.evaluation.token_job import EvaluationProgress

_CONTEXT_SHOWN = 80  # characters before the token with the largest divergence
_SMALL = 0.05  # a mean KLD below this is shown with the backend's floor, when that was measured

Text = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="instead of the built-in held-out text; a path, wikitext-2-raw or hub:USER/DATA/FILE; repeat",
    ),
]
Ctx = Annotated[int, typer.Option("--ctx", min=16, help="tokens of a chunk")]
Chunks = Annotated[int | None, typer.Option("--chunks", min=1, help="at most so many chunks of each text")]
EveryToken = Annotated[
    bool, typer.Option("--every-token", help="score all tokens after an eighth of the context, not the second half")
]


class EvaluationBar(Bar):
    """Call it with each EvaluationProgress."""

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        super().__init__(what, quiet=quiet)
        self._part, self._start = "", time.monotonic()

    def __call__(self, event: EvaluationProgress) -> None:
        now = time.monotonic()
        if event.what != self._part:
            self._part, self._start = event.what, now
        rate = (event.done - event.resumed) / max(now - self._start, 0.1)
        told = f"{event.what}: {event.done} of {event.planned} {_unit(event)}"
        if rate:
            speed = f"{rate * event.tokens:.0f} tokens/s" if event.tokens else f"{rate:.1f} {_unit(event)}/s"
            told += f", {speed}, ETA {(event.planned - event.done) / rate:.0f} s"
        self.show(event.done / max(event.planned, 1), told)


def _unit(event: EvaluationProgress) -> str:
    return "chunks" if event.tokens else "runs" if event.what == "speed" else "tasks"


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="a GGUF file, or any shard of one")],
    reference: Annotated[
        Path | None,
        typer.Option("--reference", metavar="REF", help="the full-precision GGUF, a .apexref or a _logits_ file"),
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--source", metavar="GGUF", help="what the .apexref was made from, if elsewhere")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="METRIC,...", help="ppl, kld, router, hellaswag, winogrande, mmlu, arc, "
                     "truthfulqa, speed (default: what can be measured on text)"),
    ] = None,
    text: Text = None,
    ctx: Ctx = 2048,
    chunks: Chunks = None,
    every_token: EveryToken = False,
    floor: Annotated[
        bool, typer.Option("--floor", help="also measure what rounding alone costs: a uniform Q8_0 of the reference")
    ] = False,
    tasks: Annotated[int, typer.Option("--tasks", min=0, help="of each benchmark; 0 for all")] = 400,
    task_file: Annotated[
        list[str] | None,
        typer.Option("--task-file", metavar="NAME=FILE", help="hellaswag=FILE, mmlu=hub:USER/DATA/FILE; repeat"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the choice of tasks; 1 is llama-perplexity's")] = 1,
    prompts: Annotated[
        str | None, typer.Option("-p", "--prompts", metavar="N,...", help="time prompts of N tokens (speed; 512)")
    ] = None,
    generate: Annotated[
        str | None, typer.Option("-n", "--generate", metavar="N,...", help="time generating N tokens (speed; 128)")
    ] = None,
    depths: Annotated[
        str | None, typer.Option("-d", "--depths", metavar="N,...", help="after N tokens of context (speed; 0)")
    ] = None,
    repetitions: Annotated[int, typer.Option("--repetitions", min=1, help="of each timing")] = 5,
    harness: Annotated[
        list[str] | None,
        typer.Option("--harness", metavar="TASK,...", help="also ask gsm8k, mmlu_pro, ifeval, humaneval, mbpp "
                     "through lm-evaluation-harness (extra 'harness')"),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="questions of each --harness task")] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="humaneval and mbpp may run what the model writes, with your rights")
    ] = False,
    out: Annotated[Path, typer.Option("-o", "--out", help="results, added to those there")] = Path("results.json"),
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    cpu_experts: CpuExperts = False,
    tensor_split: TensorSplit = None,
    tensor_buffers: Buffers = None,
    no_mmap: NoMmap = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Perplexity, divergence from a reference, accuracy, each with its error. Interrupted, the command goes on."""
    from apex_quant.evaluation.evaluate import evaluate as run

    options = session_options(threads, gpu_layers, cpu_experts, tensor_split, tensor_buffers, no_mmap)
    with EvaluationBar(f"evaluating {model.name}") as bar:
        made = run(
            model,
            reference=reference,
            source=source,
            only=[name.strip() for word in only for name in word.split(",")] if only else None,
            text=text,
            ctx=ctx,
            chunks=chunks,
            scored="all" if every_token else "half",
            floor=floor,
            tasks=tasks,
            task_files=dict(map(_task_file, task_file or ())),
            seed=seed,
            speed=_speed_plan(prompts, generate, depths, repetitions),
            harness=_harness_plan(harness, limit, allow_code),
            out=out,
            options=options,
            progress=bar,
        )
    if as_json:
        print_json(made.to_json())
    else:
        show_results(console_for(False), made)


def reference(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="the full-precision GGUF file, or any shard of one")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="REF.apexref", help="the file to write")],
    text: Text = None,
    ctx: Ctx = 2048,
    chunks: Chunks = None,
    every_token: EveryToken = False,
    form: Annotated[
        Literal["auto", "logprobs", "stock"],
        typer.Option("--form", help="auto: hidden states where they do; logprobs: 16-bit logits; stock: _logits_"),
    ] = "auto",
    copy_output: Annotated[
        bool, typer.Option("--copy-output", help="put the output matrix in, so that MODEL is not needed beside it")
    ] = False,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    cpu_experts: CpuExperts = False,
    tensor_split: TensorSplit = None,
    tensor_buffers: Buffers = None,
    no_mmap: NoMmap = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Keep what a full-precision model predicts, for apex eval --reference. Interrupted, the same command goes on."""
    from apex_quant.evaluation.make_reference import make_reference as run

    options = session_options(threads, gpu_layers, cpu_experts, tensor_split, tensor_buffers, no_mmap)
    with EvaluationBar(f"reading with {model.name}") as bar:
        made = run(
            model,
            out,
            text=text,
            ctx=ctx,
            chunks=chunks,
            scored="all" if every_token else "half",
            form=form,
            copy_output=copy_output,
            options=options,
            force=force,
            progress=bar,
        )
    if as_json:
        print_json(made.to_json())
    else:
        show_reference(console_for(False), made)


def _speed_plan(prompts: str | None, generate: str | None, depths: str | None, repetitions: int) -> SpeedPlan | None:
    """None where no list was given: speed is measured then only if --only names it, with the defaults."""
    from apex_quant.evaluation.speed import SpeedPlan

    lists = {"prompts": prompts, "generate": generate, "depths": depths}
    given = {name: _numbers(text, f"--{name}") for name, text in lists.items() if text is not None}
    return SpeedPlan(**given, repetitions=repetitions) if given or repetitions != SpeedPlan.repetitions else None


def _numbers(text: str, option: str) -> tuple[int, ...]:
    """'512,2048' to (512, 2048), '' and '0' to (): nothing of the kind, as llama-bench's -p 0. Raises UsageError."""
    try:
        numbers = tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of whole numbers such as 512,2048") from None
    return numbers if option == "--depths" else tuple(number for number in numbers if number)


def _harness_plan(names: list[str] | None, limit: int | None, allow_code: bool) -> HarnessPlan | None:
    from apex_quant.evaluation.harness import HarnessPlan

    if not names:
        if limit is not None or allow_code:
            raise UsageError("--limit and --allow-code say how --harness tasks are asked, and none is named")
        return None
    tasks = tuple(name.strip() for word in names for name in word.split(","))
    return HarnessPlan(tasks, limit=limit, allow_code=allow_code)


def _task_file(word: str) -> tuple[str, str]:
    name, equals, file = word.partition("=")
    if not equals or not file:
        raise UsageError(f"--task-file {word!r} is not of the form NAME=FILE, such as hellaswag=hellaswag.txt")
    return name, file


# --- shown ---


def interval(value: dict[str, Any] | None, digits: int = 4) -> str:
    """0.0123 [0.0119, 0.0127], or the value alone, or why there is none."""
    if value is None or value.get("value") is None:
        return str((value or {}).get("note") or "none")
    low, high = value.get("low"), value.get("high")
    ends = f" [{low:.{digits}g}, {high:.{digits}g}]" if low is not None and high is not None else ""
    return f"{value['value']:.{digits}g}{ends}"


def show_results(console: Console, made: Results) -> None:
    """All metrics, then what is behind the divergence."""
    from apex_quant.cli.show import table

    every = table(None, "", "")
    every.show_header = False
    for name, shown in _rows(made):
        every.add_row(name, safe(shown))
    console.print(safe(made.name) + (f", {made.model.bpw:.2f} bpw" if made.model.bpw else ""))
    console.print(every)
    kld = made.metrics.get("kld")
    if kld:
        domains = table(None, "text", ">mean KLD", ">median", ">99 %", ">top-1", ">perplexity", ">of the reference")
        for name, row in kld["by_domain"].items():
            cells = [f"{row[key]:.4g}" for key in ("median", "p99")]
            shares = [f"{row['top1_agreement']['value']:.1%}", f"{row['ppl']:.4f}", f"{row['ppl_reference']:.4f}"]
            domains.add_row(safe(name), interval(row["mean"]), *cells, *shares)
        console.print(domains)
        largest = kld["max"]
        context = one_line(largest["context"][-_CONTEXT_SHOWN:])
        console.print(
            f"largest: {largest['value']:.3f} in chunk {largest['chunk']} at {largest['position']}: "
            f"{safe(context)}[bold]{safe(largest['token'])}[/]"
        )
    router = made.metrics.get("router")
    if router:
        worst = ", ".join(f"layer {row['layer']} {row['changed']:.1%}" for row in router["worst"])
        console.print(f"routers differ most in {worst}")
    for warning in made.warnings:
        console.print(f"[yellow]note:[/] {safe(warning)}")
    if made.path is not None:
        console.print(f"[dim]{safe(str(made.path))}[/]")


def _rows(made: Results) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name in ("ppl", "ppl_all"):
        if value := made.metrics.get(name):
            words = "perplexity" if name == "ppl" else "perplexity, every token"
            error = f" ± {value['error']:.4f}" if value.get("error") is not None else ""
            rows.append((words, f"{value['value']:.4f}{error} on {value['n']} tokens"))
    if kld := made.metrics.get("kld"):
        mean = f"{interval(kld['mean'])} on {kld['mean']['n']} tokens"
        floor = kld.get("floor")
        if floor and kld["mean"]["value"] < _SMALL:
            mean += f" (a uniform {floor['type']}: {interval(floor['mean'])})"
        rows.append(("mean KLD", mean))
        rows += [(label, f"{kld[key]:.4g}") for label, key in (("median", "median"), ("99 %", "p99"))]
        rows += [("99.9 %", interval(kld["p99_9"])), ("same top token", interval(kld["top1_agreement"]))]
        rows.append(("delta-p RMS", f"{kld['delta_p_rms']:.4g}"))
    if router := made.metrics.get("router"):
        changed = interval(router["changed_interval"])
        rows.append(("other experts", f"{changed} of tokens and layers, {router['mass_moved']:.4g} of the weight"))
    for name, value in made.metrics.items():
        if "wording" in value or "harness" in value:
            rows.append((name, f"{interval(value)} of {value['n']} tasks"))
    rows += _speed_rows(made.metrics.get("speed", {}))
    return rows


def _speed_rows(speed: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (name, f"{rate['value']:.1f} ± {rate['deviation'] or 0:.1f} tokens/s")
        for name, rate in speed.items()
        if isinstance(rate, dict) and "samples" in rate and rate["value"] is not None
    ]
    if rows:
        share = (speed.get("bandwidth") or {}).get("share")
        touched = f"{speed['active_bytes_per_token'] / 1e6:.1f} MB of weights a token"
        rows.append(("generation reads", touched + (f", {share:.0%} of the bandwidth" if share is not None else "")))
    return rows


def show_reference(console: Console, made: MadeReference) -> None:
    """What was written and how exact it is."""
    smaller = made.stock_bytes / made.bytes
    console.print(
        f"{safe(str(made.path))}: {made.tokens} scored tokens in {made.chunks} chunks, {made.bytes / 1e6:.1f} MB, "
        f"{made.form}" + (f", {smaller:.1f} times smaller than a _logits_ file" if made.form != "stock" else "")
    )
    if made.error is not None:
        console.print(f"rebuilt predictions: mean KLD {made.error['mean']:.2g}, largest {made.error['max']:.2g}")
    if made.resumed:
        console.print(f"went on from {made.resumed} chunks of an earlier run")
    for warning in made.warnings:
        console.print(f"[yellow]note:[/] {safe(warning)}")
