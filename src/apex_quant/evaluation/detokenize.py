"""Token ids back to text without the library, by what a GGUF's header has of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from apex_quant.gguf import open_model

_GPT2_SPECIAL: Final = [*range(33, 127), *range(161, 173), *range(174, 256)]


def vocabulary(path: Path) -> Callable[[Sequence[int]], str] | None:
    """Token ids to text with the vocabulary of a GGUF's header; None where it has none. Raises InputError.

    Byte-level vocabularies (gpt2) write bytes as printable characters, the others (llama, t5) a space as U+2581 and
    single bytes as <0xNN>. Bytes that are no UTF-8 become replacement characters.
    """
    with open_model(path) as model:
        words = model.get("tokenizer.ggml.tokens")
        kind = model.get("tokenizer.ggml.model")
    if not isinstance(words, tuple):
        return None
    table = _gpt2_bytes() if kind == "gpt2" else None

    def piece(token: int) -> bytes:
        word = words[token] if 0 <= token < len(words) else f"[{token}]"
        if table is not None and all(letter in table for letter in word):
            return bytes(table[letter] for letter in word)
        if table is None and len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            try:
                return bytes([int(word[3:5], 16)])
            except ValueError:
                pass
        return (word if table is not None else word.replace("\u2581", " ")).encode("utf-8", "surrogateescape")

    return lambda tokens: b"".join(piece(token) for token in tokens).decode("utf-8", "replace")


def _gpt2_bytes() -> dict[str, int]:
    """The character that stands for each byte: itself where it is printable, else the next from U+0100 on."""
    others = [byte for byte in range(256) if byte not in _GPT2_SPECIAL]
    return {chr(byte): byte for byte in _GPT2_SPECIAL} | {chr(256 + k): byte for k, byte in enumerate(others)}
