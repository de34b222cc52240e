"""What a phase is: a row of a table. The engine reads it; the work stands in steps_*.py.

A phase has items (the tiers of `quantize`; most have one). An item is done when a record in state.json has its key:
the same parameters, the same content of what it reads, and its files are still what it wrote. So a new date on a file
changes nothing, a changed byte reruns what read it, and a tier that did not change is not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from apex_quant.pipeline.context import Context

PENDING: Final = "after "
"""Begins the digest of what a phase has still to make, when a run is only looked at: 'after calibrate'."""


@dataclass(frozen=True)
class Item:
    """One piece of a phase's work. `parameters`: JSON values; `inputs`: a digest by label, of content only.

    `about` is for the step and decides nothing; `given` in it: files of the user's, which are never cleared away.
    """

    name: str
    parameters: Mapping[str, Any]
    inputs: Mapping[str, str]
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """A finished item: its files by label, and what later phases and people want to know of it (JSON values).

    `seconds` where the step knows better than the clock: items that were made in one pass.
    """

    item: Item
    outputs: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True)
class Need:
    """Bytes that a phase will write at `where`, for the check before it starts."""

    where: Path
    bytes: int


@dataclass(frozen=True)
class Phase:
    """A row of the table.

    `needs`: the phases whose files it reads and which key it. `items` gives its pieces; it may be called when nothing
    has been made yet, and then inputs are PENDING. `work` does those that are due and yields each when it is finished.
    `claims`: the files an item is going to write, cleared away when they are of another key. `unused` says why the
    phase is no part of this run, None when it is. `weights`: it reads the full-precision GGUF.
    """

    name: str
    needs: tuple[str, ...]
    does: str
    items: Callable[[Context], list[Item]]
    work: Callable[[Context, Sequence[Item]], Iterator[Done]]
    claims: Callable[[Context, Item], Iterable[Path]]
    unused: Callable[[Context], str | None]
    weights: Callable[[Context], bool] = lambda context: False


def always(context: Context) -> str | None:
    """For phases that are part of every run."""
    return None
