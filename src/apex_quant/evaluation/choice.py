"""Scoring multiple-choice tasks as llama-perplexity does: how likely the model finds each answer after the question.

A task is a few sequences of tokens, one for each answer, that begin alike. As many tasks as fit are decoded together;
what a task's sequences have in common is decoded once, as tokens that belong to all of them. That works for every kind
of memory: attention looks those tokens up, a recurrent state is copied when the sequences part.

The rules, with the log-probabilities of tokens given all before them:

    HellaSwag and .bin files: the mean over the tokens after the common ones; the highest wins, the first of equals.
    Winogrande: the mean over the tokens after the answer, so that only what follows from it counts, when both
        sequences have more than three tokens of their own, else over all of these; without the last token when there
        is more than one. The first wins only when it is higher.
    mc2 (TruthfulQA): the share of the true answers in the probability of all, each that of its whole text.

In a session with as much room, tokens are put together as llama-perplexity puts them, those included that nothing is
read from: other company rounds differently, and near-ties fall the other way. Its ways that decide some tasks are kept
too: where Winogrande's answer counts, the second answer's first token is judged after the end of the first sequence;
where nothing follows an answer the second wins, or the one that got shorter with what follows it. Where it reads
beyond its arrays nothing can be the same: of sequences that are equal, or of which one begins the other, the last token
of the shorter counts as its own; without a common token the sequences' first ones are not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import InputError, ResourceError
from apex_quant.evaluation.scores import F64, Scorer
from apex_quant.evaluation.taskfiles import Form, Task
from apex_quant.runtime.session import Session
from apex_quant.runtime.tensors import I32

_OWN_TOKENS = 3  # Winogrande: both answers need more tokens than these for the answer itself to be left out
_LOGITS = 64 << 20  # most logits of one decode: 256 MB
_MIN_ROWS = 32


@dataclass(frozen=True, slots=True)
class Scored:
    """One task: what each answer got [answers], which one won, and whether it is true."""

    place: int  # in the sequence of tasks given
    scores: F64
    choice: int
    correct: bool


@dataclass(frozen=True, slots=True)
class Prepared:
    """A task's answers as tokens, of which the first `common` are the same in all sequences."""

    task: Task
    sequences: tuple[I32, ...]
    common: int
    bases: tuple[int, ...] = ()  # Winogrande: tokens up to the end of the answer

    @property
    def first(self) -> int:
        """The first token that is judged."""
        return max(self.common, 1)

    @property
    def skips_answer(self) -> bool:
        return all(len(one) - self.common > _OWN_TOKENS for one in self.sequences)

    @property
    def tokens(self) -> int:
        """Tokens to decode."""
        return self.common + sum(len(one) - self.common for one in self.sequences)


def prepare(session: Session, task: Task, form: Form) -> Prepared:
    """The answers of mc1 as tokens. Raises InputError when one has no token of its own to judge."""
    joint = "" if form == "csv" else " "
    texts = [task.question + joint + text for text in task.mc1.texts]
    bases = tuple(len(_tokens(session, text)) for text in texts) if form == "csv" else ()
    return _prepared(session, task, [text + task.ending for text in texts], bases)


def prepare_mc2(session: Session, task: Task) -> Prepared:
    """The answers of mc2 as tokens. Raises as prepare()."""
    return _prepared(session, task, [f"{task.question} {text}" for text in task.mc2.texts], ())


def _prepared(session: Session, task: Task, texts: Sequence[str], bases: tuple[int, ...]) -> Prepared:
    sequences = tuple(_tokens(session, text) for text in texts)
    made = Prepared(task, sequences, _common(sequences), bases)
    if min(map(len, sequences)) <= made.first:
        raise InputError(f"task {task.number}: an answer has no token to judge")
    return made


def _tokens(session: Session, text: str) -> I32:
    return session.tokenize(text, add_special=True, parse_special=False)


