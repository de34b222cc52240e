"""`apex compare` and `apex results`: what was measured, side by side, and which differences can be shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apex_quant.cli import safe
from apex_quant.cli.console import console_for, print_json
from apex_quant.cli.options import Force, Json

if TYPE_CHECKING:
    from rich.console import Console

    from apex_quant.evaluation.compare import Pair
    from apex_quant.evaluation.schema import Results


def compare(
    files: Annotated[list[Path], typer.Argument(metavar="A.json B.json ...", help="results of apex eval")],
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="NAME", help="kld, p99_9, top1_agreement, ppl or a task; repeat, or separate "
                     "by commas (default: all in common)"),
    ] = None,
    all_pairs: Annotated[bool, typer.Option("--all-pairs", help="every two, not each with the first")] = False,
    level: Annotated[float, typer.Option("--level", help="of the intervals")] = 0.95,
    draws: Annotated[int, typer.Option("--draws", help="of the bootstrap; levels near 1 take more")] = 2000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the draws")] = 0,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Paired differences on the same tokens and tasks, with intervals and sentences that may be quoted."""
    from apex_quant.evaluation.compare import compare as run

    names = [name.strip() for word in metric for name in word.split(",")] if metric else None
    pairs = run(files, names, all_pairs=all_pairs, level=level, draws=draws, seed=seed)
    if as_json:
        print_json({"pairs": [pair.to_json() for pair in pairs]})
    else:
        _show_pairs(console_for(False), pairs)


def results(
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="results of apex eval, or folders of them")],
    merge: Annotated[
        Path | None, typer.Option("--merge", metavar="OUT", help="put those of one model together")
    ] = None,
    import_: Annotated[
        Path | None,
        typer.Option(
            "--import", metavar="DIR", help="FILES are others' results (docs/report.md): write them there as ours are"
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """List what was measured, merge results of one model into one file, or import others' results."""
    from apex_quant.cli.show import show_warnings
    from apex_quant.evaluation.results import find, merge_files, summary
    from apex_quant.report.imports import import_results

    if import_ is not None:
        files = [one.path for path in files for one in import_results(path, out=import_, force=force) if one.path]
    found, passed_over = find(files)
    rows = [summary(one) for one in found]
    merged = merge_files([one.path for one in found if one.path], merge, force=force) if merge is not None else None
    if as_json:
        print_json(
            {
                "results": rows,
                "passed_over": [str(path) for path in passed_over],
                "merged": None if merged is None else {"path": str(merge), "warnings": merged.warnings},
            }
        )
        return
    console = console_for(False)
    _show_results(console, found)
    if passed_over:
        console.print(f"[dim]not results: {safe(', '.join(path.name for path in passed_over))}[/]")
    if merged is not None:
        console.print(f"merged into {safe(str(merge))}: {safe(', '.join(merged.metrics))}")
        show_warnings(console, merged.warnings)


def _show_pairs(console: Console, pairs: list[Pair]) -> None:
    """A table of shares and differences, then the sentences."""
    from apex_quant.cli.show import table

    made = table(
        None, "a", "b", "metric", ">a - b", ">low", ">high", ">n", ">a better", ">a worse", ">McNemar p", "better"
    )
    for pair in pairs:
        made.add_row(
            safe(pair.a), safe(pair.b), safe(pair.metric), _number(pair.difference), _number(pair.low),
            _number(pair.high), f"{pair.n:,}", _percent(pair.better), _percent(pair.worse),
            "-" if pair.p is None else f"{pair.p:.2g}", _better(pair),
        )  # fmt: skip
    console.print(made)
    for pair in pairs:
        console.print(safe(pair.sentence))
    shown = sum(pair.low is not None for pair in pairs)
    if shown > 1:
        wrong = 100 * (1 - pairs[0].level)
        console.print(
            f"[dim]{shown} intervals at {100 * pairs[0].level:g} % each: where there is no difference, about "
            f"{wrong:g} % of them exclude zero all the same[/]"
        )


def _better(pair: Pair) -> str:
    """Whose result is better, whichever way its numbers go."""
    if pair.better_result is not None:
        return safe(pair.better_result)
    return "too little to tell" if pair.low is None else "no difference shown"


def _show_results(console: Console, found: list[Results]) -> None:
    from apex_quant.cli.show import human, table

    tasks = list(dict.fromkeys(name for one in found for name in one.metrics if name in _task_names()))
    made = table(
        None, "model", ">size", ">bpw", ">ppl", ">±", ">KLD mean", ">low", ">high", ">99.9 %", ">max", ">same top",
        *(f">{name}" for name in tasks), ">pp", ">tg", "file",
    )  # fmt: skip
    for one in found:
        ppl, kld, model = one.metric("ppl"), one.metric("kld"), one.model
        mean = kld.mean if kld else None
        speed = one.metrics.get("speed", {})
        made.add_row(
            safe(one.name), "-" if model.bytes is None else human(model.bytes), _number(model.bpw, 3),
            _number(ppl.value if ppl else None), _number(ppl.error if ppl else None, 2),
            *(_number(getattr(mean, end, None)) for end in ("value", "low", "high")),
            _number(_value(kld.p99_9) if kld else None), _number(_value(kld.max) if kld else None),
            _percent(_value(kld.top1_agreement) if kld else None),
            *(_percent(_value(one.metrics.get(name))) for name in tasks),
            *(_number(_first_rate(speed, test)) for test in ("pp", "tg")), safe(one.path.name if one.path else "-"),
        )  # fmt: skip
    console.print(made)


def _task_names() -> tuple[str, ...]:
    from apex_quant.evaluation.schema import TASKS

    return TASKS


def _value(found: Any) -> float | None:
    """Of a number, an object with a value, or None."""
    value = found.get("value") if isinstance(found, dict) else getattr(found, "value", found)
    return value if isinstance(value, int | float) else None


def _first_rate(speed: dict[str, Any], test: str) -> float | None:
    """Tokens per second of the first test of that kind: pp512 of pp."""
    return next((_value(rate) for name, rate in speed.items() if name.startswith(test)), None)


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
