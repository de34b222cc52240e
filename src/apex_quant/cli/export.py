"""`apex export`: configurations for other programs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from apex_quant.cli import safe
from apex_quant.cli.console import console_for, print_json
from apex_quant.cli.options import Json, tokens


def export(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="localai, ollama, lmstudio, llama-server or docker-compose")
    ],
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="a GGUF file, or any shard of one")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="where the files go")] = Path(),
    ctx: Annotated[
        int | None,
        typer.Option("--ctx", parser=tokens, metavar="N", help="tokens: 32k (default, or what it was trained on)"),
    ] = None,
    type_k: Annotated[str, typer.Option("--type-k", metavar="TYPE", help="of the cache")] = "f16",
    type_v: Annotated[str, typer.Option("--type-v", metavar="TYPE", help="of the cache")] = "f16",
    gpu_layers: Annotated[int | None, typer.Option("--gpu-layers", min=0, help="default: all")] = None,
    cpu_moe: Annotated[int, typer.Option("--n-cpu-moe", min=0, help="layers whose experts stay in RAM")] = 0,
    name: Annotated[str | None, typer.Option("--name", help="of the model there (default: the file's)")] = None,
    uri: Annotated[
        str | None,
        typer.Option("--uri", metavar="URL", help="where to download: https://huggingface.co/USER/REPO/resolve/main"),
    ] = None,
    publisher: Annotated[str, typer.Option("--publisher", help="for LM Studio")] = "local",
    force: Annotated[bool, typer.Option("--force", help="replace existing files")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Ready configurations with context, cache types, template, sampling defaults and sha256, checked."""
    from apex_quant.cli.progress import JobBar
    from apex_quant.cli.show import show_warnings
    from apex_quant.encode.job import JobProgress
    from apex_quant.serving.exports import export as run

    with JobBar(f"reading {model.name}", quiet=as_json or not sys.stderr.isatty()) as bar:
        made = run(
            target, model, out=out, ctx=ctx, type_k=type_k, type_v=type_v, gpu_layers=gpu_layers, cpu_moe=cpu_moe,
            name=name, uri=uri, publisher=publisher, force=force,
            progress=lambda done, total: bar(JobProgress("sha256", done, total, done, total, "")),
        )  # fmt: skip
    if as_json:
        print_json(made.to_json())
        return
    console = console_for(False)
    for path in made.paths:
        console.print(safe(str(path)))
    show_warnings(console, list(made.warnings))
