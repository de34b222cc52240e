"""The programs that can serve a model: llama-server where it is found, else the bindings' server; and their options.

llama-server's options are read from its own --help, since their names change between builds; what it does not list is
not passed, and the caller is told. Keys go through the environment, never through the command line.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from apex_quant.errors import ResourceError
from apex_quant.evaluation.programs import said
from apex_quant.evaluation.server import BINDINGS_SERVER, Found, find_server
from apex_quant.gguf.types import CACHE_TYPES, TYPES

KEY_VARIABLE: Final = "LLAMA_API_KEY"
"""Of both kinds; several keys are separated by commas, as llama-server does."""
_DEVICE: Final = re.compile(r"^\s+(\w+): (.*?) \((\d+) MiB, (\d+) MiB free\)\s*$", re.MULTILINE)
_FLAG: Final = re.compile(r"(?<![\w-])--?[a-z][\w-]*")
_UNTOLD: Final = ("--fit", "--no-slots", "--cache-ram", "--ctx-checkpoints")  # builds without them do not do it either


@dataclass(frozen=True)
class Launch:
    """What to serve and how. `ctx`: tokens of each of `parallel` requests; `prompt_cache`: bytes of main memory for
    earlier prompts, `checkpoints`: of the states of each request; `keyless`: anybody on this machine may ask;
    `devices`: those to use alone, by name."""

    model: Path
    host: str
    port: int
    alias: str
    ctx: int
    parallel: int
    type_k: str
    type_v: str
    gpu_layers: int
    cpu_moe: int = 0
    threads: int | None = None
    sampling: dict[str, float] = field(default_factory=dict)
    prompt_cache: int = 0
    checkpoints: int = 0
    keyless: bool = False
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Device:
    """A GPU as the backend itself sees it. Bytes."""

    name: str
    words: str
    total: int
    free: int

    @property
    def kind(self) -> str:
        """What the server reaches it through: CUDA of CUDA1."""
        return self.name.rstrip("0123456789")


def flags(help_text: str) -> frozenset[str]:
    """Every option that a --help names."""
    return frozenset(_FLAG.findall(help_text))


def devices(found: Found) -> tuple[Device, ...]:
    """Everything that it lists but what has no memory of its own (BLAS); none where it lists none."""
    command = found.command if found.kind == "llama-server" else (sys.executable, "-P", "-m", BINDINGS_SERVER)
    text = said([*command, "--list-devices"])
    return tuple(
        Device(name, words, int(total) << 20, int(free) << 20)
        for name, words, total, free in _DEVICE.findall(text)
        if int(total)
    )


def planned(listed: Sequence[Device]) -> tuple[Device, ...]:
    """Those of the first backend. A list names a card once for each backend that sees it, and an integrated GPU's
    memory, which is main memory, beside it."""
    return tuple(device for device in listed if device.kind == listed[0].kind)


def command(found: Found, launch: Launch, known: frozenset[str] | None = None) -> tuple[list[str], list[str]]:
    """The whole command line, and what this build has no option for. `known`: flags() of its --help.

    Raises ResourceError for what cannot be left out: cache types and experts in main memory.
    """
    if found.kind == "llama-server":
        return _llama_server(found, launch, known)
    return _bindings(launch), ([] if launch.parallel == 1 else ["parallel requests: one after another"])


def _llama_server(found: Found, launch: Launch, known: frozenset[str] | None) -> tuple[list[str], list[str]]:
    quantized = TYPES[launch.type_v.upper()].is_quantized if launch.type_v.upper() in TYPES else True
    needed: dict[str, Any] = {
        "--model": launch.model, "--host": launch.host, "--port": launch.port, "--alias": launch.alias,
        "--ctx-size": launch.ctx * launch.parallel, "--parallel": launch.parallel,
        "--n-gpu-layers": launch.gpu_layers,
        "--cache-type-k": launch.type_k if launch.type_k != "f16" else None,
        "--cache-type-v": launch.type_v if launch.type_v != "f16" else None,
        "--flash-attn": "on" if quantized else None,
        "--n-cpu-moe": launch.cpu_moe or None,
    }  # fmt: skip
    wished: dict[str, Any] = {
        # its own choice of devices may be another than what was planned for
        "--device": ",".join(launch.devices) if launch.gpu_layers and launch.devices else None,
        "--threads": launch.threads, "--jinja": "", "--fit": "off", "--no-slots": "",
        "--cache-ram": launch.prompt_cache >> 20, "--ctx-checkpoints": launch.checkpoints,
        "--cors-origins": "localhost" if launch.keyless else None,
        **{f"--{name.replace('_', '-')}": f"{value:g}" for name, value in launch.sampling.items()},
    }  # fmt: skip
    lacking = [flag for flag, value in needed.items() if value is not None and known is not None and flag not in known]
    if lacking:
        raise ResourceError(
            f"{found.command[0]} has no option {', '.join(lacking)}", hint="a newer llama.cpp has; or set LLAMA_CPP_DIR"
        )
    skipped = [flag for flag, value in wished.items() if value is not None and known is not None and flag not in known]
    words: list[str] = [*found.command]
    for flag, value in {**needed, **wished}.items():
        if value is not None and flag not in skipped:
            words += [flag] if value == "" else [flag, str(value)]
    return words, [flag for flag in skipped if flag not in _UNTOLD]


def _bindings(launch: Launch) -> list[str]:
    if launch.cpu_moe:
        raise ResourceError("the bindings' server cannot keep experts in main memory", hint="use llama-server")
    for name in (launch.type_k, launch.type_v):
        if name not in CACHE_TYPES:
            raise ResourceError(f"the bindings' library has no cache type {name}", hint="use a llama-server that has")
    words: dict[str, Any] = {
        "--model": launch.model, "--host": launch.host, "--port": launch.port, "--alias": launch.alias,
        "--ctx": launch.ctx, "--type-k": launch.type_k, "--type-v": launch.type_v,
        "--gpu-layers": launch.gpu_layers, "--threads": launch.threads,
    }  # fmt: skip
    given = (str(word) for pair in words.items() if pair[1] is not None for word in pair)
    return [sys.executable, "-P", "-m", BINDINGS_SERVER, *given]


__all__ = ["KEY_VARIABLE", "Device", "Found", "Launch", "command", "devices", "find_server", "flags", "planned"]
