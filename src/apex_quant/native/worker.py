"""One child process around native code: an abort in the library ends the child, never the caller.

The child is `python -P -m apex_quant.native` (__main__.py; -P: a numpy.py where the user works is none of its
business). Its standard input is a socket, on which it gets descriptors
and one JSON line (what to run); it answers with JSON lines on a pipe. Its own standard output and error carry only
what the library prints, of which the last lines are kept for the error message. The socket staying open means that
the parent lives: on end of file, SIGTERM or a parent's Ctrl-C the job is asked to stop at the next safe point.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from apex_quant.errors import ApexError, InputError, NativeError, ResourceError, UsageError

Json = dict[str, Any]
Emit = Callable[[Json], None]

FDS_AT_ONCE = 200  # Linux passes at most 253 descriptors in one message
_LOG_LINES = 20
_PATIENCE = 20.0  # seconds that a child has to reach its next safe point
ERRORS: dict[str, type[ApexError]] = {
    cls.__name__: cls for cls in (ApexError, UsageError, InputError, ResourceError, NativeError)
}


class Stopped(Exception):
    """Raised inside a child's job when it was asked to stop."""


class Child:
    """A child process, started early: it imports `module` while the caller still plans. One job, then it ends.

    `single_blas`: for a job that multiplies no matrices with NumPy.
    """

    def __init__(self, module: str, *, single_blas: bool = False) -> None:
        package_root = str(Path(__file__).resolve().parents[2])
        inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)  # an empty entry is the current folder
        env = dict(os.environ, PYTHONPATH=os.pathsep.join([package_root, *filter(None, inherited)]))
        # an abort's last line is then the failed assertion and not a debugger's; looking for one takes seconds
        env.setdefault("GGML_NO_BACKTRACE", "1")
        if single_blas:
            # NumPy's OpenBLAS starts a thread for each processor when it is imported, and they spin: 2 s of processor
            # time on 16 processors, at the very moment when the other threads have work
            env["OPENBLAS_NUM_THREADS"] = "1"
        self._events, events_write = os.pipe()
        self._requests, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "apex_quant.native", str(events_write), module],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(events_write,),
                env=env,
            )
        os.close(events_write)
        assert self._process.stderr is not None
        self._log: deque[str] = deque(maxlen=_LOG_LINES)
        self._logger = threading.Thread(target=self._keep_log, args=(self._process.stderr,), daemon=True)
        self._logger.start()
        self._used = False

    def _keep_log(self, stderr: IO[bytes]) -> None:
        for line in stderr:
            self._log.append(line.decode("utf-8", "replace").rstrip())

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        """End a child that was never used; a used one has ended."""
        self._requests.close()
        if not self._used:
            os.close(self._events)
            self._process.kill()
            self._process.wait()
        self._logger.join(timeout=1)
        if not self._logger.is_alive():  # else a process of the child's own still holds the pipe
            assert self._process.stderr is not None
            self._process.stderr.close()

    def run(self, target: str, payload: Json, on_event: Emit, *, step: str, pass_fds: Sequence[int] = ()) -> Json:
        """As `run_in_child`."""
        assert not self._used
        self._used = True
        child = self._process
        answer: Json | None = None
        try:
            with os.fdopen(self._events, "r", encoding="utf-8") as events:
                request = {"target": target, "payload": payload, "n_fds": len(pass_fds)}
                try:
                    for start in range(0, len(pass_fds), FDS_AT_ONCE):
                        socket.send_fds(self._requests, [b"."], list(pass_fds[start : start + FDS_AT_ONCE]))
                        self._requests.recv(1)  # one batch at a time: they must not run together
                    self._requests.sendall(json.dumps(request).encode() + b"\n")
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the child died at once; its exit status tells why
                try:
                    answer = _listen(events, on_event)
                except KeyboardInterrupt:
                    # what the child finishes on its way out is news too: it need not be done again
                    insist = threading.Timer(_PATIENCE, child.kill)
                    insist.start()
                    try:
                        child.terminate()
                        _listen(events, on_event)
                    finally:
                        insist.cancel()
                    raise
        except BaseException:
            _stop(child)
            raise
        self._requests.close()
        return self._result(answer, child.wait(), step)

    def _result(self, answer: Json | None, status: int, step: str) -> Json:
        """The child's result, or its error, or what is known of its death."""
        self._logger.join(timeout=5)
        if answer is not None and answer["event"] == "result":
            result: Json = answer["result"]
            return result
        if answer is not None:
            cls = ERRORS.get(answer["type"], ApexError)
            raise cls(answer["message"], hint=answer.get("hint"))
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        last = next((line for line in reversed(self._log) if line.strip()), "nothing")
        hint = "finished work is kept: the same command goes on from there. --debug prints the library's log"
        if status == -signal.SIGKILL:
            hint = "the system may have run out of memory: fewer threads (-j) need less. " + hint
        raise NativeError(
            f"the process that was {step} ended with {how}; the library's last line: {last}",
            log_tail="\n".join(self._log),
            hint=hint,
            signal=-status if status < 0 else None,
        )


def run_in_child(target: str, payload: Json, on_event: Emit, *, step: str, pass_fds: Sequence[int] = ()) -> Json:
    """Run `module:function` in a child process and return its result.

    The function is called as function(payload, emit, stop, fds): `emit` sends an event to `on_event` here, `stop` is
    a threading.Event, `fds` are the child's copies of the descriptors in `pass_fds`, in order. `step` names the work
    in errors. Raises the child's own ApexError, or NativeError when the process died; on KeyboardInterrupt the child
    is stopped at its next safe point, then the interrupt goes on.
    """
    with Child(target.partition(":")[0]) as child:
        return child.run(target, payload, on_event, step=step, pass_fds=pass_fds)


def _listen(events: Iterable[str], on_event: Emit) -> Json | None:
    """Hand the child's events on until it closes its end; returns its answer, or None when it gave none."""
    answer: Json | None = None
    for line in events:
        if not line.endswith("\n"):
            break  # torn: the child died while it wrote
        event = json.loads(line)
        if event["event"] in ("result", "error"):
            answer = event
        else:
            on_event(event)
    return answer


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ask the child to stop at a safe point, and insist when it does not."""
    child.terminate()
    try:
        child.wait(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
