"""Which tokens a grammar allows, worked out by llama.cpp in a process of its own: `grammar_masks` starts it.

    python -m apex_quant.serving.grammar_child MODEL.gguf BYTES

It holds the model's vocabulary alone and may take BYTES of memory beyond that. Each line of its input is a JSON object:
`{"grammar": GBNF}` begins one, `{"tokens": [ID, ...]}` says what has been generated since the last line. The answer is
the byte 1, for tokens followed by a bit for each of the vocabulary, or 0 for a grammar that cannot be read. A grammar
on which the library aborts, or for which the memory does not suffice, ends this process and no other.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from apex_quant.native.bindings import bindings


class Vocabulary:
    """The tokens of a model, and the grammar that is being followed."""

    def __init__(self, path: str) -> None:
        self._lib = lib = bindings()
        params = lib.llama_model_default_params()
        params.vocab_only = True
        nothing = (ctypes.c_void_p * 1)(None)
        params.devices = ctypes.cast(nothing, ctypes.c_void_p)  # a GPU's memory is the server's
        model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise SystemExit(f"{path}: cannot be loaded")
        self._vocabulary = lib.llama_model_get_vocab(model)
        size = lib.llama_vocab_n_tokens(self._vocabulary)
        self._tokens = np.zeros(size, dtype=[("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        data = ctypes.cast(self._tokens.ctypes.data, ctypes.POINTER(lib.llama_token_data))
        self._array = lib.llama_token_data_array(data=data, size=size, selected=-1, sorted=False)
        self._sampler: Any = None

    def begin(self, grammar: str) -> bool:
        """Whether the library can read it."""
        if self._sampler:
            self._lib.llama_sampler_free(self._sampler)
        self._sampler = self._lib.llama_sampler_init_grammar(self._vocabulary, grammar.encode(), b"root")
        return bool(self._sampler)

    def allowed(self, generated: list[int]) -> npt.NDArray[np.bool_]:
        """The tokens that may follow these."""
        for token in generated:
            self._lib.llama_sampler_accept(self._sampler, token)
        self._tokens["id"] = np.arange(len(self._tokens))
        self._tokens["logit"] = 0
        self._lib.llama_sampler_apply(self._sampler, ctypes.byref(self._array))
        allowed: npt.NDArray[np.bool_] = self._tokens["logit"] == 0
        return allowed


def bound_memory(more: int) -> None:
    """No more than `more` bytes beyond what is mapped now, and no core file. On Linux alone: elsewhere the system does
    not say what is mapped, or does not keep the bound, and the deadline of whoever asks is the only one."""
    if sys.platform != "linux":
        return
    import resource

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, mapped + more))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _lines(found: SimpleQueue[bytes]) -> None:
    """Read requests in a thread, so that the end of whoever asks is noticed in the midst of an answer."""
    for line in sys.stdin.buffer:
        found.put(line)
    os._exit(0)


def main(path: str, memory: int) -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the library prints is no answer
    vocabulary = Vocabulary(path)
    lines: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_lines, args=(lines,), daemon=True).start()
    bound_memory(memory)
    answer = b"1"  # ready
    while True:
        answers.write(answer)
        answers.flush()
        request = json.loads(lines.get())
        if "grammar" in request:
            answer = b"1" if vocabulary.begin(request["grammar"]) else b"0"
        else:
            answer = b"1" + np.packbits(vocabulary.allowed(request["tokens"])).tobytes()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
