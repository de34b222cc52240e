"""Options that several commands have: how a model is loaded and run, and what is printed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from apex_quant.errors import UsageError
from apex_quant.sizes import parse_ctx

if TYPE_CHECKING:
    from apex_quant.runtime.options import SessionOptions

Threads = Annotated[int | None, typer.Option("-j", "--threads", min=1, help="threads (default: all processors)")]
GpuLayers = Annotated[int, typer.Option("--gpu-layers", min=-1, help="layers on the GPU; -1 for all")]
CpuExperts = Annotated[
    bool, typer.Option("--cpu-experts", help="routed experts stay in main memory, whatever --gpu-layers says")
]
TensorSplit = Annotated[str | None, typer.Option("--tensor-split", metavar="N,N,...", help="shares of several GPUs")]
Buffers = Annotated[
    list[str] | None, typer.Option("--override-tensor", metavar="REGEX=BUFFER", help="where matching tensors live")
]
NoMmap = Annotated[bool, typer.Option("--no-mmap", help="read the model into memory")]
Force = Annotated[bool, typer.Option("--force", help="replace an existing file once the new one is complete")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on standard output, everything else on stderr")]


def tokens(given: str | int) -> int:
    """A context for typer's `parser`, which also gets the default. Raises UsageError."""
    return given if isinstance(given, int) else parse_ctx(given)


def session_options(
    threads: int | None,
    gpu_layers: int,
    cpu_experts: bool,
    tensor_split: str | None,
    tensor_buffers: list[str] | None,
    no_mmap: bool,
    **more: Any,
) -> SessionOptions:
    """SessionOptions from the command line; `more` are fields of it. Raises UsageError."""
    from pydantic import ValidationError

    from apex_quant.runtime.options import SessionOptions

    try:
        return SessionOptions(
            threads=threads,
            gpu_layers=gpu_layers,
            cpu_experts=cpu_experts,
            tensor_split=tuple(float(word) for word in tensor_split.split(",")) if tensor_split else (),
            tensor_buffers=tuple(tensor_buffers or ()),
            mmap=not no_mmap,
            **more,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError:
        raise UsageError(f"--tensor-split {tensor_split!r} is not a list of numbers such as 3,1") from None
