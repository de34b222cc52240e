"""Phases source and convert: the full-precision weights, and as a GGUF."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from apex_quant.checkpoint import CARD, CONFIG, architectures, conversion_files, read_json
from apex_quant.errors import ApexError, InputError, UsageError
from apex_quant.gguf import open_model
from apex_quant.gguf.reader import SHARD_NAME
from apex_quant.model import facts
from apex_quant.model.patterns import PROJECTOR_ARCHITECTURES
from apex_quant.pipeline import steps_projector
from apex_quant.pipeline.config import Convert, RunConfig
from apex_quant.pipeline.context import Context
from apex_quant.pipeline.describe import PLACEHOLDER
from apex_quant.pipeline.disk import symlink
from apex_quant.pipeline.phases import Done, Item
from apex_quant.pipeline.state import STATE, digest_of, located


def source_items(context: Context) -> list[Item]:
    return [*_weights(context), *steps_projector.finished_items(context)]


def _weights(context: Context) -> list[Item]:
    config = context.config
    check_source(config)
    if config.is_hub:
        about = {"repo": config.source, "revision": config.revision, "files": config.source_files}
        return [Item("", {"kind": "hub", **about}, {})]
    path = Path(config.source)
    if context.is_gguf:
        shards = _shards(path)
        context.announce_hashing("source", shards)
        digest = context.state.digest(shards)
        return [Item("", {"kind": "gguf", "name": config.name}, {"model": digest}, {"given": shards})]
    inside = checkpoint_files(path, context.work)
    context.announce_hashing("source", inside)
    lines = [f"{one.relative_to(path)} {context.state.sha256(one)}" for one in inside]
    return [Item("", {"kind": "checkpoint"}, {"checkpoint": digest_of([*lines, ""])}, {"files": inside})]


def check_source(config: RunConfig) -> None:
    """Refuse a source on this disk that is none, by names and headers alone, and the example's.

    Raises UsageError for no source and for settings of another kind of source, InputError for what is no model, and
    what describe() raises.
    """
    if config.is_hub and config.source == PLACEHOLDER:
        raise UsageError(
            f"source: is needed, and {PLACEHOLDER} only stands for it",
            hint="edit the file: a hub id, a checkpoint's folder or a full-precision GGUF",
        )
    if config.is_gguf and config.convert.mmproj is True:
        raise UsageError(
            "convert.mmproj: true makes the projector of a checkpoint, and the source is a GGUF",
            hint="convert.mmproj=FILE or REPO:FILE takes a finished one",
        )
    if config.is_hub:
        return
    for given, what in ((config.revision, "a revision"), (config.source_files, "source_files")):
        if given is not None:
            raise UsageError(f"{what} concerns a download, and the source is on this disk")
    path = Path(config.source)
    if not path.exists():
        raise InputError(
            f"{path}: no such file or folder", hint="a hub id is ORG/NAME; a GGUF, a checkpoint's folder or a YAML file"
        )
    if config.source.lower().endswith(".gguf"):
        _shards(path)
        return
    if not path.is_dir():
        raise InputError(f"{path}: neither a GGUF nor a checkpoint's folder", hint="a GGUF file ends in .gguf")
    _described(path)


def unused_settings(config: RunConfig) -> list[str]:
    """A line for settings of `convert` that decide nothing, for nothing is converted."""
    default = Convert().model_dump()
    other = [f"convert.{key}" for key, value in config.convert.model_dump().items() if value != default[key]]
    ignored = [name for name in other if name != "convert.mmproj"]  # a finished projector is taken from there
    return [f"the source is a GGUF: {', '.join(ignored)} not used"] if ignored and config.is_gguf else []


def source_work(context: Context, items: Sequence[Item]) -> Iterator[Done]:
    """Download, or look at, the weights. Raises what hub.snapshot, open_model and describe raise."""
    for item in items:
        if item.parameters["kind"] == "gguf":
            yield _gguf(context, item)
        elif item.parameters["kind"] == steps_projector.NAME:
            yield steps_projector.finished(context, item)
        elif item.parameters["kind"] == "checkpoint":
            check_convertible(context, read_json(Path(context.config.source) / CONFIG))
            yield Done(item, {"files": item.about["files"]}, _described(Path(context.config.source)))
        else:
            yield _downloaded(context, item)


def source_claims(context: Context, item: Item) -> Iterable[Path]:
    """Links under the run's own name."""
    if item.parameters["kind"] == steps_projector.NAME:
        return [steps_projector.published(context)]
    return [] if item.parameters["kind"] != "gguf" else _links(context, item.about["given"])


