"""The corpus: reading it, holding documents out, training the vocabulary, packing token ids."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import IO, Literal, cast

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .config import DOMAINS, END_OF_TEXT, SPECIAL_TOKENS, TURN_END, TURN_START

Split = Literal["train", "heldout"]
Tokens = npt.NDArray[np.uint16]

# The split that llama.cpp makes for tokenizer.ggml.pre = "qwen35", character for character.
PRE_TOKENIZER_NAME = "qwen35"
PRE_TOKENIZER_REGEX = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_TURN = re.compile(r"^(System|User|Assistant|Question|Answer): ?", re.MULTILINE)
_ROLES = {
    "System": "system",
    "User": "user",
    "Assistant": "assistant",
    "Question": "user",
    "Answer": "assistant",
}


def _open_text(path: Path) -> IO[str]:
    """A compressed JSON-lines file as text; zstd needs the ``zstandard`` package."""
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    import zstandard

    stream = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True)
    return io.TextIOWrapper(cast("IO[bytes]", stream), encoding="utf-8")


def corpus_file(folder: Path, domain: str) -> Path:
    """The file of one domain, zstd or xz.

    Raises:
        FileNotFoundError: the folder holds neither.
    """
    for suffix in (".jsonl.zst", ".jsonl.xz"):
        path = folder / f"{domain}{suffix}"
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} holds no {domain}.jsonl.zst or .jsonl.xz")


def recompress(source: Path, target: Path, preset: int = 6) -> None:
    """Copy one domain file to xz, which Python reads without further packages."""
    with _open_text(source) as reader, lzma.open(target, "wt", preset=preset, encoding="utf-8") as writer:
        for line in reader:
            record = json.loads(line)
            writer.write(json.dumps({"text": record["text"]}, ensure_ascii=False) + "\n")


def split_of(text: str, heldout_percent: int = 1) -> Split:
    """Which side of the split a document is on; equal documents are on the same side."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") % 100
    return "heldout" if bucket < heldout_percent else "train"


def as_chat(text: str) -> str:
    """A transcript with ``User:``/``Assistant:`` or ``Question:``/``Answer:`` lines in ChatML.

    Every second transcript, chosen by hash, is rewritten; any other text is returned as it is.
    """
    first = _TURN.match(text)
    if first is None or hashlib.sha256(text.encode()).digest()[4] % 2:
        return text
    marks = list(_TURN.finditer(text))
    if len(marks) < 2 or not any(_ROLES[mark[1]] == "assistant" for mark in marks):
        return text
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return "".join(
        f"{TURN_START}{_ROLES[mark[1]]}\n{text[mark.end() : end].strip()}{TURN_END}\n"
        for mark, end in zip(marks, ends, strict=True)
    )


def documents(folder: Path, domain: str, split: Split) -> Iterator[str]:
    """The documents of one domain on one side of the split, dialogue partly in ChatML."""
    with _open_text(corpus_file(folder, domain)) as reader:
        for line in reader:
            text = json.loads(line)["text"]
            if split_of(text) == split:
                yield as_chat(text) if domain == "dialogue" else text


def _without_markers(text: str) -> str:
    for special in SPECIAL_TOKENS:
        text = text.replace(special, "\n")
    return text


def train_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE vocabulary on the training documents of all domains.

    The three special tokens have the lowest ids; nothing normalizes the text, as llama.cpp
    does not either.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=24,
        show_progress=False,
    )
    texts = (_without_markers(text) for domain in DOMAINS for text in documents(folder, domain, "train"))
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the corpus gave {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: Iterator[str]) -> Tokens:
    """All documents as one stream of ids, each one ended by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts: list[Tokens] = []
    batch: list[str] = []

    def flush() -> None:
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            parts.append(np.array([*encoding.ids, end], dtype=np.uint16))
        batch.clear()

    for text in texts:
        batch.append(text)
        if len(batch) == 512:
            flush()
    flush()
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)


def _pack_domain(job: tuple[Path, Path, Path, str]) -> dict[str, dict[str, int]]:
    folder, tokenizer_file, target, domain = job
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    counts: dict[str, dict[str, int]] = {}
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        stream = encode_documents(tokenizer, documents(folder, domain, split))
        stream.tofile(target / f"{domain}.{split}.u16")
        counts[split] = {"tokens": int(stream.size), "documents": int((stream == 0).sum())}
    return counts


def pack(folder: Path, tokenizer_file: Path, target: Path, processes: int = 2) -> dict[str, dict[str, dict[str, int]]]:
    """Tokenize the corpus into one ``DOMAIN.SPLIT.u16`` stream each, and count into ``pack.json``."""
    target.mkdir(parents=True, exist_ok=True)
    jobs = [(folder, tokenizer_file, target, domain) for domain in DOMAINS]
    with ProcessPoolExecutor(min(processes, len(jobs))) as pool:
        counts = dict(zip(DOMAINS, pool.map(_pack_domain, jobs), strict=True))
    (target / "pack.json").write_text(json.dumps(counts, indent=1) + "\n")
    return counts


def read_stream(packed: Path, domain: str, split: Split) -> Tokens:
    """One packed stream."""
    return np.fromfile(packed / f"{domain}.{split}.u16", dtype=np.uint16)


def token_byte_lengths(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """How many bytes of text each token stands for; special tokens stand for none."""
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if token in SPECIAL_TOKENS else len(token)
    return lengths
