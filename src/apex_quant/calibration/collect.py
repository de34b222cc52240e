"""The child's job: tokens through the model, batch by batch, and what its activations add up to.

Batching is llama-imatrix's: the text is tokenized as a whole and cut into chunks of `ctx` tokens, several of which
are decoded side by side from an empty context; where the vocabulary adds one, BOS replaces a chunk's first token.
With a floor for experts, further text is drawn by kind after that (coverage.py). The sums go to disk now and then.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from apex_quant.calibration.coverage import Cover, as_matrix, number_uncovered
from apex_quant.calibration.observer import ImportanceObserver
from apex_quant.calibration.state import Piece, State
from apex_quant.errors import InputError
from apex_quant.native.bindings import bindings
from apex_quant.native.worker import Emit, Json, Stopped
from apex_quant.runtime.options import SessionOptions
from apex_quant.runtime.session import Session
from apex_quant.runtime.tensors import I32

with contextlib.suppress(ImportError):  # early, while the parent still reads the text; Session says what is missing
    bindings()


class Collector:
    """One calibration in one session. `pieces` is the text asked for, `pool` further text by kind."""

    def __init__(self, session: Session, observer: ImportanceObserver, payload: Json, emit: Emit) -> None:
        self.session, self.observer, self.emit = session, observer, emit
        self.options = session.options
        self.sums = Path(payload["sums"])
        self.pieces: list[Piece] = payload["pieces"]
        self.pool: dict[str, list[Piece]] = payload["pool"]
        self.wanted: int = payload["tokens"]
        self.floor: int = payload["floor"]
        self.cover_tokens: int = payload["cover_tokens"]
        self.save_seconds: float = payload["save_seconds"]
        self.state = State.load(self.sums, payload["spec"]) or State(payload["spec"])
        self.observer.restore(self.state.arrays, self.state.shared)
        self.resumed = self.state.chunks
        self._asked_kinds: set[str] = set()
        self._chunks_planned = 0
        self._saved_at = time.monotonic()
        self._gained = {key: value for key, value in self.state.arrays.items() if key.startswith("gained/")}

    def run(self, stop: threading.Event) -> None:
        """Decode everything that is still to be decoded. Raises Stopped, after saving, when asked to stop."""
        if self.state.finished:
            return
        batches = self._batches(self._asked_tokens())
        self._chunks_planned = sum(len(batch) for batch in batches)
        for batch in batches[self.state.batches :]:
            self._decode(batch)
            self.state.batches += 1
            self._tick(stop)
        if self.cover_tokens:
            self._cover(stop)
        self.state.finished = True
        self._save()

    def _asked_tokens(self) -> I32:
        """Tokens of the text asked for. Raises InputError when they do not fill one chunk."""
        parts: list[I32] = []
        count = 0
        for number, piece in enumerate(self.pieces):
            if count >= self.wanted:
                self._keep_for_later(self.pieces[number:])
                break
            parts.append(self._tokenize(piece, first=not parts))
            self._asked_kinds.add(piece[2])
            count += len(parts[-1])
        if count < self.options.ctx:
            raise InputError(
                f"the calibration text has {count} tokens, less than one context of {self.options.ctx}",
                hint="give more text, or a smaller --ctx",
            )
        return np.concatenate(parts)[: max(self.wanted, self.options.ctx)]

    def _keep_for_later(self, pieces: Sequence[Piece]) -> None:
        """What was not needed is the first to be drawn for experts."""
        for piece in reversed(pieces):
            self.pool.setdefault(piece[2], []).insert(0, piece)

    def _tokenize(self, piece: Piece, *, first: bool) -> I32:
        text, special, _ = piece
        return self.session.tokenize(text, add_special=first, parse_special=special)

    def _batches(self, tokens: I32) -> list[I32]:
        """Chunks of `ctx` tokens, `sequences` of them together; what is left over at the end is dropped."""
        ctx, n_seq = self.options.ctx, self.options.sequences
        chunks = tokens[: len(tokens) // ctx * ctx].reshape(-1, ctx).copy()
        vocabulary = self.session.vocabulary
        assert vocabulary is not None
        if vocabulary.add_bos:
            chunks[:, 0] = vocabulary.bos
        return [chunks[i : i + n_seq] for i in range(0, len(chunks), n_seq)]

    def _decode(self, batch: I32) -> None:
        self.observer.begin()
        self.session.decode(batch)
        self.state.chunks += len(batch)

    def _cover(self, stop: threading.Event) -> None:
        """Draw text for experts under the floor, as long as that helps and the limit allows."""
        streams = {kind: self._stream(pieces) for kind, pieces in self.pool.items()}
        cover = Cover(list(streams), self.floor)
        if len(self._asked_kinds) == 1:  # what this kind brings is known, and need not be tried
            asked = self._gained.setdefault("gained/asked", as_matrix(self.observer.expert_counts()))
            cover.learn(next(iter(self._asked_kinds)), asked // max(1, self.state.batches))
        for number, drawn in enumerate(self.state.draws):  # an earlier run's, in the same order
            next(streams[drawn])
            cover.learn(drawn, self._gained[f"gained/{number}"])
        limit = self._chunks_planned + self.cover_tokens // self.options.ctx
        while self.state.chunks < limit:
            before = self.observer.expert_counts()
            kind = cover.next_kind(before)
            if kind is None:
                break
            batch = next(streams[kind], None)
            if batch is None:
                cover.exhausted(kind)
                continue
            matrix = as_matrix(before)
            self._decode(batch)
            learned = as_matrix(self.observer.expert_counts()) - matrix
            cover.learn(kind, learned)
            self._gained[f"gained/{len(self.state.draws)}"] = learned
            self.state.draws.append(kind)
            self._tick(stop)

    def _stream(self, pieces: Sequence[Piece]) -> Iterator[I32]:
        """Batches of one kind's text, from a whole chunk on."""
        waiting = np.empty(0, np.int32)
        full = self.options.ctx * self.options.sequences
        for piece in pieces:
            waiting = np.concatenate([waiting, self._tokenize(piece, first=not len(waiting))])
            while len(waiting) >= full:
                yield self._batches(waiting[:full])[0]
                waiting = waiting[full:]
        yield from self._batches(waiting)[:1]

    def _tick(self, stop: threading.Event) -> None:
        counts = self.observer.expert_counts()
        self.emit(
            {
                "event": "progress",
                "chunks": self.state.chunks,
                "planned": self._chunks_planned,
                "resumed": self.resumed,
                "experts": sum(len(tokens) for tokens in counts.values()),
                "uncovered": number_uncovered(counts, self.floor),
            }
        )
        if stop.is_set():
            self._save()
            raise Stopped
        if time.monotonic() - self._saved_at >= self.save_seconds:
            self._save()

    def _save(self) -> None:
        self.state.shared = self.observer.shared
        self.state.arrays = {**self.observer.arrays(), **self._gained}
        self.state.save(self.sums)
        self._saved_at = time.monotonic()


def run(payload: Json, emit: Emit, stop: threading.Event, fds: Sequence[int]) -> Json:
    """Entry point of the child process; `payload` as calibrate.py makes it."""
    options = SessionOptions.model_validate(payload["options"])
    on_one_backend = options.gpu_layers == 0
    observer = ImportanceObserver(heads=payload["heads"], share=on_one_backend)
    with Session(payload["model"], options, observer) as session:
        warnings = []
        if options.ctx > session.training_context:
            warnings.append(f"the model was trained on {session.training_context} tokens, not on {options.ctx}")
        if session.vocabulary is None:
            raise InputError(
                f"{payload['model']}: the model has no vocabulary, so no text can be calibrated with",
                hint="convert it again with its tokenizer",
            )
        start = time.monotonic()
        collector = Collector(session, observer, payload, emit)
        collector.run(stop)
        state = collector.state
        return {
            "chunks": state.chunks,
            "resumed": collector.resumed,
            "draws": state.draws,
            "seconds": time.monotonic() - start,
            "warnings": warnings,
        }
