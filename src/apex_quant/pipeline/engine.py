"""`run`: the phases in order, each item only when something that decides it has changed.

made = run("MODEL-BF16.gguf", tiers=["i-quality", "i-compact"], work="out")
for file in made.files: print(file.tier, file.path, file.kld, file.quarantined)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from apex_quant.errors import ApexError, UsageError
from apex_quant.native import Workers
from apex_quant.pipeline import disk, room
from apex_quant.pipeline.config import PHASES as NAMES
from apex_quant.pipeline.config import Phases, RunConfig, anywhere, load_config
from apex_quant.pipeline.context import FOLDERS, Context, PhaseEvent
from apex_quant.pipeline.estimate import estimate, peak_disk
from apex_quant.pipeline.hopeless import refuse_hopeless
from apex_quant.pipeline.look import NOTHING, RESUMED, Look, lacking, look, look_at
from apex_quant.pipeline.phases import Done, Item, Phase
from apex_quant.pipeline.results import PhaseRun, RunResult, summarize
from apex_quant.pipeline.state import Record, Started, State, exclusive, is_folder, key_of, located, now
from apex_quant.pipeline.steps_source import check_source, convert_problem, unused_settings
from apex_quant.pipeline.table import PHASES


def run(
    source: str | Path | RunConfig,
    *,
    yes: bool = False,
    dry_run: bool = False,
    force: bool = False,
    progress: Callable[[Any], None] | None = None,
    **options: Any,
) -> RunResult:
    """Everything from a source to files that are verified, measured and, with `yes`, published.

    `source`: a hub id, a checkpoint's folder, a GGUF, a YAML file, or a RunConfig; `options` are keys of the
    configuration (docs/config.md): tiers=[...], work="DIR", evaluate={"suite": "none"}. The same call after an
    interruption goes on where that stopped; with other options it redoes what they concern. `force` also runs the
    selected phases where nothing changed. `dry_run` says what would run, and changes nothing. `progress` gets a
    PhaseEvent for every line, the progress of each step as its own function gives it, and of a run that fails, before
    the error, the RunResult of what was finished.

    Raises UsageError, InputError, ResourceError (BusyError while another run has the folder) or NativeError; all
    that was finished is recorded. Files that failed their checks raise nothing: they are quarantined in the result.
    """
    tell = progress or (lambda event: None)
    config = configured(source, options, lambda note: tell(PhaseEvent("note", "config", note)))
    for note in unused_settings(config):
        tell(PhaseEvent("note", "convert", note))
    work = config.work_folder.resolve()
    is_new = not is_folder(work)
    selected = config.phases.selected()
    forced = selected if force else ()
    if dry_run:
        context = Context(config, work, State(work).load(), tell, yes=yes, forced=forced)
        looks = look(context, PHASES, selected, force=forced)
        refuse_hopeless(context, looks)
        if any(one.phase.name == "convert" and one.due for one in looks):
            convert_problem(context)
        due = {one.phase.name: [item.name for item, _ in one.due] for one in looks if one.due}
        estimates = estimate(config, recorded=_took(context), due=due) if due else []
        runs = [PhaseRun.of(one) for one in looks]
        peak = peak_disk(estimates, keep=config.keep)
        return replace(summarize(context, runs, 0.0, dry_run=True), estimates=tuple(estimates), disk=peak)
    if "source" in selected:
        check_source(config)  # before there is a folder
    started = time.monotonic()
    context = Context(config, work, State(work), tell, yes=yes, forced=forced)
    if is_new:  # what is refused leaves no folder
        refuse_hopeless(context, look(context, PHASES, selected, force=forced))
    with exclusive(work, lambda note: tell(PhaseEvent("note", "run", note))), _machines(config, tell) as machines:
        context.state.load()  # of a new folder there is none: what was hashed stays known
        context.cluster = machines
        if not is_new:
            refuse_hopeless(context, look(context, PHASES, selected, force=forced))
        for folder in FOLDERS:
            (work / folder).mkdir(parents=True, exist_ok=True)
        kept = anywhere(config)
        context.state.about |= {"source": kept["source"], "name": config.model_name, "config": kept}
        engine = _Engine(context, selected)
        try:
            engine.run()
        except ApexError:
            with suppress(ApexError):  # the first error is the one to be told
                tell(summarize(context, engine.runs, time.monotonic() - started, dry_run=False))
            raise
        context.state.prune()
        context.state.save()
        return summarize(context, engine.runs, time.monotonic() - started, dry_run=False)


def configured(
    source: str | Path | RunConfig, options: dict[str, Any], say: Callable[[str], None] | None = None
) -> RunConfig:
    """The configuration that a source and keys stand for; `say` as load_config. Raises UsageError or InputError."""
    if isinstance(source, RunConfig):
        if options:
            raise UsageError("a RunConfig is complete: put the options into it")
        return source
    if str(source).lower().endswith((".yaml", ".yml")):
        return load_config(source, options, say=say)
    return load_config(None, {"source": str(source), **options})


@contextmanager
def _machines(config: RunConfig, tell: Callable[[Any], None]) -> Iterator[Workers | None]:
    """The cluster, where one is to share the work. Raises as cluster()."""
    if config.ray is None:
        yield None
        return
    from apex_quant.pipeline.cluster import cluster

    with cluster(config.ray, lambda text: tell(PhaseEvent("note", "ray", text))) as machines:
        tell(PhaseEvent("note", "ray", f"machines: {machines.places}"))
        yield machines


def _took(context: Context) -> dict[str, dict[str, float]]:
    """Seconds by phase and item, as far as they are known."""
    return {
        phase: {name: record.seconds for name, record in items.items() if record.seconds > 0}
        for phase, items in context.state.records.items()
    }


class _Engine:
    """One run of the table."""

    def __init__(self, context: Context, selected: Collection[str]) -> None:
        assert tuple(phase.name for phase in PHASES) == NAMES
        self.context, self.selected, self.force = context, selected, context.forced
        self.facts = room.facts_at_hand(context)
        self.runs: list[PhaseRun] = []

    def run(self) -> None:
        """All phases; `runs` has those that are finished."""
        for number, phase in enumerate(PHASES):
            one = look_at(self.context, phase, self.selected, self.force)
            if one.freed:
                one = look(self.context, PHASES[number:], self.selected, force=self.force)[0]
            self.runs.append(self._phase(one))
            if one.due and phase.name in ("source", "convert"):
                self.facts = room.facts_at_hand(self.context)
                if phase.name == "convert" or self.context.config.is_hub:  # a header to look at, which was not here
                    rest = PHASES[number + 1 :]
                    refuse_hopeless(self.context, look(self.context, rest, self.selected, force=self.force))
            if number > NAMES.index("convert"):
                self._free()

    def _phase(self, one: Look) -> PhaseRun:
        phase, context = one.phase, self.context
        if one.skipped in (None, NOTHING):
            self._dropped(phase, {item.name for item in (*(item for item, _ in one.due), *one.done)})
        if not one.due:
            context.tell(PhaseEvent("skip", phase.name, one.reason))
            return PhaseRun.of(one)
        if (before := lacking(context, phase)) is not None:
            raise UsageError(
                f"{phase.name} reads the files of phase {before}, which were deleted",
                hint=f"let phase {before} run as well: it brings them back (--keep keeps a converted file)",
            )
        context.tell(PhaseEvent("run", phase.name, one.reason, eta=self._eta(one)))
        items = [item for item, _ in one.due]
        disk.require(phase.name, room.needs(context, phase, items, self.facts))
        for item, why in one.due:
            self._begin(phase, item, again=why != RESUMED)
        context.state.save()
        begun = last = time.monotonic()
        try:
            for done in phase.work(context, items):
                elapsed = time.monotonic() - last
                self._finish(phase, done, elapsed)
                last = time.monotonic()
        except BaseException:
            self._interrupted(phase, time.monotonic() - last)
            raise
        seconds = time.monotonic() - begun
        context.tell(PhaseEvent("done", phase.name, "", seconds=seconds))
        return PhaseRun.of(one, seconds)

    def _dropped(self, phase: Phase, names: Collection[str]) -> None:
        """Of what an earlier configuration asked for and this one does not: what was still in hand is cleared away;
        finished files stay and are published, which is told."""
        context, state = self.context, self.context.state
        started, records = state.started.get(phase.name, {}), state.records.get(phase.name, {})
        begun = [started.pop(name) for name in list(started) if name not in names]
        others = {claim for record in records.values() for claim in record.claims}
        others |= {claim for one in started.values() for claim in one.claims}
        for claim in dict.fromkeys(claim for one in begun for claim in one.claims if claim not in others):
            self._clear(phase, state.work / claim)
        if begun:
            state.save()
        for name, record in records.items() if phase.name == "quantize" else ():
            files = [file for every in record.outputs.values() for file in every if state.where(file).exists()]
            if name not in names and files:
                context.note(phase.name, f"{name} is no longer asked for; its file stays: {files[0].path}")

    def _eta(self, one: Look) -> tuple[float, float, float] | None:
        """Estimated seconds of what is due with their range, by what the same and similar work took here before."""
        if self.facts is None:
            return None
        due = {one.phase.name: [item.name for item, _ in one.due]}
        found = estimate(self.context.config, self.facts, recorded=_took(self.context), due=due)
        if not found or found[0].seconds is None or found[0].low is None or found[0].high is None:
            return None
        return found[0].seconds, found[0].low, found[0].high

    def _begin(self, phase: Phase, item: Item, *, again: bool) -> None:
        """Clear away what is of another key, and remember that this one is in hand."""
        state, key = self.context.state, key_of(item.parameters, item.inputs)
        started = state.started.setdefault(phase.name, {})
        # the user's own files, and links of ours that have become them
        given = {place for path in item.about.get("given", ()) for place in (located(path), path.resolve())}
        claims = [state.relative(path) for path in phase.claims(self.context, item)]
        if again:
            old, record = started.pop(item.name, None), state.record(phase.name, item.name)
            names = [*(record.claims if record else []), *(old.claims if old else []), *claims]
            for name in dict.fromkeys(names):
                self._clear(phase, state.work / name, given)
            state.records.get(phase.name, {}).pop(item.name, None)
        before = started.get(item.name, Started(key, []))
        # what was given is not the item's own to delete, once it is given no more
        own = [name for name in claims if located(state.work / name) not in given]
        started[item.name] = replace(before, key=key, claims=own)

    def _clear(self, phase: Phase, path: Path, given: Collection[Path] = ()) -> None:
        """Delete what an item has, but not what is `given`. Raises UsageError where the source lies."""
        state = self.context.state
        if phase.name != "source" and located(path) not in given:
            self._refuse_source(path)
        disk.clear(state.work, path, keep=given)
        if not path.exists():
            state.forget(path)

    def _refuse_source(self, path: Path) -> None:
        """UsageError where the source itself lies, before anything there is deleted."""
        record = self.context.record("source")
        for file in record.outputs.get("files", []) if record is not None else []:
            if path.exists() and path.samefile(self.context.state.where(file)):
                raise UsageError(f"{path} is the source, and would be replaced", hint="choose another --work folder")

    def _finish(self, phase: Phase, done: Done, elapsed: float) -> None:
        state, item = self.context.state, done.item
        begun = state.started[phase.name].pop(item.name)
        seconds = begun.seconds + (elapsed if done.seconds is None else done.seconds)
        state.records.setdefault(phase.name, {})[item.name] = Record(
            key=begun.key,
            parameters=dict(item.parameters),
            inputs=dict(item.inputs),
            outputs={label: [state.stored(path) for path in paths] for label, paths in done.outputs.items()},
            facts=dict(done.facts),
            seconds=round(seconds, 3),
            finished=now(),
            claims=begun.claims,
        )
        state.save()

    def _interrupted(self, phase: Phase, elapsed: float) -> None:
        """Remember what was spent; the error that is on its way is the one to tell of."""
        for one in self.context.state.started.get(phase.name, {}).values():
            one.seconds += elapsed
        try:
            self.context.state.save()
        except Exception as error:  # a full disk, of all moments
            self.context.note(phase.name, f"the state could not be saved: {error}")

    def _free(self) -> None:
        """Delete the converted file when no phase, asked for or not, still has to read it."""
        context = self.context
        record = context.record("convert")
        if context.config.keep or context.is_gguf or record is None:
            return
        files = [file for file in record.outputs.get("model", []) if context.state.where(file).exists()]
        if not files:
            return
        readers = PHASES[1 + NAMES.index("convert") :]
        # what is left out of this run only may be asked for in the next
        whole = context.config.model_copy(update={"phases": Phases()})
        context = replace(context, config=whole, pending=set(context.pending))
        try:
            every = look(context, readers, NAMES)
        except UsageError:  # one needs what was left out of this run: it may read the file another time
            return
        if any(one.due and one.phase.weights(context) for one in every):
            return
        record.released = True
        context.state.save()  # first: a run that ends in between finds the file and deletes it
        for file in files:
            path = context.state.where(file)
            disk.clear(context.work, path)
            context.state.forget(path)
        total = sum(file.bytes for file in files)
        context.note("convert", f"deleted {', '.join(file.path for file in files)} ({total} bytes): no phase needs it")
