"""The GGUF container: hardened reader, atomic writer, shards seen as one model, the table of ggml types."""

from apex_quant.gguf.atomic import AtomicFile, locked, require_space, write_file
from apex_quant.gguf.header import GGUFFile, TensorInfo
from apex_quant.gguf.reader import GGUFModel, open_model, shard_name, stock_order
from apex_quant.gguf.tools import merge, split
from apex_quant.gguf.types import TYPES, TYPES_BY_ID, GGMLType, ggml_type
from apex_quant.gguf.values import Value, ValueType
from apex_quant.gguf.writer import (
    Layout,
    TensorLike,
    TensorSpec,
    layout,
    padded,
    shard_groups,
    shard_layouts,
    tensor_bytes,
)

__all__ = [
    "TYPES",
    "TYPES_BY_ID",
    "AtomicFile",
    "GGMLType",
    "GGUFFile",
    "GGUFModel",
    "Layout",
    "TensorInfo",
    "TensorLike",
    "TensorSpec",
    "Value",
    "ValueType",
    "ggml_type",
    "layout",
    "locked",
    "merge",
    "open_model",
    "padded",
    "require_space",
    "shard_groups",
    "shard_layouts",
    "shard_name",
    "split",
    "stock_order",
    "tensor_bytes",
    "write_file",
]
