"""References for divergence: which forms there are, and .apexref, the small file of a model's own predictions.

A .apexref is: 8 bytes `APEXREF1`, u64 offset and u64 length of a JSON header, its sha256 (32 bytes), 8 zero bytes; then
sections, each with its sha256 in the header, which comes last, so that a file is written in one pass and a file
that is cut short has none. Sections: the tokens (i32), with --copy-output the output matrix, then for every chunk
`parts` of `rows` scored tokens:

    form "hidden"    final hidden states [rows, n_embd] in a type of rebuild.STATES, bf16, f16 or blocks of 8 bits;
                     logits are these times the output matrix
    form "logprobs"  zlib of: float32 step [rows], float32 smallest logit [rows], high bytes and low bytes of 16-bit
                     words [rows, vocabulary]; logit = step * word + smallest. For models whose logits are not a
                     product that can be redone
    both             then the nll as float32 [rows], experts as u8 or u16 [layers, rows, k], their weights as float16
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import ApexError, InputError
from apex_quant.evaluation.identity import sampled
from apex_quant.evaluation.rebuild import STATES, OutputMatrix, matrix_from_json
from apex_quant.evaluation.scores import F32, Blocks
from apex_quant.evaluation.steps import Step
from apex_quant.evaluation.stock_logits import MAGIC as STOCK_MAGIC
from apex_quant.evaluation.stock_logits import StockLogits
from apex_quant.evaluation.watch import Routing
from apex_quant.gguf import GGUFModel, open_model
from apex_quant.runtime.tensors import I32

MAGIC: Final = b"APEXREF1"
SCHEMA: Final = "apex.reference/1"
PREAMBLE: Final = struct.Struct("<8sQQ32s8x")
LOGIT_RANGE: Final = np.float32(24)  # of form "logprobs": what is further below the largest weighs nothing
PART_ROWS: Final = 32  # of form "logprobs"
_MAX_HEADER = 64 << 20
_MAX_TOKENS = 1 << 31
_BLOCK = 4 << 20

Section = tuple[int, int, str]  # offset, bytes, sha256


def describe(
    path: str | Path, source: str | Path | None, model: GGUFModel
) -> tuple[dict[str, Any], StockLogits | ApexReference | None]:
    """What kind of reference a file is: {"form": gguf, apexref or logits, "path", "name", ...}, and its reader when
    its text is in it. Raises InputError for other files, another vocabulary, or a source that does not fit."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    about: dict[str, Any] = {"path": str(path), "name": path.name}
    if magic[:4] == b"GGUF":
        with open_model(path) as other:
            check_vocabulary(model, vocabulary_size(other), path.name)
            return {**about, "form": "gguf", "path": str(other.path), "spec": sampled(other)}, None
    if magic == STOCK_MAGIC:
        stock = StockLogits(path)
        check_vocabulary(model, stock.vocabulary, path.name)
        size = {"bytes": path.stat().st_size, "chunks": len(stock.tokens), "ctx": stock.ctx}
        tokens = hashlib.sha256(stock.tokens.tobytes()).hexdigest()
        return {**about, **size, "form": "logits", "tokens_sha256": tokens}, stock
    if magic == MAGIC:
        stored = ApexReference(path)
        check_vocabulary(model, stored.vocabulary, path.name)
        header = stored.header
        whole = stored.find_source(source, Path(model.path).parent)
        about |= {"bytes": path.stat().st_size, "sha256": stored.sha256, "source": str(whole) if whole else None}
        known = {key: header["model"].get(key) for key in ("name", "sha256")}
        stated = {"model_sha256": known["sha256"], "model": known["name"], "error": header["error"]}
        return {**about, **stated, "form": "apexref", "kind": header["form"]}, stored
    raise InputError(
        f"{path}: is no reference: neither a GGUF model nor a .apexref nor a _logits_ file",
        hint="`apex reference MODEL-BF16.gguf -o REF.apexref` makes one",
    )


def vocabulary_size(model: GGUFModel) -> int:
    """Tokens of a model's vocabulary, as its file says; 0 where it does not."""
    value = model.metadata.get("tokenizer.ggml.tokens")
    return value.count if value is not None else 0


