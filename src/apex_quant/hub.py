"""Downloads from the Hugging Face hub: models to convert, and other people's files to compare with.

Everything is downloaded at a commit: a branch or tag is looked up once, and the commit is recorded. The files lie in
huggingface_hub's own cache and are shared with every other program that uses it. Files that are there are not
fetched again; of one that was cut off, the library goes on within a process and begins anew in the next.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from apex_quant.errors import InputError, ResourceError, UsageError
from apex_quant.gguf.reader import SHARD_NAME
from apex_quant.hub_access import cache_folder, explained, library, missing_repository, rest, retried

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
"""ORG/NAME."""
BASELINE: Final = re.compile(
    r"(?P<repo>[^:@\s]+/[^:@\s]+)(?:@(?P<revision>[^:\s]+))?:(?P<pattern>[^:]+)(?::(?P<label>.+))?"
)
"""REPO[@REVISION]:PATTERN[:LABEL]."""
_SPARE: Final = 64 << 20  # bytes of disk left over, for what other programs write meanwhile


@dataclass(frozen=True)
class HubProgress:
    """Bytes of all files done, and the file in hand; `note` tells of something that is not progress."""

    phase: Literal["hash", "verify", "download", "upload", "commit"]
    file: str
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: `sha256` of large ones (LFS), `blob` (git's SHA-1) of the others."""

    path: str
    size: int
    sha256: str | None
    blob: str | None


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    name: str
    commit: str
    private: bool
    files: tuple[HubFile, ...]


@dataclass(frozen=True)
class Snapshot:
    """Downloaded files of one commit, and where they lie."""

    repo: str
    revision: str | None
    commit: str
    folder: Path
    files: tuple[HubFile, ...]

    def to_json(self) -> dict[str, Any]:
        files = [{"path": one.path, "bytes": one.size, "sha256": one.sha256} for one in self.files]
        return {"repo": self.repo, "revision": self.revision, "commit": self.commit, "files": files}


@dataclass(frozen=True)
class Baseline:
    """Another quantization of the model: `path` is its file, or the first of its shards."""

    label: str
    path: Path
    repo: str
    commit: str
    files: tuple[HubFile, ...]


def repository(repo: str, revision: str | None = None) -> Repository:
    """What a model repository holds. Raises whatever the library raises: for `explained` or `retried` around it."""
    info = library(repo).HfApi().model_info(repo, revision=revision, files_metadata=True)
    files = [
        HubFile(one.rfilename, one.size or 0, getattr(one.lfs, "sha256", None), one.blob_id)
        for one in info.siblings or ()
    ]
    return Repository(repo, str(info.sha), bool(info.private), tuple(files))


def find_repository(repo: str, revision: str | None = None) -> Repository | None:
    """The same, None when there is no such repository (or none that the stored token may see)."""
    try:
        return repository(repo, revision)
    except Exception as error:
        if missing_repository(error):
            return None
        raise


def download(
    repo: str,
    *,
    revision: str | None = None,
    patterns: Sequence[str] | None = None,
    progress: Callable[[HubProgress], None] | None = None,
) -> Path:
    """The folder with a repository's files that fit `patterns` (as of shells; None: all), at one commit.

    Its name is the commit; `snapshot` returns the commit and the files as well. Raises UsageError for a name that is
    none, InputError when there is no such repository, revision or file, when it is gated, or when what came is not
    what the hub said; ResourceError without huggingface_hub, network or disk space.
    """
    return snapshot(repo, revision=revision, patterns=patterns, progress=progress).folder


def snapshot(
    repo: str,
    *,
    revision: str | None = None,
    patterns: Sequence[str] | None = None,
    progress: Callable[[HubProgress], None] | None = None,
    sleep: Callable[[float], None] = rest,
) -> Snapshot:
    """Download as `download` does, and tell what came. `revision` is a branch, a tag or a commit."""
    found = looked_up(repo, revision, progress=progress, sleep=sleep)
    wanted = [file for file in found.files if patterns is None or _fits(file.path, patterns)]
    if not wanted:
        there = ", ".join(file.path for file in found.files[:8]) or "nothing"
        raise InputError(
            f"{repo}@{found.commit[:8]}: no file fits {', '.join(patterns or ('*',))}", hint=f"it holds {there}"
        )
    return Snapshot(repo, revision, found.commit, fetch(found, wanted, progress=progress, sleep=sleep), tuple(wanted))


def looked_up(
    repo: str,
    revision: str | None = None,
    *,
    progress: Callable[[HubProgress], None] | None = None,
    sleep: Callable[[float], None] = rest,
) -> Repository:
    """What a repository holds, asked until it answers. Raises what `download` raises before the first file."""
    with explained(repo):
        return retried(lambda: repository(repo, revision), sleep=sleep, say=_noted(repo, progress))


def _noted(repo: str, progress: Callable[[HubProgress], None] | None) -> Callable[[str], None]:
    def say(note: str) -> None:
        if progress is not None:
            progress(HubProgress("download", repo, 0, 0, note))

    return say


def fetch(
    found: Repository,
    wanted: Sequence[HubFile],
    *,
    progress: Callable[[HubProgress], None] | None = None,
    sleep: Callable[[float], None] = rest,
) -> Path:
    """The folder of a repository's commit, with at least these of its files in it. Raises what `download` raises."""
    tell, say = progress or (lambda _: None), _noted(found.name, progress)
    _require_disk(found, wanted)
    total, done = sum(file.size for file in wanted), 0
    folder = None
    for file in wanted:
        tell(HubProgress("download", file.path, done, total))
        path = _one_file(found, file, sleep, say)
        folder = path.parents[file.path.count("/")]
        done += file.size
    tell(HubProgress("download", wanted[-1].path, total, total))
    assert folder is not None
    return folder


