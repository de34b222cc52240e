"""What is in a Hugging Face checkpoint directory, told from its JSON files and safetensors headers alone.

Nothing is imported from the directory and no tensor is read, so this takes milliseconds and no memory. Which keys
and dtypes matter is what llama.cpp's converter looks at.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, NamedTuple

from apex_quant.errors import InputError, UsageError

CONFIG: Final = "config.json"
CARD: Final = "README.md"
WEIGHTS: Final = (("model", ".safetensors"), ("pytorch_model", ".bin"))
"""How names of weight files begin and end, the better form first: the converter reads one form alone."""
BESIDE: Final = ("*.json", "*.jsonl", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", CARD)
"""Names of what it reads besides: configuration, tokenizer, templates, code that may be trusted, the card's facts."""
_PARTS: Final = "*/model.safetensors"  # of audio tokenizers and dense modules, in folders of their own
OUTTYPES: Final = ("bf16", "f16", "f32", "auto")
_MAX_JSON: Final = 64 << 20
_MAX_HEADER: Final = 100_000_000  # the safetensors library's own limit
_MAX_FILES: Final = 4096
_MAX_TENSORS: Final = 4_000_000
_MAX_DIMENSIONS: Final = 8  # PyTorch's convolutions have 5
# where a configuration keeps that of its language model
_TEXT_CONFIGS: Final = ("text_config", "llm_config", "lm_config", "language_config", "lfm")
_NEXTN_KEYS: Final = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")
_VISION: Final = re.compile(r"(^|\.)(visual|vision_\w+|vision|image_newline|multi_modal_projector|mm_projector|mlp1)\.")
_AUDIO: Final = re.compile(r"(^|\.)(audio_tower|audio_encoder|audio_projector|talker|token2wav|code2wav)\.")
_NEXTN: Final = re.compile(r"(^|\.)(mtp|nextn)\w*\.")
# stored dtype -> bits of one element
_BITS: Final = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    "F4": 4,
}
_SCALES: Final = re.compile(r"(_scale(_inv|_2)?|_zero_point|\.qzeros|\.g_idx|\.scales|_shape|_global_scale)$")
_OUTPUT_BYTES: Final = {"bf16": 2, "f16": 2, "auto": 2, "f32": 4}
READ_METHODS: Final = frozenset({"bitnet", "fp8", "gptq", "compressed-tensors", "modelopt", "mxfp4"})
"""Values of quant_method that the converter of the pinned version undoes or repacks."""
_KEPT: Final = ("mxfp4", "nvfp4")
"""Formats that become ggml's type of the same name instead of being dequantized."""


class StoredTensor(NamedTuple):
    """A tensor as a safetensors header tells of it; `shape` in PyTorch's order."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """Facts of a checkpoint directory. Bytes are file sizes; `dtypes` counts elements by stored dtype."""

    path: Path
    architecture: str
    text_architecture: str
    model_type: str
    layers: int
    experts: int
    nextn_layers: int
    nextn_tensors: int
    quantization: str | None
    quantization_format: str | None
    vision: bool
    audio: bool
    parameters: int
    tensors: int
    dtypes: dict[str, int]
    weight_bytes: int
    shards: tuple[str, ...]
    missing: tuple[str, ...]
    remote_code: bool
    estimated_bytes: dict[str, int]
    warnings: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every weight file that the index names is there in full."""
        return not self.missing

    @property
    def without_nextn(self) -> bool:
        """Whether it is known that the weights hold no NextN/MTP block, whatever the configuration says."""
        return self.tensors > 0 and not self.nextn_tensors and not self.missing

    def estimate(self, outtype: str, *, mmproj: bool = False) -> int:
        """Bytes that the GGUF will have, to a few per cent; `mmproj`: of the projector file instead."""
        if outtype not in OUTTYPES:
            raise UsageError(f"--outtype {outtype!r}: choose {', '.join(OUTTYPES)}")
        return self.estimated_bytes[("mmproj-" if mmproj else "") + outtype]

    def outtype(self, asked: str) -> str:
        """What `auto` will become: f16 where the weights are F16, else bf16 (FP8 and F32 have bf16's range)."""
        if asked != "auto":
            return asked
        return "f16" if max(("F16", "BF16", "F32"), key=lambda kind: self.dtypes.get(kind, 0)) == "F16" else "bf16"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **asdict(self),
            "path": str(self.path),
            "shards": list(self.shards),
            "missing": list(self.missing),
            "warnings": list(self.warnings),
            "complete": self.complete,
        }


