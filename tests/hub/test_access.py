"""Errors of the library and below it, explained; how long is waited."""

from __future__ import annotations

import errno
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import pytest

from apex_quant.errors import InputError, ResourceError
from apex_quant.hub_access import LONGEST_WAIT, TRIES, explain, explained, library, pause, retried


class Answer(Exception):
    """As HTTP errors of the library are: with the response."""

    def __init__(self, status: int, **headers: str) -> None:
        super().__init__(f"{status} error")
        self.response = SimpleNamespace(
            status_code=status, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )


def test_what_passes() -> None:
    errors: list[Exception] = [
        Answer(408),
        Answer(429),
        Answer(500),
        Answer(599),
        ConnectionResetError(),
        TimeoutError(),
    ]
    for error in errors:
        assert pause(error, 0) == 2.0
        assert pause(error, 3) == 16.0
        assert pause(error, TRIES - 1) is None
    errors = [Answer(400), Answer(401), Answer(404), ValueError(), OSError(errno.ENOSPC, "full"), KeyError()]
    for error in errors:
        assert pause(error, 0) is None


def test_wrapped_errors_pass_too() -> None:
    outer = RuntimeError("Error while uploading")
    outer.__cause__ = Answer(503)
    assert pause(outer, 0) == 2.0
    assert "in trouble: 503 error" in explain(outer, "x").message


def test_retry_after() -> None:
    assert pause(Answer(429, Retry_After="12"), 4) == 12.0
    assert pause(Answer(429, Retry_After=str(int(LONGEST_WAIT) + 1)), 0) is None
    soon = pause(Answer(503, Retry_After=format_datetime(datetime.now(UTC) + timedelta(seconds=60))), 0)
    assert soon is not None
    assert 50 < soon <= 60
    assert pause(Answer(503, Retry_After=format_datetime(datetime.now(UTC) - timedelta(days=1))), 0) == 0.0
    for odd in ("", "soon", "-5", "1e9", "²", "Mon, 01 Jan 99999999999 00:00:00 GMT"):
        assert pause(Answer(429, Retry_After=odd), 0) == 2.0


def test_retried() -> None:
    slept: list[float] = []
    said: list[str] = []
    left = [Answer(500), ConnectionResetError("reset by peer")]

    def call() -> str:
        if left:
            raise left.pop(0)
        return "done"

    assert retried(call, sleep=slept.append, say=said.append) == "done"
    assert slept == [2.0, 4.0]
    assert said == ["the hub answered 500; again in 2 s", "ConnectionResetError: reset by peer; again in 4 s"]
    left = [Answer(500) for _ in range(TRIES)]
    with pytest.raises(Answer):
        retried(call, sleep=slept.append)
    assert left == []


def test_explained() -> None:
    with pytest.raises(ResourceError, match="x: the disk is full"), explained("x"):
        raise OSError(errno.ENOSPC, "No space left")
    with pytest.raises(InputError, match="mine"), explained("x"):
        raise InputError("mine")
    with pytest.raises(ResourceError, match="x: cannot be loaded: ValueError: odd"), explained("x"):
        raise ValueError("\n\nodd\nmore")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ResourceError, match="needs huggingface_hub") as caught:
        library("hub:x")
    assert caught.value.hint == "pip install 'apex-quant[hub]'"
    assert isinstance(explain(ValueError("x"), "y"), ResourceError)
