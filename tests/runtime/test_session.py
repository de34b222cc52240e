"""A session on real models: tokens, logits, what an observer sees, and errors that say what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from apex_quant import SessionOptions, embedded_model
from apex_quant.errors import InputError, UsageError
from apex_quant.gguf import open_model
from apex_quant.runtime.observe import Product
from apex_quant.runtime.session import Session
from apex_quant.runtime.tensors import F32, I32, weight_name
from tests.helpers.random_models import write_random_gguf

SMALL = SessionOptions(threads=1, ctx=32, sequences=2, ubatch=64)


class Recorder:
    """Keeps copies of the inputs of some weights."""

    nodes: ClassVar[Mapping[str, tuple[str, ...]]] = {"SOFT_MAX": ("ffn_moe_probs-0",)}

    def __init__(self, *wanted: str) -> None:
        self.wanted = wanted
        self.taken: dict[str, tuple[F32, I32 | None]] = {}
        self.probabilities: F32 | None = None

    def wants(self, product: Product) -> bool:
        return product.weight in self.wanted

    def take(self, product: Product, x: F32, ids: I32 | None) -> None:
        self.taken[product.weight] = x.copy(), None if ids is None else ids.copy()

    def take_node(self, name: str, op: str, value: F32, source: F32 | I32 | None) -> None:
        self.probabilities = value.copy()


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder("blk.0.ffn_gate_inp.weight", "blk.0.ffn_up_exps.weight", "token_embd.weight")


@pytest.fixture(scope="module")
def session(recorder: Recorder) -> Session:
    return Session(embedded_model(), SMALL, recorder)


def tokens_of(session: Session) -> I32:
    tokens = session.tokenize(
        "The quick brown fox jumps over the lazy dog. " * 20, add_special=True, parse_special=True
    )
    return tokens[:64].reshape(2, 32)


def test_tokenizer(session: Session) -> None:
    assert session.vocabulary is not None
    assert session.vocabulary.size == 10240
    marks = session.tokenize("<|im_start|>user", add_special=False, parse_special=True)
    plain = session.tokenize("<|im_start|>user", add_special=False, parse_special=False)
    assert marks[0] == 1
    assert len(plain) > len(marks)
    assert len(session.tokenize("", add_special=False, parse_special=False)) == 0


def test_decoding_again_gives_the_same(session: Session) -> None:
    tokens = tokens_of(session)
    session.decode(tokens)
    first = session.logits().copy()
    session.decode(tokens[:, :16])
    session.decode(tokens)
    assert first.shape == (64, 10240)
    assert np.isfinite(first).all()
    assert (session.logits() == first).all()


def test_observed_activations_are_the_real_ones(session: Session, recorder: Recorder) -> None:
    """Router: input times weight gives the probabilities that the graph has, and these the chosen experts."""
    tokens = tokens_of(session)
    session.decode(tokens)
    x = recorder.taken["blk.0.ffn_gate_inp.weight"][0].reshape(-1, 256)
    with open_model(embedded_model()) as model:
        info = model.tensors["blk.0.ffn_gate_inp.weight"]
        router = np.frombuffer(model.read(info), np.float32).reshape(6, 256)
    scores = x.astype(np.float64) @ router.T.astype(np.float64)
    expected = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    assert recorder.probabilities is not None
    np.testing.assert_allclose(recorder.probabilities.reshape(-1, 6), expected, rtol=1e-3, atol=1e-5)
    routed, ids = recorder.taken["blk.0.ffn_up_exps.weight"]
    assert ids is not None
    assert (routed.reshape(-1, 256) == x).all()
    best = np.sort(np.argsort(-expected, axis=1)[:, :2], axis=1)
    assert (np.sort(ids, axis=1) == best).mean() > 0.95  # near-ties may go either way


def test_head_is_observed_and_gives_the_logits(session: Session, recorder: Recorder) -> None:
    session.decode(tokens_of(session))
    assert recorder.taken["token_embd.weight"][0].reshape(-1, 256).shape == (64, 256)


def test_what_does_not_fit(session: Session) -> None:
    with pytest.raises(UsageError, match="2 x 32"):
        session.decode(np.zeros((3, 32), np.int32))


def test_model_without_vocabulary(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "m.gguf", "llama")
    with Session(path, SMALL) as session:
        assert session.vocabulary is None
        with pytest.raises(InputError, match="no vocabulary"):
            session.tokenize("hello", add_special=True, parse_special=False)
        session.decode(np.arange(32, dtype=np.int32)[None])
        assert np.isfinite(session.logits()).all()


def test_library_says_why_a_file_does_not_load(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(embedded_model().read_bytes()[:1_000_000])
    with pytest.raises(InputError, match="cannot load this model") as caught:
        Session(path, SMALL)
    assert str(path) in caught.value.message


def test_names_of_copies_between_backends() -> None:
    assert weight_name(b"CUDA0#blk.0.attn_k.weight#0") == "blk.0.attn_k.weight"
    assert weight_name(b"blk.0.attn_k.weight") == "blk.0.attn_k.weight"


def test_cpu_experts_are_a_no_op_without_a_gpu() -> None:
    with Session(embedded_model(), SMALL.model_copy(update={"cpu_experts": True, "mmap": False})) as session:
        session.decode(np.arange(32, dtype=np.int32)[None])
        assert np.isfinite(session.logits()).all()
