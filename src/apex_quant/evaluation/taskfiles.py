"""Multiple-choice tasks in the three forms llama-perplexity reads: HellaSwag's text, Winogrande's CSV, and .bin files.

    tasks = read_tasks("mmlu-validation.bin", "mmlu").tasks

The same tasks are read as there, so that the same ones can be drawn; what it passes over without a word is said in
`notes`. Files are bounded and may come from anywhere: what is broken raises InputError naming the place.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args

from apex_quant.errors import InputError, UsageError, did_you_mean
from apex_quant.evaluation.pertoken import read_bounded

Kind = Literal["hellaswag", "winogrande", "mmlu", "arc", "truthfulqa"]
Form = Literal["text", "csv", "bin"]
KINDS: Final[tuple[str, ...]] = get_args(Kind)
FORMS: Final[dict[str, Form]] = {"hellaswag": "text", "winogrande": "csv"}  # the others are .bin files

MAX_BYTES: Final = 64 << 20  # HellaSwag's 10,042 tasks have 8 MB, MMLU's 14,042 about as many
MAX_TASKS: Final = 200_000
MAX_ANSWERS: Final = 100  # llama.cpp's own bound
MAX_TEXT: Final = 1 << 20  # bytes of one question or answer
_MOST_NOTES = 5
_LINES = 6  # of one HellaSwag task


class Answers(NamedTuple):
    """Possible answers, and for each whether it is true."""

    texts: tuple[str, ...]
    true: tuple[bool, ...]


_NONE = Answers((), ())


@dataclass(frozen=True, slots=True)
class Task:
    """One task: `question` comes before each answer, `ending` after it (Winogrande). `mc2` may be without answers."""

    number: int  # in the file, from 0
    question: str
    mc1: Answers
    mc2: Answers = _NONE
    ending: str = ""

    def to_json(self) -> list[Any]:
        """For another process."""
        return [self.number, self.question, self.mc1, self.mc2, self.ending]

    @classmethod
    def from_json(cls, document: Sequence[Any]) -> Task:
        """What to_json() gave, after JSON."""
        number, question, mc1, mc2, ending = document
        answers = [Answers(tuple(texts), tuple(true)) for texts, true in (mc1, mc2)]
        return cls(number, question, answers[0], answers[1], ending)

    def digest(self) -> int:
        """64 bits that tell whether two evaluations had the same task, wherever it stood."""
        text = json.dumps([self.question, self.mc1, self.mc2, self.ending], ensure_ascii=True)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class TaskFile:
    """Tasks in the file's order, what was passed over, and the sha256 of the file."""

    form: Form
    tasks: tuple[Task, ...]
    notes: tuple[str, ...]
    sha256: str


def read_tasks(path: str | Path, kind: str) -> TaskFile:
    """All tasks of a file for `kind`: one of KINDS. A name that ends in .bin is a .bin file for every kind.

    Raises UsageError for an unknown kind, InputError for a file that is broken, too large or without tasks.
    """
    if kind not in KINDS:
        raise UsageError(f"no tasks called {kind!r}.{did_you_mean(kind, list(KINDS))} Known: {', '.join(KINDS)}")
    path = Path(path)
    data = read_bounded(path, MAX_BYTES, "the tasks")
    form = "bin" if path.suffix == ".bin" else FORMS.get(kind, "bin")
    notes: list[str] = []
    if form == "bin":
        tasks = _Binary(path, data).tasks()
    else:
        tasks = {"text": _hellaswag, "csv": _winogrande}[form](path, _lines(path, data), notes)
    if not tasks:
        raise InputError(f"{path}: no tasks")
    if len(notes) > _MOST_NOTES:
        notes[_MOST_NOTES:] = [f"{path.name}: and {len(notes) - _MOST_NOTES} more lines like these"]
    return TaskFile(form, tuple(tasks), tuple(notes), hashlib.sha256(data).hexdigest())


# --- text ---


