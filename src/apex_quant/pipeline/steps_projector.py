"""A vision or audio projector beside the quantized files: llama.cpp loads it as a file of its own, unquantized.

It is made by the converter (phase convert) or is a finished one that the user names (phase source).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from apex_quant.errors import InputError
from apex_quant.gguf import open_model
from apex_quant.model.patterns import PROJECTOR_ARCHITECTURES
from apex_quant.pipeline.context import Context
from apex_quant.pipeline.disk import link
from apex_quant.pipeline.phase_work import PROJECTOR
from apex_quant.pipeline.phases import Done, Item

NAME: Final = PROJECTOR
_REMOTE: Final = re.compile(r"(?P<repo>[^:/]+/[^:/]+):(?P<file>.+)")


def published(context: Context) -> Path:
    """Where it lies among the files to publish."""
    name = re.sub(r"[^\w.+-]+", "-", context.name)
    return context.release / f"mmproj-{name}.gguf"


def finished_items(context: Context) -> list[Item]:
    """The item of phase source for a finished projector, FILE or REPO:FILE. InputError when FILE is none."""
    given = context.config.convert.mmproj
    if not isinstance(given, str) or given == "auto":
        return []
    decided = {"kind": NAME, "name": context.name}
    if _REMOTE.fullmatch(given):
        return [Item(NAME, {**decided, "from": given}, {})]
    path = Path(given)
    if not path.is_file():
        raise InputError(f"convert.mmproj: {path}: no such file", hint="FILE or REPO:FILE, auto, true or false")
    return [Item(NAME, decided, {"file": context.state.sha256(path)}, {"given": [path]})]


def finished(context: Context, item: Item) -> Done:
    """Fetch it, and lay it beside the quantized files. Raises what snapshot() raises, InputError for another file."""
    facts = {}
    if "given" in item.about:
        (path,) = item.about["given"]
    else:
        from apex_quant.hub import snapshot

        words = _REMOTE.fullmatch(item.parameters["from"])
        assert words is not None
        at = context.pinned(words["repo"], None)
        came = snapshot(words["repo"], revision=at, patterns=(words["file"],), progress=context.tell)
        if len(came.files) != 1:
            names = ", ".join(file.path for file in came.files)
            raise InputError(f"convert.mmproj: {len(came.files)} files fit {item.parameters['from']}: {names}")
        context.pin(words["repo"], None, came.commit)
        path, facts = came.folder / came.files[0].path, {"repo": words["repo"], "commit": came.commit}
    return Done(item, {"projector": [lay_beside(context, path)]}, facts)


def lay_beside(context: Context, path: Path) -> Path:
    """`path` under its published name: a hard link where that is possible. InputError when it is no projector."""
    with open_model(path) as model:
        if model.architecture not in PROJECTOR_ARCHITECTURES:
            raise InputError(f"{path}: a {model.architecture} model, not a projector (mmproj)")
    return link(path, published(context))
