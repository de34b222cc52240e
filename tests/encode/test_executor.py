"""The executor: each slice is encoded as the library would alone, whatever the parts, threads and outputs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from apex_quant.encode import executor as executor_module
from apex_quant.encode import tasks as tasks_module
from apex_quant.encode.encoder import Bytes, GgmlEncoder
from apex_quant.encode.executor import Executor
from apex_quant.encode.tasks import Task, Write
from apex_quant.errors import InputError, NativeError, ResourceError
from apex_quant.gguf import TYPES, GGMLType, GGUFModel, open_model
from apex_quant.importance import Importance
from apex_quant.native import ggml
from apex_quant.native.worker import Json, Stopped

WIDTH, ROWS, EXPERTS = 256, 5, 3
SHAPE = (EXPERTS, ROWS, WIDTH)
Floats = npt.NDArray[np.float32]


class Memory:
    """A sink that keeps what is written and when, and may fail."""

    def __init__(self, size: int, log: list[Any], fail: Exception | None = None) -> None:
        self.data = np.zeros(size, np.uint8)
        self.times = np.zeros(size, np.uint8)
        self.log, self.fail = log, fail
        self.lock = threading.Lock()

    def write(self, data: Bytes, offset: int) -> None:
        if self.fail is not None:
            raise self.fail
        with self.lock:
            self.data[offset : offset + data.nbytes] = data.reshape(-1)
            self.times[offset : offset + data.nbytes] += 1
            self.log.append(("write", id(self), offset, data.nbytes))

    def sync(self) -> None:
        with self.lock:
            self.log.append(("sync", id(self)))


def write_source(path: Path, tensors: dict[str, tuple[Floats, str]]) -> GGUFModel:
    """A GGUF with these values in these types."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, (values, kind) in tensors.items():
        qtype = gguf.GGMLQuantizationType[kind]
        if kind == "F32":
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_model(path)


def values(seed: int, shape: tuple[int, ...] = SHAPE) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def task(model: GGUFModel, name: str, writes: Sequence[Write]) -> Task:
    info = model.tensors[name]
    return Task(name, info.shape, info.type.name, list(writes))


def run(
    model: GGUFModel,
    sinks: Sequence[Memory],
    tasks: Sequence[Task],
    importance: Importance | None = None,
    *,
    threads: int = 3,
    log: list[Any] | None = None,
    stop: threading.Event | None = None,
) -> Json:
    def emit(event: Json) -> None:
        if log is not None:
            log.append(event)

    stop = stop or threading.Event()
    return Executor(model, sinks, tasks, importance, threads, GgmlEncoder(), emit, stop).run()