def _shards(path: Path) -> list[Path]:
    """The files of a GGUF. InputError for one that is no language model."""
    with open_model(path) as model:
        facts(model)  # of an importance matrix or an adapter there are none
        if model.architecture in PROJECTOR_ARCHITECTURES:
            raise InputError(f"{path}: is a projector, not a model", hint="convert.mmproj takes it, beside a model")
        return [located(Path(file.path)) for file in model.files]


def _links(context: Context, shards: Sequence[Path]) -> list[Path]:
    """Where the shards are linked to when the run has a name of its own: plans name files after their source."""
    if context.config.name is None:
        return []
    endings = [
        shard.name.removeprefix(found["prefix"]) if (found := SHARD_NAME.fullmatch(shard.name)) else ".gguf"
        for shard in shards
    ]
    stem = re.sub(r"[^\w.+-]+", "-", context.config.name)
    links = [context.work / "source" / f"{stem}{ending}" for ending in endings]
    return [] if set(links) & set(shards) else links


def _gguf(context: Context, item: Item) -> Done:
    shards = list(item.about["given"])
    links = _links(context, shards)
    for shard, link in zip(shards, links, strict=bool(links)):
        symlink(shard, link)
        context.state.seed(link, context.state.sha256(shard))
    with open_model(shards[0]) as model:
        facts = {"architecture": model.architecture, "tensors": len(model.tensors)}
    return Done(item, {"files": links or shards}, facts)


def checkpoint_files(folder: Path, work: Path) -> list[Path]:
    """The files that decide a conversion: those that a download would bring, without the card, which adds to the
    metadata alone and is written anew all the time. The folders of runs are none of them."""
    found = []
    for place, folders, names in os.walk(folder):
        here = Path(place)
        folders[:] = [n for n in folders if not n.startswith(".") and not _is_work(here / n, work)]
        found += [here / name for name in names if not name.startswith(".") and (here / name).is_file()]
    there = {path.relative_to(folder).as_posix(): path for path in found}
    return sorted(there[name] for name in conversion_files(folder, there) if name in there and name != CARD)


def _is_work(folder: Path, work: Path) -> bool:
    return folder.resolve() == work or (folder / STATE).is_file()


def _described(folder: Path) -> dict[str, Any]:
    from apex_quant.convert import describe

    found = describe(folder)
    if found.missing:
        raise InputError(f"{folder}: {found.missing[0]}", hint="complete the download, then run again")
    projector = found.vision or found.audio
    return {
        "architecture": found.architecture,
        "folder": str(folder.absolute()),
        "projector": projector,
        "parameters": found.parameters,
    }


def _downloaded(context: Context, item: Item) -> Done:
    """A checkpoint's files, at one commit. InputError, before the weights, for what cannot be converted."""
    from apex_quant.hub_checkpoint import hub_checkpoint

    repo, revision = item.parameters["repo"], item.parameters["revision"]
    if item.parameters["files"] is not None:
        return _downloaded_gguf(context, item)
    at = context.pinned(repo, revision)
    came = hub_checkpoint(repo, at, check=partial(check_convertible, context), progress=context.tell)
    paths = [came.folder / file.path for file in came.files]
    for path, file in zip(paths, came.files, strict=True):
        if file.sha256 is not None:  # the download has just compared it
            context.state.seed(path, file.sha256)
    context.pin(repo, revision, came.commit)
    return Done(item, {"files": paths}, {**_described(came.folder), "repo": repo, "commit": came.commit})


