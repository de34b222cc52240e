"""Generation held to a grammar, while the grammar itself is kept out of the process that serves everybody.

What a grammar costs in llama.cpp is not to be seen from its text: a few short rules can take time and memory without
end, and others end the process. So another process works out which tokens may come next (`grammar_child`), within a
deadline and a bound of memory, and is ended when it keeps neither.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from apex_quant.errors import ResourceError
from apex_quant.serving.grammars import GrammarError

SECONDS: Final = 10.0
"""For one answer: a grammar read, or the tokens after one more."""
MEMORY: Final = 1 << 30
"""Bytes for a grammar, beside the vocabulary."""
_START_SECONDS: Final = 120.0
_MODULE: Final = "apex_quant.serving.grammar_child"


class Masks:
    """What grammars allow of a model's vocabulary, one at a time. `seconds` and `memory` (bytes) bound each."""

    def __init__(
        self, model: str | os.PathLike[str], vocabulary: int, *, seconds: float = SECONDS, memory: int = MEMORY
    ) -> None:
        """`vocabulary`: tokens of `model`. Nothing is started before it is needed."""
        self._model, self._size = os.fspath(model), vocabulary
        self.seconds, self._memory = seconds, memory
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self, grammar: str) -> Mask:
        """Follow this one from its start. Raises GrammarError, ResourceError where there is no process for it."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._start()
        if self._ask({"grammar": grammar}, 1) != b"1":
            raise GrammarError("the grammar (of the request, or of its JSON schema) cannot be read")
        return Mask(self)

    def allowed(self, generated: list[int]) -> npt.NDArray[np.bool_]:
        """The tokens that may follow `generated`, since the last question. Raises GrammarError, also for none."""
        packed = self._ask({"tokens": generated}, 1 + (self._size + 7) // 8)[1:]
        mask = np.unpackbits(np.frombuffer(packed, np.uint8), count=self._size).astype(np.bool_)
        if not mask.any():
            raise GrammarError("the grammar allows nothing after what was generated, not even its end")
        return mask

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for end in (self._process.stdin, self._process.stdout):
                assert end is not None
                end.close()
            self._process = None

    def _start(self) -> None:
        # -P, and no backtraces: as every child of ours; the server has taken its key out of the environment
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE, self._model, str(self._memory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )  # fmt: skip
        if self._read(1, _START_SECONDS) is None:
            self.close()
            raise ResourceError("the process that follows grammars does not start")

    def _ask(self, request: dict[str, Any], size: int) -> bytes:
        """The answer, of `size` bytes or the one byte that says no."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            answer = self._read(size, self.seconds)
        except BrokenPipeError:
            answer = None
        if answer is None:
            ended = self._process.poll() is not None
            self.close()
            raise GrammarError(
                f"the grammar ends llama.cpp, or takes more than {self._memory >> 20:,} MiB"
                if ended
                else f"the grammar takes more than {self.seconds:g} s for one token"
            )
        return answer

    def _read(self, size: int, seconds: float) -> bytes | None:
        """None when the process ends or the time is over."""
        assert self._process is not None
        assert self._process.stdout is not None
        found, end = b"", time.monotonic() + seconds
        while len(found) < size and found != b"0":
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            if not part:
                if ready:
                    self._process.wait()  # its output ends with it
                return None
            found += part
        return found


class Mask:
    """A logits processor of the bindings. What goes wrong in it is kept in `error`, since they call it from the library
    and lose what it raises."""

    def __init__(self, masks: Masks) -> None:
        self._masks = masks
        self._seen: int | None = None
        self.error: Exception | None = None

    def __call__(self, tokens: npt.NDArray[np.intc], scores: npt.NDArray[np.single]) -> npt.NDArray[np.single]:
        """`tokens`: the prompt, which no grammar is about, and all that has been generated."""
        generated = [] if self._seen is None else [int(token) for token in tokens[self._seen :]]
        self._seen = len(tokens)
        try:
            return np.where(self._masks.allowed(generated), scores, np.single(-np.inf))
        except Exception as error:
            self.error = error
            return scores


def masked(generate: Callable[..., Iterator[int]], masks: Masks) -> Callable[..., Iterator[int]]:
    """llama.generate, whose grammar never reaches the library in this process. Raises GrammarError."""

    def generated(tokens: Any, *words: Any, grammar: Any = None, **more: Any) -> Iterator[int]:
        if grammar is None:
            yield from generate(tokens, *words, **more)
            return
        mask = masks.begin(grammar._grammar)
        # the last of them, where the library has its own
        more["logits_processor"] = [*(more.get("logits_processor") or []), mask]
        for token in generate(tokens, *words, **more):
            if mask.error is not None:
                raise mask.error
            yield token

    return generated


__all__ = ["MEMORY", "SECONDS", "Mask", "Masks", "masked"]
