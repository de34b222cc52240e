"""`apex export`: ready configurations of a model for LocalAI, Ollama, LM Studio, llama-server and docker compose.

    export("ollama", "MODEL.gguf", out="export/")

Every file is checked against what its target documents (data/targets.json) before it is written. Models are referred
to, not copied; only Ollama, which takes no shards, gets a merged file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from apex_quant.errors import InputError, UsageError, did_you_mean
from apex_quant.evaluation.kv_types import Pair, require_offered
from apex_quant.gguf import merge, open_model
from apex_quant.gguf.atomic import write_file
from apex_quant.gguf.types import TYPES
from apex_quant.model.facts import facts
from apex_quant.model.kv_cache import kv_cache
from apex_quant.serving import exports_schema as schema
from apex_quant.serving.exports_template import frame, stops
from apex_quant.serving.fit import shown_name
from apex_quant.serving.serve import sampling_defaults

if TYPE_CHECKING:
    from apex_quant.serving.exports_template import Frame

DEFAULT_CTX: Final = 32768
_BLOCK: Final = 8 << 20
_URI: Final = re.compile(r"(https?|huggingface)://[!-~]+")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Exported:
    """What was written. `warnings` name what the target cannot take."""

    target: str
    paths: tuple[Path, ...]
    sha256: dict[str, str]
    settings: dict[str, Any]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target, "paths": [str(path) for path in self.paths], "sha256": self.sha256,
            "settings": self.settings, "warnings": list(self.warnings),
        }  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What exporters need to know of the model."""

    path: Path
    files: tuple[Path, ...]
    name: str
    description: str
    license: str | None
    architecture: str
    ctx: int
    trained: int | None
    type_k: str
    type_v: str
    layers: int
    """As llama.cpp counts them for --n-gpu-layers: those that it adds or repeats too."""
    gpu_layers: int
    cpu_moe: int
    bytes: int
    kv_bytes: int
    sampling: dict[str, float]
    frame: Frame | None
    why_no_frame: str
    has_template: bool
    sha256: dict[str, str]
    uri: str | None
    publisher: str

    @property
    def file_name(self) -> str:
        """Of the first shard."""
        return self.files[0].name

    @property
    def partly_on_device(self) -> bool:
        """Whether fewer layers than all are asked for on the device."""
        return self.gpu_layers <= self.layers

    @property
    def quantized_v(self) -> bool:
        return self.type_v.upper() not in TYPES or TYPES[self.type_v.upper()].is_quantized

    def files_rows(self) -> list[dict[str, str]]:
        """filename, sha256 and uri of every shard."""
        return [
            {
                "filename": path.name,
                "sha256": self.sha256[path.name],
                "uri": f"{self.uri.rstrip('/')}/{path.name}" if self.uri else path.absolute().as_uri(),
            }
            for path in self.files
        ]


Writer = Callable[[Subject, Path, list[str]], dict[str, str]]


