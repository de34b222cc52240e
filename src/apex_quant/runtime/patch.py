"""Writing into the weights of a loaded model, and taking it back.

Every weight that the graph reads is found by one decode of a single token: the eval callback is shown each node with
its sources. Data is written with the backend's own ggml_backend_tensor_set, so that it may lie on any device. The
model must have been read into memory (a mapped file is read-only: writing ends the process) as it lies in the file
(not rearranged for the processor): options mmap=False, repack=False.

    with Session(path, SessionOptions(mmap=False, repack=False)) as session, open_model(path) as file:
        patcher = Patcher(session, file)
        patcher.write("blk.3.attn_v.weight", 0, blocks)
        session.decode(...)
        patcher.restore("blk.3.attn_v.weight")
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import InputError, NativeError, UsageError
from apex_quant.gguf import GGUFModel
from apex_quant.native import ggml
from apex_quant.runtime.observe import EvalCallback
from apex_quant.runtime.session import Session
from apex_quant.runtime.tensors import OP_OFFSET, SRC_OFFSET, Tensors

Bytes = NDArray[np.uint8]
_SOURCES = 10  # GGML_MAX_SRC
_NO_OP = 0  # GGML_OP_NONE: a leaf, which weights are
_AT_ONCE = 16 << 20  # bytes compared or restored together
_ONE_TOKEN = 1


class _Finder(EvalCallback):
    """Notes every leaf that a node of the graph reads; nothing is observed."""

    def __init__(self, lib: Any, tensors: Tensors, wanted: Collection[str]) -> None:
        super().__init__(lib, tensors)
        self.found: dict[str, list[int]] = {}
        self._wanted, self._seen = wanted, set[int]()
        self._access = tensors

    def _call(self, address: int, ask: bool, _: int | None) -> bool:
        if not ask:
            return True
        try:
            for source in (ctypes.c_void_p * _SOURCES).from_address(address + SRC_OFFSET):
                if source and source not in self._seen:
                    self._seen.add(source)
                    self._note(source)
        except BaseException as error:  # it must not reach the library
            self.error = error
        return False

    def _note(self, address: int) -> None:
        if ctypes.c_int.from_address(address + OP_OFFSET).value != _NO_OP:
            return
        raw = bytes(self._access.at(address).name)
        name = raw.decode("utf-8", "replace")
        # a name with marks (CUDA0#...#0) is a copy that lives for one graph: writing there changes nothing
        if name in self._wanted:
            self.found.setdefault(name, []).append(address)


class Patcher:
    """The weights of a session's model. `file` is the open GGUF that was loaded: what restore() puts back.

    Empties the session's memory. Raises UsageError for a session whose weights cannot be written.
    """

    def __init__(self, session: Session, file: GGUFModel) -> None:
        if session.options.mmap or session.options.repack:
            raise UsageError("weights can only be written in a session with mmap=False and repack=False")
        self.file = file
        lib = ctypes.CDLL(str(ggml().path))
        address, size = ctypes.c_void_p, ctypes.c_size_t
        self._set, self._get = lib.ggml_backend_tensor_set, lib.ggml_backend_tensor_get
        for function in (self._set, self._get):
            function.restype, function.argtypes = None, [address, address, size, size]
        self._tensors = Tensors()
        self._found = self._find(session)
        self._checked: set[str] = set()

    @property
    def names(self) -> frozenset[str]:
        """Tensors of the file that the graph reads, in whichever operation."""
        return frozenset(self._found)

    def write(self, name: str, start: int, data: Bytes) -> None:
        """Replace the bytes from `start` on by `data`, blocks of the loaded type. Raises InputError where the library
        holds another form of this tensor than the file does, UsageError for bytes outside it or a tensor that the
        graph does not read."""
        info = self._info(name)
        if start < 0 or start + data.nbytes > info.nbytes:
            raise UsageError(f"bytes {start} to {start + data.nbytes} of {name}, which has {info.nbytes}")
        self._check(name)
        data = np.ascontiguousarray(data)
        for address in self._found[name]:
            self._set(address, data.ctypes.data, start, data.nbytes)

    def read(self, name: str) -> Bytes:
        """All bytes as they are in the device's memory now, uint8 [nbytes]."""
        info = self._info(name)
        out = np.empty(info.nbytes, np.uint8)
        self._get(self._found[name][0], out.ctypes.data, 0, out.nbytes)
        return out

    def restore(self, name: str) -> None:
        """Put the file's bytes back."""
        info = self._info(name)
        for start in range(0, info.nbytes, _AT_ONCE):
            data = np.empty(min(_AT_ONCE, info.nbytes - start), np.uint8)
            self.file.read_into(info, start, data.data)
            for address in self._found[name]:
                self._set(address, data.ctypes.data, start, data.nbytes)

    def _info(self, name: str) -> Any:
        if name not in self._found:
            raise UsageError(f"{name}: the model does not read this tensor when it decodes")
        return self.file.tensors[name]

    def _check(self, name: str) -> None:
        """Once for each tensor, before its first change: type, size and bytes are the file's, wherever it lies."""
        if name in self._checked:
            return
        info = self.file.tensors[name]
        for address in self._found[name]:
            tensor = self._tensors.at(address)
            shape = (*info.shape, 1, 1, 1, 1)[:4]
            if tensor.type != info.type.id or tuple(tensor.ne) != shape:
                raise InputError(f"{name}: the library holds it in another form than the file does")
            for start in range(0, info.nbytes, _AT_ONCE):
                size = min(_AT_ONCE, info.nbytes - start)
                ours, theirs = np.empty(size, np.uint8), np.empty(size, np.uint8)
                self.file.read_into(info, start, ours.data)
                self._get(address, theirs.ctypes.data, start, size)
                if not np.array_equal(ours, theirs):
                    raise InputError(f"{name}: the library holds other bytes than the file does")
        self._checked.add(name)

    def _find(self, session: Session) -> dict[str, list[int]]:
        before = session.callback
        finder = _Finder(session.library, self._tensors, self.file.tensors.keys())
        session.callback = finder
        try:
            session.reopen()
            session.decode(np.zeros((1, _ONE_TOKEN), np.int32))
        finally:
            session.callback = before
            session.reopen()
        if not finder.found:
            raise NativeError(f"{session.path.name}: none of the model's tensors was found in its graph")
        return finder.found
