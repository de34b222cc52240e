"""The metadata of a quantized file: the source's own, then what was done to it.

Nothing here differs between two equal runs: no path, time or command line. Hashes that are known only when the
data is written get fixed-width fields, so that the size of the header is known beforehand.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from apex_quant.errors import UsageError
from apex_quant.gguf import GGMLType, GGUFModel, Value
from apex_quant.version import LIBRARY, LIBRARY_VERSION, VERSION

if TYPE_CHECKING:
    from apex_quant.importance import Importance
    from apex_quant.recipe.recipe import Recipe

SOURCE_HASH = "apex.source.sha256"
DATA_HASH = "apex.data.sha256"
LIBRARY_COMMIT = "apex.library.commit"
PRUNED_LAYERS = "apex.pruned_layers"
IMATRIX_HASH = "apex.imatrix.sha256"
IMATRIX_PRIOR = "apex.imatrix.prior"
RESERVED: Mapping[str, int] = {LIBRARY_COMMIT: 40, SOURCE_HASH: 64, DATA_HASH: 64}
"""Fields filled after encoding, with their width in bytes; shorter values are padded with spaces."""

_REPLACED = ("general.quantization_version", "general.file_type", "general.alignment")
_DROPPED_PREFIXES = ("split.", "apex.", "quantize.imatrix.")
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of ggml.h

# Names that say where a checkpoint lay and not what it is (published files carry general.name "Safetensors").
_FOLDER_NAMES = re.compile(
    r"(safetensors|model|models|snapshots?|checkpoints?|hf|gguf|ggml[-_]model|output|main|(sha256-)?[0-9a-f]{40,64})",
    re.I,
)
_PRECISION = re.compile(r"[-_. ](bf16|f16|fp16|f32|fp32|q8_0|mxfp4)$", re.I)
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")

# Newest first: the pull request of github.com/ggml-org/llama.cpp that added a type. Builds have numbers of their
# own, which no page we could check gives for the old ones.
_ADDED_BY: tuple[tuple[int, tuple[str, ...]], ...] = (
    (24448, ("Q2_0",)),
    (21273, ("Q1_0",)),
    (19769, ("NVFP4",)),
    (15091, ("MXFP4",)),
    (8151, ("TQ1_0", "TQ2_0")),
    (6302, ("IQ1_M",)),
    (5747, ("IQ4_XS",)),
    (5721, ("IQ2_S",)),
    (5676, ("IQ3_S",)),
    (5590, ("IQ4_NL",)),
    (5453, ("IQ1_S",)),
    (5196, ("IQ3_XXS",)),
    (4856, ("IQ2_XS",)),
    (4773, ("IQ2_XXS",)),
)


def display_name(model: GGUFModel) -> str:
    """The model's name for file names: the file's stem without precision and shard, or general.name.

    Folder-like stems ("model", "Safetensors", a commit hash) give way to general.name and basename.
    """
    stem = model.path.name.removesuffix(".gguf")
    previous = None
    while stem != previous:
        previous, stem = stem, _PRECISION.sub("", _SHARD.sub("", stem))
    for candidate in (stem, model.get("general.name"), model.get("general.basename")):
        if isinstance(candidate, str) and candidate.strip() and not _FOLDER_NAMES.fullmatch(candidate.strip()):
            return re.sub(r"[^\w.+-]+", "-", candidate.strip()).strip("-")
    return stem or "model"


def _kept_name(model: GGUFModel, name: Value) -> Value:
    if isinstance(name.data, str) and name.data.strip() and not _FOLDER_NAMES.fullmatch(name.data.strip()):
        return name
    return Value.string(display_name(model).replace("-", " "))


def parse_kv_override(text: str) -> tuple[str, Value]:
    """'KEY=TYPE:VALUE' (int, float, bool, str) with the value types llama-quantize writes. Raises UsageError."""
    key, separator, rest = text.partition("=")
    if key == "general.architecture" or key in _REPLACED or key.startswith(_DROPPED_PREFIXES):
        raise UsageError(f"{key} is decided by what is written and cannot be overridden")
    kind, colon, raw = rest.partition(":")
    try:
        if not separator or not colon or not key:
            raise ValueError
        match kind:
            case "int":
                return key, Value.u32(abs(int(raw)))
            case "float":
                return key, Value.f32(float(raw))
            case "bool":
                return key, Value.bool_({"true": True, "false": False}[raw.lower()])
            case "str":
                return key, Value.string(raw)
        raise ValueError
    except (ValueError, KeyError):
        raise UsageError(f"{text!r} is not of the form KEY=int|float|bool|str:VALUE") from None


def needed_llama_cpp(types: Iterable[GGMLType]) -> str | None:
    """The newest llama.cpp pull request that reading these types takes; the architecture may need a newer one."""
    names = {kind.name for kind in types}
    return next((f"PR #{number}" for number, added in _ADDED_BY if names & set(added)), None)


def library_version() -> str:
    """llama-cpp-python's version without loading it: the installed one, else the one we are made for."""
    try:
        return importlib.metadata.version(LIBRARY)
    except importlib.metadata.PackageNotFoundError:
        return LIBRARY_VERSION


def output_metadata(
    model: GGUFModel,
    source: Mapping[str, Value],
    recipe: Recipe,
    *,
    file_type: int,
    tier: str,
    zones: str,
    types: Iterable[GGMLType],
    importance: Importance | None,
    prior: str = "none",
) -> dict[str, Value]:
    """All keys of the output in order. `source` is the model's metadata after the user's own overrides.

    `prior` says how the importance matrix is filled, when there is one.
    """
    kept = {
        key: value for key, value in source.items() if key not in _REPLACED and not key.startswith(_DROPPED_PREFIXES)
    }
    if "general.name" in kept:
        kept["general.name"] = _kept_name(model, kept["general.name"])
    result = dict(kept)
    result["general.quantization_version"] = Value.u32(QUANTIZATION_VERSION)
    result["general.file_type"] = Value.u32(file_type)
    if importance is not None:
        result |= importance.quantize_metadata()
    result["apex.version"] = Value.string(VERSION)
    result["apex.library"] = Value.string(f"{LIBRARY} {library_version()}")
    result["apex.tier"] = Value.string(tier)
    result["apex.zones"] = Value.string(zones)
    result["apex.recipe.base"] = Value.string(recipe.base)
    result["apex.recipe.sha256"] = Value.string(recipe.sha256)
    result["apex.encoder"] = Value.string("ggml")
    needed = needed_llama_cpp(types)
    if needed is not None:
        result["apex.llama_cpp.needs"] = Value.string(needed)
    if importance is not None and importance.sha256 is not None:
        result[IMATRIX_HASH] = Value.string(importance.sha256)
    if importance is not None:
        result[IMATRIX_PRIOR] = Value.string(prior)
    for key, width in RESERVED.items():
        result[key] = Value.string(" " * width)
    return result
