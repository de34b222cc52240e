"""A GGUF model: one file or all its shards, seen as one.

Tensor data is read with pread into the caller's buffer. Nothing is mapped: touched mapped pages count
against memory, and a mapped file that is cut short ends the process with SIGBUS; here it is a GGUFError.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from apex_quant.errors import GGUFError
from apex_quant.gguf import limits
from apex_quant.gguf.header import GGUFFile, TensorInfo, open_regular, read_header
from apex_quant.gguf.limits import Budget
from apex_quant.gguf.values import Value, ValueType

SPLIT_NO = "split.no"
SPLIT_COUNT = "split.count"
SPLIT_TENSORS = "split.tensors.count"
SPLIT_KEYS = (SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS)
SHARD_NAME = re.compile(r"(?P<prefix>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL | re.ASCII)

_LAYER = re.compile(r"blk\.[ \t\n\v\f\r]*([+-]?\d+)", re.ASCII)
_LARGEST_READ = 1 << 30  # one preadv moves at most 2 GiB minus a page


class GGUFModel:
    """An open model. `files` in shard order, `tensors` by name in file order, `metadata` of the first shard.

    The split.* keys are not in `metadata`; files[i].metadata has what each file says. `architecture` is ""
    where the file names none.
    """

    def __init__(
        self, path: Path, files: tuple[GGUFFile, ...], tensors: dict[str, TensorInfo], fds: tuple[int, ...]
    ) -> None:
        self.path = path
        self.files = files
        self.tensors = tensors
        self.metadata: Mapping[str, Value] = MappingProxyType(
            {key: value for key, value in files[0].metadata.items() if key not in SPLIT_KEYS}
        )
        architecture = self.metadata.get("general.architecture")
        if architecture is not None and architecture.type is not ValueType.STRING:
            raise GGUFError("must be a string", files[0].path, field="general.architecture")
        self.architecture = str(architecture.data) if architecture is not None else ""
        self._fds = fds  # last: from here on they are closed with the model

    def get(self, key: str, default: Any = None) -> Any:
        """The Python value of a key. '{arch}' in it stands for the architecture: '{arch}.block_count'."""
        value = self.metadata.get(key.replace("{arch}", self.architecture))
        return default if value is None else value.data

    def read_into(self, info: TensorInfo, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with the tensor's bytes from `start` on, whole or GGUFError.

        ValueError when that range is not inside the tensor.
        """
        view = buffer.cast("B")
        if start < 0 or start + len(view) > info.nbytes:
            raise ValueError(f"bytes {start} to {start + len(view)} of {info.name}, which has {info.nbytes}")
        path, offset, done = self.files[info.file].path, info.offset + start, 0
        if not self._fds:
            raise ValueError(f"{path} is closed")
        while done < len(view):
            try:
                got = os.preadv(self._fds[info.file], [view[done : done + _LARGEST_READ]], offset + done)
            except OSError as error:
                raise GGUFError(f"cannot be read: {error.strerror}", path, offset + done, info.name) from None
            if not got:
                raise GGUFError("the file was truncated after it was opened", path, offset + done, info.name)
            done += got

    def read(self, info: TensorInfo, start: int = 0, size: int | None = None) -> bytes:
        """`size` bytes of the tensor from `start` on, by default all that follow. Errors as read_into."""
        size = info.nbytes - start if size is None else size
        if start < 0 or size < 0 or start + size > info.nbytes:
            raise ValueError(f"bytes {start} to {start + size} of {info.name}, which has {info.nbytes}")
        buffer = bytearray(size)
        self.read_into(info, start, memoryview(buffer))
        return bytes(buffer)

    def close(self) -> None:
        """Closes all files. Metadata stays usable, tensor data does not."""
        fds, self._fds = self._fds, ()
        for fd in fds:
            os.close(fd)

    def __enter__(self) -> GGUFModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fds", ()):
            self.close()


def shard_name(prefix: str, index: int, count: int) -> str:
    """The file name of shard `index` (from 0) of `count`, as llama_split_path makes it."""
    return f"{prefix}-{index + 1:05d}-of-{count:05d}.gguf"


def _split_number(file: GGUFFile, key: str) -> int | None:
    value = file.metadata.get(key)
    if value is None:
        return None
    if not isinstance(value.data, int) or isinstance(value.data, bool) or value.data < 0:
        raise GGUFError(f"must be a count, is {value}", file.path, field=key)
    return value.data