def check_convertible(context: Context, config_json: Mapping[str, Any], *, fetch: bool = True) -> None:
    """Refuse, before hours of download and hashing, what `convert` would refuse after them.

    `fetch`: download the converter where it is not there yet. Raises InputError for an architecture that it does not
    know, ResourceError for what it needs and is missing. Nothing where `convert` is not asked for.
    """
    from apex_quant.convert import check_architecture
    from apex_quant.converter_python import find_python
    from apex_quant.converter_source import find_converter, unpacked_converter

    if "convert" not in context.config.phases.selected():
        return
    find_python(context.config.convert.python)
    say = partial(context.note, "convert")
    converter = find_converter(say=say) if fetch else unpacked_converter()
    if converter is not None:
        check_architecture(context.config.source, architectures(config_json), converter)


def convert_problem(context: Context) -> None:
    """Note what `convert` will miss, as far as that is known without the hub."""
    folder = Path(context.config.source)
    try:
        known = {} if context.config.is_hub else read_json(folder / CONFIG)
        check_convertible(context, known, fetch=False)
    except ApexError as error:
        context.note("convert", f"{error.message}{f' ({error.hint})' if error.hint else ''}")


def _downloaded_gguf(context: Context, item: Item) -> Done:
    """The one GGUF model of a repository that fits the pattern, all its shards."""
    from apex_quant.hub import baseline_files

    repo, revision, pattern = (item.parameters[key] for key in ("repo", "revision", "files"))
    at = context.pinned(repo, revision)
    found = baseline_files(f"{repo}{f'@{at}' if at else ''}:{pattern}", progress=context.tell)
    if len(found) != 1:
        names = ", ".join(one.path.name for one in found)
        raise InputError(f"{repo}: {len(found)} models fit {pattern}: {names}", hint="source_files must name one")
    shards = _shards(found[0].path)
    by_name = {file.path.split("/")[-1]: file for file in found[0].files}
    for shard in shards:
        if (digest := by_name[shard.name].sha256) is not None:
            context.state.seed(shard, digest)
    context.pin(repo, revision, found[0].commit)
    return Done(item, {"files": shards}, {"repo": repo, "commit": found[0].commit})


# --- convert ---


def convert_unused(context: Context) -> str | None:
    return "the source is a GGUF" if context.is_gguf else None


def convert_items(context: Context) -> list[Item]:
    given = context.config.convert
    digest = {"checkpoint": context.artifact("source", "files").digest}
    shared = {"file": context.name, "pre": given.pre, "trust_remote_code": given.trust_remote_code,
              "name": _title(context)}  # fmt: skip
    items = [Item("", {**shared, "outtype": given.outtype, "nextn": given.nextn}, digest)]
    if given.mmproj is True or (given.mmproj == "auto" and context.facts("source").get("projector")):
        items.append(Item(steps_projector.NAME, {**shared, "outtype": given.outtype}, digest))
    return items


def convert_claims(context: Context, item: Item) -> Iterable[Path]:
    name = re.sub(r"[^\w.+-]+", "-", context.name)
    whole = context.work / "source" / f"{name}.gguf"
    return [steps_projector.published(context) if item.name == steps_projector.NAME else whole]


def convert_work(context: Context, items: Sequence[Item]) -> Iterator[Done]:
    """llama.cpp's converter. Raises what convert() raises."""
    from apex_quant.convert import convert

    folder = context.facts("source")["folder"] if context.config.is_hub else context.config.source
    given = context.config.convert
    for item in items:
        (out,) = convert_claims(context, item)
        facts = context.noted("convert", item)
        if not out.exists():  # another key's file was cleared away: this one is complete, the run ended after it
            made = convert(
                folder,
                out,
                outtype=given.outtype,
                mmproj=item.name == steps_projector.NAME,
                nextn=given.nextn,
                name=item.parameters["name"],
                pre=given.pre,
                trust_remote_code=given.trust_remote_code,
                python=given.python,
                progress=context.tell,
            )
            facts = {"converter": made.converter, "outtype": made.outtype, "warnings": list(made.warnings)}
            context.keep_note("convert", item, facts)
        yield Done(item, {"model": [out]}, facts)


def _title(context: Context) -> str | None:
    """general.name: what the user says, or what the hub calls it; a folder's is left to the converter."""
    config = context.config
    return config.name or (context.name.replace("-", " ") if config.is_hub else None)
