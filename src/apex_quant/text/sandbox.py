"""The process in which chat templates run: jinja2's sandbox inside limits that the kernel enforces.

A chat template is a program by an unknown author. The sandbox keeps it from the interpreter's insides, but not from
looping for ever or from building a string of a terabyte, and no check inside the interpreter can stop one long
operation. Here a CPU timer and an address space limit do. This file is run as a script and imports nothing of ours.
What templates see is what transformers gives them (apply_chat_template), except that the date stands still.

On standard input one JSON line with the template, its common variables and the seconds of CPU time for each text, then
one for each conversation; on standard output a line each: {"text"}, or {"error", "message"} with error one of syntax,
security, limit, raised.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from datetime import datetime
from typing import IO, Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.parser import Parser
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import Namespace

TODAY = datetime(2025, 1, 1)  # for every run, so that results can be repeated
MEMORY = 256 << 20  # beyond what the process has once it is ready
OUTPUT = 1 << 20  # characters, beyond four times those of the conversation


class OutputLimit(Exception):
    """The text grew past its limit."""


class Generation(jinja2.ext.Extension):
    """{% generation %}: marks what the assistant says, for training; here it only renders what it encloses."""

    tags = {"generation"}  # noqa: RUF012 as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> Any:
        return caller()


class SafeNamespace(Namespace):
    """namespace() without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, attributes = args[0], dict(*args[1:], **kwargs)
        for name in attributes:
            SafeNamespace._check(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        SafeNamespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"access to attribute {name!r} of a namespace is unsafe")


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes HTML, which no model was trained on."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(form: str) -> str:
    return TODAY.strftime(form)


class SafeDict:
    """dict() without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class Sandbox(SandboxedEnvironment):
    """What transformers compiles chat templates in, except that lists may be appended to: Kimi K2's template does.

    What a template could change is its own copy of one conversation.
    """

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Reaching for the insides is an error at once, not only when something is done with what came back."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")


def environment() -> Sandbox:
    """The sandbox with the functions and filters that templates expect."""
    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": SafeDict(),
        "namespace": SafeNamespace,
    }
    del env.globals["lipsum"], env.filters["random"]  # nothing by chance
    return env


def limit_memory() -> None:
    """Address space, and no files written whatever happens. Where the kernel has no such limit (macOS), none."""
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm") as statm:  # noqa: PTH123 before anything else is imported
            pages = int(statm.read().split()[0])
        room = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
    for what in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(what, (0, 0))


def failure(error: BaseException) -> dict[str, str]:
    """What to answer instead of a text."""
    kinds: tuple[tuple[type[BaseException], str, str], ...] = (
        (TemplateSyntaxError, "syntax", f"line {getattr(error, 'lineno', 0)}: "),
        (SecurityError, "security", ""),
        (MemoryError, "limit", f"more than {MEMORY >> 20} MiB of memory"),
        (OutputLimit, "limit", ""),
        (OverflowError, "limit", ""),  # of range()
        (RecursionError, "limit", ""),
    )
    kind, before = next(((kind, text) for cls, kind, text in kinds if isinstance(error, cls)), ("raised", ""))
    return {"error": kind, "message": (before + str(error))[:500] or type(error).__name__}


def render(template: jinja2.Template, variables: dict[str, Any], most: int) -> dict[str, str]:
    """The text of one conversation, given up as soon as it is longer than `most` characters."""
    parts: list[str] = []
    size = 0
    for part in template.generate(**variables):
        size += len(part)
        if size > most:
            raise OutputLimit(f"more than {most} characters of output")
        parts.append(part)
    return {"text": "".join(parts)}


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer line by line until the input ends."""
    template: jinja2.Template | None = None
    common: dict[str, Any] = {}
    seconds = 0.0
    for line in requests:
        request = json.loads(line)
        seconds = request.pop("seconds", seconds)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process, even inside one operation
        try:
            if template is None:
                common = request["variables"]
                template = environment().from_string(request["template"])
                answer = {"text": ""}
            else:
                answer = render(template, common | request, OUTPUT + 4 * len(line))
            written = json.dumps(answer).encode()
        except Exception as error:
            written = json.dumps(failure(error)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(written + b"\n")
        answers.flush()


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    limit_memory()
    answers.write(b'{"text": "ready"}\n')
    answers.flush()
    with open(os.devnull, "wb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
