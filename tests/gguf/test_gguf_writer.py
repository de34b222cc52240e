"""layout() and shard_layouts() against the library's reader and writer, and PyPI gguf's reader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apex_quant.errors import UsageError
from apex_quant.gguf import (
    TYPES,
    Layout,
    TensorSpec,
    Value,
    ValueType,
    layout,
    open_model,
    shard_groups,
    shard_layouts,
    shard_name,
)
from tests.gguf.ggml_oracle import parse

METADATA = {
    "general.architecture": Value.string("llama"),
    "apex.source.sha256": Value.string("0" * 64),
    "llama.block_count": Value.u32(2),
    "tokenizer.ggml.tokens": Value.array(ValueType.STRING, ["a", "", "é", "\udcff"]),
    "tokenizer.ggml.scores": Value.array(ValueType.FLOAT32, [0.5, -1.0]),
    "some.flag": Value.bool_(True),
    "some.flags": Value.array(ValueType.BOOL, [True, False]),
}


def specs(*rows: tuple[str, tuple[int, ...], str]) -> list[TensorSpec]:
    return [TensorSpec(name, shape, TYPES[kind]) for name, shape, kind in rows]


TENSORS = specs(
    ("b", (256, 3), "Q4_K"), ("a", (5,), "F32"), ("c", (32, 2, 2), "Q8_0"), ("d", (3, 1, 2), "F16"), ("e", (1,), "I8")
)


def save(plan: Layout, path: Path) -> Path:
    with path.open("wb") as file:
        file.write(plan.header)
        file.truncate(plan.total_bytes)
    return path


tensor_lists = st.lists(
    st.tuples(
        st.sampled_from(sorted(TYPES)),
        st.integers(1, 4),
        st.lists(st.integers(1, 5), max_size=3),
    ),
    min_size=1,
    max_size=6,
).map(
    lambda rows: [
        TensorSpec(f"t{i}", (TYPES[kind].block * blocks, *rest), TYPES[kind])
        for i, (kind, blocks, rest) in enumerate(rows)
    ]
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=tensor_lists, alignment=st.sampled_from([None, 8, 32, 64, 4096]))
def test_library_reads_and_writes_the_same(tmp_path: Path, tensors: list[TensorSpec], alignment: int | None) -> None:
    """Same tensors, offsets and keys as the library reads; the header it would write is ours, byte for byte."""
    plan = layout(METADATA, tensors, alignment)
    path = save(plan, tmp_path / "x.gguf")
    theirs = parse(path, rewrite=tmp_path / "y.gguf")
    assert theirs is not None
    assert (theirs.alignment, theirs.data_start) == (alignment or 32, plan.data_start)
    assert theirs.tensors == {t.name: (plan.offsets[t.name], t.type.id, t.nbytes) for t in tensors}
    assert (tmp_path / "y.gguf").read_bytes() == plan.header
    with open_model(path) as model:
        assert {t.name: t.offset for t in model.tensors.values()} == plan.offsets
        assert layout(model.metadata, list(model.tensors.values())) == plan


def test_pypi_gguf_reads_the_same(tmp_path: Path) -> None:
    plan = layout({k: v for k, v in METADATA.items() if "tokens" not in k}, TENSORS)
    reader = gguf.GGUFReader(save(plan, tmp_path / "x.gguf"))
    assert {t.name: t.data_offset for t in reader.tensors} == plan.offsets
    assert {t.name: t.n_bytes for t in reader.tensors} == {t.name: t.nbytes for t in TENSORS}
    assert reader.get_field("llama.block_count").contents() == 2


def test_deterministic_and_padded_at_the_end() -> None:
    plan = layout(METADATA, TENSORS)
    assert plan == layout(dict(METADATA), list(TENSORS))
    assert plan.total_bytes % 32 == 0
    assert plan.total_bytes == plan.offsets["e"] + 32
    assert plan.data_start == len(plan.header)
    assert len(plan.header) % 32 == 0


def test_reserved_value_is_filled_in_place(tmp_path: Path) -> None:
    plan = layout(METADATA, TENSORS)
    offset, length = plan.value_span("apex.source.sha256")
    assert (length, plan.header[offset : offset + length]) == (64, b"0" * 64)
    path = save(plan, tmp_path / "x.gguf")
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"f" * 64)
    with open_model(path) as model:
        assert model.get("apex.source.sha256") == "f" * 64
        assert {k: v for k, v in model.metadata.items() if "sha" not in k} == {
            k: v for k, v in METADATA.items() if "sha" not in k
        }


def test_alignment_is_stated() -> None:
    assert b"general.alignment" not in layout(METADATA, TENSORS).header
    assert b"general.alignment" in layout(METADATA, TENSORS, 64).header
    with_key = METADATA | {"general.alignment": Value.u32(128)}
    assert layout(with_key, TENSORS).alignment == 128
    assert layout(with_key, TENSORS, 32).alignment == 32


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (specs(("a", (4,), "F32"), ("a", (4,), "F32")), "two tensors"),
        (specs(("a", (100,), "Q4_K")), "multiple"),
        (specs(("a", (1, 1, 1, 1, 1), "F32")), "shape"),
        (specs(("a", (4, 0), "F32")), "shape"),
        (specs(("n" * 64, (4,), "F32")), "name"),
        (specs(("", (4,), "F32")), "name"),
        (specs(("a\n", (4,), "F32")), "name"),
        ([TensorSpec(f"t{i}", (1,), TYPES["F32"]) for i in range(100_001)], "more than a reader accepts"),
    ],
)
def test_refuses_what_the_reader_would(tensors: list[TensorSpec], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        layout({}, tensors)


@pytest.mark.parametrize("alignment", [0, 3, -32, 1 << 21])
def test_refuses_alignment(alignment: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        layout({}, [], alignment)


@pytest.mark.parametrize("key", ["", "k" * 256, "a\0b"])
def test_refuses_key(key: str) -> None:
    with pytest.raises(ValueError, match="cannot be a key"):
        layout({key: Value.u8(1)}, [])


def rows(sizes: Sequence[int]) -> list[TensorSpec]:
    """Tensors of these many bytes."""
    return [TensorSpec(f"t{i}", (size,), TYPES["I8"]) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "limit", "groups"),
    [
        # as llama-gguf-split of the pinned release cuts them: sums of sizes padded to 32, `>` opens a shard
        ([32, 32, 32], 96, [0, 0, 0]),
        ([32, 32, 32], 95, [0, 0, 1]),
        ([33, 31], 96, [0, 0]),
        ([33, 33], 96, [0, 1]),
        ([32, 500, 32], 64, [0, 1, 2]),
        ([32, 500, 32, 32], 64, [0, 1, 2, 2]),
        ([500, 32], 64, [0, 1]),  # stock refuses this one
        ([], 64, []),
    ],
)
def test_shard_rule(sizes: list[int], limit: int, groups: list[int]) -> None:
    assert shard_groups(rows(sizes), limit) == groups


def test_shards_open_as_one(tmp_path: Path) -> None:
    plans = shard_layouts(METADATA, TENSORS, max_bytes=500)
    paths = [save(plan, tmp_path / shard_name("m", i, len(plans))) for i, plan in enumerate(plans)]
    assert [path.name for path in paths] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    for i, path in enumerate(paths):
        theirs = parse(path)
        assert theirs is not None
        assert theirs.tensors.keys() == plans[i].offsets.keys()
        assert {theirs.keys[f"split.{k}"][0] for k in ("no", "count")} == {ValueType.UINT16}
        assert theirs.keys["split.tensors.count"][0] == ValueType.INT32
        with open_model(path) as model:
            assert dict(model.metadata) == METADATA
            assert list(model.tensors) == [t.name for t in TENSORS]
            assert [t.file for t in model.tensors.values()] == shard_groups(TENSORS, 500)
            assert [f.metadata["split.no"].data for f in model.files] == [0, 1]
            for info in model.tensors.values():
                assert info.offset == plans[info.file].offsets[info.name]
                assert model.read(info) == bytes(info.nbytes)


def test_groups_keep_a_given_split() -> None:
    plans = shard_layouts(METADATA, TENSORS, groups=[1, 0, 1, 0, 2])
    assert [list(plan.offsets) for plan in plans] == [["a", "d"], ["b", "c"], ["e"]]
    assert [b"block_count" in plan.header for plan in plans] == [True, False, False]


def test_alignment_in_every_shard(tmp_path: Path) -> None:
    plans = shard_layouts(METADATA | {"general.alignment": Value.u32(64)}, TENSORS, max_bytes=500)
    for i, plan in enumerate(plans):
        theirs = parse(save(plan, tmp_path / shard_name("m", i, 2)))
        assert theirs is not None
        assert theirs.alignment == 64


def test_split_keys_of_the_source_are_replaced() -> None:
    old = METADATA | {"split.no": Value.u16(3), "split.count": Value.u16(7)}
    assert shard_layouts(old, TENSORS, max_bytes=500) == shard_layouts(METADATA, TENSORS, max_bytes=500)


def test_too_many_shards() -> None:
    with pytest.raises(UsageError, match="513 shards"):
        shard_layouts({}, rows([32] * 513), max_bytes=32)
    with pytest.raises(ValueError, match="either"):
        shard_layouts({}, TENSORS)
    with pytest.raises(ValueError, match="groups"):
        shard_layouts({}, TENSORS, groups=[0])


def test_numpy_shapes_are_no_problem() -> None:
    shape = tuple(int(n) for n in np.array([256, 2]))
    assert layout({}, [TensorSpec("a", shape, TYPES["Q6_K"])]).total_bytes % 32 == 0
