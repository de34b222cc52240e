"""`apex run` and `apex status`: their options, the line of each phase, and what they show at the end."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from rich.console import Console

from apex_quant.cli import safe
from apex_quant.cli.console import console_for, print_json
from apex_quant.cli.options import Json
from apex_quant.errors import InputError, UsageError

if TYPE_CHECKING:
    from apex_quant.pipeline.context import PhaseEvent
    from apex_quant.pipeline.results import FileResult, RunResult
    from apex_quant.pipeline.status import Status


# option of the command line -> key of the configuration (docs/config.md)
_KEYS: Final[dict[str, str]] = {
    "tiers": "tiers",
    "size": "sizes",
    "work": "work",
    "name": "name",
    "revision": "revision",
    "keep": "keep",
    "threads": "threads",
    "phase": "phases.phase",
    "from_": "phases.from",
    "only": "phases.only",
    "skip": "phases.skip",
    "eval_suite": "evaluate.suite",
    "baselines": "baselines",
    "publish": "publish.repo",
    "private": "publish.private",
    "corpus": "calibrate.corpus",
    "imatrix": "calibrate.imatrix",
    "outtype": "convert.outtype",
    "pre": "convert.pre",
    "trust_remote_code": "convert.trust_remote_code",
    "python": "convert.python",
    "gpu_layers": "gpu.layers",
    "cpu_experts": "gpu.cpu_experts",
    "ray": "ray",
}
_Phase = Literal[
    "source", "convert", "reference", "calibrate", "recipes", "quantize", "verify", "evaluate", "baselines", "report",
    "publish",
]  # fmt: skip


_WORTH_SAYING: Final = 10.0  # seconds


def run(
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="hub id, checkpoint's folder, full-precision GGUF, or a YAML file"),
    ] = None,
    tiers: Annotated[
        list[str] | None, typer.Option("--tiers", "--tier", metavar="TIER,...", help="what to make; 'all' for all")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option("--size", metavar="SIZE", help="fill 12GB by measured allocation; repeat")
    ] = None,
    work: Annotated[str | None, typer.Option("--work", metavar="DIR", help="folder of the run (NAME-apex)")] = None,
    name: Annotated[str | None, typer.Option("--name", help="MODEL in MODEL-APEX-I-Quality.gguf")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="branch, tag or commit on the hub")] = None,
    phase: Annotated[_Phase | None, typer.Option("--phase", metavar="P", help="this phase alone")] = None,
    from_: Annotated[_Phase | None, typer.Option("--from", metavar="P", help="this phase and all after it")] = None,
    only: Annotated[str | None, typer.Option("--only", metavar="P,Q", help="these phases alone")] = None,
    skip: Annotated[str | None, typer.Option("--skip", metavar="P,Q", help="all phases but these")] = None,
    force: Annotated[bool, typer.Option("--force", help="also run phases asked for in which nothing changed")] = False,
    eval_suite: Annotated[
        Literal["native", "harness", "all", "none"] | None,
        typer.Option("--eval-suite", help="what is measured of every file (native)"),
    ] = None,
    baselines: Annotated[
        list[str] | None,
        typer.Option("--baselines", metavar="REPO:PATTERN:LABEL", help="others' files to compare with; repeat"),
    ] = None,
    publish: Annotated[
        str | None, typer.Option("--publish", metavar="ORG/NAME", help="upload, with --yes; else say what would be")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="a new repository is private")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do upload")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="phases, disk, memory and time; change nothing")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="keep the converted full-precision GGUF")] = False,
    corpus: Annotated[
        list[str] | None, typer.Option("--corpus", metavar="TEXT", help="calibration text: builtin, files; repeat")
    ] = None,
    imatrix: Annotated[str | None, typer.Option("--imatrix", help="a finished importance matrix")] = None,
    outtype: Annotated[str | None, typer.Option("--outtype", help="of the conversion: auto, bf16, f16, f32")] = None,
    pre: Annotated[str | None, typer.Option("--pre", help="splitting rule of an unknown vocabulary")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="let the checkpoint's own Python code run")
    ] = False,
    python: Annotated[str | None, typer.Option("--python", help="the Python that runs the converter")] = None,
    threads: Annotated[int | None, typer.Option("-j", "--threads", min=1, help="threads (all processors)")] = None,
    gpu_layers: Annotated[int | None, typer.Option("--gpu-layers", min=-1, help="on the GPU; -1 for all")] = None,
    cpu_experts: Annotated[bool, typer.Option("--cpu-experts", help="routed experts stay in main memory")] = False,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="share the work in a cluster: HOST:PORT, auto, local")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any key of docs/config.md; repeat")
    ] = None,
    init: Annotated[bool, typer.Option("--init", help="write apex-run.yaml, with every key explained")] = False,
    as_json: Json = False,
) -> None:
    """From a checkpoint to verified, measured, published files. Interrupted or changed, it redoes only what it must."""

    if init:
        from apex_quant.cli.run_init import write_config

        written = write_config(source=source, force=force)
        if as_json:
            print_json({"path": str(written)})
        else:
            console_for(False).print(f"{safe(str(written))}: edit it, then apex run {safe(str(written))}")
        return
    if source is None:
        raise UsageError(
            "what is to be quantized?", hint="apex run MODEL; or apex run --init, which writes a YAML file to edit"
        )
    given = {key: value for key, value in locals().items() if key in _KEYS and value is not None and value is not False}
    options: dict[str, Any] = {_KEYS[key]: value for key, value in given.items()}
    if tiers:
        options["tiers"] = ",".join(tiers)
    options |= dict(map(setting, set_ or ()))
    from apex_quant.pipeline.engine import configured
    from apex_quant.pipeline.engine import run as pipeline

    notes = console_for(True)
    config = configured(source, options, lambda note: notes.print(f"config: {safe(note)}"))
    console = console_for(as_json)
    with RunProgress() as progress:
        made = pipeline(config, yes=yes, dry_run=dry_run, force=force, progress=progress)
    if as_json:
        print_json(made.to_json())
    elif dry_run:
        show_looks(console, made)
    else:
        show_run(console, made)
    if made.quarantined and not dry_run:
        raise InputError(
            f"{len(made.quarantined)} of {len(made.files)} files are quarantined: "
            + "; ".join(f"{one.tier}: {one.quarantined}" for one in made.quarantined),
            hint=f"apex status {made.work} tells of all; the others are finished",
        )


def status(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="the folder of a run")], as_json: Json = False
) -> None:
    """What a run's folder holds, what is in hand, and what the same run would do now and why."""
    from apex_quant.pipeline.status import status as read

    found = read(directory)
    if as_json:
        print_json(found.to_json())
    else:
        show_status(console_for(False), found)


