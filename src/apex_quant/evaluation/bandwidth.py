"""Memory bandwidth of this machine: how fast its threads stream through memory that no cache holds.

Each thread reads (dot product) or copies its own part of a buffer several times larger than the last-level caches; the
fastest round counts, since everything that disturbs makes a round slower and nothing makes it faster. A copy counts
twice: bytes read and bytes written.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

SMALLEST, LARGEST = 1 << 28, 1 << 32  # bytes of the buffer
ROUNDS: Final = 5
_TIMES_CACHE = 4
_CPU_FOLDER = Path("/sys/devices/system/cpu")
_MEMINFO = Path("/proc/meminfo")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

Part = tuple[NDArray[np.float32], NDArray[np.float32]]


def _read(part: Part) -> None:
    np.dot(part[0], part[1])


def _copy(part: Part) -> None:
    np.copyto(part[0], part[1])


KERNELS: Final[dict[str, Callable[[Part], None]]] = {"read": _read, "copy": _copy}
"""Each touches every byte of both halves of a part once."""


def cache_bytes(folder: Path = _CPU_FOLDER) -> int | None:
    """Bytes of all last-level caches together; None where the system does not tell."""
    caches: dict[tuple[int, str], int] = {}
    for index in folder.glob("cpu[0-9]*/cache/index*"):
        try:
            level, size, shared = ((index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
            caches[int(level), shared] = _size(size)
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == last) or None


def _size(text: str) -> int:
    """'32768K' in bytes. Raises ValueError."""
    found = re.fullmatch(r"(\d{1,12})([KMG]?)", text, re.ASCII)
    if found is None:
        raise ValueError(text)
    return int(found[1]) * _UNITS[found[2]]


def available_bytes(meminfo: Path = _MEMINFO) -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d{1,15}) kB$", meminfo.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def buffer_bytes(cache: int | None, available: int | None) -> int:
    """Four times the caches, within bounds, and no more than a quarter of the memory there is."""
    wanted = min(max(SMALLEST, _TIMES_CACHE * (cache or 0)), LARGEST)
    return wanted if available is None else max(1 << 20, min(wanted, available // 4))


def measure_bandwidth(
    threads: int,
    nbytes: int | None = None,
    *,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """{"measured_gb_s" (10^9 bytes a second), "by_kernel", "buffer_bytes", "cache_bytes", "threads"}.

    NumPy's matrix library should run with one thread (OPENBLAS_NUM_THREADS=1), or the dot products start more.
    """
    cache = cache_bytes()
    each = max(2, (nbytes or buffer_bytes(cache, available_bytes())) // threads // 8)  # floats of half a part
    best: dict[str, float] = {}
    with ThreadPoolExecutor(threads) as pool:
        # made by the threads that use them, so that each has them in the memory next to it
        parts = list(pool.map(lambda _: (np.ones(each, np.float32), np.ones(each, np.float32)), range(threads)))
        touched = sum(a.nbytes + b.nbytes for a, b in parts)
        for name, kernel in KERNELS.items():
            seconds = []
            for _ in range(rounds):
                started = clock()
                list(pool.map(kernel, parts))
                seconds.append(clock() - started)
            best[name] = touched / max(min(seconds), 1e-9) / 1e9
    return {
        "measured_gb_s": max(best.values()),
        "by_kernel": best,
        "buffer_bytes": touched,
        "cache_bytes": cache,
        "threads": threads,
    }
