"""The commands and their options. Each calls the public function of the same name and shows what it returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from apex_quant.cli import one_line, safe
from apex_quant.cli.calibrate import calibrate
from apex_quant.cli.chat import chat
from apex_quant.cli.console import console_for, print_json
from apex_quant.cli.convert import convert, convert_mlx
from apex_quant.cli.evaluate import evaluate, reference
from apex_quant.cli.export import export
from apex_quant.cli.fit import fit
from apex_quant.cli.imatrix import imatrix_app
from apex_quant.cli.kv import kv
from apex_quant.cli.measure import measure
from apex_quant.cli.optimize import frontier, optimize
from apex_quant.cli.options import Force, Json, Threads
from apex_quant.cli.pipeline import run, status
from apex_quant.cli.publish import publish
from apex_quant.cli.report import card, report, which
from apex_quant.cli.results import compare, results
from apex_quant.cli.serve import serve
from apex_quant.errors import InputError, UsageError
from apex_quant.sizes import parse_size as parse_size

app = typer.Typer(
    name="apex",
    help="Fit Mixture-of-Experts models into small memory: GGUF files for stock llama.cpp, every byte accounted for.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="--debug with any command shows tracebacks and the library's log.",
)
app.command()(convert)
app.command("convert-mlx")(convert_mlx)
app.command()(calibrate)
app.command()(measure)
app.command("eval")(evaluate)
app.command()(reference)
app.command()(compare)
app.command()(results)
app.command()(report)
app.command()(card)
app.command()(which)
app.command("fit")(fit)
app.command()(kv)
app.command("serve")(serve)
app.command("export")(export)
app.command("chat")(chat)
app.command()(optimize)
app.command()(frontier)
app.command()(publish)
app.command()(run)
app.command()(status)
app.add_typer(imatrix_app, name="imatrix")

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="a GGUF file, or any shard of one")]
TierNames = Annotated[
    list[str] | None,
    typer.Option("--tier", metavar="TIER", help="tier, llama.cpp mix or .toml file; repeat, or separate by commas; "
                 "'all' for the nine published tiers"),
]  # fmt: skip
Imatrix = Annotated[Path | None, typer.Option("--imatrix", help="importance matrix, GGUF or .dat")]
Fill = Annotated[
    str,
    typer.Option("--fill", metavar="RULE", help="'prior' shrinks the importance of thinly covered experts towards "
                 "their tensor's mean, 'none' takes the matrix as it is"),
]  # fmt: skip
Recipe = Annotated[Path | None, typer.Option("--recipe", help="tensor-type file or JSON recipe; wins over the tier")]
Like = Annotated[Path | None, typer.Option("--like", help="take the types of this GGUF")]
Override = Annotated[
    list[str] | None,
    typer.Option("--override", metavar="REGEX=TYPE", help="type for matching tensors; first match wins"),
]
Cell = Annotated[
    list[str] | None, typer.Option("--cell", metavar="COLUMN.ZONE=TYPE", help="change one cell: routed.middle=IQ3_S")
]
Published = Annotated[
    bool, typer.Option("--published", help="exactly what the published tier files do, their holes included")
]
OutputType = Annotated[str | None, typer.Option("--output-tensor-type", metavar="TYPE", help="type of output.weight")]
EmbeddingType = Annotated[str | None, typer.Option("--token-embedding-type", metavar="TYPE", help="type of token_embd")]
LeaveOutput = Annotated[bool, typer.Option("--leave-output-tensor", help="keep output.weight as it is")]
Pure = Annotated[bool, typer.Option("--pure", help="no mix rules: the base type for all that is not named")]
OverrideKv = Annotated[
    list[str] | None,
    typer.Option("--override-kv", metavar="KEY=TYPE:VALUE", help="set a key; TYPE is int, float, bool or str"),
]
Prune = Annotated[str | None, typer.Option("--prune-layers", metavar="L0,L1,...", help="leave out these layers")]
SplitSize = Annotated[str | None, typer.Option("--split-max-size", metavar="SIZE", help="shards of at most this, 48G")]
KeepSplit = Annotated[bool, typer.Option("--keep-split", help="as many shards as the source")]
Requantize = Annotated[bool, typer.Option("--allow-requantize", help="also from tensors that are already quantized")]


def _options(
    recipe: Path | None,
    like: Path | None,
    override: list[str] | None,
    cell: list[str] | None,
    published: bool,
    output_tensor_type: str | None,
    token_embedding_type: str | None,
    leave_output_tensor: bool,
    pure: bool,
    override_kv: list[str] | None,
    prune_layers: str | None,
    split_max_size: str | None,
    keep_split: bool,
    allow_requantize: bool,
    fill: str,
) -> Any:
    from apex_quant.recipe.planned import PlanOptions

    try:
        pruned = [int(word) for word in prune_layers.split(",")] if prune_layers else []
    except ValueError:
        raise UsageError(f"--prune-layers {prune_layers!r} is not a list of layer numbers such as 10,11") from None
    return PlanOptions(
        recipe=recipe,
        like=like,
        override=override or (),
        cell=cell or (),
        published=published,
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        leave_output_tensor=leave_output_tensor,
        pure=pure,
        override_kv=override_kv or (),
        prune_layers=pruned,
        split_max_size=parse_size(split_max_size) if split_max_size else None,
        keep_split=keep_split,
        allow_requantize=allow_requantize,
        fill=fill,
    )


def _version(wanted: bool) -> None:
    if wanted:
        from apex_quant import __version__

        print(f"apex {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and exit")
    ] = False,
) -> None:
    pass


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="where the files go")] = Path("quickstart"),
    as_json: Json = False,
) -> None:
    """See it work: inspect, plan, calibrate, quantize, verify and evaluate the model in the package."""
    from apex_quant.cli.quickstart import quickstart as run

    document = run(folder, console_for(as_json))
    if as_json:
        print_json(document)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, processor, memory, disk; what is missing and how to get it."""
    from apex_quant.cli.show import show_diagnosis
    from apex_quant.doctor import doctor as run

    found = run()
    if as_json:
        print_json(found.to_json())
    else:
        show_diagnosis(console_for(False), found)