def setting(word: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as a configuration's YAML has it. Raises UsageError."""
    from apex_quant.pipeline.yaml_text import parse_value

    key, equals, value = word.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {word!r} is not KEY=VALUE, such as calibrate.tokens=100k")
    try:
        return key, parse_value(value, f"--set {word[:80]!r}")
    except InputError as error:
        raise UsageError(error.message, hint=error.hint) from None


class RunProgress:
    """A context manager; call it with every event of a run: a line for each phase, a bar for the step in hand."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
        self._bar: Any = None
        self._kind: type | None = None
        self._phase = ""

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def __call__(self, event: Any) -> None:
        from apex_quant.pipeline.context import PhaseEvent
        from apex_quant.pipeline.results import RunResult
        from apex_quant.publish import Published

        if isinstance(event, PhaseEvent):
            self._close()
            self._line(event)
        elif isinstance(event, Published):
            from apex_quant.cli.publish import show_published

            self._close()
            show_published(self._console, event)
        elif isinstance(event, RunResult):  # of a run that failed: what it has all the same
            self._close()
            if event.files:
                show_run(self._console, event)
        else:
            if type(event) is not self._kind:
                self._close()
                self._bar, self._kind = _bar_for(event, self._phase), type(event)
                if self._bar is not None:
                    self._bar.__enter__()
            if self._bar is not None:
                self._bar(event)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
        self._bar = self._kind = None

    def _line(self, event: PhaseEvent) -> None:
        if event.kind != "note":
            self._phase = event.phase
        name = f"{event.phase:<10}"
        match event.kind:
            case "run":
                worth = event.eta is not None and event.eta[2] >= _WORTH_SAYING
                eta = f" [dim](about {_range(event.eta)})[/]" if event.eta and worth else ""
                self._console.print(f"[bold]{name}[/] runs: {safe(event.text)}{eta}")
            case "skip":
                self._console.print(f"[dim]{name} skipped: {safe(event.text)}[/]")
            case "done":
                self._console.print(f"[dim]{name} done in {_time(event.seconds or 0.0)}[/]")
            case _:
                self._console.print(f"[yellow]note:[/] {name.strip()}: {safe(event.text)}")


def _bar_for(event: Any, phase: str) -> AbstractContextManager[Any] | None:
    """The bar that the command of the same step has."""
    from apex_quant.cli.calibrate import CalibrationBar
    from apex_quant.cli.convert import ConvertBar
    from apex_quant.cli.evaluate import EvaluationBar
    from apex_quant.cli.progress import JobBar
    from apex_quant.cli.publish import HubBar

    match type(event).__name__:
        case "JobProgress":
            return JobBar(phase)
        case "CalibrationProgress":
            return CalibrationBar(phase)
        case "EvaluationProgress":
            return EvaluationBar(phase)
        case "ConvertProgress":
            return ConvertBar(phase)
        case "HubProgress":
            return HubBar()
        case "MeasureProgress":
            from apex_quant.cli.measure import MeasureBar

            return MeasureBar(phase)
    return None


def _range(eta: tuple[float, float, float]) -> str:
    """'3 min (1 min to 9 min)'."""
    return f"{_time(eta[0])} ({_time(eta[1])} to {_time(eta[2])})"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


# --- shown ---


def show_looks(console: Console, made: RunResult) -> None:
    """What would run and why, with what that takes."""
    from apex_quant.cli.show import human, table

    estimates = {one.phase: one for one in made.estimates}
    rows = table(None, "phase", "", ">disk", ">memory", ">time", "why")
    for one in made.phases:
        cells = ["", "", ""]
        if (found := estimates.get(one.name)) is not None:
            disk = "unknown" if found.bytes_disk is None else human(found.bytes_disk)
            known = found.seconds is not None and found.low is not None and found.high is not None
            time = _range((found.seconds, found.low, found.high)) if known else "unknown"  # type: ignore[arg-type]
            cells = [disk, human(found.bytes_memory), time]
        rows.add_row(one.name, "runs" if one.ran else "skipped", *cells, safe(one.reason))
    console.print(rows)
    if made.disk is not None:
        console.print(f"disk: {human(made.disk[0])} at most, {human(made.disk[1])} in the end; times are estimates")
    console.print("nothing was done")


def show_run(console: Console, made: RunResult) -> None:
    """Every file with its numbers, then what the run took."""
    show_files(console, made.files)
    ran = [one.name for one in made.phases if one.ran]
    console.print(
        f"{safe(str(made.work / 'release'))}: {', '.join(ran)} ran in {_time(made.seconds)}"
        if ran
        else f"{safe(str(made.work / 'release'))}: nothing had changed"
    )
    for path in made.report:
        if path.suffix == ".html" or path.name == "README.md":
            console.print(f"[dim]{safe(str(path))}[/]")


def show_files(console: Console, files: tuple[FileResult, ...]) -> None:
    """One row a file."""
    from apex_quant.cli.evaluate import interval
    from apex_quant.cli.show import human, table

    rows = table(None, "tier", ">size", ">bpw", ">mean KLD", "state", "file")
    for one in files:
        state = "quarantined" if one.quarantined else "verified" if one.verified else "not verified"
        kld = interval(one.kld) if one.kld else "not measured"
        rows.add_row(safe(one.tier), human(one.bytes), f"{one.bpw:.2f}", kld, state, safe(one.path.name))
    if files:
        console.print(rows)
    for one in files:
        if one.quarantined:
            console.print(f"[red]quarantined:[/] {safe(one.path.name)}: {safe(one.quarantined)}")


def show_status(console: Console, found: Status) -> None:
    """Every phase with what is finished and what would be next, then the files."""
    from apex_quant.cli.show import human, table

    console.print(f"{safe(str(found.work))}, from {safe(found.source)}")
    if found.running:
        console.print(f"[bold]running:[/] process {safe(found.running)}")
    rows = table(None, "phase", "finished", ">took", ">size", "next")
    for one in found.phases:
        names = ", ".join(name for name in one.finished if name) or ("yes" if one.finished else "")
        if one.started:
            names += f"{'; ' if names else ''}in hand: {', '.join(name or one.name for name in one.started)}"
        seconds = sum(item["seconds"] for item in one.finished.values())
        total = sum(item["bytes"] for item in one.finished.values())
        rows.add_row(one.name, safe(names), _time(seconds) if one.finished else "", human(total) if total else "",
                     safe(one.next))  # fmt: skip
    console.print(rows)
    show_files(console, found.files)
