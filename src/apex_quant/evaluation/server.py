"""A model behind an OpenAI endpoint on this machine: llama-server, or the bindings' own server.

    with Server.start("MODEL.gguf", find_server(), ctx=8192) as server:
        print(server.url, server.key)

Only this machine reaches it, and only with a key drawn anew for each start.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from apex_quant.errors import ResourceError
from apex_quant.evaluation.programs import Log, Program, clean_environment, executable
from apex_quant.runtime.options import SessionOptions

ALIAS: Final = "apex"  # the model's name at the endpoint
DIRECTORY: Final = "LLAMA_CPP_DIR"
_PLACES = ("", "bin", "build/bin", "build/bin/Release")
BINDINGS_SERVER: Final = "apex_quant.serving.bindings_server"
"""The module that is started where there is no llama-server, on a command line: nothing here imports it."""
_NEEDS = ("fastapi", "uvicorn", "pydantic_settings", "sse_starlette", "starlette_context")  # of it
_HOST = "127.0.0.1"
_NO_MMAP = {
    "LLAMA_ARG_LOAD_MODE": "none",
    "LLAMA_ARG_NO_MMAP": "1",
}  # the option was renamed; names not known are ignored

Kind = Literal["llama-server", "llama_cpp.server"]


@dataclass(frozen=True)
class Found:
    """A server program: which kind, and the command that begins its command line."""

    kind: Kind
    command: tuple[str, ...]


def find_server(given: str | Path | None = None) -> Found:
    """llama-server: `given`, in LLAMA_CPP_DIR (or its build/bin), or on PATH; else the bindings' server, where what
    it needs is installed. Raises ResourceError."""
    if given is not None:
        if program := shutil.which(os.fspath(given)):
            return Found("llama-server", (program,))
        raise ResourceError(f"{given}: no such program")
    folder = os.environ.get(DIRECTORY)
    if folder:
        for place in _PLACES:
            for name in ("llama-server", "llama-server.exe"):
                if executable(path := Path(folder, place, name)):
                    return Found("llama-server", (str(path),))
        raise ResourceError(
            f"{DIRECTORY}={folder}: no llama-server there", hint=f"unset {DIRECTORY}, or build it there"
        )
    if program := shutil.which("llama-server"):
        return Found("llama-server", (program,))
    missing = [name for name in ("llama_cpp", *_NEEDS) if not _installed(name)]
    if not missing:
        return Found("llama_cpp.server", (sys.executable, "-P", "-m", BINDINGS_SERVER))
    raise ResourceError(
        f"no server for the model: llama-server is not on PATH, and the bindings' server lacks {', '.join(missing)}",
        hint=f"put llama-server on PATH, set {DIRECTORY}=FOLDER, or pip install 'apex-quant[harness]'",
    )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def server_command(
    found: Found, model: str | Path, port: int, *, ctx: int, parallel: int, options: SessionOptions
) -> list[str]:
    """The whole command line, on which no key is: others can read it. `ctx`: tokens of each of `parallel` requests at a
    time. Raises ResourceError for what the bindings' server has no option for."""
    if found.kind == "llama-server":
        words: dict[str, object] = {
            "--model": model, "--host": _HOST, "--port": port, "--alias": ALIAS,
            "--ctx-size": ctx * parallel, "--parallel": parallel, "--threads": options.threads,
            "--ubatch-size": options.ubatch, "--n-gpu-layers": _layers(options),
            "--tensor-split": ",".join(f"{part:g}" for part in options.tensor_split) or None,
            "--override-tensor": ",".join(options.tensor_buffers) or None,
            "--cache-type-k": options.type_k if options.type_k != "f16" else None,
            "--cache-type-v": options.type_v if options.type_v != "f16" else None,
            "--flash-attn": options.flash_attention if options.flash_attention != "auto" else None,
        }  # fmt: skip
        flags = {"--cpu-moe": options.cpu_experts, "--no-repack": not options.repack}
    else:
        unknown = {"cpu_experts": options.cpu_experts, "tensor_buffers": options.tensor_buffers,
                   "no repack": not options.repack, "no flash attention": options.flash_attention == "off",
                   "parallel": parallel > 1}  # fmt: skip
        if given := [name for name, value in unknown.items() if value]:
            raise ResourceError(f"the bindings' server has no option for {', '.join(given)}", hint="use llama-server")
        words = {
            "--model": model, "--host": _HOST, "--port": port, "--alias": ALIAS, "--ctx": ctx,
            "--threads": options.threads, "--ubatch": options.ubatch, "--gpu-layers": options.gpu_layers,
            "--type-k": options.type_k, "--type-v": options.type_v,
            "--tensor-split": ",".join(f"{part:g}" for part in options.tensor_split) or None,
        }  # fmt: skip
        flags = {"--no-mmap": not options.mmap, "--flash-attn": options.flash_attention == "on"}
    switches = [flag for flag, given in flags.items() if given]
    return [*found.command, *(str(x) for pair in words.items() if pair[1] is not None for x in pair), *switches]


def _layers(options: SessionOptions) -> int:
    return 999 if options.gpu_layers < 0 else options.gpu_layers


class Server:
    """A server that answers. It is stopped at the block's end, and when this process dies."""

    def __init__(self, program: Program, kind: Kind, port: int, key: str) -> None:
        self.program, self.kind, self.port, self.key = program, kind, port, key
        self.url = f"http://{_HOST}:{port}"

    @classmethod
    def start(
        cls,
        model: str | Path,
        found: Found,
        *,
        ctx: int,
        parallel: int = 1,
        options: SessionOptions | None = None,
        deadline: float = 600.0,
        log: Log | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Self:
        """Start it and wait until it answers. Raises ResourceError when it ends before, or after `deadline` seconds."""
        key, port = secrets.token_hex(16), _free_port()
        command = server_command(found, model, port, ctx=ctx, parallel=parallel, options=options or SessionOptions())
        # llama-server takes options from LLAMA_ARG_...: what is measured must not depend on them
        plain = _NO_MMAP if options is not None and not options.mmap else {}
        env = clean_environment(prefixes=("LLAMA_ARG_",), LLAMA_API_KEY=key, **plain)
        program = Program(found.kind, command, env=env, log=log)
        try:
            server = cls(program, found.kind, port, key)
            program.until(server._answers, Path(model).name, deadline, clock)
        except BaseException:
            program.stop()
            raise
        return server

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.program.stop()

    def _answers(self) -> bool:
        """Whether the model is loaded. The key is not shown: who answers is known only by this."""
        return self.program.answers(_HOST, self.port, "/health")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind((_HOST, 0))
        return int(one.getsockname()[1])


__all__: Sequence[str] = ["ALIAS", "BINDINGS_SERVER", "DIRECTORY", "Found", "Server", "find_server", "server_command"]
