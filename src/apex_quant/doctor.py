"""`doctor`: what this machine and installation can do, what is missing and how to get it. Loads nothing heavy."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apex_quant.errors import ApexError
from apex_quant.native.library import compiled_with_amx, library_info
from apex_quant.version import LIBRARY as PACKAGE
from apex_quant.version import LIBRARY_VERSION as REQUIRED
from apex_quant.version import VERSION

_CPU_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_bf16", "amx_int8", "f16c", "fma", "asimd", "sve", "i8mm")
_LOW_MEMORY = 4 << 30
_LOW_DISK = 5 << 30
# what a GPU needs of the library: (its name begins with, the option of ggml's build, the backend that then exists)
_GPU_BUILDS = (("AMD", "GGML_HIP", "hip"), ("Apple", "GGML_METAL", "metal"), ("", "GGML_CUDA", "cuda"))


@dataclass(frozen=True)
class Problem:
    """Something missing and its cure."""

    what: str
    cure: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything `apex doctor` knows. Sizes in bytes; None where it cannot be told."""

    apex: str
    python: str
    system: str
    library: str | None
    ggml: str | None
    ggml_commit: str | None
    backends: tuple[str, ...]
    amx_unused: bool
    gpus: tuple[str, ...]
    cpus: int
    cpu_model: str
    cpu_features: tuple[str, ...]
    memory_total: int | None
    memory_available: int | None
    disk_free: int
    problems: tuple[Problem, ...]

    def facts(self) -> Iterator[tuple[str, str]]:
        """Rows for a table."""
        yield "apex", self.apex
        yield "Python", f"{self.python} on {self.system}"
        yield "library", f"{PACKAGE} {self.library}" if self.library else "not installed"
        if self.ggml:
            yield "ggml", f"{self.ggml} ({self.ggml_commit})"
        amx = " (without AMX tiles, whose code in this version fails)" if self.amx_unused else ""
        yield "backends", (", ".join(self.backends) or "none") + amx
        yield "GPUs", "; ".join(self.gpus) or "none seen"
        yield "processors", f"{self.cpus}, {self.cpu_model} ({' '.join(self.cpu_features)})"
        if self.memory_total is not None:
            available = (self.memory_available or 0) / 1e9
            yield "memory", f"{self.memory_total / 1e9:.1f} GB, {available:.1f} GB available"
        yield "disk", f"{self.disk_free / 1e9:.1f} GB free here"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def doctor(folder: str | Path = ".") -> Diagnosis:
    """Look at the installation, the machine and the free space of `folder`."""
    problems: list[Problem] = []
    info = library_info()
    ggml_version = commit = None
    if info.problem:
        problems.append(Problem(info.problem, info.cure))
        if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
            problems.append(
                Problem("no C++ compiler", "apt install g++ (Debian, Ubuntu), xcode-select --install (macOS)")
            )
    else:
        try:
            from apex_quant.native import ggml

            ggml_version, commit = ggml().version, ggml().commit
        except (OSError, ApexError) as error:
            problems.append(Problem(f"the library does not load: {error}", f"pip install --force-reinstall {PACKAGE}"))
    gpus = _gpus()
    for gpu in gpus if info.folder is not None else ():
        option, backend = next((option, backend) for maker, option, backend in _GPU_BUILDS if gpu.startswith(maker))
        if not {backend, "vulkan", "sycl"} & set(info.backends):
            problems.append(
                Problem(
                    f"a GPU is here ({gpu}) but the library is built without {backend}",
                    f'CMAKE_ARGS="-D{option}=on" pip install --force-reinstall --no-cache-dir --no-deps '
                    f"{PACKAGE}=={REQUIRED}   (pip's wheel cache ignores CMAKE_ARGS)",
                )
            )
            break
    total, available = main_memory()
    if available is not None and available < _LOW_MEMORY:
        problems.append(Problem(f"only {available / 1e9:.1f} GB of memory available", "close other programs"))
    free = shutil.disk_usage(folder).free
    if free < _LOW_DISK:
        problems.append(
            Problem(f"only {free / 1e9:.1f} GB free on this disk", "outputs need their size; plan tells it")
        )
    model, features = _cpu()
    return Diagnosis(
        apex=VERSION,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        library=info.version,
        ggml=ggml_version,
        ggml_commit=commit,
        backends=info.backends,
        amx_unused=compiled_with_amx(),
        gpus=gpus,
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_model=model,
        cpu_features=features,
        memory_total=total,
        memory_available=available,
        disk_free=free,
        problems=tuple(problems),
    )


def _gpus() -> tuple[str, ...]:
    """GPUs by the traces their drivers leave in the file system; no tool is run."""
    found = []
    for folder in sorted(Path("/proc/driver/nvidia/gpus").glob("*")):
        try:
            lines = (folder / "information").read_text().splitlines()
            found.append(next((line.split(":", 1)[1].strip() for line in lines if line.startswith("Model")), "NVIDIA"))
        except OSError:
            continue
    if not found and Path("/dev/nvidiactl").exists():
        found.append("NVIDIA GPU")
    if Path("/dev/kfd").exists():
        found.append("AMD GPU (ROCm)")
    if sys.platform == "darwin" and platform.machine() == "arm64":
        found.append("Apple GPU (Metal)")
    return tuple(found)


def main_memory() -> tuple[int | None, int | None]:
    """Bytes in all and bytes available; None where the system does not say."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(rows["MemTotal"].split()[0]) * 1024, int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
        except (ValueError, OSError):
            return None, None


def _cpu() -> tuple[str, tuple[str, ...]]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), ()
    rows = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((rows.get("flags") or rows.get("Features") or "").split())
    return rows.get("model name", platform.machine()), tuple(f for f in _CPU_FEATURES if f in flags)
