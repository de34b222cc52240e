"""`apex optimize` and `apex frontier`: their options, their progress and what they show."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from apex_quant.cli import safe
from apex_quant.cli.console import console_for, print_json
from apex_quant.cli.evaluate import EvaluationBar, interval
from apex_quant.cli.measure import Budget, Load, MeasureBar, parse_time
from apex_quant.cli.options import Buffers, CpuExperts, GpuLayers, Json, TensorSplit, Threads, session_options
from apex_quant.cli.progress import JobBar
from apex_quant.errors import UsageError
from apex_quant.sizes import parse_ctx, parse_size

if TYPE_CHECKING:
    from apex_quant.allocation.frontier import Frontier
    from apex_quant.allocation.optimize import Optimized, OptimizeProgress
    from apex_quant.recipe.planned import PlanOptions


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="the full-precision GGUF file, or any shard of one")]
Sensitivity = Annotated[
    Path | None,
    typer.Option("--sensitivity", metavar="FILE", help="of apex measure (default: measured now, kept beside MODEL)"),
]
Imatrix = Annotated[Path | None, typer.Option("--imatrix", help="importance matrix, GGUF or .dat")]
Types = Annotated[
    list[str] | None,
    typer.Option("--types", metavar="TYPE,...", help="what tensors may become (default: K and IQ types, Q8_0)"),
]
Minimum = Annotated[
    list[str] | None,
    typer.Option("--minimum", metavar="ROLE=TYPE", help="no tensor of the role gets fewer bits: attention=Q4_K"),
]
Equal = Annotated[
    str | None,
    typer.Option("--equal", metavar="SIBLINGS,...", help="of one type in each layer: gate_up, qkv, ffn; '' for none "
                 "(default: gate_up, unless apart measures lower)"),
]  # fmt: skip
Fixed = Annotated[
    list[str] | None,
    typer.Option("--fix", metavar="ROLE|REGEX=TYPE", help="decide these tensors beforehand: output=Q6_K"),
]
SpeedAware = Annotated[
    Path | None, typer.Option("--speed-aware", metavar="TABLE.toml", help="times of types: a second budget")
]
MaxSlowdown = Annotated[float, typer.Option("--max-slowdown", help="times the table's reference type throughout")]
Fill = Annotated[str, typer.Option("--fill", metavar="RULE", help="as apex quantize --fill")]
GroupsMeasured = Annotated[
    str | None, typer.Option("--groups", metavar="HOW", help="where it is measured now: as apex measure --groups")
]


class OptimizeBar:
    """A context manager; call it with each OptimizeProgress. Each step has the bar of the command it is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> OptimizeBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(kind, error, trace)

    def _close(self, *error: Any) -> None:
        for bar in self._bars.values():
            bar.__exit__(*(error or (None, None, None)))
        self._bars.clear()

    def __call__(self, event: OptimizeProgress) -> None:
        if event.what not in self._bars:
            self._close()  # one bar at a time holds the terminal
            kinds: dict[str, Any] = {"encoding": JobBar, "measuring": MeasureBar}
            self._bars[event.what] = kinds.get(event.what, EvaluationBar)(f"{event.what} {self.name}").__enter__()
        if event.event is not None:
            self._bars[event.what](event.event)


