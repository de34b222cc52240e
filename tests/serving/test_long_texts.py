"""Texts that take more stack than threads have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apex_quant import embedded_model
from apex_quant.serving import long_texts
from apex_quant.serving.long_texts import tokenizing
from tests.helpers.cli import PACKAGE_ROOT

# whole words, spaces, signs and lines in one another
TOKENIZE = """
import sys
from apex_quant.native.bindings import bindings
from apex_quant.serving.long_texts import tokenizing
bindings()
from llama_cpp import Llama
llama = Llama(sys.argv[1], vocab_only=True, verbose=False)
for text in (b"a", b" ", b".", b"/\\n"):
    print(len(tokenizing(llama.tokenize)(text * (200_000 // len(text)), add_bos=False)) > 0)
"""


def test_long_runs(tmp_path: Path) -> None:
    """With the pre-tokenizer of Mistral's models, a regular expression."""
    data = embedded_model().read_bytes()
    key = b"tokenizer.ggml.pre"
    start = data.index(key) + len(key) + 4  # behind the value's type: its length and text
    assert data[start + 8 : start + 14] == b"qwen35"
    path = tmp_path / "model.gguf"
    path.write_bytes(data[: start + 8] + b"tekken" + data[start + 14 :])
    env = {**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)}
    done = subprocess.run([sys.executable, "-P", "-c", TOKENIZE, path], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["True"] * 4), done.stderr


def test_what_goes_wrong_is_the_texts_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokenize(text: bytes, add_bos: bool, special: bool = False) -> list[int]:
        if text == b"bad":
            raise KeyError("bad")
        return [len(text), add_bos, special]

    made = tokenizing(tokenize)
    assert made(b"abc", True, special=True) == [3, True, True]
    with pytest.raises(KeyError, match="bad"):
        made(b"bad", False)
    monkeypatch.setattr(long_texts, "MAX_BYTES", 5)
    with pytest.raises(ValueError, match="6 bytes is longer than 5"):
        made(b"abcdef", True)
    monkeypatch.setattr(long_texts, "_STACK_PER_BYTE", 1 << 50)
    with pytest.raises(ValueError, match="addresses"):
        made(b"abc", True)
    monkeypatch.undo()
    assert made(b"abcdef", True) == [6, True, False]