def export(
    target: str,
    model: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] = ".",
    ctx: int | None = None,
    type_k: str = "f16",
    type_v: str = "f16",
    gpu_layers: int | None = None,
    cpu_moe: int = 0,
    name: str | None = None,
    uri: str | None = None,
    publisher: str = "local",
    force: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write the files for `target` into the folder `out`.

    `ctx`: tokens (default 32768, or less where the model was trained on less); `gpu_layers`: as llama.cpp counts them
    (default all); `uri`: where the model's files can be downloaded, a folder such as
    https://huggingface.co/USER/REPO/resolve/main (default: where they lie); `publisher`: whose model it is, for LM
    Studio. Raises UsageError for an unknown target, cache types that the target has not, a `uri` that is none,
    an `out` that is a file and existing files without `force`, InputError for a file that is no model or whose path no
    configuration can name, ResourceError for a full disk.
    """
    from apex_quant.serving.exports_targets import WRITERS

    if target not in WRITERS:
        raise UsageError(
            f"no export is called {target!r}.{did_you_mean(target, list(WRITERS))}",
            hint="there are " + ", ".join(WRITERS),
        )
    # only llama-server is the user's own build: the others bring stock llama.cpp
    require_offered([Pair(type_k, type_v)], None if target == "llama-server" else ())
    if uri is not None and not _URI.fullmatch(uri):
        raise UsageError(f"--uri {uri[:100]!r} is no address", hint="https://huggingface.co/USER/REPO/resolve/main")
    folder = Path(out)
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if there.exists() and not there.is_dir():  # before the model is read and hashed
        raise UsageError(f"{there}: is a file, not a folder", hint="-o names the folder for the files")
    warnings: list[str] = []
    subject = _subject(Path(model), ctx, type_k, type_v, gpu_layers, cpu_moe, name, uri, publisher, warnings, progress)
    if subject.why_no_frame and target == "ollama":
        warnings.append(f"no TEMPLATE is written: {subject.why_no_frame}; Ollama then uses its own for the family")
    if target == "ollama" and len(subject.files) > 1:
        merged = folder / f"{subject.name}.gguf"
        if merged.exists() and not force:
            raise UsageError(f"{merged} exists already", hint="--force replaces it")
        folder.mkdir(parents=True, exist_ok=True)
        merge(subject.path, merged, progress, force=force)
        warnings.append(f"the {len(subject.files)} shards were merged into {merged.name}, since Ollama takes none")
        subject = _subject(merged, subject.ctx, type_k, type_v, gpu_layers, cpu_moe, subject.name, uri, publisher,
                           [], progress)  # fmt: skip
    texts = WRITERS[target](subject, folder, warnings)
    paths = [folder / file for file in texts]
    if not force and (taken := next((path for path in paths if path.exists()), None)):
        raise UsageError(f"{taken} exists already", hint="--force replaces it")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in zip(paths, texts.values(), strict=True):
        write_file(path, text)
    settings = {
        "ctx": subject.ctx, "type_k": type_k, "type_v": type_v, "gpu_layers": subject.gpu_layers,
        "n_cpu_moe": cpu_moe, "sampling": subject.sampling, "kv_bytes": subject.kv_bytes,
    }  # fmt: skip
    return Exported(target, tuple(paths), subject.sha256, settings, tuple(dict.fromkeys(warnings)))


def safe_name(text: str) -> str:
    """A name that every target takes: letters, digits, dots, dashes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "model"


def _subject(
    path: Path, ctx: int | None, type_k: str, type_v: str, gpu_layers: int | None, cpu_moe: int, name: str | None,
    uri: str | None, publisher: str, warnings: list[str], progress: Progress | None,
) -> Subject:  # fmt: skip
    with open_model(path) as model:
        known = facts(model)
        trained = known.context_length
        tokens = ctx or min(DEFAULT_CTX, trained or DEFAULT_CTX)
        if trained and tokens > trained:
            warnings.append(f"the model was trained on {trained} tokens at once, not {tokens}")
        cache = kv_cache(model, ctx=tokens, type_k=type_k, type_v=type_v)
        files = tuple(file.path for file in model.files)
        if odd := next((file for file in files if not str(file.absolute()).isprintable()), None):
            raise InputError(
                f"{str(odd)!r}: a path with line ends or control characters, which no configuration can name"
            )
        found, why = frame(model)
        text = {key: model.get(f"general.{key}") for key in ("name", "description", "license")}
        return Subject(
            path=path, files=files, name=safe_name(name or shown_name(files[0])),
            description=_line(text["description"]) or f"{_line(text['name']) or known.architecture}, {path.name}",
            license=_line(text["license"]), architecture=known.architecture, ctx=tokens, trained=trained,
            type_k=type_k, type_v=type_v, layers=known.n_layer_all,
            gpu_layers=known.n_layer_all + 1 if gpu_layers is None else gpu_layers, cpu_moe=cpu_moe,
            bytes=sum(info.nbytes for info in model.tensors.values()), kv_bytes=cache.bytes,
            sampling=sampling_defaults(model, warnings), frame=found, why_no_frame=why,
            has_template=isinstance(model.get("tokenizer.chat_template"), str),
            sha256=_hashes(files, progress), uri=uri, publisher=safe_name(publisher).lower(),
        )  # fmt: skip


def _line(value: Any) -> str | None:
    """One printable line of a metadata text; files may hold anything."""
    if not isinstance(value, str):
        return None
    return "".join(c for c in " ".join(value.split()) if c.isprintable())[:500] or None


def _hashes(files: tuple[Path, ...], progress: Progress | None) -> dict[str, str]:
    total, done, found = sum(path.stat().st_size for path in files), 0, {}
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                done += len(block)
                if progress is not None:
                    progress(done, total)
        found[path.name] = digest.hexdigest()
    return found


__all__ = ["Exported", "Subject", "export", "safe_name", "schema", "stops"]
