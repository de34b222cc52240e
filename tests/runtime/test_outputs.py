"""Which tokens give logits, in which order, hidden states next to them, and sequences that share tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from apex_quant import SessionOptions, embedded_model
from apex_quant.errors import NativeError, ResourceError, UsageError
from apex_quant.gguf import open_model
from apex_quant.runtime.session import Session
from apex_quant.runtime.tensors import F32, I32
from tests.helpers.random_models import write_random_gguf

CTX = 48
# 40-token ubatches of 3 x 48 tokens: sequences are torn between ubatches, and rows come out of the library's order
TORN = SessionOptions(threads=1, ctx=CTX, sequences=3, ubatch=40)
SHARED = TORN.model_copy(update={"unified": True})
RNG = np.random.default_rng(7)
TOKENS = RNG.integers(20, 256, (3, CTX)).astype(np.int32)


@pytest.fixture(scope="module", params=["hybrid", "attention"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "hybrid":
        return embedded_model()
    return write_random_gguf(tmp_path_factory.mktemp("model") / "m.gguf", "llama")


@pytest.fixture(scope="module")
def tokens(model: Path) -> I32:
    with Session(model, TORN) as session:
        size = int(session._lib.llama_vocab_n_tokens(session._vocab))
    return np.remainder(TOKENS, size, dtype=np.int32)


@pytest.fixture(scope="module")
def expected(model: Path, tokens: I32) -> F32:
    """[sequence, position, vocabulary]: each sequence alone, all positions at once."""
    with Session(model, SessionOptions(threads=1, ctx=CTX, sequences=1, ubatch=64)) as session:
        return np.stack([_logits(session, row[None]) for row in tokens])


@pytest.fixture(scope="module")
def shared(model: Path) -> Iterator[Session]:
    with Session(model, SHARED) as session:
        yield session


def _logits(session: Session, tokens: I32) -> F32:
    session.decode(tokens)
    return session.logits().copy()


def close(got: F32, want: F32) -> None:
    """As close as different batches of one library are: other orders of summation, 16-bit attention memory."""
    np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())
    assert np.abs(got - want).mean() < 0.002 * np.abs(want).max()


def test_rows_are_in_the_order_of_tokens(model: Path, tokens: I32, expected: F32) -> None:
    outputs = np.arange(CTX) % 5 == 3
    with Session(model, TORN) as session:
        session.decode(tokens)
        close(session.logits().reshape(expected.shape), expected)
        session.decode(tokens, outputs=outputs)
        close(session.logits(), expected[:, outputs].reshape(-1, expected.shape[2]))
        session.decode(tokens, outputs=np.zeros(CTX, bool))
        assert session.logits().shape == (0, expected.shape[2])


def test_decoding_in_parts(model: Path, tokens: I32, expected: F32) -> None:
    with Session(model, TORN.model_copy(update={"decode_tokens": 72})) as session:
        with pytest.raises(UsageError, match="144 tokens in one decode, which takes 1 to 72"):
            session.decode(tokens)
        session.decode(tokens[:, :24], outputs=np.zeros(24, bool))
        session.decode(tokens[:, 24:], position=24)
        close(session.logits().reshape(3, 24, -1), expected[:, 24:])


def test_hidden_states_make_the_logits() -> None:
    """For every output, whichever were asked for: hidden state times output matrix is the logits."""
    with open_model(embedded_model()) as opened:
        info = opened.tensors["token_embd.weight"]  # which serves as output matrix
        assert info.type.name in ("BF16", "F16")
        raw = np.frombuffer(opened.read(info), np.uint16)
        matrix = (
            (raw.astype(np.uint32) << 16).view(np.float32)
            if info.type.name == "BF16"
            else raw.view(np.float16).astype(np.float32)
        ).reshape(-1, 256)
    outputs = np.arange(CTX) >= 29
    with Session(embedded_model(), TORN.model_copy(update={"embeddings": True})) as session:
        assert session.n_embd == 256
        for chosen in (None, outputs):
            session.decode(TOKENS, outputs=chosen)
            hidden, logits = session.hidden(), session.logits()
            assert hidden.shape == (3 * (CTX if chosen is None else int(chosen.sum())), 256)
            assert len(logits) == len(hidden)
            np.testing.assert_allclose(hidden @ matrix.T, logits, atol=0.05)
        session.decode(TOKENS, outputs=np.zeros(CTX, bool))
        assert session.hidden().shape == (0, 256)


def test_no_hidden_states_without_embeddings(shared: Session) -> None:
    with pytest.raises(UsageError, match="without embeddings"):
        shared.hidden()


def test_tokens_of_several_sequences(shared: Session, tokens: I32, expected: F32) -> None:
    """A prefix that two sequences share is computed once and gives each what it would get alone."""
    shared.clear()
    prefix, first, second = tokens[0, :20], tokens[0, 20:30], tokens[1, 20:26]
    outputs = np.ones(36, bool)
    outputs[:19] = False
    shared.submit(
        np.concatenate([prefix, first, second]),
        np.concatenate([np.arange(20), np.arange(20, 30), np.arange(20, 26)]),
        [(0, 2)] * 20 + [(0,)] * 10 + [(2,)] * 6,
        outputs,
    )
    got = shared.logits().copy()
    close(got[:11], expected[0, 19:30])
    close(got[11:], _logits(shared, np.concatenate([prefix, second])[None])[20:])


def test_copied_sequences(shared: Session, tokens: I32, expected: F32) -> None:
    """A copy goes on as the original does; of a hybrid model no part can be taken back."""
    shared.decode(tokens[:1, :20], outputs=np.zeros(20, bool))
    shared.copy(0, 1)
    shared.submit(tokens[0, 20:24], np.arange(20, 24), [(1,)] * 4, np.ones(4, bool))
    close(shared.logits(), expected[0, 20:24])
    assert shared.remove(1, 22) == (not shared.recurrent)
    assert shared.remove(1)
    shared.submit(tokens[0, 20:24], np.arange(20, 24), [(0,)] * 4, np.ones(4, bool))
    close(shared.logits(), expected[0, 20:24])


@pytest.mark.parametrize(
    ("sequences", "match"),
    [
        ([(0,)], "each token has"),
        ([(0,), ()], "each token has"),
        ([(0,), (3,)], "from 0 to 2"),
        ([(0,), (-1,)], "0 to"),
    ],
)
def test_what_cannot_be_submitted(shared: Session, sequences: list[tuple[int, ...]], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        shared.submit(np.zeros(2, np.int32), np.arange(2), sequences, np.ones(2, bool))


def test_the_library_refuses(shared: Session) -> None:
    """Positions that do not follow, tokens that do not exist: an error, and the session goes on."""
    shared.clear()
    with pytest.raises(NativeError, match="failed with status"):
        shared.submit(np.full(2, 1 << 30, np.int32), np.arange(2), [(0,)] * 2, np.ones(2, bool))
    assert shared.logits().shape[0] == 0
    shared.decode(np.zeros((1, 2), np.int32))
    assert shared.logits().shape[0] == 2


def test_memory_of_sequences_apart() -> None:
    with Session(embedded_model(), TORN) as session:
        assert (session.recurrent, session.threads) == (True, 1)
        with pytest.raises(UsageError, match="several sequences"):
            session.submit(np.zeros(1, np.int32), np.zeros(1, np.int32), [(0, 1)], np.ones(1, bool))
        with pytest.raises(UsageError, match="a part of a sequence"):
            session.copy(0, 1, 3)


def test_quantized_attention_memory_needs_flash_attention() -> None:
    options = TORN.model_copy(update={"type_k": "q8_0", "type_v": "q8_0"})
    with Session(embedded_model(), options.model_copy(update={"flash_attention": "on"})) as session:
        session.decode(TOKENS)
        assert np.isfinite(session.logits()).all()
    with pytest.raises(ResourceError, match="no context"):
        Session(embedded_model(), options.model_copy(update={"flash_attention": "off"}))


def test_another_context_on_the_same_model() -> None:
    with Session(embedded_model(), TORN) as session:
        session.decode(TOKENS)
        model = session._model
        session.reopen(ctx=20, sequences=2, unified=True)
        assert session._model is model
        assert session.logits().shape[0] == 0
        assert (session.options.capacity, session.room) == (40, 256)  # the library rounds up
        session.submit(TOKENS[0, :3], np.arange(3), [(0, 1)] * 3, np.ones(3, bool))
        assert np.isfinite(session.logits()).all()
        with pytest.raises(UsageError, match="do not fit 2 x 20"):
            session.decode(TOKENS)
