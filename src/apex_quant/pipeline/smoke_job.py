"""The child's job of the smoke check: greedy text of a model for a few prompts, and whether its logits are numbers."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from apex_quant.errors import InputError
from apex_quant.evaluation.worker import text_of
from apex_quant.native.worker import Emit, Json, Stopped
from apex_quant.runtime.options import SessionOptions
from apex_quant.runtime.session import Session, library
from apex_quant.runtime.tensors import I32

MOST_PROMPT = 512
"""Tokens of a prompt that are read; of a longer one the last."""


def run(payload: Json, emit: Emit, stop: threading.Event, fds: Sequence[int]) -> Json:
    """`payload`: model, prompts, tokens, options. Gives for each prompt its tokens and text, whether every logit was
    finite, and whether the model ended by itself."""
    count = int(payload["tokens"])
    options = SessionOptions.model_validate(payload["options"]).model_copy(
        update={"ctx": MOST_PROMPT + count, "sequences": 1, "decode_tokens": None}
    )
    with Session(payload["model"], options) as session:
        written = []
        for number, prompt in enumerate(payload["prompts"]):
            written.append(_generate(session, prompt, count, stop))
            emit({"event": "progress", "done": number + 1, "planned": len(payload["prompts"])})
    return {"written": written}


def _read(session: Session, prompt: str) -> I32:
    """Tokens of a prompt. InputError for one of which the vocabulary makes none."""
    special = bool(session.vocabulary and session.vocabulary.add_bos)
    tokens = session.tokenize(prompt, add_special=special, parse_special=False)[-MOST_PROMPT:]
    if not len(tokens):
        raise InputError(f"verify.prompts: {prompt[:40]!r} has no token in this vocabulary", hint="give it words")
    return tokens


def _generate(session: Session, prompt: str, count: int, stop: threading.Event) -> Json:
    lib, _ = library()
    tokens = _read(session, prompt)
    outputs = np.zeros(len(tokens), np.bool_)
    outputs[-1] = True
    session.decode(tokens[None], outputs=outputs)
    position, made = len(tokens), []
    finite = ended = True
    for _ in range(count):
        if stop.is_set():
            raise Stopped
        logits = session.logits()[-1]
        finite = bool(np.isfinite(logits).all())
        ended = False
        if not finite:
            break
        token = int(logits.argmax())
        if lib.llama_vocab_is_eog(session._vocab, token):
            ended = True
            break
        made.append(token)
        session.decode(np.array([[token]], np.int32), position=position)
        position += 1
    return {"tokens": made, "finite": finite, "ended": ended, "text": text_of(session, np.array(made, np.int32))}
