"""Whole calls of `quantize`: what is refused before any work, what is shared, where things go, what it costs."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apex_quant import merge, plan, quantize, split
from apex_quant.encode import job
from apex_quant.encode.job import make_tasks, source_identity
from apex_quant.encode.output import Output
from apex_quant.encode.quantize import Quantized
from apex_quant.errors import InputError, NativeError, ResourceError, UsageError
from apex_quant.gguf import open_model
from apex_quant.importance import Importance
from apex_quant.recipe.planned import PlanOptions
from tests.helpers.cli import PACKAGE_ROOT, apex
from tests.helpers.imatrix import random_imatrix
from tests.helpers.random_models import write_random_gguf

NOT_FINITE = {"BF16": 0x7FC0, "F16": 0x7C00, "F32": 0xFF800000}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("source") / "tiny-BF16.gguf", "qwen3moe", layers="MM")


@pytest.fixture(scope="module")
def imatrix(source: Path) -> Path:
    path = source.with_name("tiny.imatrix")
    random_imatrix(source).write(path)
    return path


def poke(path: Path, tensor: str, row: int) -> None:
    """Put a NaN or an infinity into a row."""
    with open_model(path) as model:
        info = model.tensors[tensor]
    code = NOT_FINITE[info.type.name]
    with path.open("r+b") as file:
        file.seek(info.offset + row * info.row_bytes)
        file.write(struct.pack("<I" if info.type.name == "F32" else "<H", code))


def data_section(path: Path) -> str:
    with open_model(path) as model:
        start = model.files[0].header_bytes
    return hashlib.sha256(path.read_bytes()[start:]).hexdigest()


def everything(path: Path) -> dict[str, tuple[Any, ...]]:
    """Name -> type, shape and data of a model in any number of files."""
    with open_model(path) as model:
        return {n: (i.type.name, i.shape, model.read(i)) for n, i in model.tensors.items()}


# --- refused ---


@pytest.mark.parametrize(
    ("dtype", "tensor", "row", "tiers"),
    [
        ("BF16", "blk.1.ffn_down_exps.weight", 600, "quality"),
        ("F16", "blk.1.attn_q.weight", 3, "compact"),
        ("F32", "token_embd.weight", 511, "Q4_K_M"),
        ("BF16", "blk.1.ffn_up_exps.weight", 0, "nano"),
        ("BF16", "blk.0.attn_norm.weight", 0, "quality"),
        ("BF16", "output.weight", 8, "keep"),
    ],
)
def test_source_that_is_not_finite(dtype: Any, tensor: str, row: int, tiers: str, tmp_path: Path) -> None:
    """In quantized tensors of K and IQ types and in tensors that are merely copied: one line, exit status 3."""
    path = write_random_gguf(tmp_path / "bad.gguf", "qwen3moe", layers="MM", dtype=dtype)
    random_imatrix(path).write(tmp_path / "m.imatrix")
    poke(path, tensor, row)
    more = ["--leave-output-tensor"] if tiers == "keep" else []
    result = apex(
        "quantize", path, "--tier", "Q8_0" if tiers == "keep" else tiers, "--imatrix", tmp_path / "m.imatrix",
        "-o", tmp_path / "out", *more,
    )  # fmt: skip
    assert result.status == 3, result.err
    error = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert error[0].startswith(f"error: bad.gguf: tensor {tensor}, row {row}: a value is ")
    assert not list((tmp_path / "out").glob("*.gguf"))


def test_importance_that_is_not_finite(source: Path, imatrix: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(imatrix, tmp_path / "bad.imatrix"))
    poke(path, "blk.1.ffn_up_exps.weight.in_sum2", 1)
    with pytest.raises(InputError, match=r"bad\.imatrix: blk\.1\.ffn_up_exps\.weight: sum -inf of channel 0 in row 1"):
        quantize(source, "i-quality", imatrix=path, out=tmp_path)
    assert not list(tmp_path.glob("*.partial"))


def test_importance_of_another_model(source: Path, tmp_path: Path) -> None:
    """Said before anything is begun, although only the last tensor of the model does not fit."""
    other = random_imatrix(source)
    name = "blk.1.ffn_up_exps.weight"
    arrays = {key: (entry.sums, entry.counts) for key, entry in other.entries.items()}
    arrays[name] = (arrays[name][0][:2], arrays[name][1][:2])
    with pytest.raises(InputError, match=f"importance of {name} has 512 values, but .* 768") as caught:
        quantize(source, "i-quality", imatrix=Importance.from_arrays(arrays), out=tmp_path / "out")
    assert caught.value.hint == "the importance matrix was made for another model"
    assert not (tmp_path / "out").exists()


def test_foreign_file(source: Path, tmp_path: Path) -> None:
    """Refused before anything is begun, and with --force replaced only by a complete file."""
    target = tmp_path / "m.gguf"
    target.write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"m\.gguf exists and was not made by this command") as caught:
        quantize(source, "Q8_0", out=target)
    assert "--force" in str(caught.value.hint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]

    bad = Path(shutil.copy(source, tmp_path / "bad.gguf"))
    poke(bad, "blk.1.attn_q.weight", 0)
    with pytest.raises(InputError, match=r"blk\.1\.attn_q\.weight"):
        quantize(bad, "Q8_0", out=target, force=True)
    assert target.read_bytes() == b"precious"

    made = quantize(source, "Q8_0", out=target, force=True).outputs[0]
    assert target.stat().st_size == made.bytes


def test_one_foreign_file_among_several(source: Path, tmp_path: Path) -> None:
    (tmp_path / plan(source, "compact").file_name).write_bytes(b"precious")
    with pytest.raises(UsageError, match="Compact"):
        quantize(source, ["Q8_0", "compact"], out=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("how", ["same", "link", "hard link", "shard", "matrix"])
def test_writing_onto_what_is_read(source: Path, imatrix: Path, tmp_path: Path, how: str) -> None:
    """Not even with --force."""
    model = Path(shutil.copy(source, tmp_path / "m.gguf"))
    matrix = Path(shutil.copy(imatrix, tmp_path / "i.gguf"))
    target, options = model, PlanOptions()
    if how == "link":
        target = tmp_path / "l.gguf"
        target.symlink_to(model)
    elif how == "hard link":
        target = tmp_path / "h.gguf"
        target.hardlink_to(model)
    elif how == "shard":
        shards = split(model, tmp_path / "s", 3_000_000)
        assert len(shards) > 1
        model, target, options = shards[1], tmp_path / "s.gguf", PlanOptions(keep_split=True)
    elif how == "matrix":
        target = matrix
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="is what is read"):
        quantize(model, "Q8_0", imatrix=matrix, out=target, options=options, force=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folders(source: Path, tmp_path: Path) -> None:
    made = quantize(source, "Q8_0", out=tmp_path / "a" / "b").outputs[0]
    assert made.path == tmp_path / "a" / "b" / "tiny-Q8_0.gguf"
    with pytest.raises(UsageError, match="cannot be made a folder"):
        quantize(source, "Q8_0", out=made.path / "c")
    with pytest.raises(UsageError, match="names one file, but 2 outputs"):
        quantize(source, ["Q8_0", "Q4_0"], out=tmp_path / "x.gguf")
    with pytest.raises(UsageError, match="same name"):
        quantize(source, ["Q4_K", "Q4_K_M"], out=tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(source: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ResourceError, match="Permission denied"):
        quantize(source, "Q8_0", out=tmp_path / "m.gguf")


def test_folder_that_refuses_files(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which nobody may create files, root neither."""
    usage = shutil.disk_usage("/")._replace(free=1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match=r"m\.gguf\.partial: cannot be opened"):
        quantize(source, "Q8_0", out="/proc/self/m.gguf")