def alone(kind: GGMLType, rows: Floats, importance: Floats | None) -> bytes:
    """The library's own bytes for rows that share one importance."""
    rows = np.ascontiguousarray(rows)
    out = np.empty(kind.row_bytes(rows.shape[-1]) * len(rows), np.uint8)
    address = None if importance is None else importance.ctypes.data
    ggml().wait_grid(kind)
    ggml().quantize_chunk(kind.id, rows.ctypes.data, out.ctypes.data, 0, len(rows), rows.shape[-1], address)
    return out.tobytes()


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 4 rows, which do not divide slices of 5."""
    monkeypatch.setattr(tasks_module, "LEAST_WEIGHTS", 4 * WIDTH)
    monkeypatch.setattr(tasks_module, "MOST_WEIGHTS", 4 * WIDTH)


@pytest.mark.parametrize("source", ["F32", "F16", "BF16", "Q8_0"])
def test_slices_with_their_own_importance(source: str, tmp_path: Path) -> None:
    kinds = ["Q4_K", "Q2_K", "IQ4_NL", "IQ3_XXS", "IQ2_XXS", "Q5_1", "F16", "F32"]
    with write_source(tmp_path / "m.gguf", {"w": (values(0), source)}) as model:
        info = model.tensors["w"]
        rng = np.random.default_rng(1)
        sums = rng.lognormal(sigma=2, size=(EXPERTS, WIDTH)).astype(np.float32)
        importance = Importance.from_arrays({"w": (sums, [1] * EXPERTS)})
        raw = np.frombuffer(model.read(info), np.uint8).reshape(*SHAPE[:2], -1)
        decoded = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[source]).reshape(SHAPE)
        sizes = [TYPES[kind].row_bytes(WIDTH) * ROWS * EXPERTS for kind in kinds]
        weighted = [TYPES[kind].imatrix != "unused" for kind in kinds]
        plain = Memory(sizes[0], [])
        sinks = [*(Memory(size + 64, []) for size in sizes), plain]
        writes = [Write(k, w, [(i, 64)]) for i, (k, w) in enumerate(zip(kinds, weighted, strict=True)) if k != source]
        writes.append(Write("Q4_K", False, [(len(kinds), 0)]))
        result = run(model, sinks, [task(model, "w", writes)], importance)
        assert result["rows_encoded"] == len(writes) * ROWS * EXPERTS
        assert result["bytes_read"] == info.nbytes
        for kind, sink, use in zip(kinds, sinks, weighted, strict=False):
            if kind == source:
                continue
            wanted = b"".join(alone(TYPES[kind], decoded[e], sums[e] if use else None) for e in range(EXPERTS))
            assert sink.data[64:].tobytes() == wanted, kind
            assert (sink.times[64:] == 1).all()
            assert not sink.times[:64].any()
        assert plain.data.tobytes() == alone(TYPES["Q4_K"], decoded.reshape(-1, WIDTH), None)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 9])
def test_part_boundaries(rows: int, tmp_path: Path) -> None:
    with write_source(tmp_path / "m.gguf", {"w": (values(rows, (rows, WIDTH)), "F32")}) as model:
        sink = Memory(TYPES["Q6_K"].row_bytes(WIDTH) * rows, [])
        run(model, [sink], [task(model, "w", [Write("Q6_K", False, [(0, 0)])])])
        assert sink.data.tobytes() == alone(TYPES["Q6_K"], values(rows, (rows, WIDTH)), None)
        assert (sink.times == 1).all()


def test_rows_longer_than_a_part(tmp_path: Path) -> None:
    shape = (3, 8 * WIDTH)
    with write_source(tmp_path / "m.gguf", {"w": (values(7, shape), "BF16")}) as model:
        sink = Memory(TYPES["Q4_K"].row_bytes(shape[1]) * 3, [])
        run(model, [sink], [task(model, "w", [Write("Q4_K", False, [(0, 0)])])])
        assert (sink.times == 1).all()


def test_copies_and_several_places(tmp_path: Path) -> None:
    """A copy is the source's bytes; an encoding is made once however many files want it."""
    tensors = {"a": (values(0), "BF16"), "norm": (values(1, (WIDTH,)), "F32")}
    with write_source(tmp_path / "m.gguf", tensors) as model:
        size = model.tensors["a"].nbytes
        sinks = [Memory(2 * size, []) for _ in range(3)]
        tasks = [
            task(model, "a", [Write("BF16", False, [(0, 0), (1, 32)]), Write("Q8_0", False, [(2, 0), (1, size + 32)])]),
            task(model, "norm", [Write("F32", False, [(0, size), (2, size)])]),
        ]
        result = run(model, sinks, tasks)
        raw, norm = model.read(model.tensors["a"]), model.read(model.tensors["norm"])
        packed = alone(TYPES["Q8_0"], gguf.quants.dequantize(
            np.frombuffer(raw, np.uint8).reshape(-1, 2 * WIDTH), gguf.GGMLQuantizationType.BF16), None)  # fmt: skip
        assert sinks[0].data[:size].tobytes() == raw
        assert sinks[1].data[32 : size + 32].tobytes() == raw
        assert sinks[2].data[: len(packed)].tobytes() == packed
        assert sinks[1].data[size + 32 : size + 32 + len(packed)].tobytes() == packed
        assert (
            sinks[0].data[size : size + len(norm)].tobytes() == sinks[2].data[size : size + len(norm)].tobytes() == norm
        )
        assert result["rows_encoded"] == ROWS * EXPERTS
        assert result["bytes_read"] == size + len(norm)


