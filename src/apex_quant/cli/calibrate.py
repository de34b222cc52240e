"""`apex calibrate`: its options, its progress and what it shows."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from apex_quant.cli import one_line, safe
from apex_quant.errors import UsageError
from apex_quant.sizes import parse_count as parse_count

if TYPE_CHECKING:
    from apex_quant.calibration.calibrate import Calibration, CalibrationProgress

_LINE_SECONDS = 10.0


class CalibrationBar:
    """A context manager; call it with each CalibrationProgress. A bar on a terminal, now and then a line elsewhere."""

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        self.what, self.quiet = what, quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> CalibrationBar:
        if sys.stderr.isatty() and not self.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TimeElapsedColumn(),
                TextColumn("{task.fields[told]}"),
                console=Console(stderr=True, emoji=False),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(safe(self.what), total=1.0, told="loading the model")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: CalibrationProgress) -> None:
        now = time.monotonic()
        share = min(1.0, event.chunks / max(event.planned, 1))
        rate = (event.chunks - event.resumed) * event.chunk_size / max(now - self._start, 0.1)
        left = max(0, event.planned - event.chunks) * event.chunk_size / max(rate, 0.1)
        told = f"{event.chunks * event.chunk_size} tokens, {rate:.0f} tokens/s, ETA {left:.0f} s"
        if event.chunks > event.planned:
            told += ", drawing text for uncovered experts"
        if event.experts:
            told += f", {event.experts - event.uncovered} of {event.experts} experts covered"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=share, told=told)
        elif not self.quiet and now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            print(one_line(f"{self.what}: {share:.0%}, {told}"), file=sys.stderr, flush=True)


def show_calibration(console: Console, made: Calibration) -> None:
    """What was made, and what it does not cover."""
    how = "unchanged" if made.unchanged else f"in {made.seconds:.1f} s"
    console.print(f"{safe(str(made.path))}: {made.tokens} tokens in {made.chunks} chunks, {how}")
    if made.resumed:
        console.print(f"went on from {made.resumed} chunks of an earlier run")
    if made.draws:
        console.print(f"drawn for uncovered experts: {safe(', '.join(made.draws))}")
    if made.experts:
        thin = sum(len(row["experts"]) for row in made.uncovered)
        console.print(f"{made.experts - thin} of {made.experts} experts saw at least {made.floor} tokens")
        for row in made.uncovered[:20]:
            console.print(f"  [yellow]layer {row['layer']}:[/] experts {', '.join(map(str, row['experts']))}")
        if made.uncovered:
            console.print("[dim]more --tokens, or --cover, which draws text that reaches them[/]")
    if made.missing:
        names = ", ".join(made.missing[:3]) + (", ..." if len(made.missing) > 3 else "")
        console.print(f"[dim]{len(made.missing)} tensors met no activations and got no importance: {safe(names)}[/]")
    for warning in made.warnings:
        console.print(f"[yellow]note:[/] {safe(warning)}")


def calibrate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="a GGUF file, or any shard of one")],
    out: Annotated[Path, typer.Option("-o", "--out", help="the importance matrix to write")] = Path("imatrix.gguf"),
    corpus: Annotated[
        list[str] | None,
        typer.Option("--corpus", metavar="TEXT", help="builtin, FILE, DIR or hub:NAME; repeat for several"),
    ] = None,
    mix: Annotated[
        str | None, typer.Option("--mix", metavar="KIND=PERCENT,...", help="chat=30,code=25,reasoning=25,tools=20")
    ] = None,
    tokens: Annotated[str, typer.Option("--tokens", metavar="N", help="how much text: 50k")] = "50k",
    ctx: Annotated[int, typer.Option("--ctx", min=16, help="tokens of a chunk")] = 512,
    cover: Annotated[
        bool, typer.Option("--cover", help="draw more text until every expert saw enough tokens (see --floor)")
    ] = False,
    floor: Annotated[int, typer.Option("--floor", min=1, help="tokens that are enough for an expert")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the order of the text")] = 0,
    skip_output: Annotated[
        bool, typer.Option("--skip-output", help="nothing for the output matrix, as llama-imatrix does")
    ] = False,
    threads: Annotated[
        int | None, typer.Option("-j", "--threads", min=1, help="threads (default: all processors)")
    ] = None,
    gpu_layers: Annotated[int, typer.Option("--gpu-layers", min=-1, help="layers on the GPU; -1 for all")] = 0,
    cpu_experts: Annotated[
        bool, typer.Option("--cpu-experts", help="routed experts stay in main memory, whatever --gpu-layers says")
    ] = False,
    tensor_split: Annotated[
        str | None, typer.Option("--tensor-split", metavar="N,N,...", help="shares of several GPUs")
    ] = None,
    tensor_buffers: Annotated[
        list[str] | None, typer.Option("--override-tensor", metavar="REGEX=BUFFER", help="where matching tensors live")
    ] = None,
    no_mmap: Annotated[bool, typer.Option("--no-mmap", help="read the model into memory")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="replace an existing file once the new one is complete")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON document on standard output, everything else on stderr")
    ] = False,
) -> None:
    """Make an importance matrix from text. Interrupted, the same command goes on."""
    from pydantic import ValidationError

    from apex_quant.calibration.calibrate import calibrate as run
    from apex_quant.cli.app import _console, _print_json
    from apex_quant.runtime.options import SessionOptions
    from apex_quant.text import parse_mix

    try:
        options = SessionOptions(
            threads=threads,
            gpu_layers=gpu_layers,
            cpu_experts=cpu_experts,
            tensor_split=tuple(float(word) for word in tensor_split.split(",")) if tensor_split else (),
            tensor_buffers=tuple(tensor_buffers or ()),
            mmap=not no_mmap,
            ctx=ctx,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError:
        raise UsageError(f"--tensor-split {tensor_split!r} is not a list of numbers such as 3,1") from None
    with CalibrationBar(f"calibrating {model.name}") as bar:
        made = run(
            model,
            out,
            corpus=corpus or ("builtin",),
            mix=parse_mix(mix) if mix else None,
            tokens=parse_count(tokens),
            cover=cover,
            floor=floor,
            seed=seed,
            heads=not skip_output,
            options=options,
            force=force,
            progress=bar,
        )
    if as_json:
        _print_json(made.to_json())
    else:
        show_calibration(_console(False), made)
