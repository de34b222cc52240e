"""Where llama.cpp's converter comes from: the source distribution of the very library release that is installed.

Only the converter, its package and gguf-py are unpacked, once, into the user's cache. LLAMA_CPP_DIR names a checkout
to take instead.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from apex_quant.cache import cache_folder
from apex_quant.errors import InputError, ResourceError, UsageError
from apex_quant.version import LIBRARY, LIBRARY_VERSION

SDIST_SHA256: Final[Mapping[str, str]] = {
    "0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
}
"""sha256 of the source distribution by release; a release without one here is not downloaded."""
SCRIPT: Final = "convert_hf_to_gguf.py"
_NEEDED: Final = (SCRIPT, "gguf-py/gguf/__init__.py")
# what is unpacked of vendor/llama.cpp: these files, and Python files and licences below these folders
_FILES: Final = (SCRIPT, "LICENSE", "gguf-py/LICENSE")
_FOLDERS: Final = ("conversion/", "gguf-py/gguf/")
_MAX_MEMBERS: Final = 50_000
_MAX_FILE: Final = 16 << 20
_MAX_KEPT: Final = 64 << 20
_MAX_ALL: Final = 4 << 30
_MANIFEST: Final = "apex-manifest.json"
_OFFLINE: Final = (
    f"without a network, unpack the sdist of {LIBRARY}=={LIBRARY_VERSION} elsewhere and set LLAMA_CPP_DIR to its "
    "vendor/llama.cpp"
)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Converter:
    """An unpacked converter. `origin` says whose it is: 'llama-cpp-python 0.3.36' or a path."""

    folder: Path
    origin: str
    pinned: bool

    @property
    def script(self) -> Path:
        return self.folder / SCRIPT

    @property
    def has_classes(self) -> bool:
        """Whether its model classes are a package and not inside the script, as in old releases."""
        return (self.folder / "conversion").is_dir()

    def architectures(self, *, mmproj: bool = False) -> frozenset[str]:
        """Names of architectures that it converts, read from its table without running it; empty where unknown."""
        wanted = "MMPROJ_MODEL_MAP" if mmproj else "TEXT_MODEL_MAP"
        try:
            tree = ast.parse((self.folder / "conversion" / "__init__.py").read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            return frozenset()  # older releases keep the table in decorators
        for node in tree.body:
            target = node.target if isinstance(node, ast.AnnAssign) else None
            if isinstance(target, ast.Name) and target.id == wanted and isinstance(getattr(node, "value", 0), ast.Dict):
                keys = node.value.keys  # type: ignore[attr-defined]
                return frozenset(str(key.value) for key in keys if isinstance(key, ast.Constant))
        return frozenset()


def find_converter(*, sdist: str | Path | None = None, sha256: str | None = None, say: Say = print) -> Converter:
    """The converter, from LLAMA_CPP_DIR, the cache, or a download of about 76 MB by pip.

    `sdist` is a source distribution that is there already, `sha256` its expected hash (default: the pinned release's).
    Raises UsageError for a wrong LLAMA_CPP_DIR, ResourceError when it cannot be had, InputError for a wrong archive.
    """
    given = os.environ.get("LLAMA_CPP_DIR")
    if given:
        folder = Path(given).expanduser().resolve()
        for name in _NEEDED:
            if not (folder / name).is_file():
                raise UsageError(f"LLAMA_CPP_DIR={given}: no {name} there", hint="name a checkout of llama.cpp")
        return Converter(folder, f"LLAMA_CPP_DIR {given}", pinned=False)
    expected = sha256 or SDIST_SHA256.get(LIBRARY_VERSION)
    if expected is None:
        raise ResourceError(f"no source hash is known for {LIBRARY} {LIBRARY_VERSION}", hint="set LLAMA_CPP_DIR")
    target = _unpacked(expected)
    found = Converter(target, f"{LIBRARY} {LIBRARY_VERSION}", pinned=True)
    if not _intact(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="converter-") as scratch:
            archive = Path(sdist) if sdist else _download(Path(scratch), expected, say)
            unpack(archive, expected, Path(scratch) / "new")
            _put_in_place(Path(scratch) / "new", target)
    return found


def unpacked_converter() -> Converter | None:
    """The same where nothing has to be downloaded for it. Raises UsageError for a wrong LLAMA_CPP_DIR."""
    expected = SDIST_SHA256.get(LIBRARY_VERSION)
    there = expected is not None and _intact(_unpacked(expected))
    return find_converter() if os.environ.get("LLAMA_CPP_DIR") or there else None


def _unpacked(sha256: str) -> Path:
    return cache_folder() / f"converter-{LIBRARY_VERSION}-{sha256[:12]}"


def _intact(folder: Path) -> bool:
    """Whether every unpacked file still has its hash: code is run from there."""
    try:
        files = json.loads((folder / _MANIFEST).read_bytes())["files"]
        return all(_sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _put_in_place(new: Path, target: Path) -> None:
    """Another process may do the same at the same time: the first one wins, and a damaged folder gives way."""
    if target.exists() and not _intact(target):
        shutil.rmtree(target)
    try:
        new.rename(target)
    except OSError:
        if not _intact(target):
            raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(folder: Path, sha256: str, say: Say) -> Path:
    """The sdist by pip, which checks the hash too. ResourceError."""
    say(f"downloading the source of {LIBRARY} {LIBRARY_VERSION} (76 MB) for its converter; this happens once")
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{LIBRARY}=={LIBRARY_VERSION} --hash=sha256:{sha256}\n")
    options = ["--no-deps", "--no-binary", LIBRARY, "--require-hashes", "-r", str(wanted), "-d", str(folder)]
    command = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "download", "--quiet", *options]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    archive = next(folder.glob("*.tar.gz"), None)
    if ran.returncode or archive is None:
        lines = [line.strip() for line in (ran.stderr + ran.stdout).splitlines() if line.strip()]
        last = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no reason given")
        raise ResourceError(f"pip cannot download {LIBRARY}=={LIBRARY_VERSION}: {last[:300]}", hint=_OFFLINE)
    return archive


def unpack(archive: Path, sha256: str, target: Path) -> None:
    """Take the converter out of an sdist into the new folder `target`, with a manifest of hashes.

    Members are read in order, none is written outside of `target`, links are refused, sizes are bounded. InputError.
    """
    if _sha256(archive) != sha256:
        raise InputError(f"{archive}: is not the released source: its sha256 is not {sha256[:12]}...")
    digests: dict[str, str] = {}
    kept = total = members = 0
    try:
        with tarfile.open(archive, "r|gz") as opened:
            for member in opened:
                members, total = members + 1, total + member.size
                if members > _MAX_MEMBERS or total > _MAX_ALL:
                    raise InputError(f"{archive}: holds more than such an archive can")
                name = _wanted(member.name)
                if name is None or member.isdir():
                    continue
                if not member.isreg() or member.size > _MAX_FILE or kept + member.size > _MAX_KEPT:
                    raise InputError(f"{archive}: {member.name} is no ordinary file of a converter's size")
                data = _contents(opened, member)
                kept += len(data)
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                digests[name] = hashlib.sha256(data).hexdigest()
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise ResourceError(f"{target}: cannot be written: {error.strerror}") from None
        raise InputError(f"{archive}: is broken: {error}") from None
    if not all(name in digests for name in _NEEDED):
        raise InputError(f"{archive}: holds no {SCRIPT}")
    manifest: dict[str, Any] = {"library": LIBRARY, "version": LIBRARY_VERSION, "sdist": sha256, "files": digests}
    (target / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _contents(opened: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = opened.extractfile(member)
    assert file is not None
    return file.read()


def _wanted(name: str) -> str | None:
    """The path below vendor/llama.cpp of a member that belongs to the converter, else None."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or path.parts[1:3] != ("vendor", "llama.cpp"):
        return None
    inner = "/".join(path.parts[3:])
    is_code = inner.startswith(_FOLDERS) and inner.endswith((".py", "py.typed"))
    return inner if inner in _FILES or is_code else None