def optimize(
    model: Model,
    size: Annotated[str | None, typer.Option("--size", help="of the whole file at most: 12.2GB")] = None,
    bpw: Annotated[float | None, typer.Option("--bpw", help="bits per weight over all tensors at most")] = None,
    fit: Annotated[
        str | None, typer.Option("--fit", metavar="SIZE", help="memory for weights, cache and compute: 16GB")
    ] = None,
    ctx: Annotated[str, typer.Option("--ctx", help="tokens of context that --fit leaves room for: 32k")] = "8k",
    kld: Annotated[
        float | None,
        typer.Option(
            "--kld", help="the smallest file of this mean KLD, predicted and then measured (docs/optimize.md)"
        ),
    ] = None,
    like_size: Annotated[
        Path | None, typer.Option("--like-size", metavar="GGUF", help="at most as large as this file")
    ] = None,
    types: Types = None,
    minimum: Minimum = None,
    fixed: Fixed = None,
    equal: Equal = None,
    speed_aware: SpeedAware = None,
    max_slowdown: MaxSlowdown = 1.0,
    sensitivity: Sensitivity = None,
    groups: GroupsMeasured = None,
    budget: Budget = None,
    load: Load = None,
    imatrix: Imatrix = None,
    fill: Fill = "prior",
    split_max_size: Annotated[
        str | None, typer.Option("--split-max-size", metavar="SIZE", help="shards of at most this, 48G")
    ] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="the recipe (a tensor-type file, or .json); certificate beside it")
    ] = Path("recipe.txt"),
    quantize: Annotated[bool, typer.Option("--quantize", help="keep the encoded file beside the recipe")] = False,
    no_validate: Annotated[bool, typer.Option("--no-validate", help="solve only: encode and measure nothing")] = False,
    steps: Annotated[int, typer.Option("--steps", min=0, help="exchanges measured when prediction is off")] = 4,
    reference: Annotated[
        Path | None, typer.Option("--reference", metavar="REF", help="what to measure against (default: MODEL)")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="FILE", help="to choose by, instead of the validation text; repeat"),
    ] = None,
    chunks: Annotated[int | None, typer.Option("--chunks", min=1, help="at most so many chunks of each text")] = None,
    work: Annotated[
        Path | None, typer.Option("--work", metavar="DIR", help="keep encoded candidates and what was measured here")
    ] = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    cpu_experts: CpuExperts = False,
    tensor_split: TensorSplit = None,
    tensor_buffers: Buffers = None,
    force: Annotated[bool, typer.Option("--force", help="replace existing files")] = False,
    as_json: Json = False,
) -> None:
    """Choose every tensor's type by measurement, for any size, and prove how good the choice is."""
    from apex_quant.allocation.constraints import minimums
    from apex_quant.allocation.optimize import optimize as run
    from apex_quant.recipe.planned import PlanOptions

    session = session_options(threads, gpu_layers, cpu_experts, tensor_split, tensor_buffers, no_mmap=False)
    split = parse_size(split_max_size) if split_max_size else None
    measuring = measured_how(sensitivity, groups, budget, load)
    with OptimizeBar(model.name) as bar:
        made = run(
            model,
            size=parse_size(size) if size else None,
            bpw=bpw,
            fit=parse_size(fit) if fit else None,
            ctx=parse_ctx(ctx),
            kld=kld,
            like_size=like_size,
            types=types,
            minimum=minimums(minimum or []),
            fixed=minimums(fixed or []),
            equal=siblings(equal) if equal is not None else None,
            speeds=speed_aware,
            max_slowdown=max_slowdown,
            sensitivity=sensitivity,
            measuring=measuring,
            imatrix=imatrix,
            options=PlanOptions(fill=fill, split_max_size=split),
            out=out,
            quantize=quantize,
            validate=not no_validate,
            steps=steps,
            reference=reference,
            text=text,
            chunks=chunks,
            work=work,
            threads=threads,
            session=session,
            force=force,
            progress=bar,
        )
    if as_json:
        print_json(made.to_json())
    else:
        show_optimized(console_for(False), made)


def frontier(
    model: Model,
    sensitivity: Sensitivity = None,
    imatrix: Imatrix = None,
    types: Types = None,
    minimum: Minimum = None,
    fixed: Fixed = None,
    equal: Equal = None,
    speed_aware: SpeedAware = None,
    max_slowdown: MaxSlowdown = 1.0,
    groups: GroupsMeasured = None,
    budget: Budget = None,
    load: Load = None,
    fill: Fill = "prior",
    points: Annotated[int, typer.Option("--points", min=2, help="sizes on the curve")] = 24,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="the plot: .png, .svg or .pdf (default: MODEL.frontier.svg)")
    ] = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    cpu_experts: CpuExperts = False,
    tensor_split: TensorSplit = None,
    tensor_buffers: Buffers = None,
    as_json: Json = False,
) -> None:
    """The least predicted KLD of every size, and the published tiers beside the curve."""
    from apex_quant.allocation.constraints import EQUAL, minimums
    from apex_quant.allocation.frontier import frontier as run
    from apex_quant.recipe.planned import PlanOptions
    from apex_quant.report.plot_frontier import check_format, plot_frontier

    out = out or Path(f"{model.stem}.frontier.svg")
    check_format(out)
    session = session_options(threads, gpu_layers, cpu_experts, tensor_split, tensor_buffers, no_mmap=False)
    with OptimizeBar(f"frontier of {model.stem}") as bar:
        made = run(
            model,
            sensitivity=sensitivity,
            imatrix=imatrix,
            types=types,
            minimum=minimums(minimum or []),
            fixed=minimums(fixed or []),
            equal=siblings(equal) if equal is not None else EQUAL,
            speeds=speed_aware,
            max_slowdown=max_slowdown,
            measuring=measured_how(sensitivity, groups, budget, load),
            options=PlanOptions(fill=fill),
            session=session,
            points=points,
            progress=bar,
        )
    made = replace(made, plot=plot_frontier(made, out))
    if as_json:
        print_json(made.to_json())
    else:
        show_frontier(console_for(False), made)


