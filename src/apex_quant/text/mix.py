"""Mixing documents of several kinds so that any beginning of the result has the wanted shares.

Calibration stops after a number of tokens, so the shares must hold from the start: at every step the kind comes next
whose next document ends soonest on its own clock, which runs slower the larger its share is (weighted fair queueing).
Within a kind, languages take turns in the same way, by how much there is of each.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from apex_quant.errors import UsageError, did_you_mean
from apex_quant.text.documents import KINDS, Document

DEFAULT_MIX: Final = "chat=25,code=25,reasoning=20,tools=20,long=10"

Size = Callable[[Document], float]


def utf8_bytes(document: Document) -> float:
    """The usual size of a document. Its tokens would be better, where a model is there to count them."""
    return document.size


def parse_mix(text: str) -> dict[str, float]:
    """'chat=30,code=25,reasoning=25,tools=20' to shares of 1 by kind. UsageError unless they make 100."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        kind, equals, number = (piece.strip() for piece in part.partition("="))
        if kind not in KINDS:
            raise UsageError(
                f"{kind!r} is no kind of text.{did_you_mean(kind, list(KINDS))}",
                hint=f"write KIND=PERCENT,... with kinds {', '.join(KINDS)}",
            )
        if kind in shares:
            raise UsageError(f"the mix names {kind} twice")
        try:
            share = float(number) if equals else math.nan
        except ValueError:
            share = math.nan
        if not 0 < share <= 100:
            raise UsageError(f"the share of {kind} must be more than 0 and at most 100, is {number!r}")
        shares[kind] = share
    total = sum(shares.values())
    if abs(total - 100) > 0.01:
        raise UsageError(f"the shares of the mix make {total:g}, not 100")
    return {kind: share / total for kind, share in shares.items()}


def mixed(
    documents: Sequence[Document], weights: Mapping[str, float] | None, seed: int = 0, size: Size = utf8_bytes
) -> Iterator[Document]:
    """Documents in an order by `seed` in which any beginning has the shares `weights` of kinds, each document once.

    When a kind is used up the others go on, in their shares. Kinds without a share are left out; without weights
    each kind has the share that it has of all documents. `size` measures. UsageError for a kind without documents.
    """
    by_kind: dict[str, list[Document]] = {}
    for document in documents:
        by_kind.setdefault(document.kind, []).append(document)
    weights = dict(weights) if weights is not None else {kind: _total(of, size) for kind, of in by_kind.items()}
    lacking = [kind for kind, weight in weights.items() if weight > 0 and kind not in by_kind]
    if lacking:
        raise UsageError(
            f"the mix asks for {' and '.join(lacking)}, but the text has none",
            hint=f"it has {', '.join(sorted(by_kind)) or 'nothing'}; give more sources or another mix",
        )
    used = [kind for kind, weight in weights.items() if weight > 0]
    kinds = {kind: _by_language(by_kind[kind], f"{seed}:{kind}", size) for kind in used}
    return _fair(kinds, weights, size)


def _by_language(documents: list[Document], seed: str, size: Size) -> Iterator[Document]:
    by_lang: dict[str, list[Document]] = {}
    for document in documents:
        by_lang.setdefault(document.lang, []).append(document)
    for lang, of in by_lang.items():
        random.Random(f"{seed}:{lang}").shuffle(of)
    shares = {lang: _total(of, size) for lang, of in by_lang.items()}
    return _fair({lang: iter(of) for lang, of in by_lang.items()}, shares, size)


def _fair(queues: Mapping[str, Iterator[Document]], weights: Mapping[str, float], size: Size) -> Iterator[Document]:
    """Weighted fair queueing; equals go by name, so that the order of the input does not matter."""
    clocks = dict.fromkeys(queues, 0.0)
    heads: dict[str, tuple[Document, float]] = {}

    def advance(key: str) -> None:
        document = next(queues[key], None)
        if document is None:
            heads.pop(key, None)
        else:
            clocks[key] += size(document) / weights[key]
            heads[key] = document, clocks[key]

    for key in sorted(queues):
        advance(key)
    while heads:
        key = min(heads, key=lambda key: (heads[key][1], key))
        yield heads[key][0]
        advance(key)


def _total(documents: Sequence[Document], size: Size) -> float:
    return math.fsum(map(size, documents)) or 1.0