def _shard_paths(file: GGUFFile) -> list[str]:
    """The paths of all shards of the model that `file` belongs to; one for a single file."""
    count = _split_number(file, SPLIT_COUNT) or 0
    named = SHARD_NAME.fullmatch(file.path.name)
    if count <= 1:
        if named and int(named["count"]) > 1 and SPLIT_COUNT not in file.metadata:
            raise GGUFError(
                f"is named as one of {int(named['count'])} shards but has no {SPLIT_COUNT}; "
                "rename it if it is a whole model",
                file.path,
                field=SPLIT_COUNT,
            )
        return [str(file.path)]
    if count > limits.MAX_SHARDS:
        raise GGUFError(f"{count} shards, at most {limits.MAX_SHARDS}", file.path, field=SPLIT_COUNT)
    number = _split_number(file, SPLIT_NO)
    if number is None or named is None or (int(named["no"]), int(named["count"])) != (number + 1, count):
        expected = "" if number is None else f", expected a name ending in {shard_name('', number, count)}"
        raise GGUFError(f"a shard whose name does not fit its place{expected}", file.path, field=SPLIT_NO)
    folder = file.path.parent
    paths = [str(folder / shard_name(named["prefix"], i, count)) for i in range(count)]
    missing = [path for path in paths if not Path(path).exists()]
    if missing:
        names = ", ".join(Path(path).name for path in missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise GGUFError(f"{len(missing)} of its {count} shards are missing: {names}", file.path)
    return paths


def _check_shard(file: GGUFFile, index: int, first: GGUFFile) -> None:
    for key, expected in (
        (SPLIT_NO, index),
        (SPLIT_COUNT, _split_number(first, SPLIT_COUNT)),
        (SPLIT_TENSORS, _split_number(first, SPLIT_TENSORS)),
    ):
        found = _split_number(file, key)
        if found != expected:
            raise GGUFError(f"is {found}, expected {expected} as its sibling shards say", file.path, field=key)


def open_model(path: str | os.PathLike[str]) -> GGUFModel:
    """Opens a GGUF file, or all shards of a model when any one of them is given.

    Raises GGUFError naming file, offset and field for anything that breaks the format or the bounds of
    limits.py, within about a second and 200 MB whatever the file.
    """
    budget = Budget()
    fds: list[int] = []

    def load(name: str, index: int) -> tuple[GGUFFile, list[TensorInfo]]:
        fd, size = open_regular(name)
        fds.append(fd)
        return read_header(name, fd, size, budget, index)

    given = os.fspath(path)
    try:
        first, table = load(given, 0)
        paths = _shard_paths(first)
        place = 0 if len(paths) == 1 else _split_number(first, SPLIT_NO) or 0
        files: list[GGUFFile] = []
        tensors: dict[str, TensorInfo] = {}
        order: list[int] = []
        for index, name in enumerate(paths):
            if index == place:
                file, infos = first, [replace(info, file=index) for info in table] if index else table
                order.append(0)
            else:
                order.append(len(fds))
                file, infos = load(name, index)
            if len(paths) > 1:
                _check_shard(file, index, first)
            for info in infos:
                if info.name in tensors:
                    raise GGUFError(f"the tensor {info.name} is in an earlier shard too", name, info.offset)
                tensors[info.name] = info
            files.append(file)
        expected = _split_number(files[0], SPLIT_TENSORS)
        if len(paths) > 1 and expected is not None and expected != len(tensors):
            raise GGUFError(
                f"says {expected} tensors, the shards hold {len(tensors)}", files[0].path, field=SPLIT_TENSORS
            )
        return GGUFModel(Path(given), tuple(files), tensors, tuple(fds[i] for i in order))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def stock_order(names: Iterable[str]) -> list[str]:
    """Tensor names in the order in which llama.cpp writes them: layer (-1 for none), then name bytes.

    The layer is what sscanf("blk.%d.") finds, as in llama_model_loader's weight_name_comparer.
    """

    def key(name: str) -> tuple[int, bytes]:
        layer = _LAYER.match(name)
        return (int(layer[1]) if layer else -1, name.encode("utf-8", "surrogateescape"))

    return sorted(names, key=key)