def quantize_measured(
    model: Path,
    tiers: list[str] | None,
    imatrix: Path | None,
    sensitivity: Path | None,
    work: Path | None,
    out: Path | None,
    options: PlanOptions,
    threads: int | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """`apex quantize --tier T --measured`: the measured twin of each tier, in the form of quantize's outputs."""
    from apex_quant.allocation.optimize import measured_twin
    from apex_quant.encode.quantize import expand_tiers

    if dry_run:
        raise UsageError("--measured does not go with --dry-run")
    names = expand_tiers(tiers)
    if names == [None]:
        raise UsageError("--measured takes the size of a tier", hint="--tier i-compact, or apex optimize --size 12GB")
    if len(names) > 1 and out is not None and out.suffix == ".gguf" and not out.is_dir():
        raise UsageError(f"{out} is one file, and {len(names)} tiers are asked for", hint="name a folder")
    outputs = []
    for name in names:
        started = time.monotonic()
        with OptimizeBar(f"{model.stem} as {name}") as bar:
            made = measured_twin(
                model,
                str(name),
                imatrix=imatrix,
                out=out,
                options=options,
                sensitivity=sensitivity,
                work=work,
                threads=threads,
                force=force,
                progress=bar,
            )
        if not as_json:
            show_optimized(console_for(False), made)
        outputs.append(
            {
                "tier": f"{name}-measured",
                "path": str(made.output),
                "bytes": made.total_bytes,
                "bpw": made.bpw,
                "sha256": _sha256(made.output) if as_json and made.output is not None else None,
                "seconds": round(time.monotonic() - started, 3),
                "optimized": made.to_json(),
            }
        )
    if as_json:
        print_json({"outputs": outputs})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measured_how(sensitivity: Path | None, groups: str | None, budget: str | None, load: Path | None) -> dict[str, Any]:
    """The arguments of measure() for sensitivities that are measured now. Raises UsageError where they are given."""
    asked = {"groups": groups, "budget": parse_time(budget) if budget is not None else None, "loaded": load}
    given = [f"--{'load' if name == 'loaded' else name}" for name, value in asked.items() if value is not None]
    if sensitivity is not None and given:
        raise UsageError(f"{given[0]} says how to measure, and --sensitivity was measured before")
    return asked


def siblings(text: str) -> tuple[str, ...]:
    """'gate_up,qkv' as a tuple."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


# --- shown ---


def show_optimized(console: Console, made: Optimized) -> None:
    """Size, what was predicted and measured, how far from optimal, and where it is."""
    from apex_quant.cli.show import table

    asked = f" of {made.target_bytes:,} asked" if made.target_bytes is not None else ""
    console.print(f"{made.total_bytes:,} bytes{asked}, {made.bpw:.3f} bpw")
    measured = made.measured_kld
    line = f"mean KLD: predicted {made.predicted_kld:.4g}"
    if measured:
        line += f", measured {interval(measured)} on {measured['n']} tokens"
    if made.corrected_kld is not None:
        line += f"; predictions of all candidates corrected by what they measured: {made.corrected_kld:.4g}"
    console.print(line)
    # the gap is a share of what is delivered, and this one of the optimum
    proof = "proved optimal" if made.proved else f"at most {made.gap / max(1 - made.gap, 1e-9):.2%} above the optimum"
    console.print(f"of the predicted cost: {proof}; one more MB saves {made.shadow_price:.3g} nats")
    if len(made.candidates) > 1:
        rows = table(None, "candidate", ">bytes", ">predicted", ">measured")
        for one in made.candidates:
            cells = [f"{one['total_bytes']:,}", f"{one['predicted_kld']:.4g}", interval(one["measured_kld"])]
            rows.add_row(safe(one["name"]), *cells)
        console.print(rows)
    for note in made.notes:
        console.print(f"[yellow]note:[/] {safe(note)}")
    for path in (made.recipe, made.certificate, made.output):
        if path is not None:
            console.print(f"[dim]{safe(str(path))}[/]")


def show_frontier(console: Console, made: Frontier) -> None:
    """The curve as a table."""
    from apex_quant.cli.show import table

    rows = table(None, ">MB", ">bpw", ">predicted KLD", ">nats per MB", "types by bytes")
    for point in made.points:
        most = ", ".join(list(point.types)[:4])
        cells = [f"{point.total_bytes / 1e6:.2f}", f"{point.bpw:.3f}", f"{point.predicted_kld:.4g}"]
        rows.add_row(*cells, f"{point.shadow_price:.3g}", most)
    console.print(rows)
    for row in made.tiers:
        console.print(f"tier {row['tier']}: {row['total_bytes'] / 1e6:.2f} MB, predicted {row['predicted_kld']:.4g}")
    for line in (*made.left_out, *made.notes):
        console.print(f"[yellow]note:[/] {safe(line)}")
    if made.plot is not None:
        console.print(f"[dim]{safe(str(made.plot))}[/]")