def test_reported_only_when_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a tensor is told to be done, all its bytes are written, and each of its files synced after that."""
    monkeypatch.setattr(executor_module, "SYNC_BYTES", 3000)
    monkeypatch.setattr(executor_module, "_TICK", 0.0)
    names = [f"t{n}" for n in range(12)]
    log: list[Any] = []
    with write_source(tmp_path / "m.gguf", {name: (values(n), "BF16") for n, name in enumerate(names)}) as model:
        size = TYPES["Q8_0"].row_bytes(WIDTH) * ROWS * EXPERTS
        sinks = [Memory(size * len(names), log) for _ in range(3)]
        tasks = [
            task(model, name, [Write("Q8_0", False, [(n % 3, n * size), ((n + 1) % 3, n * size)])])
            for n, name in enumerate(names)
        ]
        run(model, sinks, tasks, log=log)
    told = 0
    events = [i for i, entry in enumerate(log) if isinstance(entry, dict) and entry["event"] == "done"]
    assert len(events) > 1
    writes = [(i, entry) for i, entry in enumerate(log) if isinstance(entry, tuple) and entry[0] == "write"]
    for i in events:
        for tensor in log[i]["tensors"]:
            n = names.index(tensor["name"])
            for place in (n % 3, (n + 1) % 3):
                sink = id(sinks[place])
                mine = [j for j, e in writes if e[1] == sink and n * size <= e[2] < (n + 1) * size]
                synced = [j for j, e in enumerate(log[:i]) if e == ("sync", sink)]
                assert sum(log[j][3] for j in mine) == size
                assert max(mine) < max(synced) < i
            told += 1
    assert told == len(names)


@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["Q4_K", "IQ3_XXS", "IQ2_XXS", "copy"])
def test_value_that_is_not_finite(source: str, bad: float, kind: str, tmp_path: Path) -> None:
    """Named by tensor and row, before any encoder sees it (some would end the process)."""
    array = values(3)
    array[2, 1, 77] = bad  # row 11 of 15, in the third part
    with write_source(tmp_path / "m.gguf", {"blk.0.w": (array, source)}) as model:
        sink = Memory(model.tensors["blk.0.w"].nbytes, [])
        write = Write(source if kind == "copy" else kind, kind == "IQ2_XXS", [(0, 0)])
        importance = Importance.from_arrays({"blk.0.w": (np.ones((EXPERTS, WIDTH)), [1] * EXPERTS)})
        what = "a value is not finite" if kind == "copy" else f"a value is {bad}"
        with pytest.raises(InputError, match=f"m.gguf: tensor blk.0.w, row 11: {what}") as caught:
            run(model, [sink], [task(model, "blk.0.w", [write])], importance, threads=1)
        assert caught.value.hint


def test_damaged_blocks_are_not_copied(tmp_path: Path) -> None:
    with write_source(tmp_path / "m.gguf", {"w": (values(3), "Q8_0")}) as model:
        info = model.tensors["w"]
    with (tmp_path / "m.gguf").open("r+b") as file:
        file.seek(info.offset + 9 * info.row_bytes + 34)
        file.write(b"\x00\x7e")  # the scale of a block: a half-precision NaN
    with open_model(tmp_path / "m.gguf") as model:
        for kind in ("Q8_0", "Q4_K"):
            with pytest.raises(InputError, match="tensor w, row 9: "):
                run(model, [Memory(info.nbytes, [])], [task(model, "w", [Write(kind, False, [(0, 0)])])], threads=1)


def test_integers_are_copied_as_they_are(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_tensor("ids", np.full((3, 32), 0x7FC00000, np.int32))  # as floats they would be NaN
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_model(tmp_path / "m.gguf") as model:
        sink = Memory(384, [])
        run(model, [sink], [task(model, "ids", [Write("I32", False, [(0, 0)])])])
        assert sink.data.tobytes() == model.read(model.tensors["ids"])


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "F16"])
def test_finite_values_too_large_for_the_type(kind: str, tmp_path: Path) -> None:
    array = values(4)
    array[1, 3] *= 1e35
    with write_source(tmp_path / "m.gguf", {"w": (array, "F32")}) as model:
        sink = Memory(model.tensors["w"].nbytes, [])
        with pytest.raises(InputError, match=rf"tensor w, row \d+: weights up to .*e\+35 are too large for {kind}"):
            run(model, [sink], [task(model, "w", [Write(kind, False, [(0, 0)])])])


def test_sum_that_overflows_is_not_an_error(tmp_path: Path) -> None:
    """The quick check adds up: huge finite weights make its sum infinite and still are fine."""
    array = np.full((4, WIDTH), 3e38, np.float32)
    with write_source(tmp_path / "m.gguf", {"w": (array, "F32")}) as model:
        sink = Memory(2 * array.size, [])
        run(model, [sink], [task(model, "w", [Write("BF16", False, [(0, 0)])])])


@pytest.mark.parametrize("error", [ResourceError("disk full"), ValueError("a bug"), MemoryError()])
def test_failure_of_a_thread_ends_the_job(error: Exception, tmp_path: Path) -> None:
    tensors = {f"t{n}": (values(n), "BF16") for n in range(8)}
    with write_source(tmp_path / "m.gguf", tensors) as model:
        sinks = [Memory(100_000, []), Memory(100_000, [], fail=error)]
        tasks = [task(model, name, [Write("Q8_0", False, [(name == "t5", 0)])]) for name in tensors]
        wanted = {ResourceError: "disk full", ValueError: "ValueError: a bug", MemoryError: "out of memory"}[
            type(error)
        ]
        before = threading.active_count()
        with pytest.raises(NativeError if isinstance(error, ValueError) else ResourceError, match=wanted):
            run(model, sinks, tasks)
        assert threading.active_count() == before


def test_stop(tmp_path: Path) -> None:
    """Asked to stop, it tells what is done and leaves."""
    tensors = {f"t{n}": (values(n), "BF16") for n in range(8)}
    stop = threading.Event()
    stop.set()
    log: list[Any] = []
    with write_source(tmp_path / "m.gguf", tensors) as model:
        size = TYPES["Q8_0"].row_bytes(WIDTH) * ROWS * EXPERTS
        sink = Memory(size * 8, [])
        tasks = [task(model, name, [Write("Q8_0", False, [(0, n * size)])]) for n, name in enumerate(tensors)]
        with pytest.raises(Stopped):
            run(model, [sink], tasks, log=log, stop=stop)
    for event in log:
        for tensor in event.get("tensors", []) if event["event"] == "done" else []:
            n = list(tensors).index(tensor["name"])
            assert sink.times[n * size : (n + 1) * size].all()


def test_truncated_while_read(tmp_path: Path) -> None:
    with write_source(tmp_path / "m.gguf", {"w": (values(0, (64, WIDTH)), "F32")}) as model:
        with (tmp_path / "m.gguf").open("r+b") as file:
            file.truncate(model.tensors["w"].offset + 40_000)
        with pytest.raises(InputError, match="truncated"):
            run(model, [Memory(100_000, [])], [task(model, "w", [Write("Q8_0", False, [(0, 0)])])])


def test_nothing_to_do(tmp_path: Path) -> None:
    with write_source(tmp_path / "m.gguf", {"w": (values(0), "F32")}) as model:
        assert run(model, [], []) == {"bytes_read": 0, "rows_encoded": 0}


def test_task_crosses_over_as_json() -> None:
    import json

    one = Task("a", (256, 5, 3), "BF16", [Write("Q4_K", True, [(0, 64), (2, 128)]), Write("BF16", False, [(1, 0)])])
    assert Task.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert sum(rows for _, _, rows in tasks_module.items([one], 2)) == one.rows == 15
