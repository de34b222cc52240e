"""A session on one model: load it, tokenize, decode sequences side by side, read logits, observe activations.

Runs inside a child process, because the library aborts on what it does not expect; see native/worker.py.

    with Session(path, SessionOptions(ctx=512, sequences=4), observer) as session:
        tokens = session.tokenize("Hello", add_special=True)
        session.decode(tokens[None, :])
        logits = session.logits()
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import InputError, NativeError, ResourceError, UsageError
from apex_quant.gguf.types import CACHE_TYPES, TYPES
from apex_quant.native import ggml
from apex_quant.native.bindings import bindings
from apex_quant.runtime.buffers import override_table
from apex_quant.runtime.log import LibraryLog
from apex_quant.runtime.observe import EvalCallback, Observer
from apex_quant.runtime.options import SessionOptions
from apex_quant.runtime.tensors import F32, I32, Tensors

_NO_VOCABULARY = 0  # LLAMA_VOCAB_TYPE_NONE
_FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}  # LLAMA_FLASH_ATTN_TYPE_...
_CACHE_TYPES = {name: TYPES[name.upper()].id for name in CACHE_TYPES}


@dataclass(frozen=True)
class Vocabulary:
    """What callers need to know of a model's tokenizer."""

    size: int
    add_bos: bool
    add_eos: bool
    bos: int
    eos: int


@functools.cache
def library() -> tuple[Any, LibraryLog]:
    """The bindings' low-level module, started, with its log caught."""
    ggml()  # says what is wrong with the installation, if anything is
    lib = bindings()
    log = LibraryLog(lib)
    lib.llama_backend_init()
    return lib, log


