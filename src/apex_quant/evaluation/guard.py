"""Runs another program and ends it when whoever started it is gone: `python guard.py COMMAND...`.

A program of somebody else does not notice that its starter died. This one holds the reading end of a pipe as standard
input, of which the starter holds the other end: end of file means stop, whatever the starter died of. The program and
what it started are a process group of their own, so that Ctrl-C in the terminal reaches the starter alone.
On Linux the program ends with this one too, should this one be killed.
No import of this package: it must start at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

PATIENCE = 10.0  # seconds to end after SIGTERM
_PR_SET_PDEATHSIG = 1


def stop_group(process: subprocess.Popen[bytes], patience: float = PATIENCE) -> None:
    """End a process group: SIGTERM, and SIGKILL for what is left after `patience` seconds."""
    for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, None)):
        # macOS says PermissionError of groups that have ended
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=wait)


def end_with_parent() -> None:
    """In a new child: SIGKILL when the thread that started it, here the main one, is gone. Linux alone has it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(command: list[str]) -> int:
    """Run `command`; its exit status, 127 when it cannot be started."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=end_with_parent
        )
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127

    def watch() -> None:
        while os.read(0, 4096):
            pass
        stop_group(process)

    threading.Thread(target=watch, daemon=True).start()
    status = process.wait()
    stop_group(process, 0.0)  # what it started and left behind
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
