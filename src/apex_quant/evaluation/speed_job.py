"""The child's job: prompts and generations of random tokens on one model, timed as llama-bench times them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from apex_quant.errors import InputError, NativeError
from apex_quant.evaluation.bandwidth import measure_bandwidth
from apex_quant.evaluation.busy import reading, share_of_others
from apex_quant.evaluation.speed import BATCH, Test
from apex_quant.native.bindings import bindings
from apex_quant.native.worker import Emit, Json, Stopped
from apex_quant.runtime.options import SessionOptions
from apex_quant.runtime.session import Session
from apex_quant.runtime.tensors import I32

# GNU OpenMP's own default, which bindings() would shorten: what is measured is what llama.cpp's tools have
os.environ.setdefault("GOMP_SPINCOUNT", "300000")
with contextlib.suppress(ImportError):  # early, while the parent still reads the model; Session says what is missing
    bindings()

_SMALLEST = {"ctx": 16, "sequences": 1, "unified": False, "embeddings": False, "decode_tokens": None}
_GPU_KINDS = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU, ..._IGPU


Decode = Callable[[I32], None]
"""The next tokens of the one sequence, of which the last gives logits."""


def direct(session: Session) -> Decode:
    """Decodes without Session.submit()'s checks and arrays: they take a quarter of a millisecond after each token,
    which for small models is a tenth of the time. Raises NativeError as they do."""
    lib, pointer = session._lib, ctypes.POINTER(ctypes.c_int32)

    def decode(tokens: I32) -> None:
        context = session._context  # another one after reopen()
        batch = lib.llama_batch_get_one(ctypes.cast(tokens.ctypes.data, pointer), len(tokens))
        status = lib.llama_decode(context, batch)
        lib.llama_synchronize(context)
        if status != 0:
            raise NativeError(f"{session.path.name}: decoding {len(tokens)} tokens failed with status {status}")

    return decode


class Runs:
    """The runs of one call. `clock` gives seconds."""

    def __init__(
        self,
        session: Session,
        decode: Decode,
        payload: Json,
        emit: Emit,
        stop: threading.Event,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if session.vocabulary is None or session.vocabulary.size < 1:
            raise InputError(f"{session.path}: the model has no vocabulary, so there are no tokens to measure with")
        self.session, self.vocabulary = session, session.vocabulary
        self.decode, self.emit, self.stop, self.clock = decode, emit, stop, clock
        self.tests = [Test(**test) for test in payload["tests"]]
        self.repetitions: int = payload["repetitions"]
        self.random = np.random.default_rng(payload["seed"])
        self.done = 0

    def run(self) -> list[list[float]]:
        """Seconds of each repetition, for each test. Raises Stopped when asked to stop."""
        self._tick(0)
        return [self._measure(test) for test in self.tests]

    def _measure(self, test: Test) -> list[float]:
        self.session.reopen(ctx=max(16, test.room), sequences=1, decode_tokens=BATCH)
        self.session.clear()
        self._decode(test.n if test.kind == "pp" else 1, BATCH)
        self._tick()
        seconds = []
        size = BATCH if test.kind == "pp" else 1
        for _ in range(self.repetitions):
            self.session.clear()
            self._decode(test.depth, BATCH)
            started = self.clock()
            self._decode(test.n, size)
            seconds.append(max(self.clock() - started, 1e-9))
            self._tick()
        return seconds

    def _decode(self, n: int, size: int) -> None:
        """`n` random tokens, `size` at a time. The first one is BOS in models that begin with it; what comes after
        another is drawn too, not sampled from its logits."""
        tokens: I32 = self.random.integers(0, self.vocabulary.size, n, dtype=np.int32)
        if n and self.vocabulary.add_bos:
            tokens[0] = self.vocabulary.bos
        for start in range(0, n, size):
            if self.stop.is_set():
                raise Stopped
            self.decode(tokens[start : start + size])

    def _tick(self, runs: int = 1) -> None:
        self.done += runs
        planned = len(self.tests) * (1 + self.repetitions)
        self.emit({"event": "progress", "what": "speed", "done": self.done, "planned": planned, "resumed": 0})


def devices() -> list[str]:
    """Descriptions of the graphics processors that the library found."""
    lib: Any = bindings()._lib  # libllama; its dependencies' names are found through it
    try:
        count, get, kind, describe = (
            getattr(lib, f"ggml_backend_dev_{name}") for name in ("count", "get", "type", "description")
        )
    except AttributeError:
        return []
    count.restype, count.argtypes = ctypes.c_size_t, []
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    kind.restype, kind.argtypes = ctypes.c_int, [ctypes.c_void_p]
    describe.restype, describe.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    found = [get(place) for place in range(count())]
    return [describe(one).decode("utf-8", "replace") for one in found if kind(one) in _GPU_KINDS]


def run(payload: Json, emit: Emit, stop: threading.Event, fds: Sequence[int]) -> Json:
    """Entry point of the child process; `payload` as speed.py makes it."""
    options = SessionOptions.model_validate({**payload["options"], **_SMALLEST})
    with Session(payload["model"], options) as session:
        threads = session.threads
        before = reading()
        seconds = Runs(session, direct(session), payload, emit, stop).run()
        after = reading()
    return {
        "seconds": seconds,
        "threads": threads,
        "devices": devices() if options.gpu_layers else [],
        "others": share_of_others(before, after),
        "processors": after.processors,
        "bandwidth": measure_bandwidth(threads) if payload["bandwidth"] else None,
    }