def _lines(path: Path, data: bytes) -> list[str]:
    """Lines as llama-perplexity -f has them: one newline at the end of the file is no part of the text. The last
    line may be unfinished; '' stands at the end when it is not."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    if "\r" in text:
        line = text[: text.index("\r")].count("\n") + 1
        raise InputError(
            f"{path}: line {line} has a carriage return, which would be scored as text",
            hint="write the file with plain newlines (dos2unix)",
        )
    return text.removesuffix("\n").split("\n")


def _hellaswag(path: Path, lines: list[str], notes: list[str]) -> list[Task]:
    """Six lines a task: context, number of the right ending, four endings."""
    if lines[-1] == "":
        lines.pop()  # what follows the last newline is no line
    if len(lines) % _LINES:
        raise InputError(f"{path}: {len(lines)} lines, not a multiple of {_LINES}")
    _check_count(path, len(lines) // _LINES)
    tasks = []
    for number in range(len(lines) // _LINES):
        context, label, *endings = lines[_LINES * number : _LINES * (number + 1)]
        if label.strip() not in ("0", "1", "2", "3"):
            raise InputError(f"{path}: line {_LINES * number + 2} should be 0, 1, 2 or 3 and is {label[:40]!r}")
        tasks.append(Task(number, context, _single(endings, int(label))))
    return tasks


def _winogrande(path: Path, lines: list[str], notes: list[str]) -> list[Task]:
    """index,sentence,choice1,choice2,answer; the sentence has one _ for the choice. No header.

    A line is taken apart as by llama-perplexity: at the first four commas outside quotes; only a sentence that begins
    with a quote loses its first and last character. A last line without newline, after the file's last newline was
    taken away, is not read there; nor are lines that it cannot take apart.
    """
    if lines[-1]:
        notes.append(
            f"{path.name}: the last line is left out, as llama-perplexity does: "
            "it reads it only in a file that ends with two newlines"
        )
    _check_count(path, len(lines))
    tasks: list[Task] = []
    for number, line in enumerate(lines[:-1], 1):
        fields = _split(line)
        if isinstance(fields, str):
            notes.append(f"{path.name}: line {number} is left out, as llama-perplexity does: {fields}")
            continue
        first, second, choices, answer = fields
        tasks.append(Task(len(tasks), first, _single(choices, answer - 1), ending=second))
    return tasks


def _split(line: str) -> tuple[str, str, list[str], int] | str:
    """Text before and after the _, the choices, the answer; or what is wrong with the line."""
    commas: list[int] = []
    quoted = False
    for place, char in enumerate(line):
        if char == '"':
            quoted = not quoted
        elif char == "," and not quoted:
            commas.append(place)
            if len(commas) == 4:
                break
    if len(commas) < 4:
        return "fewer than four commas outside quotes"
    sentence, one, two = (line[a + 1 : b] for a, b in itertools.pairwise(commas))
    if line[commas[0] + 1] == '"':
        sentence = sentence[1:-1]
    first, blank, second = sentence.partition("_")
    if not blank:
        return "no _ in the sentence"
    answer = re.match(r"[ \t]*\+?0*([12])(?![0-9])", line[commas[3] + 1 :])
    if answer is None:
        return f"the answer is {line[commas[3] + 1 :][:40]!r}, neither 1 nor 2"
    return first, second, [one, two], int(answer[1])


def _single(texts: Sequence[str], right: int) -> Answers:
    return Answers(tuple(texts), tuple(number == right for number in range(len(texts))))


def _check_count(path: Path, count: int) -> None:
    if count > MAX_TASKS:
        raise InputError(f"{path}: {count} tasks, at most {MAX_TASKS} are read")


# --- .bin ---


class _Binary:
    """A reader of one .bin file: u32 count, u32 offset of each task, then the tasks. All little-endian."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.at = path, data, 0

    def tasks(self) -> list[Task]:
        """All tasks in the file's order, which must be that of its table of offsets."""
        count = self._u32("the number of tasks")
        if count * 4 > len(self.data):
            raise self._error(f"claims {count} tasks, more than the file has room for")
        _check_count(self.path, count)
        table = struct.unpack_from(f"<{count}I", self._take(4 * count, "the table of tasks"))
        tasks = []
        for number, start in enumerate(table):
            if start != self.at:
                # llama-perplexity follows the table when it draws tasks, and does not when it reads all
                raise self._error(f"the table says that task {number} begins at byte {start}")
            question = self._text(f"the question of task {number}")
            mc1, mc2 = self._answers(number), self._answers(number)
            if not question or not mc1.texts or not all(mc1.texts) or not all(mc2.texts):
                raise self._error(f"task {number} has an empty question or answer")
            tasks.append(Task(number, question, mc1, mc2))
        if self.at != len(self.data):
            raise self._error("there is something after the last task")
        return tasks

    def _answers(self, number: int) -> Answers:
        count = self._u32(f"the number of answers of task {number}")
        if count > MAX_ANSWERS:
            raise self._error(f"task {number} claims {count} answers, at most {MAX_ANSWERS} are read")
        texts = tuple(self._text(f"an answer of task {number}") for _ in range(count))
        labels = struct.unpack(f"<{count}i", self._take(4 * count, f"the labels of task {number}"))
        if not set(labels) <= {0, 1}:
            raise self._error(f"task {number} has a label that is neither 0 nor 1")
        return Answers(texts, tuple(label == 1 for label in labels))

    def _text(self, what: str) -> str:
        size = self._u32(f"the length of {what}")
        if size > MAX_TEXT:
            raise self._error(f"{what} claims {size} bytes, at most {MAX_TEXT} are read")
        raw = self._take(size, what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._error(f"{what} is not UTF-8") from None

    def _u32(self, what: str) -> int:
        return int.from_bytes(self._take(4, what), "little")

    def _take(self, size: int, what: str) -> bytes:
        if size > len(self.data) - self.at:
            raise self._error(f"the file ends within {what}")
        self.at += size
        return self.data[self.at - size : self.at]

    def _error(self, what: str) -> InputError:
        return InputError(f"{self.path}: byte {self.at}: {what}", hint="is it a task file of llama-perplexity?")


# --- writing ---


def pack_hellaswag(tasks: Iterable[Task]) -> bytes:
    """The text form. UsageError for what it has no place for."""
    rows = []
    for task in tasks:
        rows += [task.question, str(task.mc1.true.index(True)), *task.mc1.texts]
        if len(task.mc1.texts) != 4 or any("\n" in row or "\r" in row for row in rows[-_LINES:]):
            raise UsageError(f"task {task.number}: the text form has four endings, each of one line")
    return "".join(f"{row}\n" for row in rows).encode()


def pack_winogrande(tasks: Iterable[Task]) -> bytes:
    """The CSV form, with the second newline at its end that llama-perplexity needs. UsageError as above."""
    rows = []
    for number, task in enumerate(tasks):
        sentence = f"{task.question}_{task.ending}"
        quote = '"' if "," in sentence else ""
        answer = task.mc1.true.index(True) + 1
        row = ",".join([str(number), f"{quote}{sentence}{quote}", *task.mc1.texts, str(answer)])
        if "\n" in row or _split(row) != (task.question, task.ending, list(task.mc1.texts), answer):
            raise UsageError(f"task {task.number}: the CSV form cannot hold it")
        rows.append(row + "\n")
    return ("".join(rows) + "\n").encode()


def pack_binary(tasks: Sequence[Task]) -> bytes:
    """The .bin form."""
    packed = []
    for task in tasks:
        parts = [_packed_text(task.question)]
        for answers in (task.mc1, task.mc2):
            parts.append(struct.pack("<I", len(answers.texts)))
            parts += [_packed_text(text) for text in answers.texts]
            parts += [struct.pack("<i", label) for label in answers.true]
        packed.append(b"".join(parts))
    start = 4 + 4 * len(packed)
    table = []
    for one in packed:
        table.append(struct.pack("<I", start))
        start += len(one)
    return b"".join([struct.pack("<I", len(packed)), *table, *packed])


def _packed_text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<I", len(raw)) + raw
