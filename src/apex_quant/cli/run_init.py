"""`apex run --init`: a commented YAML file with every key and its default."""

from __future__ import annotations

from pathlib import Path

from apex_quant.errors import UsageError

DEFAULT_NAME = "apex-run.yaml"


def write_config(path: str | Path = DEFAULT_NAME, *, source: str | None = None, force: bool = False) -> Path:
    """Write the example to `path`, for `source` when one is given. It appears complete or not at all.

    Raises UsageError when there is such a file and not `force`, or no such folder, ResourceError when the disk does
    not take it.
    """
    from apex_quant.gguf import write_file
    from apex_quant.pipeline.describe import template

    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder", hint=f"name a file, such as {path / DEFAULT_NAME}")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: no such folder")
    if path.exists() and not force:
        raise UsageError(f"{path} exists already", hint="--force replaces it")
    return write_file(path, template(source))
