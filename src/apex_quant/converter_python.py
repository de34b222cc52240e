"""The Python that runs the converter: it needs PyTorch and transformers, which this package does not.

Asked for by name (--python, APEX_CONVERT_PYTHON), else the one that runs us, else an environment in the user's cache
that `set_up` makes. What is missing is found by looking for the modules, without importing them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from apex_quant.cache import cache_folder
from apex_quant.errors import ResourceError, UsageError
from apex_quant.other_python import code_command

VARIABLE: Final = "APEX_CONVERT_PYTHON"
HIDDEN: Final = ("PYTHONPATH", "PYTHONHOME", "NO_LOCAL_GGUF")
"""Variables that the converter's Python does not see: our modules must not be what it imports."""
# module -> what pip calls it
NEEDS: Final = {
    "torch": "torch",
    "transformers": "transformers",
    "sentencepiece": "sentencepiece",
    "safetensors": "safetensors",
    "google.protobuf": "protobuf",
    "numpy": "numpy",
    "yaml": "pyyaml",
    "tqdm": "tqdm",
}
# only some tokenizers need them: they are installed, but not asked for
_OPTIONAL: Final = frozenset({"google.protobuf", "safetensors"})
_SETUP_BYTES: Final = 12 << 30  # PyTorch's wheels with their CUDA libraries, packed and unpacked
_MARK: Final = "apex-complete.json"
_PROBE: Final = """
import importlib.metadata as m, importlib.util as u, json, sys
def there(name):
    try:
        return u.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return None
needs = json.loads(sys.argv[1])
print(json.dumps({k: (version(v) or "unknown") if there(k) else None for k, v in needs.items()}))
"""
Say = Callable[[str], None]


@dataclass(frozen=True)
class ConverterPython:
    """An interpreter and the versions it has of what the converter needs (None: missing)."""

    path: Path
    versions: dict[str, str | None]

    @property
    def missing(self) -> tuple[str, ...]:
        """Names for pip."""
        return tuple(NEEDS[key] for key, found in self.versions.items() if found is None and key not in _OPTIONAL)


def environment_folder() -> Path:
    """Where `set_up` makes its environment."""
    return cache_folder() / f"convert-env-{sys.version_info[0]}.{sys.version_info[1]}"


def foreign_environment() -> dict[str, str]:
    """The environment variables of a process of the converter's Python."""
    return {name: value for name, value in os.environ.items() if name not in HIDDEN}


def probe(path: str | Path) -> ConverterPython:
    """What an interpreter has. UsageError when it is none."""
    # the name is kept as given: a virtual environment's python is a link, and what it resolves to is another one
    command = code_command(path, _PROBE, json.dumps(NEEDS))
    env = foreign_environment()
    try:
        ran = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=env
        )
        return ConverterPython(Path(path), json.loads(ran.stdout))
    except (OSError, ValueError):
        raise UsageError(
            f"{path}: is not a working Python", hint="name its executable, such as env/bin/python"
        ) from None


def find_python(given: str | Path | None = None) -> ConverterPython:
    """An interpreter that can run the converter. ResourceError says in one line what is missing and the cure."""
    asked = given or os.environ.get(VARIABLE)
    if asked:
        found = probe(shutil.which(asked) or asked)
        if found.missing:
            raise ResourceError(
                f"{asked}: converting needs {', '.join(found.missing)} there",
                hint=f"{asked} -m pip install {' '.join(found.missing)}",
            )
        return found
    here = probe(sys.executable)
    if not here.missing:
        return here
    made = environment_folder()
    if (made / _MARK).is_file():
        found = probe(_python_of(made))
        if not found.missing:
            return found
    raise ResourceError(
        f"converting needs {', '.join(here.missing)}, which this Python lacks",
        hint="apex convert --setup makes an environment with them (6 GB; less where pip takes PyTorch's "
        f"CPU wheels), or name a Python that has them: --python PATH or {VARIABLE}",
    )


def set_up(*, say: Say = print) -> ConverterPython:
    """Make the environment in the cache, or complete it. Names come from pip's own index. ResourceError."""
    folder = environment_folder()
    if (folder / _MARK).is_file():
        found = probe(_python_of(folder))
        if not found.missing:
            say(f"{folder} is complete")
            return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < _SETUP_BYTES:
        raise ResourceError(
            f"{folder.parent}: an environment with PyTorch needs up to {_SETUP_BYTES >> 30} GiB, {free >> 30} are free",
            hint="free some space, or set XDG_CACHE_HOME to another disk",
        )
    shutil.rmtree(folder, ignore_errors=True)  # half made by an interrupted run
    say(f"making an environment for the converter in {folder}")
    _run([sys.executable, "-P", "-m", "venv", str(folder)], say)
    python = _python_of(folder)
    _run([str(python), "-P", "-m", "pip", "--disable-pip-version-check", "install", *NEEDS.values()], say)
    found = probe(python)
    if found.missing:
        raise ResourceError(f"{folder}: still lacks {', '.join(found.missing)}")
    (folder / _MARK).write_text(json.dumps(found.versions, indent=1) + "\n")
    return found


def _python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _run(command: list[str], say: Say) -> None:
    last: deque[str] = deque(maxlen=5)
    # what pip would find there is not what the converter will see
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=foreign_environment(),
    )
    assert process.stdout is not None
    try:
        with process.stdout:
            for line in process.stdout:
                last.append(line.strip())
                say(line.rstrip())
        status = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if status:
        why = next((line for line in reversed(last) if "error" in line.lower()), " ".join(last)[-300:])
        raise ResourceError(f"{' '.join(command[2:6])} failed: {why}", hint="is there a network, or a package index?")