def _common(sequences: Sequence[I32]) -> int:
    """Tokens that all sequences begin with; each keeps one of its own."""
    shortest = max(min(map(len, sequences)) - 1, 0)
    same = np.ones(shortest, np.bool_)
    for one in sequences[1:]:
        same &= one[:shortest] == sequences[0][:shortest]
    return shortest if same.all() else int(same.argmin())


def needs(tasks: Iterable[Prepared]) -> tuple[int, int]:
    """Tokens and sequences that a session must have room for: those of the largest task."""
    pairs = [(one.tokens, len(one.sequences)) for one in tasks]
    return max(tokens for tokens, _ in pairs), max(sequences for _, sequences in pairs)


def score_choices(
    session: Session, tasks: Sequence[Prepared], form: Form, *, done: Collection[int] = ()
) -> Iterator[list[Scored]]:
    """Score tasks in a session with `unified` memory: what was decoded together, batch by batch.

    `done`: places in `tasks` that need no scoring; batches are made as if there were none, so that a task gets the
    same numbers whether or not work was interrupted. Raises InputError for a model that gives no finite logits,
    ResourceError for a task that does not fit the session.
    """
    for batch in _judged(session, tasks, done):
        scored = []
        for place, judged in batch:
            scores, choice = _RULES[form](tasks[place], judged)
            scored.append(Scored(place, scores, choice, tasks[place].task.mc1.true[choice]))
        yield scored


def score_mc2(
    session: Session, tasks: Sequence[Prepared], *, done: Collection[int] = ()
) -> Iterator[list[tuple[int, float]]]:
    """Place and mc2 of tasks made by prepare_mc2(), batch by batch; NaN where all answers are true, or none. Raises as
    score_choices()."""
    for batch in _judged(session, tasks, done):
        yield [(place, _mass(tasks[place].task.mc2.true, judged)) for place, judged in batch]


def _judged(
    session: Session, tasks: Sequence[Prepared], done: Collection[int]
) -> Iterator[list[tuple[int, list[F64]]]]:
    """Places of tasks, and the log-probabilities of each of their sequences' tokens from `first` on."""
    known = frozenset(done)
    scorer = Scorer(session.threads)
    try:
        for batch in _batches(session, tasks):
            if not known.issuperset(batch):
                judged = _Batch(session, [tasks[place] for place in batch], scorer).judge()
                yield [pair for pair in zip(batch, judged, strict=True) if pair[0] not in known]
    finally:
        scorer.close()


def _batches(session: Session, tasks: Sequence[Prepared]) -> Iterator[list[int]]:
    """As many tasks together as have room, in order."""
    most_tokens, most_sequences = session.room, session.options.sequences
    batch: list[int] = []
    tokens = sequences = 0
    for place, one in enumerate(tasks):
        if one.tokens > most_tokens or len(one.sequences) > most_sequences:
            raise ResourceError(
                f"task {one.task.number} needs {one.tokens} tokens in {len(one.sequences)} sequences, "
                f"the session has {most_tokens} in {most_sequences}"
            )
        if batch and (tokens + one.tokens > most_tokens or sequences + len(one.sequences) > most_sequences):
            yield batch
            batch, tokens, sequences = [], 0, 0
        batch.append(place)
        tokens, sequences = tokens + one.tokens, sequences + len(one.sequences)
    if batch:
        yield batch


