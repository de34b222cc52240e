"""Tokens of long texts, whatever they consist of.

Many pre-tokenizers of llama.cpp are regular expressions of the C++ library, which match by recursion: a run of letters,
spaces or signs takes up to 384 bytes of stack for each, so that a thread's usual 8 MiB end at some 20,000, and the
process with them. So each text gets a thread with a stack for its length.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

MAX_BYTES: Final = 4 << 20
"""Of a text: about a million tokens."""
_STACK: Final = 8 << 20  # bytes for whatever is no recursion
_STACK_PER_BYTE: Final = 1 << 10  # bytes; only what is used is ever taken from memory
_STARTING: Final = threading.Lock()  # the size of stacks is one for the whole process

Tokenize = Callable[..., list[int]]


def tokenizing(tokenize: Tokenize) -> Tokenize:
    """llama.tokenize for texts of any kind. Raises ValueError for one of more than MAX_BYTES."""

    def tokenized(text: bytes, *words: bool, **more: bool) -> list[int]:
        if len(text) > MAX_BYTES:
            raise ValueError(f"a text of {len(text):,} bytes is longer than {MAX_BYTES:,}")
        tokens: Future[list[int]] = Future()

        def work() -> None:
            try:
                tokens.set_result(tokenize(text, *words, **more))
            except BaseException as error:
                tokens.set_exception(error)

        _start(threading.Thread(target=work, daemon=True), _STACK + len(text) * _STACK_PER_BYTE)
        return tokens.result()

    return tokenized


def _start(thread: threading.Thread, stack: int) -> None:
    """Raises ValueError where so large a stack cannot be had."""
    with _STARTING:
        before = threading.stack_size(stack)
        try:
            thread.start()
        except RuntimeError:
            raise ValueError(
                f"a text this long needs {stack >> 20:,} MiB of addresses, which are not to be had"
            ) from None
        finally:
            threading.stack_size(before)
