"""`apex chat`: a conversation in the terminal, with one file or with two side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apex_quant.cli import one_line, safe
from apex_quant.cli.console import console_for, print_json
from apex_quant.cli.options import Json
from apex_quant.errors import ApexError, InputError, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from apex_quant.serving.chat import Conversation, Reply
    from apex_quant.serving.serve import ServePlan

_HELP = "/new begins anew, /quit (or Ctrl-D) ends"


def chat(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="a GGUF file, or any shard of one")],
    vs: Annotated[Path | None, typer.Option("--vs", metavar="FILE", help="another, beside it")] = None,
    message: Annotated[
        str | None, typer.Option("-m", "--message", metavar="TEXT", help="ask this once and end")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="the system message")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="of an answer")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the draws, for temperatures above 0")] = 0,
    ctx: Annotated[str, typer.Option("--ctx", metavar="N|auto", help="tokens")] = "auto",
    kv: Annotated[str, typer.Option("--kv", metavar="TYPE|K/V|auto", help="of the cache")] = "auto",
    threads: Annotated[int | None, typer.Option("-j", "--threads", min=1, help="that compute")] = None,
    server: Annotated[Path | None, typer.Option("--server", metavar="PROGRAM", help="a llama-server")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Talk to a model; with --vs to two, and see where their answers first part."""
    from apex_quant.serving.chat import chat as run

    if as_json and message is None:
        raise UsageError("--json goes with one question", hint="-m TEXT")
    if message is not None and not message.strip():
        raise UsageError("--message: there is nothing to ask")
    console = console_for(as_json)

    def loading(plan: ServePlan) -> None:
        print(one_line(f"loading {plan.model.name}"), file=sys.stderr, flush=True)

    with run(
        model, vs=vs, ctx=ctx, kv=kv, system=system, threads=threads, server=server, planned=loading
    ) as conversation:  # fmt: skip
        if message is not None:
            if as_json:
                reply = conversation.ask(message, max_tokens=max_tokens, temperature=temperature, seed=seed)
                names = [service.plan.model.name for service in conversation.services]
                print_json({"models": names, "message": message, **reply.to_json()})
            else:
                _turn(console, conversation, message, max_tokens, temperature, seed)
            return
        console.print(f"[dim]{' and '.join(safe(s.plan.alias) for s in conversation.services)}: {_HELP}[/]")
        typed = sys.stdin.isatty()  # a prompt is for somebody who types, and Ctrl-D leaves the cursor behind it
        while True:
            try:
                text = console.input("[bold]> [/]" if typed else "").strip()
                text.encode()  # in some locales bytes that are no text come as half characters
            except EOFError:
                if typed:
                    console.print()
                return
            except UnicodeError:
                raise InputError("what was typed is not UTF-8", hint="or the terminal's locale is another") from None
            if text in ("/quit", "/exit"):
                return
            if text == "/new":
                conversation.forget()
            elif text.startswith("/"):
                console.print(f"[dim]{_HELP}[/]")
            elif text:
                try:
                    _turn(console, conversation, text, max_tokens, temperature, seed)
                except ApexError as error:  # such as a question that is too long: the conversation goes on
                    console.print(f"[red]{safe(error.message)}[/]")
                    if any(service.program.status is not None for service in conversation.services):
                        raise


def _turn(
    console: Console, conversation: Conversation, text: str, max_tokens: int, temperature: float, seed: int
) -> None:
    """One question: the answers as they come, then where they part."""
    from rich.live import Live

    texts = ["" for _ in conversation.services]
    names = [service.plan.alias for service in conversation.services]
    if len(names) == 1:

        def put(_: int, piece: str) -> None:
            console.print(_clean(piece), end="", markup=False, highlight=False, soft_wrap=True)

        conversation.ask(text, max_tokens=max_tokens, temperature=temperature, seed=seed, on_text=put)
        console.print()
        return
    if not console.is_terminal:  # no columns in a file
        reply = conversation.ask(text, max_tokens=max_tokens, temperature=temperature, seed=seed)
        for name, answer in zip(names, reply.texts, strict=True):
            console.print(f"{one_line(name)}: {_clean(answer)}", markup=False, highlight=False, soft_wrap=True)
    else:
        with Live(_columns(names, texts), console=console, auto_refresh=False, vertical_overflow="visible") as live:

            def show(side: int, piece: str) -> None:
                texts[side] += piece
                live.update(_columns(names, texts), refresh=True)

            reply = conversation.ask(text, max_tokens=max_tokens, temperature=temperature, seed=seed, on_text=show)
            live.update(_columns(names, list(reply.texts), reply), refresh=True)
    if temperature > 0:
        console.print("[dim]drawn at random: where they part says little[/]")
    elif reply.divergence is None:
        console.print(f"[green]the same answer, {len(reply.texts[0])} characters[/]")
    else:
        console.print(f"[yellow]{safe(reply.divergence.sentence)}[/]")


def _columns(names: list[str], texts: list[str], reply: Reply | None = None) -> Table:
    """Side by side; what they have in common is dim once it is known."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, expand=True, padding=(0, 2, 0, 0), header_style="bold")
    for name in names:
        made.add_column(Text(one_line(name)), ratio=1, overflow="fold")
    cut = 0 if reply is None or reply.divergence is None else reply.divergence.characters
    cells = []
    for text in texts:
        cell = Text(_clean(text))
        if cut:
            cell.stylize("dim", 0, cut)
            cell.stylize("bold yellow", cut, min(cut + 1, len(text)))
        cells.append(cell)
    made.add_row(*cells)
    return made


def _clean(text: str) -> str:
    """What a model writes may hold control characters: line ends and tabs alone reach the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
