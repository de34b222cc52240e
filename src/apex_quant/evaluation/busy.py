"""Whether something else used the processors while speed was measured: then the numbers are too low.

On Linux the kernel's counters tell how much processor time all processes had; what the measuring process had itself is
taken off. Elsewhere the load average before the start has to do.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

STAT: Final = Path("/proc/stat")
SHARE: Final = 0.05
"""Of all processors' time, taken by others, from which on numbers are called disturbed."""
LOAD: Final = 0.25
"""Load average for each processor, from which on numbers are called disturbed where nothing better is known."""
_SHORTEST = 0.5  # seconds; the kernel counts in steps of 10 ms for each processor
_IDLE = (3, 4)  # idle and iowait, of the fields after "cpu"
_COUNTED = 8  # fields; the two after them are part of earlier ones


class Reading(NamedTuple):
    """`wall`: seconds of some clock. `used`: processor seconds of everybody since the system started, None where not
    known. `own`: those of this process."""

    wall: float
    used: float | None
    own: float
    processors: int


def reading(stat: Path = STAT) -> Reading:
    """The counters now."""
    own = os.times()
    try:
        text = stat.read_text()
    except OSError:
        text = ""
    used, processors = parse_stat(text, os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100)
    return Reading(time.monotonic(), used, own.user + own.system, processors or os.cpu_count() or 1)


def parse_stat(text: str, ticks: int) -> tuple[float | None, int]:
    """Processor seconds that were not idle, and the number of processors, of /proc/stat's text."""
    lines = [line.split() for line in text.splitlines() if line.startswith("cpu")]
    if not lines or lines[0][0] != "cpu" or len(lines[0]) <= max(_IDLE) + 1:
        return None, 0
    try:
        fields = [int(word) for word in lines[0][1 : 1 + _COUNTED]]
    except ValueError:
        return None, 0
    return sum(value for place, value in enumerate(fields) if place not in _IDLE) / ticks, len(lines) - 1


def share_of_others(before: Reading, after: Reading) -> float | None:
    """Share of all processors' time that other processes had between two readings; None where it is not known."""
    wall = after.wall - before.wall
    if before.used is None or after.used is None or wall < _SHORTEST:
        return None
    used, own = after.used - before.used, after.own - before.own
    if used < own / 2:  # counters that stand still, as in some sandboxes
        return None
    return max(0.0, used - own) / (wall * after.processors)


def load_average() -> float | None:
    """Processes that wanted a processor in the last minute, on average; None where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def judge(share: float | None, load: float | None, processors: int) -> dict[str, Any]:
    """{"busy", "others" (share or None), "busy_note" (a sentence, or None)}. `load`: before the start."""
    if share is not None:
        note = f"other processes used {share:.0%} of the processors during the measurement: speeds are too low"
        return {"busy": share > SHARE, "others": share, "busy_note": note if share > SHARE else None}
    if load is None:
        note = "whether other processes used the processors is not known here"
        return {"busy": False, "others": None, "busy_note": note}
    busy = load > LOAD * processors
    note = f"load average {load:.2f} on {processors} processors before the start: speeds may be too low"
    return {"busy": busy, "others": None, "busy_note": note if busy else None}
