"""A checkpoint from the hub: the files that a conversion reads, and nothing before it is known that it can be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from apex_quant.checkpoint import CONFIG, WEIGHTS, conversion_files, index_files, read_json
from apex_quant.errors import InputError
from apex_quant.hub import HubProgress, Repository, Snapshot, fetch, looked_up


def hub_checkpoint(
    repo: str,
    revision: str | None = None,
    *,
    check: Callable[[Mapping[str, Any]], None] = lambda _: None,
    progress: Callable[[HubProgress], None] | None = None,
) -> Snapshot:
    """Download a repository's checkpoint at one commit: weights of one form, and what goes with them.

    `check` gets its config.json and raises for what cannot be converted, before any weight is fetched. Raises
    InputError for a repository that holds no checkpoint or names weight files that it lacks, and what hub.download
    raises.
    """
    found = looked_up(repo, revision, progress=progress)
    by_path = {file.path: file for file in found.files}
    _require_checkpoint(found, set(by_path))
    small = [by_path[name] for name in (CONFIG, *index_files()) if name in by_path]
    folder = fetch(found, small, progress=progress)
    check(read_json(folder / CONFIG))
    wanted = conversion_files(folder, by_path)
    missing = [name for name in wanted if name not in by_path]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{repo}: {missing[0]} is not there{more}", hint="its upload may be incomplete")
    files = [by_path[name] for name in wanted]
    return Snapshot(repo, revision, found.commit, fetch(found, files, progress=progress), tuple(files))


def _require_checkpoint(found: Repository, paths: set[str]) -> None:
    """By the names of its files. InputError."""
    roots = [path for path in paths if "/" not in path]
    if not any(path.startswith(prefix) and path.endswith(suffix) for path in roots for prefix, suffix in WEIGHTS):
        models = sorted(path for path in paths if path.endswith(".gguf"))
        if models:
            raise InputError(
                f"{found.name}: holds GGUF files, and no checkpoint to convert",
                hint=f"apex run --set source_files=PATTERN takes the full-precision one: {', '.join(models[:5])}",
            )
    if CONFIG not in paths:
        raise InputError(f"{found.name}: holds no {CONFIG}, so it is no Hugging Face checkpoint")