class Session:
    """A loaded model with one context."""

    def __init__(
        self, path: str | Path, options: SessionOptions | None = None, observer: Observer | None = None
    ) -> None:
        """Load the model and make its context. Raises InputError or ResourceError with the library's words."""
        self.path, self.options = Path(path), options or SessionOptions()
        self._lib, self._log = library()
        self._keep: list[Any] = []  # what the library's structures point to
        self._resources, self._context_resources = ExitStack(), ExitStack()
        self._rows = 0  # of the last decode's logits in the library's memory
        self._wanted: NDArray[np.intp] | None = None  # which of them were asked for; None: all
        try:
            self._model = self._load_model()
            self._resources.callback(self._lib.llama_model_free, self._model)
            self._vocab = self._lib.llama_model_get_vocab(self._model)
            self.vocabulary = self._read_vocabulary()
            # what contexts call while they compute; another one counts from the next reopen() on
            self.callback = EvalCallback(self._lib, Tensors()) if observer is not None else None
            if self.callback is not None:
                self.callback.observer = observer
            self._open_context()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free context and model."""
        self._context_resources.close()
        self._resources.close()

    def reopen(self, **changes: object) -> None:
        """Make a new, empty context for other options of contexts (ctx, sequences, unified, ...); the model stays
        loaded as it is. Raises as the constructor does."""
        self._context_resources.close()
        self.options = SessionOptions.model_validate({**self.options.model_dump(), **changes})
        self._open_context()

    def _open_context(self) -> None:
        self._rows, self._wanted = 0, None
        self._context = self._make_context()
        self._context_resources.callback(self._lib.llama_free, self._context)
        self._memory = self._lib.llama_get_memory(self._context)

    # --- loading ---

    def _load_model(self) -> Any:
        lib, options = self._lib, self.options
        params = lib.llama_model_default_params()
        params.n_gpu_layers = options.gpu_layers
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if options.mmap else lib.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = params.use_extra_bufts and options.repack
        if options.tensor_split:
            most = lib.llama_max_devices()
            if len(options.tensor_split) > most:
                raise UsageError(f"a split over {len(options.tensor_split)} devices, but the library knows {most}")
            split = (ctypes.c_float * most)(*options.tensor_split)
            self._keep.append(split)
            params.tensor_split = ctypes.cast(split, ctypes.POINTER(ctypes.c_float))
        overrides = options.buffer_overrides()
        if overrides:
            rows = override_table(overrides)
            self._keep.append(rows)
            params.tensor_buft_overrides = ctypes.cast(rows, ctypes.c_void_p)
        model = lib.llama_model_load_from_file(os.fsencode(self.path), params)
        if not model:
            raise InputError(
                f"{self.path}: llama.cpp cannot load this model: {self._log.last_problem()}",
                hint="`apex inspect` says whether the file is whole; --debug prints the library's log",
            )
        return model

    def _read_vocabulary(self) -> Vocabulary | None:
        lib, vocab = self._lib, self._vocab
        if lib.llama_vocab_type(vocab) == _NO_VOCABULARY:
            return None
        return Vocabulary(
            size=lib.llama_vocab_n_tokens(vocab),
            add_bos=bool(lib.llama_vocab_get_add_bos(vocab)),
            add_eos=bool(lib.llama_vocab_get_add_eos(vocab)),
            bos=lib.llama_vocab_bos(vocab),
            eos=lib.llama_vocab_eos(vocab),
        )

    def _make_context(self) -> Any:
        lib, options = self._lib, self.options
        if not lib.llama_model_has_decoder(self._model):
            raise InputError(f"{self.path}: a model without a decoder cannot be run here")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch = options.capacity, options.batch
        params.n_ubatch = min(options.ubatch, options.batch)
        params.n_seq_max = options.sequences
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k, params.type_v = _CACHE_TYPES[options.type_k], _CACHE_TYPES[options.type_v]
        params.flash_attn_type = _FLASH_ATTENTION[options.flash_attention]
        params.kv_unified = options.unified
        params.embeddings = options.embeddings
        if options.embeddings:
            params.pooling_type = lib.LLAMA_POOLING_TYPE_NONE
        params.no_perf = True
        if self.callback is not None:
            params.cb_eval = self.callback.function
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise ResourceError(
                f"{self.path.name}: no context of {options.sequences} x {options.ctx} tokens: "
                f"{self._log.last_problem()}",
                hint="a smaller --ctx needs less memory",
            )
        return context

    # --- facts ---

    @property
    def library(self) -> Any:
        """The bindings that this session calls, for what reads or writes beside it (observers, patches)."""
        return self._lib

    @property
    def training_context(self) -> int:
        """Tokens that the model was trained to see at once."""
        return int(self._lib.llama_model_n_ctx_train(self._model))

    @property
    def room(self) -> int:
        """Tokens that the context holds; the library rounds what the options say up."""
        return int(self._lib.llama_n_ctx(self._context))

    @property
    def n_embd(self) -> int:
        """Width of what the output matrix is multiplied with."""
        return int(self._lib.llama_model_n_embd_out(self._model))

    @property
    def recurrent(self) -> bool:
        """Whether a layer keeps a state instead of all past tokens, so that no part of it can be removed."""
        model = self._model
        return bool(self._lib.llama_model_is_recurrent(model) or self._lib.llama_model_is_hybrid(model))

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self.options.threads or _processors()

    def metadata(self, key: str) -> str | None:
        """A metadata value of the model as text, or None."""
        buffer = ctypes.create_string_buffer(256)
        found = self._lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if found >= 0 else None

    # --- work ---

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> I32:
        """Tokens of a text. `add_special` adds BOS and the like as the model wants; `parse_special` reads marks
        such as <|im_start|> as one token. Raises InputError for a model without a vocabulary."""
        if self.vocabulary is None:
            raise InputError(f"{self.path}: the model has no vocabulary, so no text can be read with it")
        data = text.encode("utf-8", "surrogatepass")
        if len(data) >= 1 << 31:
            raise InputError("a text of 2 GiB or more cannot be tokenized at once")
        tokens = np.empty(len(data) + 16, np.int32)
        for _ in range(2):
            pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            count = self._lib.llama_tokenize(
                self._vocab, data, len(data), pointer, len(tokens), add_special, parse_special
            )
            if count >= 0:
                return tokens[:count].copy()
            tokens = np.empty(-count, np.int32)
        raise NativeError(f"{self.path.name}: the library cannot tokenize a text of {len(data)} bytes")

    def decode(
        self, tokens: NDArray[np.integer[Any]], *, position: int = 0, outputs: NDArray[np.bool_] | None = None
    ) -> None:
        """Decode `tokens` [sequences, n]: every sequence continues at `position` with n tokens.

        With position 0 the context is emptied first. `outputs` [n] says which positions of each sequence give logits;
        without it all do. Raises UsageError for more than a decode or the context holds, NativeError when the library
        fails, and what an observer raised.
        """
        n_seq, n = tokens.shape
        if n_seq > self.options.sequences or position + n > self.options.ctx:
            raise UsageError(
                f"{n_seq} x {position}+{n} tokens do not fit {self.options.sequences} x {self.options.ctx}"
            )
        if position == 0:
            self.clear()
        self._submit(
            tokens.reshape(-1),
            np.tile(np.arange(position, position + n, dtype=np.int32), n_seq),
            np.repeat(np.arange(n_seq, dtype=np.int32), n),
            np.ones(n_seq * n, np.int32),
            np.ones(n_seq * n, np.bool_) if outputs is None else np.tile(outputs, n_seq),
        )

    def submit(
        self,
        tokens: NDArray[np.integer[Any]],
        positions: NDArray[np.integer[Any]],
        sequences: Sequence[Sequence[int]],
        outputs: NDArray[np.bool_],
    ) -> None:
        """One decode of anything: token i has a position, belongs to all of `sequences[i]` and may give logits.

        A token of several sequences is computed once; that needs `unified`. Nothing is emptied before. Raises as
        decode() does.
        """
        counts = np.fromiter(map(len, sequences), np.int32, len(sequences))
        ids = np.fromiter(itertools.chain.from_iterable(sequences), np.int32, int(counts.sum()))
        if not len(tokens) == len(positions) == len(sequences) == len(outputs) or counts.min(initial=1) < 1:
            raise UsageError("each token has one position, at least one sequence, and gives logits or not")
        if ids.min(initial=0) < 0 or ids.max(initial=0) >= self.options.sequences:
            raise UsageError(f"sequences are numbered from 0 to {self.options.sequences - 1}")
        if not self.options.unified and counts.max(initial=1) > 1:
            raise UsageError("only in a unified memory can a token belong to several sequences")
        self._submit(tokens, positions, ids, counts, outputs)

    def _submit(
        self,
        tokens: NDArray[np.integer[Any]],
        positions: NDArray[np.integer[Any]],
        ids: I32,
        counts: I32,
        outputs: NDArray[np.bool_],
    ) -> None:
        """`ids`: the sequences of all tokens behind one another, of which token i has counts[i]."""
        lib, total = self._lib, len(tokens)
        if not 0 < total <= self.options.batch:
            raise UsageError(f"{total} tokens in one decode, which takes 1 to {self.options.batch}")
        pointers = (np.cumsum(counts, dtype=np.uint64) - counts.astype(np.uint64)) * np.uint64(ids.itemsize)
        arrays = {
            "token": np.ascontiguousarray(tokens, np.int32),
            "pos": np.ascontiguousarray(positions, np.int32),
            "n_seq_id": counts,
            "seq_id": pointers + np.uint64(ids.ctypes.data),
            "logits": np.ascontiguousarray(outputs, np.int8),
        }
        batch = lib.llama_batch(n_tokens=total)
        for name, kind in lib.llama_batch._fields_:
            if name in arrays:
                setattr(batch, name, ctypes.cast(arrays[name].ctypes.data, kind))
        given = np.flatnonzero(outputs)
        self._rows, self._wanted = len(given), None
        if self.options.embeddings:
            # with embeddings on, the library gives rows of all tokens, or fails where none is asked for
            lib.llama_set_embeddings(self._context, len(given) > 0)
            if 0 < len(given) < total:
                self._rows, self._wanted = total, given
        status = lib.llama_decode(self._context, batch)
        lib.llama_synchronize(self._context)
        if self.callback is not None:
            self.callback.raise_error()
        if status != 0:
            self._rows, self._wanted = 0, None
            raise NativeError(
                f"{self.path.name}: decoding {total} tokens failed with status {status}: {self._log.last_problem()}",
                log_tail="\n".join(self._log.problems()),
            )

    def logits(self) -> F32:
        """Logits of the last decode, float32 [outputs, vocabulary], in the order of its tokens; the library's memory,
        valid until the next."""
        return self._output(self._lib.llama_get_logits, self._lib.llama_vocab_n_tokens(self._vocab))

    def hidden(self) -> F32:
        """What the output matrix was multiplied with in the last decode, float32 [outputs, n_embd]; as logits().
        Raises UsageError without `embeddings`."""
        if not self.options.embeddings:
            raise UsageError("a session without embeddings keeps no hidden states")
        return self._output(self._lib.llama_get_embeddings, self.n_embd)

    def _output(self, getter: Any, width: int) -> F32:
        if not self._rows:
            return np.empty((0, width), np.float32)
        pointer = ctypes.cast(getter(self._context), ctypes.POINTER(ctypes.c_float))
        rows: F32 = np.ctypeslib.as_array(pointer, (self._rows, width))
        return rows if self._wanted is None else rows[self._wanted]

    # --- memory ---

    def clear(self) -> None:
        """Forget all sequences."""
        self._lib.llama_memory_clear(self._memory, True)

    def remove(self, sequence: int, first: int = -1, last: int = -1) -> bool:
        """Forget positions [first, last) of a sequence; -1 means from its start, to its end. False when the memory
        cannot: a recurrent state has no parts."""
        return bool(self._lib.llama_memory_seq_rm(self._memory, sequence, first, last))

    def copy(self, source: int, target: int, first: int = -1, last: int = -1) -> None:
        """Let `target` also have positions [first, last) of `source`; of a recurrent state always all. Parts need
        `unified`, else UsageError."""
        if not self.options.unified and (first > 0 or last >= 0):
            raise UsageError("only in a unified memory can a part of a sequence be copied")
        self._lib.llama_memory_seq_cp(self._memory, source, target, first, last)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