@app.command()
def tiers(as_json: Json = False) -> None:
    """The tiers and their types."""
    from apex_quant.cli.show import show_tiers
    from apex_quant.recipe.tiers import published_tiers

    if as_json:
        rows = [
            {"needs_imatrix": tier.importance == "required", **tier.model_dump(exclude_none=True)}
            for tier in published_tiers()
        ]
        print_json({"tiers": rows})
    else:
        show_tiers(console_for(False), published_tiers())


@app.command()
def inspect(
    model: Model,
    tensors: Annotated[bool, typer.Option("--tensors", help="list every tensor")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="moments and kurtosis by role; reads all weights")] = False,
    as_json: Json = False,
) -> None:
    """What a GGUF holds: architecture, parameters, experts, roles, types, metadata."""
    from apex_quant.cli.progress import JobBar
    from apex_quant.cli.show import show_inspection
    from apex_quant.encode.job import JobProgress
    from apex_quant.gguf import open_model
    from apex_quant.model.inspect import inspect as run

    with open_model(model) as opened, JobBar(f"reading {model.name}", quiet=as_json) as bar:
        total = sum(info.nbytes for info in opened.tensors.values())
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            bar(JobProgress("statistics", done, total, done, total, ""))

        report = run(opened, tensors=tensors, statistics=stats, progress=progress)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        show_inspection(console_for(False), report)


