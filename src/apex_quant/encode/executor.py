"""The child's job: read each source tensor once, encode every distinct version, write it to all its places.

One thread reads in file order and hashes; the others decode, encode and write with positional writes. The main
thread makes finished tensors durable and only then reports them, so a reported tensor survives a power cut.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from apex_quant.encode.encoder import Bytes, Decoder, Encoder, Floats, GgmlEncoder, NotFiniteError
from apex_quant.encode.hashing import DataHashes, Section
from apex_quant.encode.sinks import Comparison, PartialFile, Sink
from apex_quant.encode.tasks import Task, item_bytes, items
from apex_quant.errors import ApexError, InputError, NativeError, ResourceError
from apex_quant.gguf import TYPES, GGMLType, GGUFModel, open_model
from apex_quant.importance import Importance
from apex_quant.importance.fill import NO_PRIOR, applied
from apex_quant.native import ggml
from apex_quant.native.worker import Emit, Json, Stopped

# Finished tensors are synced and reported together: a sync of nine files every tensor would cost more than the
# encoding of a small one, and losing up to this much work to a power cut is bearable. Not much more, either: what is
# on disk already need not be waited for at the end.
SYNC_BYTES = 64 << 20
SYNC_SECONDS = 2.0
_TICK = 0.2


@dataclass
class _Progress:
    """One tensor on its way, with the rows that remain. Guarded by the executor's lock."""

    task: Task
    importance: Floats | None
    remaining: int
    sha256: str = ""
    seconds: list[float] = field(default_factory=list)
    written: int = 0


@dataclass(frozen=True)
class _Item:
    state: _Progress
    first: int
    rows: int
    raw: Bytes
    buffer: Bytes


