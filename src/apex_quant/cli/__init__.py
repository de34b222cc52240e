"""The `apex` command: every command is a thin skin over the function of the same name."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from apex_quant.errors import ApexError, NativeError

INTERRUPTED, TERMINATED = 130, 143


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 2 usage, 3 bad input, 4 missing resource, 5 internal, 130 Ctrl-C, 143
    SIGTERM."""
    _open_streams()
    terminated: list[int] = []
    with _terminating(terminated):
        _main(arguments, terminated)


def _main(arguments: list[str] | None, terminated: list[int]) -> NoReturn:
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        status = run([word for word in arguments if word != "--debug"])
        sys.stdout.flush()
    except BrokenPipeError:
        _abandon_output()  # the reader has gone (apex inspect ... | head): nothing to say to anybody
        status = 0
    except KeyboardInterrupt:
        what, status = ("terminated", TERMINATED) if terminated else ("interrupted", INTERRUPTED)
        _complain(what, "finished work is kept: the same command goes on from there")
    except ApexError as error:
        if debug:
            _explain(error.log_tail if isinstance(error, NativeError) else "")
        _complain(error.message, error.hint)
        status = error.exit_code
    except MemoryError:
        _complain("out of memory", "fewer threads (-j) need less")
        status = 4
    except OSError as error:
        if debug:
            _explain()
        _abandon_output()
        _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror), None)
        status = 4
    except Exception as error:
        if debug:
            _explain()
        _complain(f"internal failure: {type(error).__name__}: {error}", "--debug shows where; please report it")
        status = 5
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """The same without exiting; errors are raised, usage errors of the parser become UsageError."""
    import typer

    from apex_quant.errors import UsageError

    try:
        result = _command().main(args=arguments, prog_name="apex", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except SystemExit:
        # the parser's own answer to a broken pipe, after it has wrapped the streams
        raise BrokenPipeError from None
    except Exception as error:
        # the parser's errors, by what they can do: their base class differs between its versions
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message())
            return 2
        # newer parsers put the name of a Python exception before their words
        said = message().replace(": Value error, ", ": ")
        raise UsageError(said, hint="apex COMMAND --help shows the options") from None
    if result == INTERRUPTED:
        raise KeyboardInterrupt  # newer parsers return this instead of raising Abort
    return result if isinstance(result, int) else 0


@functools.cache
def _command() -> Any:
    """All commands with their options: 0.1 s to put together, so only once for a process that runs several."""
    from typer.main import get_command

    from apex_quant.cli.app import app

    return get_command(app)


@contextlib.contextmanager
def _terminating(seen: list[int]) -> Iterator[None]:
    """SIGTERM as Ctrl-C: children are stopped at a safe point, what is finished is recorded. `seen` gets its number."""

    def interrupt(number: int, frame: object) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: whose signals they are decides its program
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _open_streams() -> None:
    """A service may be started with closed streams: their numbers must not go to the files we write."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: PTH123, SIM115 -- None when it was closed
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: PTH123, SIM115


def _abandon_output() -> None:
    """What could not be written must not be tried again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(log: str = "") -> None:
    """The traceback and the library's log, printable like everything else."""
    for line in (traceback.format_exc() + log).splitlines():
        print(one_line(line), file=sys.stderr)


def _complain(message: str, hint: str | None) -> None:
    with contextlib.suppress(OSError):  # the exit status says it too
        print("error: " + one_line(message), file=sys.stderr)
        if hint:
            print("hint: " + one_line(hint), file=sys.stderr)


def one_line(text: str) -> str:
    """Names from hostile files may hold control characters: nothing but printable text reaches the terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" if ord(c) < 256 else "?" for c in text)


def safe(text: str) -> str:
    """Text from a file or a path for rich: printable, and no markup in it is obeyed."""
    from rich.markup import escape

    return escape(one_line(text))