def describe(directory: str | Path) -> Checkpoint:
    """Look at a checkpoint directory.

    A checkpoint with missing or truncated weight files is described too: see `missing`. Raises InputError for what is
    no checkpoint, or whose JSON or safetensors headers are broken.
    """
    path = Path(directory)
    if path.is_file():
        kind = "a GGUF file already: it needs no conversion" if path.suffix == ".gguf" else "a file"
        raise InputError(f"{path}: is {kind}", hint="name the directory that holds config.json and the weights")
    if not path.is_dir():
        raise InputError(
            f"{path}: no such directory", hint="name one with config.json; what is converted may be a hub id: ORG/NAME"
        )
    if not (path / CONFIG).is_file():
        hint = "name one of its GGUF files itself" if next(path.glob("*.gguf"), None) else None
        raise InputError(f"{path}: holds no config.json, so it is no Hugging Face checkpoint", hint=hint)
    config = read_json(path / CONFIG)
    text = text_config(config)
    with os.scandir(path) as entries:
        shards = weight_files(path, [entry.name for entry in entries])
    missing = {name: "is not there" for name in shards if not (path / name).is_file()}
    stored: list[StoredTensor] = []
    for name in shards:
        if name.endswith(".safetensors") and name not in missing:
            problem = _read_header(path / name, stored)
            if problem:
                missing[name] = problem
    missing |= _unstored(path, stored, missing)
    layers = _count(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    nextn = _count(text, *_NEXTN_KEYS) or _count(config, *_NEXTN_KEYS)
    method, form = _quantization(path, config, text)
    weight_bytes = sum((path / name).stat().st_size for name in shards if (path / name).is_file())
    vision = any(config.get(key) for key in ("vision_config", "vision_encoder", "visual", "mm_vision_tower"))
    remote = _remote_code(path, config)
    whole, language = architectures(config)
    found = Checkpoint(
        path=path,
        architecture=whole,
        text_architecture=language,
        model_type=str(text.get("model_type") or config.get("model_type") or ""),
        layers=layers,
        experts=_count(text, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        nextn_layers=nextn,
        nextn_tensors=_nextn_tensors(stored, layers),
        quantization=method,
        quantization_format=form,
        vision=vision,
        audio=bool(config.get("audio_config")),
        parameters=sum(_weights(tensor, form) for tensor in stored),
        tensors=len(stored),
        dtypes=dict(sum((Counter({t.dtype: math.prod(t.shape)}) for t in stored), Counter())),
        weight_bytes=weight_bytes,
        shards=tuple(shards),
        missing=tuple(f"{name}: {problem}" for name, problem in missing.items()),
        remote_code=remote,
        estimated_bytes=_estimates(stored, form, weight_bytes),
        warnings=(),
    )
    return Checkpoint(**{**vars(found), "warnings": tuple(_warnings(found))})


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration; the whole where it has no parts."""
    thinker = config.get("thinker_config")
    parents = (thinker, config) if isinstance(thinker, dict) else (config,)
    for parent in parents:
        for key in _TEXT_CONFIGS:
            if isinstance(parent.get(key), dict):
                return dict(parent[key])
    return dict(config)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. InputError."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise InputError(f"{path}: has {path.stat().st_size} bytes, far more than such a file needs")
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no JSON object")
    return found


def architectures(config: Mapping[str, Any]) -> tuple[str, str]:
    """What a config.json calls the model, and its language model; '' where it does not."""
    return _architecture(config), _architecture(text_config(config)) or _architecture(config)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _count(config: Mapping[str, Any], *keys: str) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 20:
            return value
    return 0


def conversion_files(folder: Path, paths: Iterable[str]) -> list[str]:
    """Of a checkpoint's files, by their paths in it, those that a conversion reads; with missing ones of the weights.

    `folder` holds the index files at least. Raises what weight_files() raises.
    """
    paths = list(paths)
    weights = weight_files(folder, [path for path in paths if "/" not in path])
    return sorted({*weights, *filter(_is_beside, paths)})


def _is_beside(path: str) -> bool:
    return fnmatchcase(path, _PARTS) or any(fnmatchcase(path.rpartition("/")[2], one) for one in BESIDE)


def index_files() -> tuple[str, ...]:
    """Names under which a checkpoint may list its weight files."""
    return tuple(f"{prefix}{suffix}.index.json" for prefix, suffix in WEIGHTS)


def weight_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Names of the weight files as the converter chooses them among the `names` in a checkpoint's folder.

    What its index or the numbers in names (model-00002-of-00003) imply is named even where it is not there. `folder`
    holds the index files at least. InputError for a broken index, for far too many files, and for none.
    """
    there = set(names)
    for (prefix, suffix), index in zip(WEIGHTS, index_files(), strict=True):
        if index in there:
            chosen = _indexed(folder / index)
        else:
            chosen = _counted(folder, sorted(n for n in there if n.startswith(prefix) and n.endswith(suffix)))
        if len(chosen) > _MAX_FILES:
            raise InputError(f"{folder}: has {len(chosen)} weight files")
        if chosen:
            return chosen
    raise InputError(f"{folder}: holds no model*.safetensors or pytorch_model*.bin", hint="is the download complete?")


def _indexed(index: Path) -> list[str]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise InputError(f"{index}: has no weight_map")
    names = sorted(set(table.values()))
    if any(os.path.basename(name) != name or name in ("", ".", "..") for name in names):  # noqa: PTH119
        raise InputError(f"{index}: names weight files outside of its directory")
    return names


def _counted(folder: Path, names: list[str]) -> list[str]:
    """With the shards that the others' names imply, for checkpoints without an index."""
    numbered = [found for name in names if (found := re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)", name))]
    if not numbered or len(numbered) != len(names):
        return names
    first = numbered[0]
    if int(first[3]) > _MAX_FILES:
        raise InputError(f"{folder}: {first[0]} belongs to {int(first[3])} files")
    return sorted({*names, *(f"{first[1]}-{i:05}-of-{first[3]}{first[4]}" for i in range(1, int(first[3]) + 1))})


def _read_header(path: Path, into: list[StoredTensor]) -> str | None:
    """Add a file's tensors; returns what is wrong with a file that is not complete. InputError for a broken header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if (start + file.read(32)).startswith(b"version https://git-lfs"):
            return "is a git-lfs pointer, not the file (git lfs pull, or download it with the hub's client)"
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
            return f"is truncated: it has {size} bytes"
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            found = [
                StoredTensor(name, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
                for name, entry in entries.items()
            ]
            end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise InputError(f"{path}: has a broken safetensors header: {type(error).__name__}") from None
    too_many = len(into) + len(found) > _MAX_TENSORS or any(len(t.shape) > _MAX_DIMENSIONS for t in found)
    if too_many or any(n < 0 or n > 1 << 48 for tensor in found for n in tensor.shape):
        raise InputError(f"{path}: has tensors of impossible sizes")
    into += found
    if size < 8 + length + end:
        return f"is truncated: it has {size} of {8 + length + end} bytes"
    return None


def _unstored(path: Path, stored: list[StoredTensor], missing: Mapping[str, str]) -> dict[str, str]:
    """Index entries that no present file holds."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    names = {tensor.name for tensor in stored}
    lost: Counter[str] = Counter(
        file for name, file in read_json(index)["weight_map"].items() if name not in names and file not in missing
    )
    return {file: f"lacks {count} of the tensors that the index names" for file, count in lost.items()}


def _quantization(path: Path, config: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """quant_method, and the format within it (nvfp4-pack-quantized, NVFP4, ...), as the converter finds them."""
    settings = config.get("quantization_config") or text.get("quantization_config")
    settings = dict(settings) if isinstance(settings, dict) else {}
    if not settings and (path / "hf_quant_config.json").is_file():
        extra = read_json(path / "hf_quant_config.json")
        inner, producer = extra.get("quantization"), extra.get("producer")
        settings = dict(inner) if isinstance(inner, dict) else {}
        settings.setdefault("quant_method", (producer if isinstance(producer, dict) else {}).get("name") or "modelopt")
    if not settings:
        return None, None
    method = str(settings.get("quant_method") or "unknown").lower()
    form = settings.get("quant_algo") or settings.get("format") or settings.get("fmt")
    return method, str(form).lower() if form else method


def _remote_code(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether configuration or tokenizer name Python code of the checkpoint's own."""
    tokenizer = path / "tokenizer_config.json"
    return bool(config.get("auto_map") or (tokenizer.is_file() and read_json(tokenizer).get("auto_map")))


def _weights(tensor: StoredTensor, form: str | None) -> int:
    """Model weights that a stored tensor stands for: packed ones hold several in an element."""
    count = math.prod(tensor.shape)
    if _SCALES.search(tensor.name):
        return 0
    if (form and tensor.name.endswith(("_packed", ".qweight", "_blocks"))) or (form and "nvfp4" in form):
        return count * max(1, _BITS.get(tensor.dtype, 16) // 4) if tensor.dtype in ("U8", "I32", "I8") else count
    return count


def _estimates(stored: list[StoredTensor], form: str | None, weight_bytes: int) -> dict[str, int]:
    """Output bytes by output type and 'mmproj-' + type. Vectors stay F32; MXFP4 and NVFP4 keep their bits."""
    found: Counter[str] = Counter()
    for tensor in stored:
        projector = bool(_VISION.search(tensor.name) or _AUDIO.search(tensor.name))
        weights = _weights(tensor, form)
        kept = form is not None and any(kind in form for kind in _KEPT) and tensor.dtype in ("U8", "F8_E8M0", "I8")
        for outtype, size in _OUTPUT_BYTES.items():
            widened = weights * (size if len(tensor.shape) > 1 else 4)
            found[("mmproj-" if projector else "") + outtype] += math.prod(tensor.shape) if kept else widened
    if not stored:  # only .bin files, whose elements are nearly always 16 bits wide
        found.update({outtype: weight_bytes * size // 2 for outtype, size in _OUTPUT_BYTES.items()})
    # the vocabulary and other metadata: 5 to 25 MB
    return {
        key: found[key] + (0 if key.startswith("mmproj-") else 16 << 20)
        for outtype in OUTTYPES
        for key in (outtype, "mmproj-" + outtype)
    }


def _warnings(checkpoint: Checkpoint) -> Iterator[str]:
    """What a user should know before hours of work."""
    method, form = checkpoint.quantization, checkpoint.quantization_format or ""
    if method and any(kind in form for kind in _KEPT):
        yield f"the checkpoint is quantized ({form}): those tensors keep their 4 bits, and quantizing them loses again"
    elif method:
        yield f"the checkpoint is quantized ({method}): its weights are widened and are no better than they were"
    if checkpoint.vision:
        yield "there is a vision tower: --mmproj makes the projector file, which llama.cpp keeps apart"
    if checkpoint.nextn_layers and checkpoint.without_nextn:
        yield f"the configuration names {checkpoint.nextn_layers} NextN layers, but the weights hold none"
    if checkpoint.remote_code:
        yield "the checkpoint brings Python code; it is not run unless --trust-remote-code"
    if checkpoint.shards and checkpoint.shards[0].endswith(".bin"):
        yield "the weights are pickles (.bin): sizes are guessed, and PyTorch reads them in its restricted mode"
    if not any((checkpoint.path / name).is_file() for name in _TOKENIZERS):
        yield f"no tokenizer file is there ({', '.join(_TOKENIZERS)})"


_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "vocab.txt", "tiktoken.model")


def _nextn_tensors(stored: list[StoredTensor], layers: int) -> int:
    """Tensors of NextN/MTP blocks: named so, or of layers beyond the trunk."""
    beyond = re.compile(r"(^|\.)layers\.(\d+)\.")
    return sum(
        bool(_NEXTN.search(t.name)) or bool(layers and (found := beyond.search(t.name)) and int(found[2]) >= layers)
        for t in stored
        if not (_VISION.search(t.name) or _AUDIO.search(t.name))
    )