@app.command()
def plan(
    model: Model,
    tier: TierNames = None,
    fit: Annotated[str | None, typer.Option("--fit", metavar="SIZE", help="which tiers fit: 16GiB")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="write the recipe (.json, or a tensor-type file)")
    ] = None,
    imatrix: Imatrix = None,
    fill: Fill = "prior",
    recipe: Recipe = None,
    like: Like = None,
    override: Override = None,
    cell: Cell = None,
    published: Published = False,
    output_tensor_type: OutputType = None,
    token_embedding_type: EmbeddingType = None,
    leave_output_tensor: LeaveOutput = False,
    pure: Pure = False,
    override_kv: OverrideKv = None,
    prune_layers: Prune = None,
    split_max_size: SplitSize = None,
    keep_split: KeepSplit = False,
    allow_requantize: Requantize = False,
    as_json: Json = False,
) -> None:
    """Types, sizes to the byte and every fallback of a tier, before anything is encoded."""
    from apex_quant.cli.show import show_fit, show_plan
    from apex_quant.encode.quantize import expand_tiers
    from apex_quant.gguf import open_model
    from apex_quant.recipe.plan import plan as run

    options = _options(
        recipe, like, override, cell, published, output_tensor_type, token_embedding_type, leave_output_tensor,
        pure, override_kv, prune_layers, split_max_size, keep_split, allow_requantize,
        fill,
    )  # fmt: skip
    limit = parse_size(fit) if fit else None
    names = expand_tiers(tier or ("all" if limit is not None else None))
    with open_model(model) as opened:
        plans = [run(opened, name, imatrix=imatrix, options=options) for name in names]
    if out is not None:
        if len(plans) != 1:
            raise UsageError("-o writes one recipe: name one --tier")
        _write_recipe(out, plans[0].recipe)
    if as_json:
        documents = [one.to_json() for one in plans]
        if limit is not None:
            rows = [
                {k: d[k] for k in ("tier", "total_bytes", "bpw")} | {"fits": d["total_bytes"] <= limit}
                for d in documents
            ]
            print_json({"model": documents[0]["model"], "limit": limit, "plans": rows})
        else:
            print_json(documents[0] if len(documents) == 1 else {"plans": documents})
        return
    console = console_for(False)
    if limit is not None:
        show_fit(console, plans, limit)
        return
    for one in plans:
        show_plan(console, one)
    if out is not None:
        console.print(f"recipe written to {safe(str(out))}")


def _write_recipe(path: Path, recipe: Any) -> None:
    text = json.dumps(recipe.to_json(), indent=2) + "\n" if path.suffix == ".json" else recipe.text()
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None