class _Batch:
    """Tokens of some tasks, and which row of logits judges which token."""

    def __init__(self, session: Session, tasks: Sequence[Prepared], scorer: Scorer) -> None:
        self.session, self.tasks, self.scorer = session, tasks, scorer
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.owners: list[tuple[int, ...]] = []
        self.outputs: list[bool] = []
        self.rows: list[int] = []  # of the pairs (row, token judged)
        self.targets: list[int] = []
        self.sizes: list[int] = []  # pairs of each sequence
        self._given = 0  # rows so far
        first_sequence = 0
        for task in tasks:
            self._add(task, tuple(range(first_sequence, first_sequence + len(task.sequences))))
            first_sequence += len(task.sequences)

    def _add(self, task: Prepared, owners: tuple[int, ...]) -> None:
        common = task.common
        for position in range(common):
            self._token(task.sequences[0], position, owners, output=position == common - 1)
        before = [self._given - 1] * bool(common)  # the row that judges the sequences' first own token
        for sequence, owner in zip(task.sequences, owners, strict=True):
            rows = before.copy()
            for position in range(common, len(sequence)):
                # the last token's logits judge nothing but, of Winogrande's first sequence, what they should not
                self._token(sequence, position, (owner,), output=position < len(sequence) - 1 or bool(task.bases))
                rows.append(self._given - 1)
            judged = sequence[task.first :]
            self.rows += rows[: len(judged)]
            self.targets += judged.tolist()
            self.sizes.append(len(judged))
            if task.bases and before and not task.skips_answer:
                before = rows[-1:]

    def _token(self, sequence: I32, position: int, owners: tuple[int, ...], *, output: bool) -> None:
        self.tokens.append(int(sequence[position]))
        self.positions.append(position)
        self.owners.append(owners)
        self.outputs.append(output)
        self._given += output

    def judge(self) -> list[list[F64]]:
        """Log-probabilities of each task's sequences' tokens from its `first` on."""
        session = self.session
        session.clear()
        tokens, positions = np.array(self.tokens, np.int32), np.array(self.positions, np.int32)
        outputs = np.array(self.outputs, np.bool_)
        row, target = np.array(self.rows, np.intp), np.array(self.targets, np.int32)
        result = np.empty(len(row))
        start = 0
        for part in self._parts(outputs):
            session.submit(tokens[part], positions[part], self.owners[part], outputs[part])
            logits = session.logits()
            here = np.flatnonzero((row >= start) & (row < start + len(logits)))
            if len(logits):
                at, to = row[here] - start, target[here]
                zeros = np.zeros(len(logits), np.int32)
                log_total = self.scorer.nll(logits, zeros) + logits[:, 0]
                result[here] = logits[at, to] - log_total[at]
            start += len(logits)
        parts = iter(np.split(result, np.cumsum(self.sizes)[:-1]))
        return [[next(parts) for _ in task.sequences] for task in self.tasks]

    def _parts(self, outputs: NDArray[np.bool_]) -> Iterator[slice]:
        """Cut where one decode has enough tokens or rows."""
        assert self.session.vocabulary is not None
        most_rows = max(_MIN_ROWS, _LOGITS // self.session.vocabulary.size)
        most_tokens = self.session.options.batch
        before = np.concatenate([[0], np.cumsum(outputs)])
        start = 0
        while start < len(outputs):
            by_rows = int(np.searchsorted(before, before[start] + most_rows, side="right")) - 1
            stop = min(start + most_tokens, by_rows, len(outputs))
            yield slice(start, stop)
            start = stop


# --- what the log-probabilities mean ---


def _means(task: Prepared, judged: Sequence[F64]) -> tuple[F64, int]:
    scores = np.array([one.mean() for one in judged])
    return scores, int(scores.argmax())


def _winogrande(task: Prepared, judged: Sequence[F64]) -> tuple[F64, int]:
    scores = np.empty(2)
    for number, (sequence, one) in enumerate(zip(task.sequences, judged, strict=True)):
        start = max(task.bases[number], task.first) if task.skips_answer else task.first
        left = len(sequence) - start
        if left > 0:
            scores[number] = one[start - task.first : len(one) - (left > 1)].mean()
        else:  # 0/0, or 0 divided by a count below zero that became a very large one
            scores[number] = np.nan if left == 0 else 0.0
    return scores, int(not scores[0] > scores[1])


def _mass(true: Sequence[bool], judged: Sequence[F64]) -> float:
    if all(true) or not any(true):
        return float("nan")
    totals = np.array([one.sum() for one in judged])
    weights = np.exp(totals - totals.max())
    return float(weights[np.array(true)].sum() / weights.sum())


_RULES: dict[Form, Callable[[Prepared, Sequence[F64]], tuple[F64, int]]] = {
    "text": _means,
    "bin": _means,
    "csv": _winogrande,
}