@pytest.mark.parametrize("force", [False, True])
def test_not_enough_disk_is_said_before(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    target = tmp_path / "m.gguf"
    if force:  # the old file stays until the new one is complete: it makes no room
        target.write_bytes(b"x" * 10_000_000)
    size = plan(source, "Q8_0").total_bytes
    usage = shutil.disk_usage(tmp_path)._replace(free=size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match=f"{size} bytes needed, {size - 1} free"):
        quantize(source, "Q8_0", out=target, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"] * force
    usage = usage._replace(free=size)
    assert quantize(source, "Q8_0", out=target, force=force).outputs[0].bytes == size
    usage = usage._replace(free=0)
    assert quantize(source, "Q8_0", out=target).outputs[0].unchanged


def test_file_size_limit(source: Path, tmp_path: Path) -> None:
    """A limit for the whole command is met when the files get their size: nothing is encoded."""
    code = (
        "import resource, sys; from apex_quant.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY)); main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "quantize", str(source), "--tier", "Q8_0", "-o", str(tmp_path)],
        capture_output=True, text=True, check=False, env=dict(os.environ, PYTHONPATH=str(PACKAGE_ROOT)),
    )  # fmt: skip
    assert done.returncode == 4
    assert "File too large" in done.stderr
    assert "hint: free some space, or raise the quota or file size limit" in done.stderr
    assert quantize(source, "Q8_0", out=tmp_path).outputs[0].path.exists()


def test_library_that_dies(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An abort in the encoder is an error that names the step, the signal and the library's last line."""
    (tmp_path / "abort_executor.py").write_text(
        "import os\ndef run(payload, emit, stop, fds):\n    os.write(2, b'GGML_ASSERT(x) failed\\n')\n    os.abort()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(job, "EXECUTOR", "abort_executor")
    with open_model(source) as model:
        plans = [(plan(model, "Q8_0"), tmp_path / "m.gguf")]
        with pytest.raises(
            NativeError, match=r"encoding tiny-BF16\.gguf ended with signal SIGABRT; .*GGML_ASSERT\(x\)"
        ):
            job.run_job(model, plans, imatrix=None, imatrix_sha256=None, threads=1)
    assert not (tmp_path / "m.gguf").exists()


# --- shared work ---


def distinct(made: Quantized, weighted: dict[str, bool]) -> int:
    """Rows of all distinct (tensor, type, importance) of the outputs, counted from their plans alone."""
    rows = {}
    for one in made.plans:
        for t in one.tensors:
            if t.type is not t.source_type:
                uses = weighted[one.tier] and t.type.imatrix != "unused"
                rows[t.source, t.type, uses] = t.weights // t.shape[0]
    return sum(rows.values())


def test_everything_is_encoded_once(source: Path, imatrix: Path, tmp_path: Path) -> None:
    tiers = ["quality", "i-quality", "compact", "i-compact", "Q8_0", "Q6_K"]
    weighted = {"quality": False, "compact": False, "i-quality": True, "i-compact": True, "Q8_0": True, "Q6_K": True}
    together = quantize(source, tiers, imatrix=imatrix, out=tmp_path / "together")
    assert together.job is not None
    assert together.job.rows_encoded == together.job.rows_distinct == distinct(together, weighted)
    with open_model(source) as model:
        size = sum(info.nbytes for info in model.tensors.values())
    assert together.job.bytes_read == together.job.source_bytes == size
    # alone, each output has the same bytes
    for tier, output in zip(tiers, together.outputs, strict=True):
        alone = quantize(source, tier, imatrix=imatrix, out=tmp_path / "alone", threads=1).outputs[0]
        assert alone.sha256 == output.sha256 == hashlib.sha256(alone.path.read_bytes()).hexdigest()
        assert output.bytes == output.path.stat().st_size == output.plan.total_bytes


def test_later_outputs_use_only_what_they_lack(source: Path, tmp_path: Path) -> None:
    quantize(source, "quality", out=tmp_path)
    both = quantize(source, ["quality", "compact"], out=tmp_path)
    assert [output.unchanged for output in both.outputs] == [True, False]
    assert both.job is not None
    assert both.job.rows_encoded == distinct(quantize(source, "compact", dry_run=True), {"compact": False})


def test_importance_makes_a_difference_only_where_it_is_used(source: Path, imatrix: Path, tmp_path: Path) -> None:
    with open_model(source) as model, Importance.read(imatrix) as matrix:
        outputs = [
            Output(plan(model, tier, imatrix=used), tmp_path / f"{n}.gguf", source_identity(model, None))
            for n, (tier, used) in enumerate([("quality", None), ("i-quality", matrix)])
        ]
        for task in make_tasks(model, outputs):
            wanted = {(w.kind, w.importance): sorted(w.places) for w in task.writes}
            for (kind, importance), places in wanted.items():
                if kind == task.kind or kind == "Q8_0":
                    assert not importance
                    assert len(places) == 2
                else:
                    assert len(places) == 1
                    assert importance == (places[0][0] == 1)


def test_importance_as_an_object(source: Path, imatrix: Path, tmp_path: Path) -> None:
    with Importance.read(imatrix) as matrix:
        a = quantize(source, "i-compact", imatrix=matrix, out=tmp_path / "a").outputs[0]
    b = quantize(source, "i-compact", imatrix=imatrix, out=tmp_path / "b").outputs[0]
    assert data_section(a.path) == data_section(b.path)


# --- other forms of the same ---


def test_equal_runs_give_equal_files(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere, later, under another name, with other threads: the same bytes."""
    a = quantize(source, "compact", out=tmp_path / "a" / "one.gguf", threads=1).outputs[0]
    moved = tmp_path / "b" / "tiny-BF16.gguf"
    moved.parent.mkdir()
    shutil.copyfile(source, moved)
    monkeypatch.chdir(tmp_path / "b")
    b = quantize("tiny-BF16.gguf", "compact", out="two.gguf", threads=3).outputs[0]
    assert a.path.read_bytes() == b.path.read_bytes()


def test_shards_hold_the_same(source: Path, tmp_path: Path) -> None:
    whole = quantize(source, "compact", out=tmp_path / "whole.gguf").outputs[0]
    cut = quantize(source, "compact", out=tmp_path / "cut.gguf", options=PlanOptions(split_max_size=300_000)).outputs[0]
    assert len(cut.files) > 3
    assert [file.path.name for file in cut.files][:1] == [f"cut-00001-of-{len(cut.files):05d}.gguf"]
    assert everything(cut.path) == everything(whole.path)
    assert cut.bytes == cut.plan.total_bytes == sum(file.path.stat().st_size for file in cut.files)
    assert merge(cut.files[2].path, tmp_path / "merged.gguf").exists()
    assert data_section(tmp_path / "merged.gguf") == data_section(whole.path)
    large = quantize(source, "compact", out=tmp_path / "l.gguf", options=PlanOptions(split_max_size=1 << 40)).outputs[0]
    assert large.sha256 == whole.sha256


def test_keep_split(source: Path, tmp_path: Path) -> None:
    shards = split(source, tmp_path / "s", 1_500_000)
    whole = quantize(source, "compact", out=tmp_path / "whole.gguf").outputs[0]
    kept = quantize(shards[2], "compact", out=tmp_path / "kept.gguf", options=PlanOptions(keep_split=True)).outputs[0]
    assert len(kept.files) == len(shards)
    assert everything(kept.path) == everything(whole.path)
    for ours, theirs in zip(kept.files, shards, strict=True):
        with open_model(ours.path) as a, open_model(theirs) as b:
            assert [i.name for i in a.tensors.values() if a.files[i.file].path == ours.path] == [
                i.name for i in b.tensors.values() if b.files[i.file].path == theirs
            ]
    # from shards into one file: the same data
    one = quantize(shards[0], "compact", out=tmp_path / "one.gguf").outputs[0]
    assert data_section(one.path) == data_section(whole.path)


def test_pruned_layers(tmp_path: Path) -> None:
    source = write_random_gguf(tmp_path / "m-BF16.gguf", "qwen3moe", layers="MMMM")
    whole = quantize(source, "Q8_0", out=tmp_path / "whole.gguf").outputs[0]
    pruned = quantize(source, "Q8_0", out=tmp_path / "pruned.gguf", options=PlanOptions(prune_layers=[1, 2])).outputs[0]
    before, after = everything(whole.path), everything(pruned.path)
    assert {n: v for n, v in after.items() if not n.startswith("blk.1.")} == {
        n: v for n, v in before.items() if not n.startswith(("blk.1.", "blk.2.", "blk.3."))
    }
    for name, found in after.items():
        if name.startswith("blk.1."):
            assert found == before[name.replace("blk.1.", "blk.3.")]
    with open_model(pruned.path) as model:
        assert model.get("{arch}.block_count") == 2
    again = quantize(source, "Q8_0", out=tmp_path / "pruned.gguf", options=PlanOptions(prune_layers=[1, 2])).outputs[0]
    assert again.unchanged


def test_from_quantized(tmp_path: Path) -> None:
    source = write_random_gguf(tmp_path / "m-Q8_0.gguf", "qwen3moe", layers="M", dtype="Q8_0")
    with pytest.raises(InputError, match="already quantized") as caught:
        quantize(source, "compact", out=tmp_path)
    assert "--allow-requantize" in str(caught.value.hint)
    made = quantize(source, "compact", out=tmp_path, options=PlanOptions(allow_requantize=True)).outputs[0]
    assert any(kind == "Q4_K" for kind, _, _ in everything(made.path).values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model of 340 MB in a process that may not hold it: what both processes peak at stays far below."""
    source = write_random_gguf(
        tmp_path / "m-BF16.gguf", "qwen3moe", layers="M" * 4, sparse=True, experts=110, ff_exp=512
    )
    assert source.stat().st_size > 330_000_000
    # VmHWM and not ru_maxrss, which on Linux begins with the memory of the process that forked
    code = (
        "import re, resource, sys; from apex_quant import quantize;"
        "quantize(sys.argv[1], 'Q8_0', out=sys.argv[2], threads=2);"
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1],"
        " resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "out.gguf")],
        capture_output=True, text=True, check=True, env=dict(os.environ, PYTHONPATH=str(PACKAGE_ROOT)),
    )  # fmt: skip
    parent, child = (int(word) * 1024 for word in done.stdout.split())
    assert parent < 150_000_000
    assert child < 150_000_000
    with open_model(tmp_path / "out.gguf") as model:
        info = model.tensors["blk.3.ffn_down_exps.weight"]
        assert not np.frombuffer(model.read(info, 0, info.row_bytes), np.uint8).any()
