"""Task files: read as llama-perplexity reads them, written and read back, and hostile ones refused in a sentence."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from apex_quant.errors import InputError, UsageError
from apex_quant.evaluation import taskfiles
from apex_quant.evaluation.taskfiles import (
    Answers,
    Task,
    pack_binary,
    pack_hellaswag,
    pack_winogrande,
    read_tasks,
)
from tests.evaluation.stock_choices import file_name, tasks, write

TWO = b"0,Tom fed Sam because _ was hungry.,Tom,Sam,2\n1,A _ b.,x,y,1\n"


@pytest.mark.parametrize("kind", ["hellaswag", "winogrande", "truthfulqa", "mmlu", "arc"])
def test_written_and_read_back(kind: str, tmp_path: Path) -> None:
    made = tasks(kind, 30)
    found = read_tasks(write(tmp_path / file_name(kind), kind, made), kind)
    assert list(found.tasks) == made
    assert found.notes == ()
    assert len({task.digest() for task in made}) == 30


def test_suffix_bin_decides_the_form(tmp_path: Path) -> None:
    path = write(tmp_path / "hellaswag.bin", "truthfulqa", tasks("truthfulqa", 3))
    assert read_tasks(path, "hellaswag").form == "bin"


def test_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean hellaswag"):
        read_tasks(tmp_path / "x", "helaswag")


def read(path: Path, data: bytes, kind: str) -> taskfiles.TaskFile:
    path.write_bytes(data)
    return read_tasks(path, kind)


# --- HellaSwag ---


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
def test_ends_of_hellaswag(end: bytes, tmp_path: Path) -> None:
    """One newline belongs to the file, one to the line: any of them may be missing."""
    found = read(tmp_path / "t.txt", b"c\n2\ne0\ne1\ne2\ne3" + end, "hellaswag")
    assert found.tasks == (Task(0, "c", Answers(("e0", "e1", "e2", "e3"), (False, False, True, False))),)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"c\n2\ne0\ne1\ne2\ne3\n\n\n", "7 lines, not a multiple of 6"),
        (b"c\n4\ne0\ne1\ne2\ne3\n", "line 2 should be 0, 1, 2 or 3 and is '4'"),
        (b"c\n\xb2\ne0\ne1\ne2\ne3\n", "not UTF-8 at byte 2"),
        ("c\n²\ne0\ne1\ne2\ne3\n".encode(), "line 2 should be"),
        (b"c\n2\r\ne0\ne1\ne2\ne3\n", "line 2 has a carriage return"),
        (b"", "no tasks"),
        (b"\n", "no tasks"),
    ],
)
def test_broken_hellaswag(data: bytes, match: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=match):
        read(tmp_path / "t.txt", data, "hellaswag")


# --- Winogrande ---


def test_last_line_needs_a_second_newline(tmp_path: Path) -> None:
    """As in llama-perplexity, which takes one newline away and then reads only lines that end with one."""
    whole = read(tmp_path / "t.csv", TWO + b"\n", "winogrande")
    assert [task.mc1.true for task in whole.tasks] == [(False, True), (True, False)]
    assert (whole.tasks[1].question, whole.tasks[1].ending) == ("A ", " b.")
    for data in (TWO, TWO[:-1]):
        found = read(tmp_path / "t.csv", data, "winogrande")
        assert len(found.tasks) == 1
        assert "the last line is left out" in found.notes[0]


def test_quotes_are_taken_as_there(tmp_path: Path) -> None:
    """Outer quotes of a sentence go, doubled ones stay; commas within quotes separate nothing."""
    found = read(tmp_path / "t.csv", b'0,"He said ""no"", so _ left.",Al,Bo, 1\n\n', "winogrande")
    assert found.tasks[0].question == 'He said ""no"", so '
    assert found.tasks[0].ending == " left."
    assert found.tasks[0].mc1.texts == ("Al", "Bo")


def test_lines_that_are_left_out(tmp_path: Path) -> None:
    odd = [b"0,no blank,a,b,1", b"1,_,a,b", b"2,_,a,b,3", b"3,_,a,b,x", b"", b'4,"_,a,b,1', b"5,_,a,b,12"]
    found = read(tmp_path / "t.csv", b"\n".join([*odd, TWO, b""]), "winogrande")
    assert [task.number for task in found.tasks] == [0, 1]
    assert [note.partition(": ")[2].partition(",")[0] for note in found.notes[:5]] == [
        f"line {number} is left out" for number in range(1, 6)
    ]
    assert found.notes[5] == "t.csv: and 2 more lines like these"


def test_only_what_can_be_read_back_is_written() -> None:
    task = tasks("winogrande", 1)[0]
    for broken in (
        Task(0, 'a, "b ', task.mc1, ending=" c"),
        Task(0, "a ", Answers(("x,y", "z"), (True, False)), ending=" c"),
        Task(0, "a_b ", task.mc1, ending=" c"),
        Task(0, "a\n", task.mc1, ending=" c"),
    ):
        with pytest.raises(UsageError, match="cannot hold it"):
            pack_winogrande([broken])
    with pytest.raises(UsageError, match="four endings"):
        pack_hellaswag([task])


# --- .bin ---


def test_layout_of_bin() -> None:
    """By hand: count, offsets, then length and text, answers and labels twice."""
    task = Task(0, "Q?", Answers(("ja", "no"), (True, False)))
    expected = b"\1\0\0\0\x08\0\0\0\2\0\0\0Q?\2\0\0\0\2\0\0\0ja\2\0\0\0no\1\0\0\0\0\0\0\0\0\0\0\0"
    assert pack_binary([task]) == expected


def _u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "ends within the number of tasks"),
        (_u32(0), "no tasks"),
        (_u32(5), "claims 5 tasks"),
        (_u32(0xFFFFFFFF) + bytes(64), "claims 4294967295 tasks"),
        (_u32(1, 12, 0), "task 0 begins at byte 12"),
        (_u32(1, 8, 0xFFFFFFF0), "claims 4294967280 bytes"),
        (_u32(1, 8, 100) + b"abc", "ends within the question"),
        (_u32(1, 8, 1) + b"\xff" + _u32(0, 0), "is not UTF-8"),
        (_u32(1, 8, 1) + b"Q" + _u32(101), "claims 101 answers"),
        (_u32(1, 8, 1) + b"Q" + _u32(0, 0), "empty question or answer"),
        (_u32(1, 8, 0) + _u32(1, 1) + b"a" + _u32(1, 0), "empty question or answer"),
        (_u32(1, 8, 1) + b"Q" + _u32(1, 0, 1, 0), "empty question or answer"),
        (_u32(1, 8, 1) + b"Q" + _u32(1, 1) + b"a" + _u32(2, 0), "neither 0 nor 1"),
        (_u32(1, 8, 1) + b"Q" + _u32(1, 1) + b"a" + _u32(1), "ends within the number of answers"),
        (pack_binary(tasks("arc", 2)) + b"\0", "something after the last task"),
    ],
)
def test_broken_bin(data: bytes, match: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=match):
        read(tmp_path / "t.bin", data, "arc")


def test_damaged_files_are_errors_of_ours(tmp_path: Path) -> None:
    """Any bytes give tasks or an InputError, nothing else."""
    chance = random.Random(3)
    whole = {kind: write(tmp_path / file_name(kind), kind, tasks(kind, 8)).read_bytes()
             for kind in ("hellaswag", "winogrande", "arc")}  # fmt: skip
    refused = 0
    for _ in range(600):
        kind = chance.choice(list(whole))
        data = bytearray(whole[kind])
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        del data[chance.choice([len(data), chance.randrange(len(data))]) :]
        try:
            assert read(tmp_path / file_name(kind), bytes(data), kind).tasks
        except InputError:
            refused += 1
    assert 100 < refused < 600


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskfiles, "MAX_BYTES", 10)
    with pytest.raises(InputError, match="at most 10 are read"):
        read(tmp_path / "t.csv", TWO, "winogrande")
    monkeypatch.undo()
    monkeypatch.setattr(taskfiles, "MAX_TASKS", 1)
    for kind in ("hellaswag", "winogrande", "arc"):
        with pytest.raises(InputError, match="at most 1 are read"):
            read_tasks(write(tmp_path / file_name(kind), kind, tasks(kind, 3)), kind)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read_tasks(tmp_path, "arc")
    with pytest.raises(InputError, match="cannot be read"):
        read_tasks(tmp_path / "none.bin", "arc")
