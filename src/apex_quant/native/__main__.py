"""The child's side of worker.py: run one request from the socket at descriptor 0, answer on the given descriptor."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import threading
import traceback
from typing import Any

from apex_quant.errors import ApexError
from apex_quant.native.worker import ERRORS, FDS_AT_ONCE, Json, Stopped


def _receive(requests: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The request, and copies of the descriptors that came before it. EOFError when the parent is gone."""
    fds: list[int] = []
    line = b""
    while not line.endswith(b"\n"):
        data, received, _, _ = socket.recv_fds(requests, 1 << 16, FDS_AT_ONCE)
        if not data:
            raise EOFError
        fds += received
        if received:
            requests.send(b".")
        else:
            line += data
    return json.loads(line), fds


def _child(events_fd: int, module: str) -> int:
    """Import the module, run the one request, answer, return the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both; the parent decides
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    lock = threading.Lock()

    def emit(event: Json) -> None:
        data = (json.dumps(event) + "\n").encode()
        with lock:
            try:
                while data:
                    data = data[os.write(events_fd, data) :]
            except BrokenPipeError:
                stop.set()

    importlib.import_module(module)
    requests = socket.socket(fileno=0)
    try:
        request, fds = _receive(requests)
    except (EOFError, ConnectionResetError):
        return 0  # the parent had no work after all

    def watch_parent() -> None:
        try:
            while requests.recv(4096):
                pass
        except OSError:
            pass
        stop.set()

    threading.Thread(target=watch_parent, daemon=True).start()
    module, _, name = request["target"].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        emit({"event": "result", "result": function(request["payload"], emit, stop, fds)})
    except Stopped:
        return 130
    except ApexError as error:
        kind = next(c.__name__ for c in type(error).__mro__ if c.__name__ in ERRORS)
        emit({"event": "error", "type": kind, "message": error.message, "hint": error.hint})
    return 0


if __name__ == "__main__":
    # os._exit: a daemon thread may sit in native code (a grid being built) and must not hold the exit
    status = 1
    try:
        status = _child(int(sys.argv[1]), sys.argv[2])
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)
