"""Jobs for test_ray.py, run in worker processes of a Ray cluster."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apex_quant.errors import BusyError, InputError

Payload = dict[str, Any]
Emit = Callable[[Any], None]


def echo(payload: Payload, threads: int | None, emit: Emit) -> Payload:
    """What it was told, with two events before."""
    emit({"at": 1})
    emit({"at": 2})
    return {"value": payload["value"], "threads": threads, "pid": os.getpid()}


def die_once(payload: Payload, threads: int | None, emit: Emit) -> Payload:
    """The worker process is killed the first time."""
    flag = Path(payload["flag"])
    if not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"ok": True}


def always_dies(payload: Payload, threads: int | None, emit: Emit) -> Payload:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def busy_after_a_loss(payload: Payload, threads: int | None, emit: Emit) -> Payload:
    """Dies, then finds its own output held, then succeeds."""
    tries = Path(payload["tries"])
    count = len(tries.read_text()) if tries.exists() else 0
    tries.write_text("x" * (count + 1))
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if count == 1:
        raise BusyError("held")
    return {"tries": count + 1}


def fail(payload: Payload, threads: int | None, emit: Emit) -> Payload:
    raise {"input": InputError("bad bytes", hint="look"), "busy": BusyError("held"), "bug": ValueError("boom")}[
        payload["kind"]
    ]


def linger(payload: Payload, threads: int | None, emit: Emit) -> Payload:
    """Works until it is killed, and shows that it lives."""
    while True:
        Path(payload["alive"]).touch()
        emit({"alive": True})
        time.sleep(0.05)
