"""Killed at any moment, the same command goes on from there and ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apex_quant import plan
from apex_quant.encode.journal import Journal
from apex_quant.encode.quantize import quantize
from apex_quant.errors import BusyError, InputError, ResourceError, UsageError
from apex_quant.gguf import AtomicFile, atomic, open_model
from apex_quant.recipe.planned import Plan, PlanOptions
from tests.helpers.cli import Ran, apex
from tests.helpers.random_models import write_random_gguf

TIERS = ("quality", "compact", "Q8_0")
KILLS = 20


class Bench:
    """A small model, its outputs made without disturbance, and runs that are disturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = write_random_gguf(folder / "tiny-BF16.gguf", "qwen3moe", layers="MM")
        self.plans: dict[str, Plan] = {tier: plan(self.source, tier) for tier in TIERS}
        done = self.run(folder / "reference", count=str(folder / "calls"))
        assert done.status == 0, done.err
        self.calls = {who: int((folder / f"calls.{who}").read_text()) for who in ("parent", "child")}
        self.reference = {path.name: path.read_bytes() for path in (folder / "reference").glob("*.gguf")}
        self.hashes = {row["tier"]: row["sha256"] for row in done.json["outputs"]}
        assert len(self.reference) == len(TIERS)

    def run(self, out: Path, **sabotage: Any) -> Ran:
        return apex(
            "quantize", self.source, "--tier", ",".join(TIERS), "-o", out, "-j", "2", "--json",
            sabotage={"folder": str(self.folder), **sabotage},
        )  # fmt: skip

    def journaled(self, out: Path) -> dict[str, set[str]]:
        """By tier, the tensors that are on disk according to the journals."""
        found = {}
        for tier, one in self.plans.items():
            journal = Journal(out / one.file_name)
            journal.load()
            found[tier] = set(journal.tensors)
        return found

    def check_state(self, out: Path) -> None:
        """Final names hold finished files only; what a journal names is in the partial file, byte for byte."""
        for path in out.glob("*.gguf"):
            assert path.read_bytes() == self.reference[path.name]
        for tier, names in self.journaled(out).items():
            one = self.plans[tier]
            partial = out / (one.file_name + ".partial")
            data = (partial if partial.exists() else out / one.file_name).read_bytes() if names else b""
            for tensor in one.tensors:
                if tensor.name in names:
                    at = one.layouts[0].offsets[tensor.name]
                    wanted = self.reference[one.file_name][at : at + tensor.nbytes]
                    assert data[at : at + tensor.nbytes] == wanted, (tier, tensor.name)

    def rows_left(self, out: Path) -> int:
        """Rows of every distinct (tensor, type) that some output still lacks."""
        done = self.journaled(out)
        left = {
            (t.source, t.type): t.weights // t.shape[0]
            for tier, one in self.plans.items()
            for t in one.tensors
            if t.name not in done[tier] and t.type is not t.source_type
        }
        return sum(left.values())

    def finish(self, out: Path) -> None:
        """Resume undisturbed: equal files, equal hashes, and nothing was encoded twice."""
        left = self.rows_left(out)
        done = quantize(self.source, TIERS, out=out, threads=2)
        assert {path.name: path.read_bytes() for path in out.glob("*.gguf")} == self.reference
        assert {output.tier: output.sha256 for output in done.outputs} == self.hashes
        assert done.job is not None
        assert done.job.rows_encoded == done.job.rows_distinct == left
        assert not list(out.glob("*.partial"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("resume"))


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "out"
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("seed", range(4))
def test_kill_at_random_moments(bench: Bench, tmp_path: Path, seed: int) -> None:
    """Runs killed at random calls, each going on from the mess of the one before: the parent, the child, both."""
    rng = random.Random(seed)
    kills = 0
    rounds = 0
    folder = tmp_path / "out0"
    while kills < KILLS // 4:
        where, whom = rng.choice([("parent", ["self"]), ("child", ["self"]), ("child", ["parent", "self"])])
        result = bench.run(folder, where=where, whom=whom, at=rng.randrange(1, bench.calls[where] + 1))
        if result.status == 0:
            # it was so far already that the call never came: begin another one
            bench.finish(folder)
            rounds += 1
            folder = tmp_path / f"out{rounds}"
            continue
        assert result.status in (-signal.SIGKILL, 5), result.err
        assert "Traceback" not in result.err
        kills += 1
        bench.check_state(folder)
    bench.finish(folder)


@pytest.mark.parametrize(
    "back", [pytest.param(n, marks=[pytest.mark.slow] if n % 4 != 1 else []) for n in range(1, 18)]
)
def test_kill_among_the_last_steps(bench: Bench, out: Path, back: int) -> None:
    """Filling the hashes, renaming, closing the journal: every single call of the end."""
    result = bench.run(out, where="parent", whom=["self"], at=bench.calls["parent"] + 1 - back)
    assert result.status == -signal.SIGKILL
    bench.check_state(out)
    assert bench.rows_left(out) == 0
    bench.finish(out)


@pytest.mark.parametrize("at", [pytest.param(n, marks=[pytest.mark.slow] if n % 4 != 1 else []) for n in range(1, 10)])
def test_kill_among_the_first_steps(bench: Bench, out: Path, at: int) -> None:
    """Journal begun, file sized, header written."""
    assert bench.run(out, where="parent", whom=["self"], at=at).status == -signal.SIGKILL
    bench.check_state(out)
    bench.finish(out)


def test_interrupt_of_the_process_group(bench: Bench, out: Path) -> None:
    """What a terminal does on Ctrl-C: the child finishes what it has in hand, the parent says so and exits 130."""
    result = bench.run(
        out, where="child", whom=["group"], at=bench.calls["child"] // 2, signal=signal.SIGINT, sync=(1 << 40, 1e9)
    )
    assert result.status == 130
    assert result.err.strip().splitlines()[-2:] == [
        "error: interrupted",
        "hint: finished work is kept: the same command goes on from there",
    ]
    assert "Traceback" not in result.err
    assert result.out == ""
    bench.check_state(out)
    # nothing had been synced before the signal: what the journals hold was reported on the way out
    assert any(bench.journaled(out).values())
    bench.finish(out)


def test_terminated(bench: Bench, out: Path) -> None:
    """SIGTERM ends the parent; the child notices, ends soon and releases the files."""
    pids = out.parent / "pids"
    pids.mkdir()
    result = bench.run(
        out, where="child", whom=["parent"], at=bench.calls["child"] // 3, signal=signal.SIGTERM, pids=str(pids)
    )
    assert result.status in (-signal.SIGTERM, 128 + signal.SIGTERM)
    try:
        fd = os.pidfd_open(int((pids / "child").read_text()))
    except ProcessLookupError:
        pass
    else:
        assert select.select([fd], [], [], 20)[0], "the child lives on"
        os.close(fd)
    bench.check_state(out)
    bench.finish(out)


def test_full_disk(bench: Bench, out: Path) -> None:
    """A limit on file size in the child stands for a full disk: exit status 4, and it goes on when there is room."""
    size = min(map(len, bench.reference.values()))
    result = bench.run(out, fsize=size // 2)
    assert result.status == 4
    assert "error: " in result.err
    assert ": cannot be written: File too large" in result.err
    assert "hint: free some space and repeat the command" in result.err
    assert not list(out.glob("*.gguf"))
    bench.check_state(out)
    bench.finish(out)


# --- the state on disk, without processes that die ---


@pytest.fixture(scope="module")
def died(bench: Bench) -> Path:
    """A folder in which the child died half-way."""
    folder = bench.folder / "died"
    assert bench.run(folder, where="child", whom=["self"], at=bench.calls["child"] * 2 // 3).status == 5
    assert any(bench.journaled(folder).values())
    return folder


@pytest.fixture
def half(died: Path, out: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(died, out))


def journals(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.journal"))
    assert len(found) == len(TIERS)
    return found


@pytest.mark.parametrize(
    "damage",
    [
        b'{"tensor": "blk.0.at',
        b"\x00" * 100,
        b"not json\n",
        b"[]\n",
        b'{"tensor": "blk.0.attn_q.weight"}\n',
        b'{"finished": "x", "files": 3}\n',
        b"[" * 100000 + b"\n",
        b"\xff\xfe\n",
    ],
    ids=["torn", "zeros", "text", "list", "no hash", "bad finish", "deep", "bytes"],
)
def test_damaged_end_of_a_journal(tmp_path: Path, damage: bytes) -> None:
    """What was read before the damage counts, what comes later is readable again."""
    journal = Journal(tmp_path / "m.gguf")
    journal.begin("spec", {})
    journal.add([("a", "1", 0.5)])
    with journal.path.open("ab") as file:
        file.write(damage)
    again = Journal(tmp_path / "m.gguf")
    again.load()
    assert (again.spec, again.tensors, again.finished, again.seconds) == ("spec", {"a": "1"}, None, 0.5)
    again.repair()
    again.add([("b", "2", 0.25)])
    again.finish([{"path": "m.gguf", "bytes": 3, "mtime_ns": 1}], "x")
    journal.load()
    assert (journal.tensors, journal.seconds) == ({"a": "1", "b": "2"}, 0.75)
    assert journal.finished is not None


def test_torn_journal(bench: Bench, half: Path) -> None:
    for path in journals(half):
        path.write_bytes(path.read_bytes()[:-7])
    bench.finish(half)


def test_foreign_journal(bench: Bench, half: Path) -> None:
    """A journal of something else, or of nothing, means: from the start."""
    for path, text in zip(journals(half), ['{"apex_journal": 99, "spec": "x"}\n', "", "null\n"], strict=True):
        path.write_text(text)
    assert not any(bench.journaled(half).values())
    bench.finish(half)


def test_journal_that_is_a_folder(bench: Bench, half: Path) -> None:
    path = journals(half)[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(ResourceError, match=r"\.journal: cannot be written"):
        bench.finish(half)


def test_lost_partial_file(bench: Bench, half: Path) -> None:
    for path in half.glob("*.partial"):
        path.unlink()
    for path in journals(half):
        path.write_text(path.read_text().split("\n")[0] + "\n")  # so that rows_left tells the truth
    bench.finish(half)


def test_partial_file_of_another_size(bench: Bench, half: Path) -> None:
    """Stale padding or data of something else must not survive."""
    for path in half.glob("*.partial"):
        path.write_bytes(b"\xaa" * (path.stat().st_size + 32))
    quantize(bench.source, TIERS, out=half)
    assert {path.name: path.read_bytes() for path in half.glob("*.gguf")} == bench.reference


def test_killed_before_the_header(bench: Bench, half: Path) -> None:
    """A journal without a tensor says nothing of the partial file, even when that has the right size."""
    for path in journals(half):
        path.write_text(path.read_text().split("\n")[0] + "\n")
    for path in half.glob("*.partial"):
        path.write_bytes(b"\xaa" * path.stat().st_size)
    bench.finish(half)


def test_changed_source_starts_over(bench: Bench, half: Path) -> None:
    status = bench.source.stat()
    os.utime(bench.source, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    try:
        left = {
            (t.source, t.type): t.weights // t.shape[0] for p in bench.plans.values() for t in p.tensors if not t.kept
        }
        done = quantize(bench.source, TIERS, out=half)
        assert done.job is not None
        assert done.job.rows_encoded == sum(left.values())
        assert {path.name: path.read_bytes() for path in half.glob("*.gguf")} == bench.reference
    finally:
        os.utime(bench.source, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_finished_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    """The same command again does nothing, even where the file was copied or touched; a changed one is not ours."""
    source = bench.source
    made = quantize(source, "Q8_0", out=tmp_path).outputs[0]
    before = made.path.stat()
    again = quantize(source, "Q8_0", out=tmp_path)
    assert again.outputs[0].unchanged
    assert again.outputs[0].sha256 == made.sha256
    assert again.job is not None
    assert again.job.rows_encoded == again.job.bytes_read == 0
    now = made.path.stat()  # reading it for its sha256 may move the access time, nothing else
    assert (now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
        before.st_ctime_ns,
    )
    os.utime(made.path)
    assert quantize(source, "Q8_0", out=tmp_path).outputs[0].unchanged

    data = bytearray(made.path.read_bytes())
    data[-100] ^= 1
    made.path.write_bytes(data)
    for content in (bytes(data), b"something else"):
        made.path.write_bytes(content)
        with pytest.raises(UsageError, match="was not made by this command"):
            quantize(source, "Q8_0", out=tmp_path)
        assert made.path.read_bytes() == content
    repaired = quantize(source, "Q8_0", out=tmp_path, force=True).outputs[0]
    assert (repaired.unchanged, repaired.sha256) == (False, made.sha256)
    made.path.unlink()
    assert quantize(source, "Q8_0", out=tmp_path).outputs[0].sha256 == made.sha256


def test_foreign_file_instead_of_a_renamed_one(bench: Bench, out: Path) -> None:
    """Killed between rename and the journal's last line; then somebody puts another file of that size there."""
    target = bench.plans["Q8_0"].file_name
    bench.finish(out)
    journal = out / (target + ".journal")
    lines = journal.read_text().splitlines(keepends=True)
    assert '"finished"' in lines[-1]
    journal.write_text("".join(lines[:-1]))
    bench.finish(out)  # recognized as its own

    journal.write_text("".join(lines[:-1]))
    good = (out / target).read_bytes()
    (out / target).write_bytes(b"x" * len(good))
    with pytest.raises(UsageError, match="not made by this command"):
        bench.finish(out)
    (out / target).write_bytes(good[:-1000] + b"x" * 1000)  # right header, other data
    with pytest.raises(InputError, match="was changed by another program"):
        bench.finish(out)


def test_shards_resume(bench: Bench, tmp_path: Path) -> None:
    """Shards are renamed one by one: killed at each call of the end, they come out equal."""
    arguments: list[str | Path] = [
        "quantize",
        bench.source,
        "--tier",
        "Q8_0",
        "--split-max-size",
        "900k",
        "--json",
        "-o",
    ]
    count = tmp_path / "calls"
    whole = apex(*arguments, tmp_path / "whole.gguf", sabotage={"folder": str(tmp_path), "count": str(count)})
    wanted = [file["sha256"] for file in whole.json["outputs"][0]["files"]]
    assert len(wanted) > 2
    calls = int((tmp_path / "calls.parent").read_text())
    for back in range(1, 4 * len(wanted) + 2, 4):
        target = tmp_path / str(back) / "m.gguf"
        sabotage = {"folder": str(tmp_path), "where": "parent", "whom": ["self"], "at": calls + 1 - back}
        assert apex(*arguments, target, sabotage=sabotage).status == -signal.SIGKILL
        done = quantize(bench.source, "Q8_0", out=target, options=PlanOptions(split_max_size=900_000))
        assert [file.sha256 for file in done.outputs[0].files] == wanted
        assert done.job is not None
        assert done.job.rows_encoded == 0
        assert not list(target.parent.glob("*.partial"))


# --- two at once ---


def test_busy(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "BUSY_SECONDS", 0.0)
    target = tmp_path / "m.gguf"
    other = AtomicFile(target)
    try:
        with pytest.raises(BusyError, match=r"m\.gguf\.partial: another process is writing it") as caught:
            quantize(bench.source, "Q8_0", out=target)
        assert caught.value.exit_code == 4
    finally:
        other.close()
    assert quantize(bench.source, "Q8_0", out=target).outputs[0].path == target


def test_the_other_one_finishes_meanwhile(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While we wait for the lock the other run ends: its file is taken as it is, and not made a second time."""
    target = tmp_path / "m.gguf"
    when_free = AtomicFile.when_free
    runs: list[Any] = []

    def late(path: Path, *, resume: bool) -> AtomicFile:
        monkeypatch.setattr(AtomicFile, "when_free", when_free)
        runs.append(quantize(bench.source, "Q8_0", out=target))
        return when_free(path, resume=resume)

    monkeypatch.setattr(AtomicFile, "when_free", late)
    second = quantize(bench.source, "Q8_0", out=target)
    assert second.outputs[0].unchanged
    assert second.outputs[0].sha256 == runs[0].outputs[0].sha256
    assert not list(tmp_path.glob("*.partial"))
    with open_model(target) as model:
        assert len(model.tensors) == len(bench.plans["Q8_0"].tensors)


def test_journal_lines(bench: Bench, tmp_path: Path) -> None:
    """The journal holds what the output must not: when, how and from where."""
    made = quantize(bench.source, "Q8_0", out=tmp_path).outputs[0]
    lines = [json.loads(line) for line in Path(f"{made.path}.journal").read_text().splitlines()]
    assert lines[0]["source"] == [str(bench.source)]
    assert {"started", "command", "threads", "spec", "tier", "output"} <= set(lines[0])
    assert sorted(line["tensor"] for line in lines[1:-1]) == sorted(t.name for t in made.plan.tensors)
    with open_model(made.path) as model:
        start = model.files[0].header_bytes
        assert lines[-1]["data_sha256"] == model.get("apex.data.sha256")
    assert lines[-1]["data_sha256"] == hashlib.sha256(made.path.read_bytes()[start:]).hexdigest()