def _fits(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, one) or fnmatch.fnmatchcase(path.split("/")[-1], one) for one in patterns)


def _one_file(found: Repository, file: HubFile, sleep: Callable[[float], None], say: Callable[[str], None]) -> Path:
    """Downloaded, and its hash taken; one that differs is deleted and fetched once more."""
    name = f"{found.name}@{found.commit[:8]}/{file.path}"
    api = library(name).HfApi()
    for attempt in range(2):
        with explained(name):
            path = Path(
                retried(lambda: api.hf_hub_download(found.name, file.path, revision=found.commit), sleep=sleep, say=say)
            )
        if _came_whole(path, file):
            return path
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        if attempt == 0:
            say(f"{file.path} is not what the hub says it is; downloading it again")
    raise InputError(
        f"{name}: corrupted: its hash is not {file.sha256 or file.blob}, twice",
        hint="the copy was deleted; try again later",
    )


def _came_whole(path: Path, file: HubFile) -> bool:
    return matches(file, path.stat().st_size, lambda: path.open("rb")) is not False


def matches(
    file: HubFile, size: int, opened: Callable[[], io.BufferedIOBase], sha256: str | None = None
) -> bool | None:
    """Whether `size` bytes are those of a hub's file, None where the hub tells no hash of it.

    By the sha256 of large files, not taken again where it is known, and git's SHA-1 of the others.
    """
    if file.sha256 is not None:
        return file.sha256 == (sha256 or _digest(opened, hashlib.sha256()))
    if file.blob is not None:
        return file.blob == _digest(opened, hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False))
    return None


def _digest(opened: Callable[[], io.BufferedIOBase], begun: Any) -> str:
    with opened() as file:
        return hashlib.file_digest(file, lambda: begun).hexdigest()


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    return _digest(lambda: path.open("rb"), hashlib.sha256())


def _require_disk(found: Repository, wanted: Sequence[HubFile]) -> None:
    """ResourceError before the first byte when the rest will not fit."""
    module = library(found.name)
    # a file that an interrupted process had in hand is begun anew by the library, so partial ones do not count
    needed = sum(
        file.size
        for file in wanted
        if not isinstance(module.try_to_load_from_cache(found.name, file.path, revision=found.commit), str)
    )
    cache = cache_folder()
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if needed > 0 and needed + _SPARE > free:
        raise ResourceError(
            f"{found.name}: {needed / 1e9:.2f} GB are still to come, and {there} has {free / 1e9:.2f} GB free",
            hint="free some space, or set HF_HUB_CACHE to a folder on a larger disk",
        )


# --- baselines ---


def models_fitting(files: Sequence[HubFile], pattern: str) -> dict[str, list[HubFile]]:
    """The GGUF models whose path or file name fits a pattern, as of shells: the files of each, shards in order, by its
    path without the ending. Importance matrices and projectors are none."""
    models: dict[str, list[HubFile]] = {}
    for file in sorted(files, key=lambda one: one.path):
        base = file.path.split("/")[-1].lower()
        is_model = file.path.endswith(".gguf") and "imatrix" not in base and not base.startswith("mmproj")
        if is_model and _fits(file.path, [pattern]):
            shard = SHARD_NAME.fullmatch(file.path)
            models.setdefault(shard["prefix"] if shard else file.path.removesuffix(".gguf"), []).append(file)
    return models


def baseline_files(
    spec: str,
    *,
    progress: Callable[[HubProgress], None] | None = None,
    sleep: Callable[[float], None] = rest,
) -> list[Baseline]:
    """REPO[@REVISION]:PATTERN[:LABEL], downloaded: every GGUF model there whose file name fits the pattern.

    Shards count as one model. Several models are labelled 'LABEL NAME'; the default label is REPO. Raises UsageError
    for another form, InputError when nothing fits or shards are missing, and as `download`.
    """
    found = BASELINE.fullmatch(spec)
    if found is None:
        raise UsageError(
            f"{spec!r} is not REPO:PATTERN:LABEL", hint="such as 'unsloth/Qwen3-30B-A3B-GGUF:*-Q4_K_M*:unsloth'"
        )
    repo, label = found["repo"], found["label"] or found["repo"]
    there = looked_up(repo, found["revision"], progress=progress, sleep=sleep)
    fitting = models_fitting(there.files, found["pattern"])
    models = {name: [file.path for file in files] for name, files in fitting.items()}
    if not models:
        known = ", ".join(f.path for f in there.files if f.path.endswith(".gguf"))[:300] or "no GGUF file"
        raise InputError(f"{spec}: no GGUF model of {repo} fits {found['pattern']}", hint=f"it holds {known}")
    for name, shards in models.items():
        shard = SHARD_NAME.fullmatch(shards[0])
        if shard and len(shards) != int(shard["count"]):
            raise InputError(f"{spec}: {len(shards)} of {int(shard['count'])} shards of {name} fit the pattern")
    by_path = {file.path: file for file in there.files}
    wanted = [by_path[path] for shards in models.values() for path in shards]
    folder = fetch(there, wanted, progress=progress, sleep=sleep)
    return [
        Baseline(
            label if len(models) == 1 else f"{label} {name.split('/')[-1]}",
            folder / shards[0],
            repo,
            there.commit,
            tuple(by_path[path] for path in shards),
        )
        for name, shards in models.items()
    ]
