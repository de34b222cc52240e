"""Data sets of the Hugging Face hub: their files are listed, the fitting ones downloaded and read like any other.

No code of a data set is ever run. Which files belong to a configuration and a split is what the data set's card says
(its `configs`), else what folders and file names say.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

from apex_quant.errors import InputError, UsageError, did_you_mean
from apex_quant.hub_access import explained, library
from apex_quant.text.loaders import READERS, Loading, load_file

SUFFIXES: Final = (".jsonl", ".parquet", ".txt")
# the hub turns data sets of any form into parquet files on this branch
CONVERTED: Final = "refs/convert/parquet"
ENOUGH: Final = 64 << 20  # bytes; no calibration uses more
MOST_FILES: Final = 100  # each is a request
_SPLITS: Final = ("train", "training", "validation", "test")


class Wanted(NamedTuple):
    """hub:NAME[:CONFIG[:SPLIT]]."""

    name: str
    config: str
    split: str


class DataFile(NamedTuple):
    """A file of a data set."""

    path: str
    size: int


def parse(spec: str) -> Wanted:
    """'user/data:config:split' in its parts; missing ones are ''. UsageError."""
    found = re.fullmatch(r"([A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)(?::([^:/]*))?(?::([^:/]*))?", spec, re.ASCII)
    if found is None:
        raise UsageError(f"hub:{spec} is not hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT")
    return Wanted(found[1], found[2] or "", found[3] or "")


def load_hub(spec: str, loading: Loading) -> None:
    """Add the documents of a data set; its files in order until there is enough."""
    wanted = parse(spec)
    with explained(f"hub:{spec}"):
        api = library(f"hub:{spec}").HfApi()
        commit, files = _choose(api, wanted, spec)
        for file in _enough(files, loading, spec):
            local = api.hf_hub_download(wanted.name, file.path, repo_type="dataset", revision=commit)
            load_file(Path(local), loading, name=f"hub:{wanted.name}@{commit[:8]}/{file.path}")


def _choose(api: Any, wanted: Wanted, spec: str) -> tuple[str, list[DataFile]]:
    """The commit, and the files of the configuration and split that were asked for."""
    seen = 0
    for revision in (None, CONVERTED):
        try:
            info = api.dataset_info(wanted.name, revision=revision, files_metadata=True)
        except Exception:
            if revision is None:
                raise
            break  # no such branch
        files = [DataFile(entry.rfilename, entry.size or 0) for entry in info.siblings or ()]
        seen += len(files)
        known = sorted(file for file in files if PurePosixPath(file.path).suffix.lower() in SUFFIXES)
        known = [file for file in known if PurePosixPath(file.path).name.lower() not in ("readme.txt", "license.txt")]
        if known:
            configs = getattr(info, "card_data", None) or {}
            return str(info.sha), select(known, configs.get("configs") if hasattr(configs, "get") else None, wanted)
    raise InputError(f"hub:{spec}: none of its {seen} files is {', '.join(SUFFIXES)}")


def select(files: list[DataFile], configs: object, wanted: Wanted) -> list[DataFile]:
    """The files of the wanted configuration and split; of the training split when none was asked for.

    UsageError naming what there is when the configuration or the split does not exist, or must be chosen.
    """
    table = _by_card(files, configs) or _by_path(files)
    if wanted.config not in table and (wanted.config or len(table) > 1):
        if not wanted.config and "default" in table:
            return select(files, configs, wanted._replace(config="default"))
        raise UsageError(
            f"hub:{wanted.name}: "
            + (f"no configuration {wanted.config!r}." if wanted.config else "has several configurations.")
            + did_you_mean(wanted.config, list(table))
            + f" Known: {', '.join(list(table)[:20])}",
            hint=f"write hub:{wanted.name}:CONFIG",
        )
    splits = table[wanted.config] if wanted.config in table else next(iter(table.values()))
    split = wanted.split or next((name for name in _SPLITS if name in splits), next(iter(splits)))
    if split not in splits:
        raise UsageError(f"hub:{wanted.name}: no split {split!r}. Known: {', '.join(splits)}")
    return splits[split]


_Table = dict[str, dict[str, list[DataFile]]]  # files by configuration and split


def _by_card(files: list[DataFile], configs: object) -> _Table:
    """As the card's `configs` say: [{config_name, data_files: PATTERN | [{split, path: PATTERN | [PATTERN]}]}]."""
    table: _Table = {}
    for config in configs if isinstance(configs, list) else ():
        data_files = config.get("data_files") if isinstance(config, dict) else None
        entries = data_files if isinstance(data_files, list) else [data_files]
        for entry in entries:
            split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
            patterns = [str(path) for path in (paths if isinstance(paths, list) else [paths]) if path]
            found = [file for file in files if any(_matches(file.path, pattern) for pattern in patterns)]
            if found:
                table.setdefault(str(config.get("config_name", "default")), {})[str(split)] = found
    return table


def _matches(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, pattern.replace("**/", ""))


def _by_path(files: list[DataFile]) -> _Table:
    """CONFIG/SPLIT-00000-of-00001.parquet, CONFIG/SPLIT/0000.parquet, data/SPLIT.jsonl, anything.txt."""
    table: _Table = {}
    for file in files:
        path = PurePosixPath(file.path)
        stem = re.split(r"[^a-z]", path.name.lower(), maxsplit=1)[0]
        folders = list(path.parts[:-1])
        split = stem if stem in _SPLITS else next((part for part in folders if part in _SPLITS), "train")
        config = next((part for part in folders if part not in (*_SPLITS, "data")), "default")
        table.setdefault(config, {}).setdefault(split, []).append(file)
    return table


def _enough(files: list[DataFile], loading: Loading, spec: str) -> list[DataFile]:
    """The first files, until ENOUGH bytes or MOST_FILES; what is left out is said. InputError for too large a file."""
    taken: list[DataFile] = []
    size = 0
    for file in files[:MOST_FILES]:
        if size >= ENOUGH:
            break
        most = READERS[PurePosixPath(file.path).suffix.lower()][1]
        if file.size > most:
            raise InputError(
                f"hub:{spec}: {file.path} has {file.size} bytes, more than the {most} that are read",
                hint="choose another configuration, or download the file and cut a part out",
            )
        taken.append(file)
        size += file.size
    if len(taken) < len(files):
        loading.say(f"hub:{spec}: the first {len(taken)} of {len(files)} files are taken, the rest is left out")
    return taken
