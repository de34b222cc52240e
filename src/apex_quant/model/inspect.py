"""`inspect`: what a GGUF file holds, from its header alone; statistics of the weights on request."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
from pydantic import BaseModel

from apex_quant.gguf import GGUFModel, TensorInfo, Value
from apex_quant.model.facts import NOT_MODELS, ModelFacts, facts
from apex_quant.model.patterns import Role
from apex_quant.model.roles import TensorRole, classify
from apex_quant.model.stats import WeightStatistics, weight_statistics

SHORT_ARRAY: Final = 16
"""Longer arrays of the metadata are shown as type and length."""


class Usage(BaseModel):
    """Tensors, weights and bytes of one role or type; `bpw` is bits per weight, `share` of all bytes."""

    name: str
    tensors: int
    parameters: int
    active_parameters: int
    bytes: int
    bpw: float
    share: float


class TensorReport(BaseModel):
    """One tensor; `shape` in ggml order (row length first)."""

    name: str
    role: Role
    layer: int | None
    nextn: bool
    shape: list[int]
    type: str
    bytes: int


class ModelReport(BaseModel):
    """What `inspect` found. Parameters are weights of all tensors; active ones are those a token uses."""

    path: str
    files: int
    file_bytes: int
    gguf_version: int
    architecture: str
    name: str | None
    parameters: int
    active_parameters: int
    tensor_bytes: int
    bpw: float
    layers: int
    nextn_layers: int
    experts: int
    experts_used: list[int]
    """By layer; one entry when all layers use the same number."""
    experts_shared: int
    embedding_length: int
    vocabulary: int | None
    context_length: int | None
    tied_embeddings: bool
    roles: list[Usage]
    types: list[Usage]
    metadata: dict[str, Any]
    tensors: list[TensorReport] | None = None
    statistics: WeightStatistics | None = None


def model_roles(model: GGUFModel, known: ModelFacts | None = None) -> dict[str, TensorRole]:
    """The role of every tensor in file order, tensors of NextN/MTP blocks marked. Errors as `facts`."""
    known = known or facts(model)
    return {
        name: classify(name, info.shape, known.architecture, trunk_layers=known.trunk_layers)
        for name, info in model.tensors.items()
    }


def inspect(
    model: GGUFModel,
    *,
    tensors: bool = False,
    statistics: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ModelReport:
    """Report on an open file: a model, a projector, an adapter or an importance matrix.

    Reads the header only, unless `statistics` asks for moments and kurtosis of all weights; `progress` is
    told the bytes read for those. Raises InputError for metadata that contradicts itself.
    """
    known = None if model.get("general.type") in NOT_MODELS else facts(model)
    roles = (
        model_roles(model, known)
        if known
        else {name: classify(name, info.shape, model.architecture) for name, info in model.tensors.items()}
    )
    infos = list(model.tensors.values())
    active = {info.name: _active(info, roles[info.name], known) for info in infos}
    parameters = sum(info.n_elements for info in infos)
    tensor_bytes = sum(info.nbytes for info in infos)
    used = known.n_expert_used if known else ()
    embedding = model.tensors.get("token_embd.weight")
    return ModelReport(
        path=str(model.path),
        files=len(model.files),
        file_bytes=sum(file.size for file in model.files),
        gguf_version=model.files[0].version,
        architecture=_clean(model.architecture),
        name=_clean(known.name) if known and known.name else None,
        parameters=parameters,
        active_parameters=sum(active.values()),
        tensor_bytes=tensor_bytes,
        bpw=_bpw(tensor_bytes, parameters),
        layers=known.trunk_layers if known else 0,
        nextn_layers=known.nextn_layers if known else 0,
        experts=known.n_expert if known else 0,
        experts_used=list(used[:1] if len(set(used)) == 1 else used),
        experts_shared=known.n_expert_shared if known else 0,
        embedding_length=known.n_embd if known else 0,
        vocabulary=embedding.shape[1] if embedding and len(embedding.shape) > 1 else None,
        context_length=known.context_length if known else None,
        tied_embeddings=embedding is not None and "output.weight" not in model.tensors,
        roles=_usage(infos, active, tensor_bytes, lambda info: roles[info.name].role.value, list(Role)),
        types=_usage(infos, active, tensor_bytes, lambda info: info.type.name, ()),
        metadata={key: _plain(value) for key, value in model.metadata.items()},
        tensors=[_tensor(info, roles[info.name]) for info in infos] if tensors else None,
        statistics=weight_statistics(model, roles, progress=progress) if statistics else None,
    )


def _active(info: TensorInfo, role: TensorRole, known: ModelFacts | None) -> int:
    """Weights of the tensor that one token uses: its share of the experts, none of NextN/MTP blocks."""
    if role.nextn:
        return 0
    if role.role is Role.routed_expert and known and known.n_expert:
        return info.n_elements * known.experts_used(role.layer) // known.n_expert
    return info.n_elements


def _usage(
    infos: list[TensorInfo],
    active: dict[str, int],
    total: int,
    group: Callable[[TensorInfo], str],
    order: Iterable[str],
) -> list[Usage]:
    """One row for each group that has tensors: in `order`, the others after it by falling bytes."""
    groups: dict[str, list[TensorInfo]] = {str(name): [] for name in order}
    for info in infos:
        groups.setdefault(group(info), []).append(info)
    rows = []
    for name, members in groups.items():
        parameters, size = sum(i.n_elements for i in members), sum(i.nbytes for i in members)
        if members:
            rows.append(
                Usage(
                    name=name,
                    tensors=len(members),
                    parameters=parameters,
                    active_parameters=sum(active[i.name] for i in members),
                    bytes=size,
                    bpw=_bpw(size, parameters),
                    share=size / total if total else 0.0,
                )
            )
    return rows if order else sorted(rows, key=lambda row: -row.bytes)


def _tensor(info: TensorInfo, role: TensorRole) -> TensorReport:
    return TensorReport(
        name=_clean(info.name),
        role=role.role,
        layer=role.layer,
        nextn=role.nextn,
        shape=list(info.shape),
        type=info.type.name,
        bytes=info.nbytes,
    )


def _bpw(size: int, parameters: int) -> float:
    return size * 8 / parameters if parameters else 0.0


def _plain(value: Value) -> Any:
    """A metadata value as JSON can hold it."""
    if value.count > SHORT_ARRAY:
        return str(value)
    data = value.data
    if isinstance(data, np.ndarray):
        return data.tolist()
    if isinstance(data, tuple):
        return [_clean(text) for text in data]
    return _clean(data) if isinstance(data, str) else data


def _clean(text: str) -> str:
    """Bytes that are no UTF-8 become replacement characters: JSON has no place for them."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
