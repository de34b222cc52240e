"""Which tasks are taken, and in which order: those that llama-perplexity takes, so that the two can be compared.

It draws without replacement with std::mt19937 seeded with 1, in two ways: HellaSwag's with libstdc++'s
std::uniform_int_distribution, the others' by scaling in 32-bit floats. Built with another C++ library (libc++, MSVC's)
llama-perplexity itself draws other HellaSwag tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from apex_quant.errors import UsageError

SEED: Final = 1  # llama-perplexity's; it knows no other
_WORD = 1 << 32
_AT_ONCE = 1024


def select(form: str, available: int, wanted: int, seed: int = SEED) -> list[int]:
    """Numbers of the tasks to do, in order, of `available` ones in a file of this form; `wanted` 0 takes all.

    HellaSwag's are shuffled even when all are taken, the others' stay in the file's order then. UsageError for a
    negative number.
    """
    if wanted < 0 or not 0 <= seed < _WORD:
        raise UsageError(f"{wanted} tasks with the seed {seed}: neither may be negative, and the seed has 32 bits")
    count = min(wanted or available, available)
    if form == "text":
        return _uniform(available, count, seed)
    return list(range(available)) if count == available else _scaled(available, count, seed)


def mt19937(seed: int) -> Iterator[int]:
    """The numbers of std::mt19937, each of 32 bits."""
    generator = np.random.RandomState(seed)
    while True:
        yield from generator.randint(0, _WORD, _AT_ONCE, dtype=np.uint32).tolist()


def uniform_int(numbers: Iterator[int], size: int) -> int:
    """One of 0 .. size-1 as by libstdc++ 11 and later: Lemire's nearly divisionless method on 32-bit numbers."""
    product = next(numbers) * size
    if product % _WORD < size:
        threshold = (_WORD - size) % size
        while product % _WORD < threshold:
            product = next(numbers) * size
    return product // _WORD


def _uniform(available: int, count: int, seed: int) -> list[int]:
    numbers, left = mt19937(seed), list(range(available))
    return [left.pop(uniform_int(numbers, len(left))) for _ in range(count)]


def _scaled(available: int, count: int, seed: int) -> list[int]:
    """As int(scale * number * left) in floats, which may round up to what is left: there the last is taken, where
    llama-perplexity reads beyond its array (about once in 30 million draws)."""
    numbers, left, taken = mt19937(seed), list(range(available)), []
    scale = np.float32(1) / (np.float32(1) + np.float32(_WORD - 1))
    for _ in range(count):
        place = int(scale * np.float32(next(numbers)) * np.float32(len(left)))
        place = min(place, len(left) - 1)
        taken.append(left[place])
        left[place] = left[-1]
        left.pop()
    return taken
