"""Phases report and publish: the numbers as pages and plots, and everything to the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from apex_quant.errors import ResourceError
from apex_quant.gguf import split
from apex_quant.gguf.reader import SHARD_NAME
from apex_quant.pipeline import disk
from apex_quant.pipeline.config import PHASES
from apex_quant.pipeline.context import Context
from apex_quant.pipeline.phases import PENDING, Done, Item, Need
from apex_quant.pipeline.proof import require_proven
from apex_quant.pipeline.steps_checks import evaluate_items, evaluate_unused
from apex_quant.publishable import MOST_BYTES

_CARD: Final = "card"
"""Of the state: sha256 of the card as it was written, and of the one before it."""
_CUT: Final = "shards"
"""Of the state: by name of a file that is published in shards, what those were cut from."""
_HEADER: Final = 1_000_000_000
_NOT_PUBLISHED: Final = (".journal", ".partial", ".state", ".lock")


def report_unused(context: Context) -> str | None:
    if "evaluate" in context.config.phases.skip and not context.state.records.get("evaluate"):
        return "nothing was evaluated"
    return evaluate_unused(context)


def report_items(context: Context) -> list[Item]:
    given = context.config.report
    inputs = {}
    for name in _reported(context):
        inputs[f"results of {name}"] = context.artifact("evaluate", "results", name).digest
    for spec in context.config.baselines:
        inputs[f"baseline {spec}"] = context.artifact("baselines", "results", spec).digest
    config = context.config
    parameters = {
        "formats": list(given.formats),
        "family": list(given.family),
        "repo": config.publish.repo,
        "base_model": config.source if config.is_hub else None,
    }
    return [Item("", parameters, inputs)] if inputs else []


def _reported(context: Context) -> list[str]:
    """The files with results, of a run that measures none; else all, and who has none is missed."""
    names = [item.name for item in evaluate_items(context)]
    if "evaluate" in context.config.phases.selected():
        return names
    measured = [name for name in names if context.record("evaluate", name) is not None]
    return measured or names


def report_claims(context: Context, item: Item) -> Iterable[Path]:
    return [context.release / "report"]


def report_work(context: Context, items: Sequence[Item]) -> Iterator[Done]:
    """Report and model card. Raises as report() and card()."""
    from apex_quant.report.report import report

    for item in items:
        folder = context.release / "report"
        family, formats = tuple(item.parameters["family"]), tuple(item.parameters["formats"])
        made = report([context.release / "results"], folder, family=family, formats=formats)
        unmeasured = [one.name for one in evaluate_items(context) if one.name not in _reported(context)]
        if unmeasured:
            context.note("report", f"without {', '.join(unmeasured)}: not measured, and evaluation is left out")
        for missing in made.missing:
            context.note("report", missing)
        paths = [*made.paths.values(), _card(context, item)]
        yield Done(item, {"report": paths}, {"sentences": list(made.sentences)})


def _card(context: Context, item: Item) -> Path:
    """The model card; one that somebody has edited stays, and the new one goes beside the report."""
    from apex_quant.report.card import card

    state, target = context.state, context.release / "README.md"
    there = state.sha256(target) if target.exists() else None
    known = state.about.get(_CARD, [])
    edited = there is not None and there not in ([known] if isinstance(known, str) else known)
    if edited:
        target = context.release / "report" / "README.md"
        context.note("report", f"README.md was edited and stays as it is; the new card is {target}")
    made = card(
        context.release,
        target if edited else target.with_name(f".{target.name}.new"),
        base_model=item.parameters["base_model"],
        repo=item.parameters["repo"],
        family=item.parameters["family"],
    )
    if not edited:
        # whichever of the two a run that ends here leaves, it is known as ours
        state.about[_CARD] = [*([there] if there else []), state.sha256(made)]
        state.save()
        made.replace(target)
    return target


# --- publish ---


def publish_unused(context: Context) -> str | None:
    return None if context.config.publish.repo else "no repository is given"


def publish_items(context: Context) -> list[Item]:
    given = context.config.publish
    parameters = {
        "repo": given.repo,
        "private": given.private,
        "shards": given.shards,
        "upload": context.yes and not given.dry_run,
    }
    if context.pending:
        waiting = max((phase for phase, _ in context.pending), key=PHASES.index)
        return [Item("", parameters, {"files": f"{PENDING}{waiting}"})]
    # shards that this phase cuts follow from the whole
    cut = {name for one in context.state.about.get(_CUT, {}).values() for name in one["files"]}
    files = [
        path
        for path in sorted(context.release.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_NOT_PUBLISHED)
        if path.name not in cut
        if not ((shard := SHARD_NAME.fullmatch(path.name)) and path.with_name(f"{shard['prefix']}.gguf").exists())
    ]
    inputs = {str(path.relative_to(context.release)): context.state.sha256(path) for path in files}
    return [Item("", parameters, inputs)]


def publish_claims(context: Context, item: Item) -> Iterable[Path]:
    return []


def publish_work(context: Context, items: Sequence[Item]) -> Iterator[Done]:
    """Upload, or without --yes say what would be uploaded, as far as the hub can be asked.

    Raises as publish(): quarantined files are refused; and InputError for files that were not verified or measured.
    """
    from apex_quant.publish import publish

    given = context.config.publish
    assert given.repo is not None
    for item in items:
        upload = item.parameters["upload"]
        require_proven(context)
        _split_large(context)
        try:
            made = publish(
                context.release,
                given.repo,
                private=given.private,
                dry_run=not upload,
                replace=given.replace,
                progress=context.tell,
                plan=context.tell,
            )
        except ResourceError as error:
            if upload:
                raise
            # nothing was to leave this machine: the files are finished all the same, and the next run looks again
            context.note("publish", f"{error.message}: what would be uploaded is not known")
            del context.state.started["publish"][item.name]
            context.state.save()
        else:
            yield Done(item, {}, {"published": made.to_json()})
        if not upload:
            context.note("publish", f"nothing was uploaded to {given.repo}: --yes does it")


def _split_large(context: Context) -> None:
    """Shards beside the models that are too large; publishable() then leaves the whole ones here.

    Those of another file or size that an earlier upload had are deleted, and those of a file that was moved away.
    Raises ResourceError for a full disk.
    """
    most = context.config.publish.shards
    cut: dict[str, Any] = context.state.about.setdefault(_CUT, {})
    models = {path.name: path for path in _models(context)}
    for name in sorted({*cut, *models}):
        path = context.release / name
        size = path.stat().st_size if name in models else 0
        wanted = {"sha256": context.state.sha256(path), "most": most} if size > most else {}
        known = cut.get(name, {"files": []})
        is_whole = all((context.release / shard).exists() for shard in known["files"])
        if known == {**wanted, "files": known["files"]} and is_whole:
            continue
        for shard in known["files"]:
            disk.clear(context.work, context.release / shard)
        cut.pop(name, None)
        if wanted:
            context.note("publish", f"{path.name} is over {most} bytes: split into shards")
            disk.require("publish", [Need(path.parent, size)])
            # the header comes on top of the tensors that are counted
            made = split(path, path.with_suffix(""), min(most, MOST_BYTES - _HEADER), force=True)
            cut[path.name] = {**wanted, "files": [file.name for file in made]}
        context.state.save()


def _models(context: Context) -> list[Path]:
    """The quantized files that are here in one piece: a projector or an importance matrix is no use in shards."""
    found = []
    for record in context.state.records.get("quantize", {}).values():
        path = context.state.where(record.outputs["model"][0])
        if len(record.outputs["model"]) == 1 and path.parent == context.release and path.exists():
            found.append(path)
    return found
