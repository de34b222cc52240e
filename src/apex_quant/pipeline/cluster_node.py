"""What runs on a machine of the cluster: looks whether it is the right place, does one job, tells what happens.

`serve` is called by the task that cluster.py sends; it gives messages until the job's answer, which is the last.
"""

from __future__ import annotations

import os
import queue
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from apex_quant.errors import ApexError, ResourceError
from apex_quant.native import library_info
from apex_quant.native.worker import Json
from apex_quant.native.workers import error_to_json, find

MARK: Final = ".apex-shared-"
"""Begins the names of empty files by which a machine sees that a folder is the caller's, and not one of its own."""


def serve(request: Json) -> Iterator[Json]:
    """Messages of one job: {"kind": "event"} any number of times, then "result" or "error".

    `request`: target, payload, threads, events (whether anybody listens), reads, marks, library.
    """
    messages: queue.SimpleQueue[Json] = queue.SimpleQueue()

    def emit(event: Any) -> None:
        if request["events"]:
            messages.put({"kind": "event", "event": event})

    def work() -> None:
        try:
            check(request)
            result = find(request["target"])(request["payload"], request["threads"], emit)
            messages.put({"kind": "result", "result": result})
        except ApexError as error:
            messages.put({"kind": "error", **error_to_json(error)})
        except BaseException as error:
            told = {"type": "NativeError", "message": f"{type(error).__name__}: {error}", "hint": None}
            messages.put({"kind": "error", **told, "log": traceback.format_exc()})

    threading.Thread(target=work, daemon=True).start()
    while True:
        message = messages.get()
        yield message
        if message["kind"] != "event":
            return


def check(request: Json) -> None:
    """ResourceError when this machine has another library, other files, or folders of its own."""
    found = library_info()
    if found.problem or found.version != request["library"]:
        raise ResourceError(
            found.problem or f"the library is {found.version} here, not {request['library']}", hint=found.cure
        )
    for mark in map(Path, request["marks"]):
        if not mark.exists():
            raise ResourceError(f"{mark.parent}: not the same folder here", hint=_SHARED)
    for path, size, changed in request["reads"]:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # a network disk asks its server only when a file is opened
        except OSError as error:
            raise ResourceError(f"{path}: cannot be opened here: {error.strerror}", hint=_SHARED) from None
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        if (status.st_size, int(status.st_mtime)) != (size, changed):
            raise ResourceError(f"{path}: another file here, by its size or time", hint=_SHARED)


_SHARED = "all machines need the work folder and the source on one shared disk, under the same path"