@app.command()
def quantize(
    model: Model,
    tier: TierNames = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="file name, or folder (default: this one)")] = None,
    imatrix: Imatrix = None,
    fill: Fill = "prior",
    recipe: Recipe = None,
    like: Like = None,
    override: Override = None,
    cell: Cell = None,
    published: Published = False,
    output_tensor_type: OutputType = None,
    token_embedding_type: EmbeddingType = None,
    leave_output_tensor: LeaveOutput = False,
    pure: Pure = False,
    override_kv: OverrideKv = None,
    prune_layers: Prune = None,
    split_max_size: SplitSize = None,
    keep_split: KeepSplit = False,
    allow_requantize: Requantize = False,
    threads: Threads = None,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="plan and check only")] = False,
    measured: Annotated[
        bool, typer.Option("--measured", help="not the tier itself, but the measured allocation of its size")
    ] = False,
    sensitivity: Annotated[
        Path | None, typer.Option("--sensitivity", metavar="FILE", help="of apex measure, for --measured")
    ] = None,
    work: Annotated[
        Path | None, typer.Option("--work", metavar="DIR", help="keep what --measured encoded and measured here")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make every requested file in one pass over the model. Interrupted, the same command goes on."""
    from apex_quant.cli.optimize import quantize_measured
    from apex_quant.cli.progress import JobBar
    from apex_quant.cli.show import show_outputs, show_plan
    from apex_quant.encode.quantize import quantize as run

    options = _options(
        recipe, like, override, cell, published, output_tensor_type, token_embedding_type, leave_output_tensor,
        pure, override_kv, prune_layers, split_max_size, keep_split, allow_requantize,
        fill,
    )  # fmt: skip
    if measured:
        quantize_measured(model, tier, imatrix, sensitivity, work, out, options, threads, force, dry_run, as_json)
        return
    if sensitivity is not None or work is not None:
        raise UsageError("--sensitivity and --work are for --measured: a tier does not read them")
    with JobBar(f"quantizing {model.name}") as bar:
        result = run(
            model,
            tier,
            imatrix=imatrix,
            out=out,
            threads=threads,
            force=force,
            dry_run=dry_run,
            options=options,
            progress=bar,
        )
    if as_json:
        document: dict[str, Any] = {"outputs": [output.to_json() for output in result.outputs]}
        if result.job is not None:
            document["job"] = {
                "seconds": round(result.seconds, 3),
                "bytes_read": result.job.bytes_read,
                "rows_encoded": result.job.rows_encoded,
            }
        if dry_run:
            document["plans"] = [one.to_json() for one in result.plans]
        print_json(document)
        return
    console = console_for(False)
    if dry_run:
        for one in result.plans:
            show_plan(console, one)
    else:
        show_outputs(console, result)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a GGUF file, or any shard of one")],
    source: Annotated[
        Path | None, typer.Option("--source", help="the full-precision model: encode again and compare")
    ] = None,
    imatrix: Imatrix = None,
    everything: Annotated[bool, typer.Option("--all", help="encode every tensor again, not a sample")] = False,
    seed: Annotated[int, typer.Option("--seed", help="of the sample")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Structure, values, hashes; with the source, whether the bytes follow from it. Exit status 3 when not."""
    from apex_quant.cli.progress import JobBar
    from apex_quant.cli.show import show_verification
    from apex_quant.encode.verify import verify as run

    if source is None and (imatrix is not None or everything):
        raise UsageError("--imatrix and --all compare with the source: give --source too")
    with JobBar(f"verifying {file.name}", quiet=as_json) as bar:
        result = run(
            file, source=source, imatrix=imatrix, everything=everything, seed=seed, threads=threads, progress=bar
        )
    if as_json:
        print_json(result.to_json())
    else:
        show_verification(console_for(False), result)
    if not result.ok:
        failed = ", ".join(check.name for check in result.checks if check.ok is False)
        raise InputError(f"{file}: failed: {failed}")


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="a GGUF file, or any shard of one")],
    b: Annotated[Path, typer.Argument(metavar="B", help="the other one")],
    values: Annotated[bool, typer.Option("--values", help="relative error of every tensor that differs")] = False,
    headers_only: Annotated[bool, typer.Option("--headers-only", help="types and metadata, no data")] = False,
    as_json: Json = False,
) -> None:
    """Types, bytes, metadata and errors between two files of one model."""
    from apex_quant.cli.progress import JobBar
    from apex_quant.cli.show import show_difference
    from apex_quant.encode.diff import diff as run

    with JobBar("comparing", quiet=as_json) as bar:
        found = run(a, b, headers_only=headers_only, values=values, progress=bar)
    if as_json:
        print_json(found.to_json())
    else:
        show_difference(console_for(False), found)


@app.command()
def split(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="PREFIX of PREFIX-00001-of-0000N.gguf, or a folder")],
    max_size: Annotated[str, typer.Option("--split-max-size", metavar="SIZE", help="48G")],
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Cut a GGUF into shards as llama-gguf-split does."""
    from apex_quant.gguf import split as run

    limit = parse_size(max_size)
    with _bytes_bar("splitting", as_json) as progress:
        paths = run(model, out, limit, progress, force=force)
    _show_paths(paths, as_json)


@app.command()
def merge(
    model: Annotated[Path, typer.Argument(metavar="SHARD", help="any shard")],
    out: Annotated[Path, typer.Option("-o", "--out", help="the single file")],
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make one GGUF of shards."""
    from apex_quant.gguf import merge as run

    with _bytes_bar("merging", as_json) as progress:
        path = run(model, out, progress, force=force)
    _show_paths([path], as_json)


class _bytes_bar:
    """A JobBar for functions that report (bytes done, bytes in all)."""

    def __init__(self, what: str, quiet: bool) -> None:
        from apex_quant.cli.progress import JobBar

        self._bar = JobBar(what, quiet=quiet)

    def __enter__(self) -> Any:
        from apex_quant.encode.job import JobProgress

        bar = self._bar.__enter__()
        return lambda done, total: bar(JobProgress("copy", done, total, done, total, ""))

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)


def _show_paths(paths: list[Path], as_json: bool) -> None:
    rows = [{"path": str(path), "bytes": path.stat().st_size} for path in paths]
    if as_json:
        print_json({"outputs": rows})
    else:
        for row in rows:
            print(one_line(f"{row['path']}  {row['bytes']} bytes"))
