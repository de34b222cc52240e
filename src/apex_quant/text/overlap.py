"""How much of one text stands in another: shared runs of 13 words, the usual test for contamination.

A calibration text that holds the evaluation text makes quality look better than it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

WORDS: Final = 13
# a Chinese or Japanese character counts as a word, since nothing separates words there
_WORD: Final = re.compile(r"[぀-ヿ㐀-鿿]|[^\W぀-ヿ㐀-鿿]+")


class Overlap(NamedTuple):
    """Of `runs` of 13 words, `shared` also stand in the other text; `example` is the first of these."""

    shared: int
    runs: int
    example: str

    @property
    def share(self) -> float:
        return self.shared / self.runs if self.runs else 0.0


def overlap(texts: Iterable[str], others: Iterable[str]) -> Overlap:
    """How many runs of `texts` stand in `others` too; case and punctuation do not matter.

    Runs never cross from one text to the next. A text of fewer than 13 words has none.
    """
    known = {_digest(run) for text in others for run in _runs(text)}
    shared = count = 0
    example = ""
    for text in texts:
        for run in _runs(text):
            count += 1
            if _digest(run) in known:
                shared += 1
                example = example or run
    return Overlap(shared, count, example)


def _runs(text: str) -> Iterator[str]:
    words = _WORD.findall(text.lower())
    for start in range(len(words) - WORDS + 1):
        yield " ".join(words[start : start + WORDS])


def _digest(run: str) -> bytes:
    """Eight bytes instead of a hundred: two runs share them by chance once in 10^10 pairs of large corpora."""
    return hashlib.blake2b(run.encode(), digest_size=8).digest()
