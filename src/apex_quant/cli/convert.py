"""`apex convert` and `apex convert-mlx`: their options, their progress and what they show."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from apex_quant.cli import one_line, safe
from apex_quant.cli.console import console_for, print_json
from apex_quant.cli.options import Force, Json
from apex_quant.cli.progress import Bar
from apex_quant.cli.publish import show_hub
from apex_quant.errors import UsageError

if TYPE_CHECKING:
    from apex_quant.convert import Conversion, ConvertProgress
    from apex_quant.hub import HubProgress
    from apex_quant.mlx import MlxConversion


Source = Annotated[
    str, typer.Argument(metavar="HF_DIR|HF_ID", help="a checkpoint directory, or a hub id such as Qwen/Qwen3.5-35B-A3B")
]
Python = Annotated[Path | None, typer.Option("--python", metavar="PATH", help="the Python that runs the converter")]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="branch, tag or commit of the hub repository")
]
Log = Annotated[bool, typer.Option("--log", help="show the converter's whole log on standard error")]


class ConvertBar(Bar):
    """Call it with each HubProgress and ConvertProgress."""

    def __call__(self, event: ConvertProgress | HubProgress) -> None:
        from apex_quant.hub import HubProgress

        if isinstance(event, HubProgress):
            show_hub(self, event)
        else:
            self.show(event.share, event.detail, what=f"{self.what} ({event.phase})")


def _say(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)


def convert(
    source: Annotated[
        str | None, typer.Argument(metavar="HF_DIR|HF_ID", help="a checkpoint directory, or a hub id")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="the GGUF to write (default: NAME-BF16.gguf here)")
    ] = None,
    outtype: Annotated[
        str, typer.Option("--outtype", metavar="TYPE", help="bf16, f16, f32, or auto: the weights' own 16-bit type")
    ] = "auto",
    mmproj: Annotated[bool, typer.Option("--mmproj", help="the vision or audio projector instead")] = False,
    no_nextn: Annotated[bool, typer.Option("--no-nextn", help="leave NextN/MTP blocks out")] = False,
    revision: Revision = None,
    name: Annotated[str | None, typer.Option("--name", help="the model's name in the metadata")] = None,
    pre: Annotated[
        str | None,
        typer.Option("--pre", metavar="RULE", help="splitting rule of a vocabulary that is not recognized: qwen35"),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that the checkpoint brings")
    ] = False,
    python: Python = None,
    setup: Annotated[
        bool, typer.Option("--setup", help="first make the environment that the converter needs, in the user's cache")
    ] = False,
    describe: Annotated[bool, typer.Option("--describe", help="only say what the checkpoint holds")] = False,
    log: Log = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """A Hugging Face checkpoint to GGUF, by llama.cpp's own converter."""
    from apex_quant.convert import convert as run
    from apex_quant.convert import describe as look
    from apex_quant.converter_python import set_up

    if source is None and (not setup or describe):
        raise UsageError("name a checkpoint directory or a hub id", hint="apex convert HF_DIR -o model-BF16.gguf")
    if describe and source is not None:
        if setup or revision is not None or not Path(source).exists():
            raise UsageError(
                "--describe looks at a directory that is there, and does nothing else",
                hint="download a hub id first: hf download ORG/NAME --local-dir DIR",
            )
        found = look(source)
        if as_json:
            print_json(found.to_json())
        else:
            _show_checkpoint(console_for(False), found.to_json())
        return
    if setup:
        made = set_up(say=_say)
        python = python or made.path
        if source is None:
            if as_json:
                print_json({"python": str(made.path), "versions": made.versions})
            return
    assert source is not None
    with ConvertBar(f"converting {Path(source).name}", quiet=log) as bar:
        done = run(
            source,
            out,
            outtype=outtype,
            mmproj=mmproj,
            nextn=not no_nextn,
            revision=revision,
            name=name,
            pre=pre,
            trust_remote_code=trust_remote_code,
            python=python,
            force=force,
            progress=bar,
            say=_say if log else None,
        )
    if as_json:
        print_json(done.to_json())
    else:
        _show_conversion(console_for(False), done)


def _show_conversion(console: Console, done: Conversion) -> None:
    from apex_quant.cli.show import human, show_warnings

    what = f"{done.architecture}, {done.tensors} tensors, {done.outtype}"
    console.print(f"{safe(str(done.path))}: {human(done.bytes)}, {safe(what)}, in {done.seconds:.1f} s")
    console.print(f"[dim]converter of {safe(done.converter)}[/]")
    show_warnings(console, done.warnings)


def _show_checkpoint(console: Console, facts: dict[str, object]) -> None:
    from apex_quant.cli.show import show_warnings

    for key, value in facts.items():
        if key not in ("warnings", "shards", "missing"):
            console.print(f"{key}: {safe(str(value))}")
    for key in ("missing", "warnings"):
        listed = facts[key]
        assert isinstance(listed, list)
        show_warnings(console, [f"{key}: {text}" if key == "missing" else text for text in listed])


def convert_mlx(
    source: Source,
    out: Annotated[Path, typer.Option("-o", "--out", help="the folder to write")],
    tier: Annotated[str, typer.Option("--tier", metavar="TIER", help="whose bits each layer gets")] = "quality",
    revision: Revision = None,
    predicate_only: Annotated[
        bool, typer.Option("--predicate-only", help="write the predicate, do not convert")
    ] = False,
    python: Annotated[Path | None, typer.Option("--python", metavar="PATH", help="the Python with mlx-lm")] = None,
    log: Log = False,
    as_json: Json = False,
) -> None:
    """A Hugging Face checkpoint to MLX, with a tier's bits in each layer."""
    from apex_quant.mlx import convert_mlx as run

    with ConvertBar(f"converting {Path(source).name}", quiet=log) as bar:

        def say(line: str) -> None:
            bar.stop()  # mlx-lm has bars of its own
            if log:
                _say(line)

        done = run(
            source,
            out,
            tier=tier,
            revision=revision,
            predicate_only=predicate_only,
            python=python,
            say=say,
            progress=bar,
        )
    if as_json:
        print_json(done.to_json())
    else:
        _show_mlx(console_for(False), done)


def _show_mlx(console: Console, done: MlxConversion) -> None:
    from apex_quant.cli.show import human, show_warnings

    console.print(f"{safe(str(done.predicate))}: bits of each layer as {safe(done.tier)} has them")
    if done.bytes:
        console.print(f"{safe(str(done.path))}: {human(done.bytes)}, in {done.seconds:.1f} s")
    show_warnings(console, done.warnings)
