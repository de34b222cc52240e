"""Room on the disk before a phase starts: what --dry-run says that it writes, less what lies there already.

Downloads go to the hub's cache, where hub.py looks before the first byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from apex_quant.encode.quantize import usable_cpus
from apex_quant.errors import ApexError
from apex_quant.gguf import open_model
from apex_quant.pipeline.context import Context
from apex_quant.pipeline.phase_work import WORK
from apex_quant.pipeline.phases import Item, Need, Phase
from apex_quant.pipeline.source_facts import SourceFacts, of_checkpoint, of_gguf, source_facts


def facts_at_hand(context: Context) -> SourceFacts | None:
    """The best that is known now, without the hub: of the full-precision GGUF's header, once it is there, of the
    checkpoint, or of the source's name. None when the source cannot be read: the phase that meets that says so."""
    config = context.config
    try:
        phase, label = ("source", "files") if context.is_gguf else ("convert", "model")
        record = context.record(phase)
        for file in record.outputs.get(label, [])[:1] if record is not None else ():
            if (path := context.state.where(file)).exists():
                with open_model(path) as model:
                    return of_gguf(config, model)
        folder = context.facts("source").get("folder")
        if folder is not None and Path(folder).is_dir():
            return of_checkpoint(config, Path(folder))
        return source_facts(config, online=False)
    except ApexError:
        return None


def needs(context: Context, phase: Phase, items: Sequence[Item], facts: SourceFacts | None) -> list[Need]:
    """What these items will write in WORK. Of what is not known nothing is asked."""
    config = context.config
    work = WORK[phase.name](config, facts, config.threads or usable_cpus()) if facts is not None else None
    if work is None:
        return []
    sizes = [(work.disk.get(item.name) or 0) - _there(context, phase, item) for item in items]
    scratch = max((work.scratch.get(item.name, 0) for item in items), default=0)
    return [Need(context.work, sum(max(0, size) for size in sizes) + scratch)]


def _there(context: Context, phase: Phase, item: Item) -> int:
    """Bytes on disk of the files that an item is going to write, finished or begun."""
    return sum(
        one.stat().st_blocks * 512
        for path in phase.claims(context, item)
        if path.parent.is_dir()
        for one in path.parent.iterdir()
        if one.is_file() and (one.name == path.name or one.name.startswith(f"{path.name}."))
    )
