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
import importlib
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import InputError, NativeError, ResourceError, UsageError
from apex_quant.native import ggml
from apex_quant.runtime.log import LibraryLog
from apex_quant.runtime.observe import EvalCallback, Observer
from apex_quant.runtime.options import SessionOptions
from apex_quant.runtime.tensors import F32, I32, Tensors

_NO_VOCABULARY = 0  # LLAMA_VOCAB_TYPE_NONE


@dataclass(frozen=True)
class Vocabulary:
    """What callers need to know of a model's tokenizer."""

    size: int
    add_bos: bool
    add_eos: bool
    bos: int
    eos: int


def bindings() -> Any:
    """The low-level module of the bindings: 0.3 s to import. ImportError without it.

    GNU OpenMP's threads spin at every barrier, by default for milliseconds: where other processes want the processor
    too, two threads were up to four times slower than one. With a short spin they were not (embedded model, 2 cores).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "100")
    return importlib.import_module("llama_cpp.llama_cpp")


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
        self._resources = ExitStack()
        self._rows = 0
        try:
            self._model = self._load_model()
            self._resources.callback(self._lib.llama_model_free, self._model)
            self._vocab = self._lib.llama_model_get_vocab(self._model)
            self.vocabulary = self._read_vocabulary()
            self._callback = EvalCallback(self._lib, Tensors()) if observer is not None else None
            if self._callback is not None:
                self._callback.observer = observer
            self._context = self._make_context()
            self._resources.callback(self._lib.llama_free, self._context)
            self._batch = self._lib.llama_batch_init(self.options.batch, 0, 1)
            self._resources.callback(self._lib.llama_batch_free, self._batch)
        except BaseException:
            self._resources.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free context and model."""
        self._resources.close()

    # --- loading ---

    def _load_model(self) -> Any:
        lib, options = self._lib, self.options
        params = lib.llama_model_default_params()
        params.n_gpu_layers = options.gpu_layers
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if options.mmap else lib.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = options.repack
        if options.tensor_split:
            most = lib.llama_max_devices()
            if len(options.tensor_split) > most:
                raise UsageError(f"a split over {len(options.tensor_split)} devices, but the library knows {most}")
            split = (ctypes.c_float * most)(*options.tensor_split)
            self._keep.append(split)
            params.tensor_split = ctypes.cast(split, ctypes.POINTER(ctypes.c_float))
        overrides = options.buffer_overrides()
        if overrides:
            rows = (_Override * (len(overrides) + 1))()
            for row, (pattern, buffer) in zip(rows, overrides, strict=False):
                row.pattern, row.buffer_type = pattern.encode(), _buffer_type(buffer)
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
        params.n_ctx = params.n_batch = options.batch
        params.n_ubatch = min(options.ubatch, options.batch)
        params.n_seq_max = options.sequences
        params.n_threads = params.n_threads_batch = options.threads or _processors()
        params.no_perf = True
        if self._callback is not None:
            params.cb_eval = self._callback.function
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
    def training_context(self) -> int:
        """Tokens that the model was trained to see at once."""
        return int(self._lib.llama_model_n_ctx_train(self._model))

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

    def decode(self, tokens: NDArray[np.integer[Any]], *, position: int = 0) -> None:
        """Decode `tokens` [sequences, n]: every sequence continues at `position` with n tokens.

        With position 0 the context is emptied first. All tokens give logits. Raises what an observer raised.
        """
        n_seq, n = tokens.shape
        count = n_seq * n
        if n_seq > self.options.sequences or position + n > self.options.ctx:
            raise UsageError(
                f"{n_seq} x {position}+{n} tokens do not fit {self.options.sequences} x {self.options.ctx}"
            )
        if position == 0:
            self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        batch = self._batch
        batch.n_tokens = count
        _view(batch.token, count, np.int32)[:] = tokens.reshape(-1)
        _view(batch.pos, count, np.int32)[:] = np.tile(np.arange(position, position + n, dtype=np.int32), n_seq)
        _view(batch.n_seq_id, count, np.int32)[:] = 1
        _view(batch.logits, count, np.int8)[:] = 1
        for i in range(count):
            batch.seq_id[i][0] = i // n
        self._rows = count
        status = self._lib.llama_decode(self._context, batch)
        self._lib.llama_synchronize(self._context)
        if self._callback is not None:
            self._callback.raise_error()
        if status != 0:
            raise NativeError(
                f"{self.path.name}: decoding {n_seq} x {n} tokens failed with status {status}: "
                f"{self._log.last_problem()}",
                log_tail="\n".join(self._log.problems()),
            )

    def logits(self) -> F32:
        """Logits of the last decode, float32 [tokens, vocabulary]; the library's memory, valid until the next."""
        size = self._lib.llama_vocab_n_tokens(self._vocab)
        pointer = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self._rows, size))


class _Override(ctypes.Structure):
    """struct llama_model_tensor_buft_override."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


def _buffer_type(name: str) -> int:
    """The default buffer type of the device called `name` (CPU, CUDA0, ...). Raises UsageError."""
    base = ctypes.CDLL(str(ggml().path))
    if name == "CPU":
        base.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
        return int(base.ggml_backend_cpu_buffer_type())
    path = ggml().path
    registry = ctypes.CDLL(str(path.with_name(path.name.replace("ggml-base", "ggml"))))
    registry.ggml_backend_dev_by_name.restype = ctypes.c_void_p
    registry.ggml_backend_dev_by_name.argtypes = [ctypes.c_char_p]
    device = registry.ggml_backend_dev_by_name(name.encode())
    if not device:
        raise UsageError(f"the library has no device {name!r}", hint="`apex doctor` lists its backends")
    base.ggml_backend_dev_buffer_type.restype = ctypes.c_void_p
    base.ggml_backend_dev_buffer_type.argtypes = [ctypes.c_void_p]
    return int(base.ggml_backend_dev_buffer_type(device))


def _view(pointer: Any, count: int, kind: type) -> NDArray[Any]:
    return np.ctypeslib.as_array(pointer, (count,)).view(kind)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
