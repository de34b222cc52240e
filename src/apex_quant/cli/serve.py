"""`apex serve`: an OpenAI-compatible endpoint, until Ctrl-C."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apex_quant.cli import INTERRUPTED, one_line, safe
from apex_quant.cli.console import console_for, print_json
from apex_quant.cli.options import Json
from apex_quant.errors import ApexError

if TYPE_CHECKING:
    from apex_quant.serving.serve import ServePlan


class StoppedEarly(ApexError):
    """Ctrl-C or SIGTERM while the server starts: there is no finished work that the same command would go on from."""

    exit_code = INTERRUPTED


def serve(
    place: Annotated[
        str, typer.Argument(metavar="MODEL|TIER|DIR", help="a GGUF file, a folder of tiers, or a tier in --dir")
    ],
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="where a tier's file is looked for")] = Path(),
    ctx: Annotated[str, typer.Option("--ctx", metavar="N|auto", help="tokens of each request")] = "auto",
    kv: Annotated[
        str, typer.Option("--kv", metavar="TYPE|K/V|auto", help="of the cache; auto: f16 if it fits, else q8_0")
    ] = "auto",
    host: Annotated[str, typer.Option("--host", help="address; others than this machine's need a key")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one")] = 8080,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="one key a line, readable by you alone")
    ] = None,
    parallel: Annotated[int | None, typer.Option("--parallel", min=1, help="requests at a time (llama-server)")] = None,
    vram: Annotated[
        str | None, typer.Option("--vram", metavar="SIZE", help="of the device (default: what is free); 0: none")
    ] = None,
    ram: Annotated[str | None, typer.Option("--ram", metavar="SIZE", help="default: what is available")] = None,
    alias: Annotated[str | None, typer.Option("--alias", help="the model's name for clients")] = None,
    threads: Annotated[int | None, typer.Option("-j", "--threads", min=1, help="that compute")] = None,
    server: Annotated[
        Path | None, typer.Option("--server", metavar="PROGRAM", help="a llama-server (default: LLAMA_CPP_DIR, PATH)")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="the server's own log on stderr")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Serve a model with what fits this machine, chosen and explained; Ctrl-C ends it."""
    from apex_quant.serving.serve import serve as run
    from apex_quant.sizes import parse_memory, parse_size

    def log(name: str, line: str) -> None:
        if verbose:
            print(one_line(line), file=sys.stderr, flush=True)

    def show(plan: ServePlan) -> None:
        console = console_for(as_json)
        for line in plan.reasons:
            console.print(f"  {safe(line)}")
        for line in plan.warnings:
            console.print(f"  [yellow]{safe(line)}[/]")

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)  # a service manager's way to say Ctrl-C
    started = False
    try:
        with run(
            place, folder=folder, ctx=ctx, kv=kv, host=host, port=port, api_key_file=api_key_file, parallel=parallel,
            vram=None if vram is None else parse_memory(vram),
            ram=None if ram is None else parse_size(ram),
            alias=alias, threads=threads, server=server, planned=show, log=log,
        ) as service:  # fmt: skip
            started, plan = True, service.plan
            if as_json:
                print_json({"url": service.url, "model": plan.alias, "key": api_key_file is not None,
                             "plan": plan.to_json()})  # fmt: skip
                sys.stdout.flush()
            else:
                key = "" if api_key_file is None else ", with a key"
                console_for(False).print(f"[bold]{safe(service.url)}[/]  model {safe(plan.alias)}{key}; Ctrl-C ends it")
            service.wait()
    except KeyboardInterrupt:
        if not started:
            raise StoppedEarly("stopped before it served") from None
        print("stopping", file=sys.stderr, flush=True)
    finally:
        signal.signal(signal.SIGTERM, previous)
