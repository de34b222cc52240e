"""What results were measured with: versions and the machine's kind, no name and no path."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from apex_quant.native import ggml, library_info
from apex_quant.version import LIBRARY, VERSION


def collect() -> dict[str, Any]:
    """Versions, processor and system. `commit` is the library's; None where it does not load."""
    try:
        commit: str | None = ggml().commit
    except OSError:
        commit = None
    return {
        "apex": VERSION,
        "library": f"{LIBRARY} {library_info().version}",
        "commit": commit,
        "backends": list(library_info().backends),
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
