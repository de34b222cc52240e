"""Other programs that run beside this one: their output line by line, and their certain end."""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from apex_quant.errors import ResourceError
from apex_quant.evaluation import guard

Log = Callable[[str, str], None]
"""Called with a program's name and a line of its output, from another thread."""

PAUSE: Final = 0.2
"""Seconds between two looks at a program; its end is known after that."""
_LINES: Final = 20
_ANSWER: Final = 5.0  # seconds for one answer
_LISTEN: Final = "0A"  # the state of a socket in /proc/net/tcp
_EXTRA = 5.0  # seconds beyond the guard's own patience


class Program:
    """A running program, `command`, called `name` in messages. It ends with the block, or with this process."""

    def __init__(self, name: str, command: Sequence[str], *, env: Mapping[str, str], log: Log | None = None) -> None:
        """Raises ResourceError when not even the guard can be started."""
        self.name, self._log = name, log
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._strangers: list[int] = []  # that were seen at its port
        try:
            self._guard = subprocess.Popen(
                [sys.executable, guard.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,  # also makes the \r of progress bars an end of line
                encoding="utf-8",
                errors="replace",
                env=dict(env),
                start_new_session=True,
            )
        except OSError as error:
            raise ResourceError(f"{name} cannot be started: {error.strerror}") from None
        assert self._guard.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._guard.stdout,), daemon=True)
        self._reader.start()

    def _read(self, output: IO[str]) -> None:
        for raw in output:
            line = raw.rstrip()
            if line:
                self._lines.append(line)
                if self._log is not None:
                    self._log(self.name, line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def status(self) -> int | None:
        """Exit status, None while it runs; 128 and a signal's number for one that was killed, or whose guard was."""
        return _status(self._guard.poll())

    def wait(self) -> int:
        """Its exit status, once it has ended and its output is read."""
        status = _status(self._guard.wait())
        self._reader.join(timeout=_EXTRA)
        assert status is not None
        return status

    def stop(self) -> None:
        """End it, if it still runs."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        try:
            self._guard.wait(timeout=guard.PATIENCE + _EXTRA)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        self._reader.join(timeout=_EXTRA)

    def answers(self, host: str, port: int, path: str) -> bool:
        """Whether it runs, nobody else is seen to listen at that port, and a GET of `path` there is answered by 200."""
        if self.status is not None:
            return False
        self._strangers = _strangers(self._guard.pid, port)
        if self._strangers:
            return False
        connection = http.client.HTTPConnection(host, port, timeout=_ANSWER)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == http.client.OK and self.status is None
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def until(
        self,
        ready: Callable[[], bool],
        model: str,
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        hint: str = "a smaller context needs less memory; the log has more",
    ) -> None:
        """Return when it is `ready` to serve `model`. Raises ResourceError when it ends before, with this `hint`, or
        after `deadline` seconds."""
        end = clock() + deadline
        while not ready():
            if self.status is not None:
                status = self.wait()
                raise ResourceError(
                    f"{self.name} ended with status {status} before it served {model}: {self.last()}",
                    hint=hint,
                )
            if clock() >= end:
                others = ", ".join(map(str, self._strangers))
                raise ResourceError(
                    f"{self.name} did not serve {model} within {deadline:g} s; its last line: {self.last()}",
                    hint=f"process {others}, which it did not start, listens at its port"
                    if others
                    else "a larger model needs a longer deadline",
                )
            time.sleep(PAUSE)

    def last(self) -> str:
        """Its last line, for messages."""
        return self._lines[-1] if self._lines else "nothing"


def _strangers(pid: int, port: int) -> list[int]:
    """Processes that listen at the port and are neither `pid` nor of its descent: somebody else may have taken it, and
    answer. None where the listener is not known: Linux alone tells, and only of processes that may be looked into."""
    rows: list[list[str]] = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            rows += [line.split() for line in Path(table).read_text().splitlines()[1:]]
    sockets = {f"socket:[{row[9]}]" for row in rows if row[3] == _LISTEN and int(row[1][-4:], 16) == port}
    listeners = [one for one in _processes() if _holds(one, sockets)] if sockets else []
    return [] if any(pid in _line(one) for one in listeners) else listeners


def _processes() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())


def _line(pid: int) -> Iterator[int]:
    """A process, its parent, and so on."""
    while pid > 1:
        yield pid
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return


def _holds(pid: int, sockets: Collection[str]) -> bool:
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(link.readlink()) in sockets:
                    return True
    return False


def _status(code: int | None) -> int | None:
    return code if code is None or code >= 0 else 128 - code


def clean_environment(*, drop: Sequence[str] = (), prefixes: Sequence[str] = (), **more: str) -> dict[str, str]:
    """This process's environment without some variables and with others."""
    kept = {key: value for key, value in os.environ.items() if key not in drop and not key.startswith(tuple(prefixes))}
    return {**kept, **more}


def said(command: Sequence[str], *, seconds: float = 30.0) -> str:
    """What a short command prints on both streams, such as `llama-server --help`; its options in the environment are
    left out. Raises ResourceError when it does not run or does not end."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False,
            stdin=subprocess.DEVNULL, env=clean_environment(prefixes=("LLAMA_ARG_",)),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(f"{command[0]}: does not run: {error}") from None
    return done.stdout + "\n" + done.stderr


def executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)