def check_vocabulary(model: GGUFModel, size: int, name: str) -> None:
    """Raises InputError, with both sizes, when the reference has another vocabulary."""
    ours = vocabulary_size(model)
    if ours and size and ours != size:
        raise InputError(
            f"{model.path.name} has a vocabulary of {ours} tokens, the reference {name} one of {size}: "
            "they are not two forms of one model"
        )


class ApexReference:
    """An open .apexref. `tokens` I32 [chunks, ctx]; `scored` tokens a chunk from position `first` on."""

    floor: float | None = None

    def __init__(self, path: str | Path) -> None:
        """Reads header and tokens. Raises InputError for a file that is broken or cut short."""
        self.path = Path(path)
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self.header, self.sha256 = self._read_header()
            try:
                self._read_facts()
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise InputError(f"{path}: its header lacks or mistakes {error}") from None
        except BaseException:
            self._file.close()
            raise
        self._matrix: OutputMatrix | None = None
        self._source: GGUFModel | None = None
        self._last: tuple[tuple[int, int], bytes] | None = None

    def close(self) -> None:
        self._file.close()
        if self._source is not None:
            self._source.close()

    def _read_header(self) -> tuple[dict[str, Any], str]:
        start = self._file.read(PREAMBLE.size)
        if len(start) < PREAMBLE.size or start[:8] != MAGIC:
            raise InputError(f"{self.path}: is no .apexref file, or is cut short")
        _, offset, size, digest = PREAMBLE.unpack(start)
        if size == 0 or size > _MAX_HEADER or offset + size > self._size:
            raise InputError(
                f"{self.path}: is cut short: its header should be at byte {offset}, it has {self._size}",
                hint="copy it again, or make it again with `apex reference`",
            )
        data = os.pread(self._file.fileno(), size, offset)
        if hashlib.sha256(data).digest() != digest:
            raise InputError(f"{self.path}: its header is damaged")
        try:
            header = json.loads(data)
            schema = str(header["schema"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{self.path}: its header is no JSON document of {SCHEMA}") from None
        if schema != SCHEMA:
            raise InputError(
                f"{self.path}: schema {schema[:40]}, known is {SCHEMA}", hint="update apex-quant to read it"
            )
        return header, digest.hex()

    def _read_facts(self) -> None:
        header = self.header
        self.vocabulary, self.n_embd = _whole(header["vocabulary"]), _whole(header["n_embd"])
        self.ctx, self.first = _whole(header["ctx"]), _whole(header["first"])
        self.bos: int | None = None if header["bos"] is None else int(header["bos"])
        self.scored, self.rows = self.ctx - 1 - self.first, _whole(header["rows"])
        self.chunks = sum(_whole(text["chunks"]) for text in header["texts"])
        self.domains = tuple(str(text["name"]) for text in header["texts"])
        counts = [text["chunks"] for text in header["texts"]]
        self.domain = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
        if header["form"] not in ("hidden", "logprobs") or self.scored < 1 or self.chunks * self.ctx > _MAX_TOKENS:
            raise ValueError("form, context or chunks")
        if header["form"] == "hidden":
            STATES[header["dtype"]].row_bytes(self.n_embd)
        parts = header["parts"]
        if len(parts) != self.chunks or any(len(row) != -(-self.scored // self.rows) for row in parts):
            raise ValueError("parts")
        raw = self._section(header["tokens"])
        self.tokens: I32 = np.frombuffer(raw, "<i4").reshape(self.chunks, self.ctx).astype(np.int32)
        if self.tokens.min() < 0 or self.tokens.max() >= self.vocabulary:
            raise ValueError("tokens")
        self.routers: dict[str, Any] | None = header["routers"]

    def _section(self, section: Any) -> bytes:
        """The bytes of a section, as they were written. Raises InputError."""
        offset, size, digest = section
        if not (isinstance(offset, int) and isinstance(size, int) and 0 <= offset <= offset + size <= self._size):
            raise InputError(f"{self.path}: is cut short, or lies about its sections")
        data = os.pread(self._file.fileno(), size, offset)
        while len(data) < size and (more := os.pread(self._file.fileno(), size - len(data), offset + len(data))):
            data += more
        if hashlib.sha256(data).hexdigest() != digest:
            raise InputError(f"{self.path}: is damaged at bytes {offset} to {offset + size}")
        return data

    # --- the output matrix ---

    def find_source(self, given: str | Path | None, *folders: Path) -> Path | None:
        """The GGUF that has the output matrix, by its hash; None where none is needed. Raises InputError."""
        header = self.header
        if header["form"] != "hidden" or header["output_copy"] is not None:
            return None
        name = str(header["model"].get("name", ""))
        safe = name and Path(name).name == name
        places = [Path(given)] if given else [folder / name for folder in (self.path.parent, *folders) if safe]
        problem = "it is not beside the reference"
        for place in places:
            if not place.is_file():
                continue
            try:
                with open_model(place) as source:
                    self._check_source(source)
                return place
            except ApexError as error:
                problem = error.message
        raise InputError(
            f"{self.path.name} needs the output matrix of {name}: {problem}",
            hint="--source MODEL.gguf says where that model is; a reference made with --copy-output needs none",
        )

    def _check_source(self, source: GGUFModel) -> OutputMatrix:
        wanted = self.header["output"]
        found = OutputMatrix.of(source, str(wanted["tensor"]))
        if found.sha256() != wanted["sha256"]:
            raise InputError(f"{source.path}: its {found.tensor} is not the one that the reference was made with")
        return found

    def load_output(self, source: str | Path | None) -> None:
        """Get what logits are rebuilt with; before the first take(). Raises InputError."""
        if self.header["form"] != "hidden":
            return
        wanted = self.header["output"]
        if self.header["output_copy"] is not None:
            raw = self._section(self.header["output_copy"])
            self._matrix = matrix_from_json(wanted, lambda start, size: raw[start : start + size])
            if self._matrix.nbytes != len(raw):
                raise InputError(f"{self.path}: its output matrix has {len(raw)} bytes, not {self._matrix.nbytes}")
        else:
            assert source is not None
            self._source = open_model(source)
            matrix = self._check_source(self._source)
            matrix.scale, matrix.softcap = float(wanted["scale"]), float(wanted["softcap"])
            self._matrix = matrix
        if self._matrix.shape != (self.n_embd, self.vocabulary):
            raise InputError(f"{self.path}: an output matrix of shape {self._matrix.shape} does not fit it")

    # --- rows ---

    def take(self, step: Step) -> tuple[Blocks, Routing | None]:
        if not step.rows:
            return [], None
        whole: list[NDArray[Any]] = []
        routed = []
        filled = 0
        for chunk in step.chunks:
            for part in range(step.scored.start // self.rows, -(-step.scored.stop // self.rows)):
                begin = part * self.rows
                body, _, routing = self._part(chunk, part)
                keep = slice(max(step.scored.start - begin, 0), min(step.scored.stop - begin, self.rows))
                whole = whole or [np.empty((step.rows, array.shape[1]), array.dtype) for array in body]
                for target, array in zip(whole, body, strict=True):  # one part after the other: they are large
                    target[filled : filled + keep.stop - keep.start] = array[keep]
                filled += keep.stop - keep.start
                if routing is not None:
                    routed.append((routing[0][:, keep], routing[1][:, keep]))
        routing_of_all = None
        if routed and self.routers is not None:
            experts, weights = (np.concatenate([one[i] for one in routed], axis=1) for i in (0, 1))
            routing_of_all = Routing(tuple(self.routers["layers"]), experts, weights)
        return (self._rebuilt(whole[0]) if len(whole) == 1 else _decoded(*whole)), routing_of_all

    def _rebuilt(self, kept: NDArray[np.uint8]) -> Iterator[tuple[int, F32]]:
        assert self._matrix is not None
        return self._matrix.blocks(STATES[self.header["dtype"]].decode(kept))

    def _part(
        self, chunk: int, part: int
    ) -> tuple[list[NDArray[Any]], NDArray[np.float32], tuple[NDArray[np.int32], NDArray[np.float32]] | None]:
        """Body, nll and routing of one part."""
        if self._last is None or self._last[0] != (chunk, part):
            self._last = (chunk, part), self._section(self.header["parts"][chunk][part])
        data = self._last[1]
        rows = min(self.rows, self.scored - part * self.rows)
        try:
            return unpack(self.header, data, rows)
        except (ValueError, struct.error, zlib.error, KeyError, TypeError) as error:
            raise InputError(f"{self.path}: chunk {chunk} cannot be read: {error}") from None


def pack(
    form: str, body: list[NDArray[Any]], nll: NDArray[Any], routing: tuple[NDArray[Any], NDArray[Any]] | None
) -> bytes:
    """One part as in the file; the inverse of unpack."""
    raw = b"".join(array.tobytes() for array in body)
    if form == "logprobs":
        packed = zlib.compress(raw, 1)
        raw = struct.pack("<Q", len(packed)) + packed
    parts = [raw, nll.astype("<f4").tobytes()]
    if routing is not None:
        experts, weights = routing
        parts += [experts.tobytes(), weights.astype("<f2").tobytes()]
    return b"".join(parts)


def unpack(
    header: dict[str, Any], data: bytes, rows: int
) -> tuple[list[NDArray[Any]], NDArray[np.float32], tuple[NDArray[np.int32], NDArray[np.float32]] | None]:
    """Body, nll [rows] and routing (experts, weights [layers, rows, k]) of a part of `rows` scored tokens."""
    if header["form"] == "hidden":
        end = rows * STATES[header["dtype"]].row_bytes(header["n_embd"])
        body = [np.frombuffer(data[:end], np.uint8).reshape(rows, -1)]
    else:
        size, vocabulary = struct.unpack_from("<Q", data)[0], header["vocabulary"]
        end, expected = 8 + size, rows * (8 + 2 * vocabulary)
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(data[8:end], expected)
        if len(raw) != expected:
            raise ValueError("it is too short")
        at = np.cumsum([0, 4 * rows, 4 * rows, rows * vocabulary])
        step, low = (np.frombuffer(raw, "<f4", rows, at[i]).reshape(rows, 1) for i in (0, 1))
        high_bytes, low_bytes = (
            np.frombuffer(raw, np.uint8, rows * vocabulary, at[i]).reshape(rows, vocabulary) for i in (2, 3)
        )
        body = [step, low, high_bytes, low_bytes]
    nll = np.frombuffer(data, "<f4", rows, end)
    end += 4 * rows
    about = header["routers"]
    if about is None:
        if end != len(data):
            raise ValueError("it has another size")
        return body, nll, None
    shape = (len(about["layers"]), rows, int(about["k"]))
    count = shape[0] * shape[1] * shape[2]
    kind = np.dtype("<u1" if about["experts"] <= 256 else "<u2")
    if end + count * (kind.itemsize + 2) != len(data):
        raise ValueError("it has another size")
    experts = np.frombuffer(data, kind, count, end).reshape(shape).astype(np.int32)
    weights = np.frombuffer(data, "<f2", count, end + count * kind.itemsize).reshape(shape).astype(np.float32)
    return body, nll, (experts, weights)


def encode_logits(logits: F32) -> list[NDArray[Any]]:
    """Body of form "logprobs" for `logits` [n, vocabulary]."""
    top = logits.max(axis=1, keepdims=True)
    low = np.maximum(logits.min(axis=1, keepdims=True), top - LOGIT_RANGE)
    step = (top - low) / np.float32(65535)
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0)
    words = np.clip(np.rint((logits - low) * inverse), 0, 65535).astype(np.uint16)
    return [step.astype("<f4"), low.astype("<f4"), (words >> 8).astype(np.uint8), words.astype(np.uint8)]


def _decoded(
    step: NDArray[Any], low: NDArray[Any], high_bytes: NDArray[Any], low_bytes: NDArray[Any]
) -> Iterator[tuple[int, F32]]:
    vocabulary = high_bytes.shape[1]
    width = max(256, _BLOCK // len(step))
    for start in range(0, vocabulary, width):
        part = slice(start, min(start + width, vocabulary))
        words = high_bytes[:, part].astype(np.uint16) << np.uint16(8) | low_bytes[:, part]
        yield start, words.astype(np.float32) * step + low


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise ValueError(f"{value!r} as a count")
    return value
