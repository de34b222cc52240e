"""The child process around native code: whatever happens in it, the caller gets a result or one clear error."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apex_quant.errors import ApexError, InputError, NativeError, ResourceError, UsageError
from apex_quant.native import Child, run_in_child, worker

Event = dict[str, Any]

JOBS = """
import ctypes, os, signal, sys, time
from apex_quant.errors import BusyError, GGUFError, UsageError
from apex_quant.native.worker import Stopped

def echo(payload, emit, stop, fds):
    for event in payload["events"]:
        emit({"event": "news", "value": event})
    for fd in fds:
        os.write(fd, b"x")
    return {"answer": payload["value"]}

def fail(payload, emit, stop, fds):
    kind = {"usage": UsageError("no", hint="try"), "gguf": GGUFError("bad", "f.gguf", 7, "key"), "busy": BusyError("b")}
    raise kind[payload["kind"]]

def crash(payload, emit, stop, fds):
    raise ValueError("boom")

def abort(payload, emit, stop, fds):
    for number in range(payload["lines"]):
        print(f"line {number}", file=sys.stderr)
    sys.stderr.flush()
    os.abort()

def leave(payload, emit, stop, fds):
    os._exit(7)

def torn(payload, emit, stop, fds):
    os.write(int(sys.argv[1]), b'{"event": "re')
    os.kill(os.getpid(), signal.SIGKILL)

def until_stopped(payload, emit, stop, fds):
    emit({"event": "ready", "pid": os.getpid()})
    stop.wait()
    emit({"event": "last words"})
    raise Stopped

def stubborn(payload, emit, stop, fds):
    emit({"event": "ready", "pid": os.getpid()})
    while True:
        stop.wait(1)
        stop.clear()

def ggml_assertion(payload, emit, stop, fds):
    from apex_quant.gguf import TYPES
    from apex_quant.native import ggml
    floats = (ctypes.c_float * 256)()
    out = (ctypes.c_uint8 * 66)()
    ggml().quantize_chunk(TYPES["IQ2_XXS"].id, ctypes.addressof(floats), ctypes.addressof(out), 0, 1, 256, None)
"""


@pytest.fixture(autouse=True)
def _jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions for the child in a module it can import."""
    (tmp_path / "jobs.py").write_text(JOBS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def call(name: str, on_event: Callable[[Event], None] = lambda _: None, fds: list[int] | None = None, **payload: Any):  # type: ignore[no-untyped-def]
    return run_in_child(f"jobs:{name}", payload, on_event, step="testing", pass_fds=fds or [])


def ended(pid: int) -> bool:
    """Whether the process ends within 20 s (or has ended and been waited for)."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], 20)[0])
    finally:
        os.close(fd)


def test_result_and_events_in_order() -> None:
    seen: list[Event] = []
    big = "y" * (1 << 20)
    assert call("echo", seen.append, events=[1, big, None], value=big) == {"answer": big}
    assert [event["value"] for event in seen] == [1, big, None]


def test_many_descriptors() -> None:
    """More than one message of a socket can carry; each arrives as itself."""
    pipes = [os.pipe() for _ in range(worker.FDS_AT_ONCE * 2 + 5)]
    try:
        call("echo", fds=[write for _, write in pipes], events=[], value=0)
        assert all(os.read(read, 10) == b"x" for read, _ in pipes)
    finally:
        for pair in pipes:
            for fd in pair:
                os.close(fd)


@pytest.mark.parametrize(
    ("kind", "error", "message", "hint"),
    [
        ("usage", UsageError, "no", "try"),
        ("gguf", InputError, "f.gguf at byte 7 (key): bad", None),
        ("busy", ResourceError, "b", None),
    ],
)
def test_errors_cross_over(kind: str, error: type[ApexError], message: str, hint: str | None) -> None:
    with pytest.raises(error) as caught:
        call("fail", kind=kind)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_abort_names_step_signal_and_last_line() -> None:
    with pytest.raises(
        NativeError, match=r"testing ended with signal SIGABRT; the library's last line: line 29"
    ) as caught:
        call("abort", lines=30)
    assert caught.value.log_tail.splitlines() == [f"line {n}" for n in range(10, 30)]
    assert caught.value.signal == signal.SIGABRT
    assert caught.value.hint


def test_silent_abort() -> None:
    with pytest.raises(NativeError, match="last line: nothing"):
        call("abort", lines=0)


def test_assertion_in_the_library() -> None:
    """The real thing: ggml ends the process when IQ2_XXS is asked for without importance."""
    with pytest.raises(NativeError, match=r"SIGABRT; the library's last line: .*GGML_ASSERT\(.*\) failed$"):
        call("ggml_assertion")


def test_other_ends() -> None:
    with pytest.raises(NativeError, match="exit status 7"):
        call("leave")
    with pytest.raises(NativeError, match="last line: ValueError: boom") as caught:
        call("crash")
    assert "Traceback" in caught.value.log_tail
    with pytest.raises(NativeError, match="SIGKILL") as caught:
        call("torn")
    assert "memory" in str(caught.value.hint)
    with pytest.raises(NativeError, match="No module named 'nowhere'"):
        run_in_child("nowhere:f", {}, lambda _: None, step="testing")


def test_interrupt_lets_the_child_finish_what_it_has() -> None:
    seen: list[str] = []
    pids: list[int] = []

    def on_event(event: Event) -> None:
        seen.append(event["event"])
        if event["event"] == "ready":
            pids.append(event["pid"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call("until_stopped", on_event)
    assert seen == ["ready", "last words"]
    assert ended(pids[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_child_that_does_not_listen_is_killed(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_PATIENCE", 0.1)
    pids: list[int] = []

    def on_event(event: Event) -> None:
        pids.append(event["pid"])
        raise error

    with pytest.raises(error):
        call("stubborn", on_event)
    assert ended(pids[0])


def test_child_ends_when_the_parent_dies(tmp_path: Path) -> None:
    """Nobody tells the child: it sees its socket close."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:

        def on_event(event: Event) -> None:
            if "pid" in event:
                os.write(write, str(event["pid"]).encode())

        try:
            call("until_stopped", on_event)
        finally:
            os._exit(1)
    os.close(write)
    pid = int(os.read(read, 20))
    os.close(read)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert ended(pid)


def test_unused_child_ends() -> None:
    with Child("jobs") as child:
        pid = child._process.pid
    assert ended(pid)
    assert child._process.returncode is not None


def test_no_descriptor_is_left_open() -> None:
    call("echo", events=[], value=0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    call("echo", events=[], value=0)
    for name in ("crash", "leave"):
        with pytest.raises(NativeError):
            call(name)
    with Child("jobs"):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
