"""Text to chunks, chunks to decodes: llama.cpp's convention of measuring perplexity.

A text is tokenized whole and cut into chunks of `ctx` tokens; what is left over is dropped. Each chunk is evaluated
alone, its first token replaced by BOS where the vocabulary adds one, and only tokens with at least half a context
before them are scored: positions ctx/2 to ctx-2, each for the token after it. Several chunks are decoded side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import InputError
from apex_quant.runtime.session import Session
from apex_quant.runtime.tensors import I32

Scored = Literal["half", "all"]
WARM_UP = 8  # of scored="all": an eighth of the context comes before the first scored token
_BATCH = 2048  # llama-perplexity's -b: as many chunks side by side as fit
_DECODE = 512  # tokens of one decode: as llama-perplexity computes them, with a quarter of its logits in memory
_LOGIT_BYTES = 700 << 20  # of all models, in the library's graph and in its output
_SMALLEST = 32


def first_scored(ctx: int, scored: Scored) -> int:
    """The first position whose prediction counts."""
    return ctx // 2 if scored == "half" else max(1, ctx // WARM_UP)


@dataclass(frozen=True)
class Batching:
    """How chunks are decoded: `sequences` of them side by side, `tokens` of all of them at a time."""

    sequences: int
    tokens: int

    @classmethod
    def of(cls, ctx: int, vocabulary: int, models: int) -> Batching:
        """llama-perplexity's, with smaller decodes where the logits of `models` models would take too much memory."""
        tokens = _DECODE
        while tokens > _SMALLEST and 2 * 4 * tokens * vocabulary * models > _LOGIT_BYTES:
            tokens //= 2
        sequences = max(1, min(_BATCH // ctx, tokens))
        return cls(sequences, max(sequences, min(tokens, ctx * sequences)))


@dataclass(frozen=True)
class Plan:
    """What is evaluated. `tokens` I32 [chunks, ctx] as they are in the text; `domain` I16 [chunks] into `domains`."""

    tokens: I32
    domain: NDArray[np.int16]
    domains: tuple[str, ...]
    first: int
    bos: int | None = None

    @property
    def ctx(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def scored(self) -> int:
        """Scored tokens of one chunk."""
        return self.ctx - 1 - self.first

    def targets(self) -> I32:
        """Scored tokens, I32 [chunks, scored]."""
        return self.tokens[:, self.first + 1 :]

    def steps(self, done: int, batching: Batching) -> Iterator[list[Step]]:
        """The decodes of each group of chunks, from chunk `done` on.

        A group that is not full has more tokens of each chunk in a decode, as the library would put them together:
        attention rounds differently for other numbers of them.
        """
        ctx = self.ctx
        positions = np.arange(ctx)
        outputs = (positions >= self.first) & (positions < ctx - 1)
        for start in range(done, len(self.tokens), batching.sequences):
            tokens = self.tokens[start : start + batching.sequences].copy()
            if self.bos is not None:
                tokens[:, 0] = self.bos
            chunks, width = range(start, start + len(tokens)), max(1, batching.tokens // len(tokens))
            steps = []
            for position in range(0, ctx, width):
                part = slice(position, min(position + width, ctx))
                given = outputs[part]
                begin = max(position - self.first, 0)
                scored = slice(begin, begin + int(given.sum()))
                steps.append(Step(chunks, tokens[:, part], position, given, scored))
            yield [step for step in steps if step.position <= ctx - 2]  # the last token predicts nothing


@dataclass(frozen=True)
class Step:
    """One decode: `tokens` I32 [chunks, n] from `position` on; `outputs` bool [n] says which are scored, and `scored`
    which of a chunk's scored tokens these are. Rows of results go by chunk, then by position."""

    chunks: range
    tokens: I32
    position: int
    outputs: NDArray[np.bool_]
    scored: slice

    @property
    def rows(self) -> int:
        return len(self.chunks) * int(self.scored.stop - self.scored.start)


def plan_texts(session: Session, texts: Sequence[dict[str, Any]], ctx: int, scored: Scored, most: int | None) -> Plan:
    """Tokenize `texts` ({"name", "pieces": [[text, whether marks are tokens in it]]}) and cut them, at most `most`
    chunks of each. Raises InputError for a text shorter than one chunk."""
    vocabulary = session.vocabulary
    if vocabulary is None:
        raise InputError(f"{session.path}: the model has no vocabulary, so no text can be evaluated with it")
    chunks, domain = [], []
    for number, text in enumerate(texts):
        parts = [
            session.tokenize(piece, add_special=i == 0, parse_special=marks)
            for i, (piece, marks) in enumerate(text["pieces"])
        ]
        tokens = np.concatenate(parts) if parts else np.empty(0, np.int32)
        if len(tokens) < ctx:
            raise InputError(
                f"{text['name']}: {len(tokens)} tokens, but one context takes {ctx}",
                hint="give more text, or a smaller --ctx",
            )
        count = min(len(tokens) // ctx, most or len(tokens))
        chunks.append(tokens[: count * ctx].reshape(count, ctx))
        domain += [number] * count
    names = tuple(text["name"] for text in texts)
    bos = vocabulary.bos if vocabulary.add_bos else None
    return Plan(np.concatenate(chunks), np.array(domain, np.int16), names, first_scored(ctx, scored), bos)