class Executor:
    """Runs tasks against open output descriptors. See the module docstring for who does what."""

    def __init__(
        self,
        model: GGUFModel,
        outputs: Sequence[Sink],
        tasks: Sequence[Task],
        importance: Importance | None,
        threads: int,
        encoder: Encoder,
        emit: Emit,
        stop: threading.Event,
        hashes: DataHashes | None = None,
    ) -> None:
        self.hashes = hashes
        self.tasks, self.importance, self.threads = tasks, importance, max(1, threads)
        self.model, self.outputs, self.emit, self.stop = model, outputs, emit, stop
        self.encoder = encoder
        self.rows_encoded = 0
        self.bytes_read = 0
        self._work_done = 0.0
        self._lock = threading.Lock()
        self._error: ApexError | None = None
        self._halt = threading.Event()
        size = item_bytes(tasks)
        self._buffers: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        for _ in range(2 * self.threads + 2):
            self._buffers.put(np.empty(size, np.uint8))
        self._ready: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[_Progress] = queue.SimpleQueue()

    def run(self) -> Json:
        """Do all tasks; returns counters. Raises the first error, or Stopped."""
        kinds = {TYPES[w.kind] for t in self.tasks for w in t.writes if w.kind != t.kind}
        self.encoder.prepare(sorted(kinds, key=lambda kind: kind.id))
        crew = [threading.Thread(target=self._guard, args=(self._read,), daemon=True)]
        crew += [threading.Thread(target=self._guard, args=(self._encode,), daemon=True) for _ in range(self.threads)]
        for thread in crew:
            thread.start()
        try:
            self._report()
        finally:
            self._halt.set()
            for _ in range(self.threads):
                self._ready.put(None)
            self._buffers.put(np.empty(0, np.uint8))
            for thread in crew:
                thread.join(timeout=30)
        if self._error is not None:
            raise self._error
        return {"bytes_read": self.bytes_read, "rows_encoded": self.rows_encoded}

    def _guard(self, body: Callable[[], None]) -> None:
        """Turn any failure of a thread into the job's error."""
        try:
            body()
        except ApexError as error:
            self._fail(error)
        except MemoryError:
            self._fail(ResourceError("out of memory", hint="fewer threads (-j) need less"))
        except Exception as error:
            self._fail(NativeError(f"{type(error).__name__}: {error}"))

    def _fail(self, error: ApexError) -> None:
        with self._lock:
            self._error = self._error or error
        self._halt.set()

    def _read(self) -> None:
        """Reader thread: source bytes into free buffers, in task order, hashed on the way."""
        state: _Progress | None = None
        digest = hashlib.sha256()
        for task, first, rows in items(self.tasks, self.threads):
            if state is None or state.task is not task:
                state = _Progress(task, self._weights(task), task.rows, seconds=[0.0] * len(task.writes))
                digest = hashlib.sha256()
            buffer = self._buffers.get()
            if self._halt.is_set():
                return
            row_bytes = task.source_type.row_bytes(task.row_length)
            raw = buffer[: rows * row_bytes]
            self.model.read_into(self.model.tensors[task.name], first * row_bytes, raw.data)
            self.bytes_read += raw.nbytes
            digest.update(raw.data)
            if first + rows == task.rows:
                state.sha256 = digest.hexdigest()
            self._ready.put(_Item(state, first, rows, raw, buffer))

    def _weights(self, task: Task) -> Floats | None:
        if self.importance is None or not any(w.importance for w in task.writes):
            return None
        return self.importance.for_tensor(task)

    def _encode(self) -> None:
        """Encoder thread: items until the None that ends them."""
        floats, blocks = np.empty(0, np.float32), np.empty(0, np.uint8)
        decoders: dict[str, Decoder] = {}
        while (item := self._ready.get()) is not None and not self._halt.is_set():
            task = item.state.task
            weights = item.rows * task.row_length
            if floats.size < weights:
                floats, blocks = np.empty(weights, np.float32), np.empty(weights * 4, np.uint8)
            values: Floats | None = None
            spent = [0.0] * len(task.writes)
            written = 0
            for number, write in enumerate(task.writes):
                kind = TYPES[write.kind]
                start = time.perf_counter()
                if write.kind == task.kind:
                    data = item.raw
                    self._check_copy(kind, item)
                else:
                    if values is None:
                        decoder = decoders.get(task.kind) or decoders.setdefault(task.kind, Decoder(task.source_type))
                        values = self._decode(decoder, item, floats[:weights])
                    data = blocks[: item.rows * kind.row_bytes(task.row_length)]
                    importance = item.state.importance if write.importance else None
                    self._encode_rows(kind, item, values, importance, data)
                row_bytes = data.nbytes // item.rows
                for file, offset in write.places:
                    self.outputs[file].write(data, offset + item.first * row_bytes)
                    written += data.nbytes
                spent[number] = time.perf_counter() - start
            self._buffers.put(item.buffer)
            self._account(item, spent, written)

    def _decode(self, decoder: Decoder, item: _Item, out: Floats) -> Floats:
        try:
            return decoder.decode(item.raw, out)
        except NotFiniteError as error:
            raise self._located(error, item, error.index // item.state.task.row_length) from None

    def _check_copy(self, kind: GGMLType, item: _Item) -> None:
        address, size = item.raw.ctypes.data, item.raw.nbytes
        if kind.kind == "int" or ggml().validate(kind, address, size):
            return
        step = size // item.rows
        row = next(r for r in range(item.rows) if not ggml().validate(kind, address + r * step, step))
        what = "a value is not finite" if kind.kind == "float" else f"not valid {kind.name} blocks"
        raise self._located(InputError(what), item, row)

    def _located(self, error: InputError, item: _Item, row: int) -> InputError:
        return InputError(
            f"{self.model.path.name}: tensor {item.state.task.name}, row {item.first + row}: {error.message}",
            hint="convert the model again; a file with such values cannot be quantized",
        )

    def _encode_rows(self, kind: GGMLType, item: _Item, values: Floats, importance: Floats | None, out: Bytes) -> None:
        """Encode an item, slice by slice: rows of different experts have different importance."""
        task = item.state.task
        rows = values.reshape(item.rows, task.row_length)
        row_bytes = kind.row_bytes(task.row_length)
        start = 0
        while start < item.rows:
            if importance is None:
                stop, channel = item.rows, None
            else:
                index, within = divmod(item.first + start, task.rows_per_slice)
                stop = min(item.rows, start + task.rows_per_slice - within)
                channel = importance[index]
            try:
                self.encoder.encode(kind, rows[start:stop], channel, out[start * row_bytes : stop * row_bytes])
            except InputError as error:
                raise self._located(error, item, start) from None
            start = stop

    def _account(self, item: _Item, spent: list[float], written: int) -> None:
        state = item.state
        with self._lock:
            state.seconds = [a + b for a, b in zip(state.seconds, spent, strict=True)]
            state.written += written
            state.remaining -= item.rows
            self._work_done += state.task.work * item.rows / state.task.rows
            self.rows_encoded += item.rows * sum(w.kind != state.task.kind for w in state.task.writes)
            last = state.remaining == 0
        if last:
            self._finished.put(state)

    def _report(self) -> None:
        """Main thread: progress, durability, and the news of finished tensors."""
        pending: list[_Progress] = []
        open_tasks, unsynced, synced_at = len(self.tasks), 0, time.monotonic()
        while open_tasks:
            try:
                state = self._finished.get(timeout=_TICK)
                pending.append(state)
                open_tasks -= 1
                if self.hashes is not None:
                    self.hashes.finished(state.task.name)
                unsynced += state.written
            except queue.Empty:
                state = None
            self._tick(pending[-1].task.name if pending else "")
            stopping = self.stop.is_set() or self._halt.is_set()
            late = time.monotonic() - synced_at > SYNC_SECONDS
            if pending and (unsynced > SYNC_BYTES or late or stopping or not open_tasks):
                self._sync(pending)
                pending, unsynced, synced_at = [], 0, time.monotonic()
            if self._halt.is_set():
                return
            if stopping:
                raise Stopped

    _last_tick = 0.0

    def _tick(self, name: str) -> None:
        now = time.monotonic()
        if now - self._last_tick >= _TICK:
            self._last_tick = now
            self.emit({"event": "progress", "work": self._work_done, "bytes": self.bytes_read, "tensor": name})

    def _sync(self, states: list[_Progress]) -> None:
        touched = {file for state in states for write in state.task.writes for file, _ in write.places}
        for file in touched:
            self.outputs[file].sync()
        self.emit(
            {
                "event": "done",
                "tensors": [{"name": s.task.name, "sha256": s.sha256, "seconds": s.seconds} for s in states],
            }
        )


def run(payload: Json, emit: Emit, stop: threading.Event, fds: Sequence[int]) -> Json:
    """Entry point of the child process; `payload` as job.py makes it, `fds` one for each of payload["names"]."""
    importance: Importance | None = None
    if payload["imatrix"] is not None:
        importance = applied(Importance.read(Path(payload["imatrix"])), payload.get("prior", NO_PRIOR))
    sinks: list[Sink] = [
        Comparison(fd, name) if payload.get("compare") else PartialFile(fd, name)
        for fd, name in zip(fds, payload["names"], strict=True)
    ]
    sections = [Section.from_json(section) for section in payload.get("sections", [])]
    hashes = DataHashes(fds, sections)
    executor = Executor(
        open_model(payload["source"]),
        sinks,
        [Task.from_json(task) for task in payload["tasks"]],
        importance,
        payload["threads"],
        GgmlEncoder(),
        emit,
        stop,
        hashes,
    )
    try:
        result = executor.run()
        data_sha256 = hashes.digests()
    finally:
        hashes.close()
    library = ggml()
    differences = [sink.differences for sink in sinks if isinstance(sink, Comparison)]
    return {
        **result,
        "data_sha256": data_sha256,
        "ggml_version": library.version,
        "ggml_commit": library.commit,
        "differences": differences,
    }
