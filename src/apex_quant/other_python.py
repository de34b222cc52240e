"""Code for a Python that the user names, of whatever version: nothing of the current folder is imported by it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

# -P came with Python 3.11; sys is built in, so this line itself imports no file
_WITHOUT_FOLDER: Final = "import sys; sys.path[:] = [entry for entry in sys.path if entry]\n"
_RUN_FILE: Final = "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')\n"


def code_command(python: str | Path, code: str, *arguments: str) -> list[str]:
    """`python -c code arguments`, without the current folder in sys.path."""
    return [os.fspath(python), "-c", _WITHOUT_FOLDER + code, *arguments]


def file_command(python: str | Path, file: Path, *arguments: str) -> list[str]:
    """`python file arguments`, also without the folder of the file in sys.path."""
    return code_command(python, _RUN_FILE, str(file), *arguments)
