"""Logits to per-token numbers: negative log-likelihood and divergence, streamed over rows and over the vocabulary.

exp is taken in float32 and summed in float64. The reference's logits come in blocks of the vocabulary, each for all
rows, so that nothing of the size of a whole reference is ever needed; threads share the rows, and each works on at
most a megabyte at a time, which stays in its core's cache.

With l the logits, m their maximum and p = exp(l - m) / s, the divergence of a row is

    KLD = sum p_ref (l_ref - l_test) - (log sum exp l_ref - log sum exp l_test)

in which only differences of logits are averaged: of equal rows it is 0 exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import InputError

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Blocks = Iterable[tuple[int, F32]]  # (first token of the vocabulary, logits [rows, width])

_BLOCK_FLOATS = 1 << 18
NEVER = np.float32(-1e30)  # instead of minus infinity: a token that is never said


class NotFinite(InputError):
    """Logits that are NaN or infinite; `row` says in which row."""

    def __init__(self, row: int, whose: str) -> None:
        super().__init__(f"{whose} gives logits that are NaN or infinite")
        self.row, self.whose = row, whose


@dataclass(frozen=True)
class Divergence:
    """Per row, float64 [n] unless said otherwise; logarithms are natural."""

    kld: F64  # of the model from the reference, sum p_ref log(p_ref / p)
    reverse: F64  # sum p log(p / p_ref); NaN where the reference does not know all probabilities
    top1: NDArray[np.bool_]  # whether both hold the same token for the likeliest
    nll: F64  # of the target under the model
    ref_nll: F64  # and under the reference


class Scorer:
    """Shares rows between threads. One per job; close it, or use it in a with statement."""

    def __init__(self, threads: int = 1) -> None:
        self.threads = max(1, threads)
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def each(self, rows: int, width: int, work: Callable[[slice], None]) -> None:
        """Call `work` for slices of the rows, each small enough for a core's cache."""
        step = max(1, _BLOCK_FLOATS // max(width, 1))
        slices = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
        if self._pool is None:
            for part in slices:
                work(part)
        else:
            for _ in self._pool.map(work, slices):  # raises what a thread raised
                pass

    def nll(self, logits: F32, targets: NDArray[np.integer]) -> F64:
        """-log p of `targets` [n] under `logits` [n, vocabulary], in nats. Raises NotFinite."""
        sums = _Sums(len(logits))

        def work(rows: slice) -> None:
            sums.add(rows, logits[rows], 0)

        with np.errstate(invalid="ignore", over="ignore"):
            self.each(len(logits), logits.shape[1], work)
        sums.check("the model")
        found: F64 = sums.log_total() - logits[np.arange(len(logits)), targets].astype(np.float64)
        return found

    def divergence(
        self, reference: Blocks, logits: F32, targets: NDArray[np.integer], *, floor: float | None = None
    ) -> Divergence:
        """Compare `logits` [n, vocabulary] with the reference's, which come in blocks that cover the vocabulary.

        With `floor` the reference gives log-probabilities instead, of which those at or below it are not known:
        they are left out as in llama-perplexity, nothing is normalized, and there is no reverse divergence.
        Raises NotFinite, and InputError when the blocks do not cover the vocabulary.
        """
        n, vocabulary = logits.shape
        ours, theirs = _Sums(n), _Sums(n)
        forward, backward, ref_target = np.zeros(n), np.zeros(n), np.full(n, np.nan)
        covered = 0
        for start, block in reference:
            if start != covered or block.shape[0] != n or start + block.shape[1] > vocabulary:
                raise InputError("the reference's logits do not fit the model's vocabulary")
            covered += block.shape[1]

            def work(rows: slice, start: int = start, block: F32 = block) -> None:
                ref, test = block[rows], logits[rows, start : start + block.shape[1]]
                hidden = None if floor is None else ref <= floor
                ref_weights = theirs.add(rows, ref, start, (forward,), hidden)
                test_weights = ours.add(rows, test, start, (backward,))
                difference = np.subtract(ref, test)
                if not np.isfinite(difference).all():  # tokens that are never said have logits of minus infinity
                    difference = np.maximum(ref, NEVER) - np.maximum(test, NEVER)
                np.multiply(ref_weights, difference, out=ref_weights)
                forward[rows] += ref_weights.sum(axis=1, dtype=np.float64)
                np.multiply(test_weights, difference, out=test_weights)
                backward[rows] -= test_weights.sum(axis=1, dtype=np.float64)

            with np.errstate(invalid="ignore", over="ignore"):
                self.each(n, block.shape[1], work)
            inside = np.flatnonzero((targets >= start) & (targets < covered))
            ref_target[inside] = block[inside, targets[inside] - start]
        if covered != vocabulary:
            raise InputError(f"the reference has logits of {covered} tokens, the model of {vocabulary}")
        ours.check("the model")
        theirs.check("the reference")
        total = ours.log_total()
        nll = total - logits[np.arange(n), targets].astype(np.float64)
        if floor is not None:
            scale = np.exp(theirs.top)  # sums were taken relative to the likeliest
            kld, reverse = scale * (forward + theirs.total * total), np.full(n, np.nan)
            ref_nll = -ref_target
        else:
            ref_total = theirs.log_total()
            kld = forward / theirs.total - (ref_total - total)
            reverse = backward / ours.total - (total - ref_total)
            ref_nll = ref_total - ref_target
        return Divergence(kld, reverse, ours.best == theirs.best, nll, ref_nll)


class _Sums:
    """Running maximum, its token, and the sum of exp(l - maximum) of each row."""

    def __init__(self, rows: int) -> None:
        self.top = np.full(rows, float(NEVER))
        self.best = np.zeros(rows, np.int64)
        self.total = np.zeros(rows)

    def add(
        self,
        rows: slice,
        block: F32,
        start: int,
        carried: tuple[F64, ...] = (),
        hidden: NDArray[np.bool_] | None = None,
    ) -> F32:
        """Take a block [rows, width] in; gives exp(l - maximum) as float32, with 0 where `hidden`.

        `carried`: other sums relative to the same maximum, which are scaled when it rises.
        """
        best = block.argmax(axis=1)  # NaN counts as the largest
        top = np.take_along_axis(block, best[:, None], axis=1)[:, 0].astype(np.float64)
        old = self.top[rows]
        higher = ~(top <= old)
        new = np.where(higher, top, old)
        scale = np.where(old == new, 1.0, np.exp(old - new))
        weights = np.exp(block - new[:, None].astype(np.float32))
        if hidden is not None:
            weights[hidden] = 0
        self.total[rows] = self.total[rows] * scale + weights.sum(axis=1, dtype=np.float64)
        for other in carried:
            other[rows] *= scale
        self.best[rows] = np.where(higher, best + start, self.best[rows])
        self.top[rows] = new
        return weights

    def log_total(self) -> F64:
        """log sum exp of each row."""
        return self.top + np.log(self.total)

    def check(self, whose: str) -> None:
        bad = ~(np.isfinite(self.top) & np.isfinite(self.total) & (self.total > 0))
        if bad.any():
            raise NotFinite(int(np.flatnonzero(bad)[0]), whose)


@contextmanager
def scorer(threads: int) -> Iterator[Scorer]:
    """A Scorer that is closed at the end."""
    made = Scorer(threads)
    try:
        yield made
    finally:
        made.close()


def nll(logits: F32, targets: NDArray[np.integer], *, threads: int = 1) -> F64:
    """As Scorer.nll, once."""
    with scorer(threads) as one:
        return one.nll(logits, targets)


def divergence(reference: F32 | Blocks, logits: F32, targets: NDArray[np.integer], *, threads: int = 1) -> Divergence:
    """As Scorer.divergence, once; `reference` may be the logits as one array [n, vocabulary]."""
    blocks: Blocks = [(0, reference)] if isinstance(reference, np.ndarray) else reference
    with scorer(threads) as one:
        return one.divergence(blocks, logits, targets)
