"""Which bytes of a model lie on the device and which in main memory, for each way llama.cpp can divide it.

llama.cpp keeps the input embedding in main memory always; `--n-gpu-layers N` puts the output and the last N - 1 layers
on the device with their share of the cache, `--n-cpu-moe N` leaves the routed experts of the first N layers in main
memory. Buffers hold tensors one behind another at multiples of an alignment; CUDA also pads rows of quantized tensors
to 512 values (ggml_backend_cuda_buffer_type_get_alloc_size).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from apex_quant.model.facts import facts
from apex_quant.runtime.options import EXPERTS

if TYPE_CHECKING:
    from apex_quant.gguf.header import TensorInfo
    from apex_quant.gguf.reader import GGUFModel
    from apex_quant.model.kv_cache import KVCache

CPU_ALIGNMENT: Final = 32  # TENSOR_ALIGNMENT of ggml
DEVICE_ALIGNMENT: Final = 128
DEVICE_ROW: Final = 512  # values; MATRIX_ROW_PADDING of ggml-cuda

_LAYER: Final = re.compile(r"blk\.(\d+)\.")
_EXPERTS: Final = re.compile(EXPERTS)
_INPUT: Final = re.compile(r"(token_embd|per_layer_token_embd|position_embd|token_types|token_embd_norm)\b")
_OUTPUT: Final = "output.weight"
_EMBEDDING: Final = "token_embd.weight"
_TIED_TWICE: Final = frozenset({"gemma3n", "gemma4"})  # their loaders make the output's copy first, so both stay


def cpu_bytes(info: TensorInfo) -> int:
    """What a tensor takes in a buffer in main memory."""
    return -(-info.nbytes // CPU_ALIGNMENT) * CPU_ALIGNMENT


def device_bytes(info: TensorInfo) -> int:
    """What a tensor takes in a buffer of a CUDA device."""
    size, row = info.nbytes, info.shape[0] if info.shape else 1
    if info.type.is_quantized and row % DEVICE_ROW:
        # the row that is added is as long as the last row lacks; its blocks are counted whole
        missing = DEVICE_ROW - row % DEVICE_ROW
        size += -(-missing // info.type.block) * info.type.bytes
    return -(-size // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Of one layer, in bytes: (in main memory, on the device)."""

    layer: int
    experts: tuple[int, int]
    rest: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a file's weights as llama.cpp loads them. `input` stays in main memory, `output` goes with the last
    layer; blocks for next-token prediction are loaded only for drafting and not counted here."""

    file_bytes: int
    input: int
    output: tuple[int, int]
    layers: tuple[LayerBytes, ...]
    counted: int
    """Layers as llama.cpp counts them for --n-gpu-layers: those for next-token prediction too."""
    unloaded: int
    """Bytes of tensors that are left in the file."""

    @property
    def expert_bytes(self) -> int:
        """Routed experts, in main memory's alignment."""
        return sum(layer.experts[0] for layer in self.layers)


def weights(model: GGUFModel) -> Weights:
    """Weights of an open model by where they can go. Raises InputError for metadata that is no model's."""
    found = facts(model)
    trunk = found.trunk_layers
    rows = {i: {"experts": [0, 0], "rest": [0, 0]} for i in range(trunk)}
    sides = {"input": [0, 0], "output": [0, 0]}
    unloaded = 0
    for name, info in model.tensors.items():
        sizes = cpu_bytes(info), device_bytes(info)
        layer = _LAYER.match(name)
        if layer and int(layer[1]) >= trunk:
            unloaded += info.nbytes
            continue
        part = "experts" if _EXPERTS.search(name) else "rest"
        target = rows[int(layer[1])][part] if layer else sides["input" if _INPUT.match(name) else "output"]
        for side in range(2):
            target[side] += sizes[side]
    output = sides["output"]
    embedding = model.tensors.get(_EMBEDDING)
    if embedding is not None and _OUTPUT not in model.tensors:
        # tied: the device has a copy, main memory shares one
        output[0] += cpu_bytes(embedding) if found.architecture in _TIED_TWICE else 0
        output[1] += device_bytes(embedding)
    return Weights(
        file_bytes=sum(info.nbytes for info in model.tensors.values()),
        input=sides["input"][0],
        output=(output[0], output[1]),
        layers=tuple(
            LayerBytes(i, (row["experts"][0], row["experts"][1]), (row["rest"][0], row["rest"][1]))
            for i, row in rows.items()
        ),
        counted=found.n_layer_all,
        unloaded=unloaded,
    )


@dataclass(frozen=True, slots=True)
class Placement:
    """`gpu_layers` as llama.cpp counts them (layers + 1: everything); `cpu_moe`: layers, from the first, whose routed
    experts stay in main memory."""

    gpu_layers: int
    cpu_moe: int = 0

    def words(self, layers: int) -> str:
        """For people."""
        if not self.gpu_layers:
            return "all in main memory"
        if self.gpu_layers > layers:
            return f"experts of the first {self.cpu_moe} layers in RAM" if self.cpu_moe else "all on the device"
        said = f"the last {self.gpu_layers - 1} of {layers} layers and the output on the device"
        return said + (f", experts of the first {self.cpu_moe} layers in main memory" if self.cpu_moe else "")

    def to_json(self) -> dict[str, Any]:
        return {"gpu_layers": self.gpu_layers, "n_cpu_moe": self.cpu_moe}


@dataclass(frozen=True, slots=True)
class Use:
    """Bytes of one memory."""

    weights: int
    kv: int
    recurrent: int
    compute: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.recurrent + self.compute

    def to_json(self) -> dict[str, int]:
        return {"weights": self.weights, "kv": self.kv, "recurrent": self.recurrent, "compute": self.compute,
                "total": self.total}  # fmt: skip


def placements(layers: int, *, experts: bool, device: bool = True) -> Iterator[Placement]:
    """From everything on the device to nothing, in the order in which speed is given up: attention and what every
    token uses stay longest."""
    if device:
        yield Placement(layers + 1)
        if experts:
            yield from (Placement(layers + 1, n) for n in range(1, layers + 1))
        yield from (Placement(n, layers if experts else 0) for n in range(layers, 0, -1))
    yield Placement(0)


def use(where: Weights, cache: KVCache, place: Placement, compute: int, host_compute: int) -> tuple[Use, Use]:
    """Bytes of the device and of main memory. `compute`: of the device that computes, `host_compute` of main memory
    when that is another one."""
    first = max(where.counted + 1 - place.gpu_layers, 0)  # of the layers on the device
    device, host = [0, 0, 0], [where.input, 0, 0]
    for row in where.layers:
        on_device = row.layer >= first
        side, index = (device, 1) if on_device else (host, 0)
        side[0] += row.rest[index]
        side, index = (device, 1) if on_device and row.layer >= place.cpu_moe else (host, 0)
        side[0] += row.experts[index]
    for cached in cache.layers:
        side = device if cached.layer >= first else host
        side[2 if cached.kind == "recurrent" else 1] += cached.bytes
    if place.gpu_layers:
        device[0] += where.output[1]
        return Use(*_three(device), compute), Use(*_three(host), host_compute)
    host[0] += where.output[0]
    return Use(0, 0, 0, 0), Use(*_three(host), compute)


def _three(counts: list[int]) -> tuple[int, int, int]:
    return counts[0], counts[1], counts[2]
