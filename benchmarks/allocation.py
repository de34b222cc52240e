"""Measured allocation against every tier and rival at no more bytes, on the held-out text; predictions against truth.

    python benchmarks/allocation.py --work DIR --imatrix F --sensitivity F            # the table for RESULTS.md
    python benchmarks/allocation.py --work DIR ... --rivals i-compact,micro --chunks 4 # some of it, quickly
    python benchmarks/allocation.py --work DIR ... --random                            # rank correlation, errors

For each tier and each llama.cpp mix: the measured allocation of at most its bytes; for the tiers also, at the same
size, the hand recipe as it is published (where it fits), the best of its family by our own prediction, and allocation
by error alone. All files of a size are encoded with the same importance matrix in one pass over the model, measured on
the same tokens of the held-out text (never seen by calibration, probes or validation) against one .apexref, and
removed; what was measured is kept in --work, and the same command goes on from there.

`--random`: 24 random recipes of equal size at three sizes and 40 that span 2 to 8 bits per weight, each tensor in any
type that can be encoded, on the first chunks of the held-out text: Spearman's rank correlation of predicted and
measured KLD with an interval over recipes, and relative errors, with and without what apex measure found rounding of
activations to cost. The same ranks for error alone, with rows counted and with all tensors alike.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import numpy as np  # noqa: E402

import apex_quant  # noqa: E402
from apex_quant.allocation import baselines  # noqa: E402
from apex_quant.allocation.choices import make_space  # noqa: E402
from apex_quant.allocation.cost import CostModel  # noqa: E402
from apex_quant.allocation.exchange import parted, smoothed  # noqa: E402
from apex_quant.allocation.inputs import sensitivities_of  # noqa: E402
from apex_quant.allocation.space import Predicted, Space  # noqa: E402
from apex_quant.allocation.validate import Candidate, Validator, best_of  # noqa: E402
from apex_quant.errors import UsageError  # noqa: E402
from apex_quant.evaluation import bootstrap  # noqa: E402
from apex_quant.evaluation.compare import compare  # noqa: E402
from apex_quant.evaluation.make_reference import make_reference  # noqa: E402
from apex_quant.evaluation.statistics import DRAWS, LEVEL, MIN_CHUNKS  # noqa: E402
from apex_quant.gguf import open_model  # noqa: E402
from apex_quant.importance import Importance  # noqa: E402
from apex_quant.recipe.planned import PlanOptions  # noqa: E402
from apex_quant.runtime.options import SessionOptions  # noqa: E402

TIERS = ("i-quality", "i-balanced", "i-compact", "mini", "nano", "micro")
MIXES = ("Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_M", "IQ2_M")
CTX = 512
AT_ONCE = 8  # files of random recipes
HEAD = """
| recipe | bytes | predicted | mean KLD | 99 % | 99.9 % (ours minus it) | ours minus it | ours / it |
|---|---|---|---|---|---|---|---|"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="what was measured is kept here")
    parser.add_argument("--model", type=Path, default=apex_quant.embedded_model())
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument(
        "--sensitivity", type=Path, help="of apex measure (default: measured and kept beside the model)"
    )
    parser.add_argument("--rivals", default=",".join((*TIERS, *MIXES)), help="tiers and mixes, with commas between")
    parser.add_argument("--chunks", type=int, help=f"of each held-out text, of {CTX} tokens (default: all)")
    parser.add_argument("--validate", action="store_true", help="choose near-optimal recipes on the validation text")
    parser.add_argument("--ours", default="optimum", help="optimum, smoothed, apart: without --validate")
    parser.add_argument("--plot", type=Path, help="the table as a picture")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--count", type=int, default=24, help="random recipes of each size")
    parser.add_argument("--spanning", type=int, default=40)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--gpu-layers", type=int, default=0, help="-1: all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    with Bench(options) as bench:
        document = bench.random() if options.random else bench.table()
    (options.work / ("random.json" if options.random else "table.json")).write_text(
        json.dumps(document, indent=1) + "\n"
    )
    if options.json:
        print(json.dumps(document, indent=1))
    return 0


class Bench:
    """The space, and two validators: one judges on held-out text, one chooses on the validation text."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.held = options, ExitStack()
        self.session = SessionOptions(threads=options.threads, gpu_layers=options.gpu_layers)
        self.model = self.held.enter_context(open_model(options.model))
        matrix = self.held.enter_context(Importance.read(options.imatrix))
        self.measured, _ = sensitivities_of(self.model, options.sensitivity, options.imatrix, session=self.session)
        costs = CostModel.from_sensitivities(self.measured)
        self.space = make_space(self.model, costs, importance=matrix)
        self.judge = self._validator(matrix, self._reference())
        self.chooser = self._validator(matrix, None)
        self.chooser.keep = False
        self.left_out: list[str] = []

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self.held.close()

    def _validator(self, matrix: Importance, reference: Path | None) -> Validator:
        folder = self.options.work / ("heldout" if reference else "validation")
        folder.mkdir(exist_ok=True)
        return Validator(
            self.model, folder, matrix, self.options.imatrix, PlanOptions(), reference=reference, session=self.session,
            threads=self.options.threads, chunks=self.options.chunks if reference else None, keep=False,
            ctx=int(self.measured.settings.get("ctx", CTX)),
        )  # fmt: skip

    def _reference(self) -> Path:
        path: Path = self.options.work / f"heldout-{self.options.chunks or 'all'}.apexref"
        if not path.exists():
            say("reference")
            make_reference(
                self.model.path, path, ctx=CTX, chunks=self.options.chunks, scored="all", options=self.session
            )
        return path

    def ours(self, target: int) -> tuple[str, Predicted]:
        """The measured allocation of at most `target` bytes, and how it was chosen."""
        made: dict[str, Predicted] = {"optimum": self.space.fit(target)}
        made["smoothed"] = self._repredicted(smoothed(self.space), target)
        made["apart"] = self._repredicted(parted(self.space), target)
        if not self.options.validate:
            return self.options.ours, made[self.options.ours]
        best = best_of(self.chooser.measure(made))
        return best.name, best.file

    def _repredicted(self, space: Space, target: int) -> Predicted:
        return self.space.predicted(space.fit(target).plan)

    def table(self) -> dict[str, Any]:
        """Each rival and ours at no more bytes; a size at a time, so that lines appear as they are measured."""
        started, rows = time.monotonic(), list[dict[str, Any]]()
        print(HEAD)
        for rival in self.options.rivals.split(","):
            planned = baselines.tier_plan(self.space, rival)
            how, mine = self.ours(planned.total_bytes)
            recipes = {f"ours@{rival} ({how})": mine, rival: self.space.predicted(planned)}
            if rival in TIERS:
                recipes |= self.others(rival, planned.total_bytes)
            say(f"{rival}: {planned.total_bytes} bytes, {', '.join(recipes)}")
            found = dict(zip(recipes, self.judge.measure(recipes), strict=True))
            ours = next(iter(found.values()))
            for name, one in found.items():
                rows.append(row(name, one, None if one is ours else ours))
                print(rows[-1]["line"], flush=True)
        if self.options.plot is not None:
            plot(rows, self.model.path.stem, self.options.plot)
        return {
            "rows": rows,
            "left_out": self.left_out,
            "seconds": time.monotonic() - started,
            "settings": {"ctx": CTX, **plain(self.options)},
        }

    def others(self, rival: str, size: int) -> dict[str, Predicted]:
        """The hand recipes and allocation by error alone of at most `size` bytes."""
        found: dict[str, Predicted] = {}
        try:
            literal = self.space.predicted(baselines.hand_recipe(self.space, size))
            found[f"hand@{rival} ({baselines.ALWAYS[0]})"] = literal
        except UsageError as error:
            self.left_out.append(f"{rival}: {error.message}")
            say(self.left_out[-1])
        always, best = baselines.hand_family(self.space, size)
        found[f"hand family@{rival} ({always})"] = best
        errors = baselines.error_only(self.space, self.measured, size)
        found[f"error@{rival}"] = self.space.predicted(errors.plan)
        return found

    def random(self) -> dict[str, Any]:
        """Predictions against truth over random recipes."""
        drawn = baselines.drawing_space(self.space)
        by_rows = baselines.ErrorCosts.of(self.measured, self.model)
        alike = replace(by_rows, weights=dict.fromkeys(by_rows.weights, 1.0))
        recipes: dict[str, Predicted] = {}
        sizes = [baselines.tier_plan(self.space, tier).total_bytes for tier in ("i-balanced", "i-compact", "micro")]
        for size in sizes:
            for number in range(self.options.count):
                planned = baselines.random_recipe(drawn, size, seed=number)
                recipes[f"{size}/{number}"] = self.space.predicted(planned)
        for number, size in enumerate(baselines.random_sizes(drawn, self.options.spanning, seed=0)):
            planned = baselines.random_recipe(drawn, size, seed=1000 + number, spread=1.0, tolerance=0.03)
            recipes[f"span/{number}"] = self.space.predicted(planned)
        say(f"{len(recipes)} recipes")
        # the nearly perfect file: what it diverges by is rounding of activations, on the text that judges
        recipes["Q8_0"] = self.space.predicted(baselines.tier_plan(self.space, "Q8_0"))
        found = self.judged(recipes)
        rounding, nearly = CostModel.from_sensitivities(self.measured).rounding, found["Q8_0"]
        document: dict[str, Any] = {
            "rounding": rounding,
            "Q8_0": {"predicted": nearly.file.predicted, "measured": nearly.kld},
            "recipes": {name: one.to_json() for name, one in found.items()},
        }
        print(f"rounding {rounding:.5f}; Q8_0: predicted {nearly.file.predicted:.5f}, measured {nearly.value:.5f}")
        for group in [*map(str, sizes), "span"]:
            mine = [one for name, one in found.items() if name.startswith(f"{group}/")]
            if len(mine) < 3:
                continue
            true = [one.value for one in mine]
            predicted = [one.file.predicted for one in mine]
            stats: dict[str, Any] = {"n": len(mine), "rank": ranked(predicted, true)}
            for what, costs in (("rows", by_rows), ("tensors_alike", alike)):
                alone = [error_of(costs, one.file) for one in mine]
                stats[f"rank_error_only_{what}"] = ranked(alone, true)
            stats["median_ratio"] = float(np.median(np.divide(true, predicted)))
            small = [(p, t) for p, t in zip(predicted, true, strict=True) if t < 0.3]
            if small:
                stats["below_0.3"] = len(small)
                for what, less in (("", 0.0), ("_without_rounding", rounding)):
                    off = [abs((p - less) / t - 1) for p, t in small]
                    stats[f"median_relative_error_below_0.3{what}"] = float(np.median(off))
            document[group] = stats
            print(group, json.dumps(stats))
        return document

    def judged(self, recipes: dict[str, Predicted]) -> dict[str, Candidate]:
        """Measured on held-out text, a few files at a time, so that they need little room and an end loses little."""
        found: dict[str, Candidate] = {}
        names = list(recipes)
        for start in range(0, len(names), AT_ONCE):
            part = {name: recipes[name] for name in names[start : start + AT_ONCE]}
            found |= dict(zip(part, self.judge.measure(part), strict=True))
            say(f"{len(found)} of {len(names)}")
        return found


def row(name: str, one: Candidate, mine: Candidate | None) -> dict[str, Any]:
    """A line of the table. The difference is ours minus the rival's, paired on the same tokens."""
    kld = one.results.metrics["kld"]
    made = {"name": name, **one.to_json(), "p99": kld["p99"]}
    difference, ratio = "", ""
    if mine is not None:
        pairs = compare([mine.results, one.results], ["kld", "p99_9"])
        made["pairs"] = [pair.to_json() for pair in pairs]
        difference = f"{pairs[0].difference:+.5f}" + (
            f" [{pairs[0].low:+.5f}, {pairs[0].high:+.5f}]" if pairs[0].low is not None else ""
        )
        ratio = f"{mine.value / one.value - 1:+.1%}"
        made["tail"] = tail(mine, one)
    mean = kld["mean"]
    interval = f" [{mean['low']:.5f}, {mean['high']:.5f}]" if mean["low"] is not None else ""
    values = one.results.arrays()["kld/kld"]
    made["p999_of_tokens"] = float(np.quantile(values, 0.999))
    tails = f"{made['p999_of_tokens']:.3f}"
    if mine is not None and made["tail"]["low"] is not None:
        tails += f" ({made['tail']['value']:+.3f} [{made['tail']['low']:+.3f}, {made['tail']['high']:+.3f}])"
    made["line"] = (
        f"| {name} | {one.file.plan.total_bytes:,} | {one.file.predicted:.4f} | {mean['value']:.5f}{interval} | "
        f"{kld['p99']:.3f} | {tails} | {difference} | {ratio} |"
    )
    return made


def plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Mean KLD with its interval over size: ours, tiers, llama.cpp's mixes, the hand recipe, error alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained", dpi=160)
    axes = figure.add_subplot()
    kinds = {
        "ours": ("measured allocation", "o", "#0072b2"), "tier": ("APEX tiers", "s", "#d55e00"),
        "mix": ("llama.cpp's mixes", "^", "#009e73"), "hand": ("hand recipe as published", "v", "#8a8a8a"),
        "hand family": ("best of the hand recipe's family", "v", "#444444"),
        "error": ("error alone, by rows", "x", "#cc79a7"),
    }  # fmt: skip
    for kind, (label, mark, colour) in kinds.items():
        mine = sorted((one for one in rows if kind_of(one["name"]) == kind), key=lambda one: one["total_bytes"])
        size = [one["total_bytes"] / 1e6 for one in mine]
        kld = [one["measured_kld"]["value"] for one in mine]
        bars = [
            [abs(one["measured_kld"][end] - y) for one, y in zip(mine, kld, strict=True)] for end in ("low", "high")
        ]
        axes.errorbar(
            size, kld, bars, fmt=mark, ls="-" if kind == "ours" else "", color=colour, label=label, ms=5, lw=1
        )
        for one, x, y in zip(mine, size, kld, strict=True) if kind in ("tier", "mix") else ():
            axes.annotate(one["name"], (x, y), (6, 3), fontsize=8, textcoords="offset points")
    axes.margins(x=0.14)
    axes.set_yscale("log")
    axes.set_xlabel("file size, MB (10^6 bytes)")
    axes.set_ylabel("mean KLD on held-out text, nats per token, 95 % intervals")
    axes.set_title(f"{title}: the same importance matrix, no more bytes")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)


def kind_of(name: str) -> str:
    """Which kind of recipe a row of the table is about."""
    first, at, _ = name.partition("@")
    return first if at else "tier" if name in TIERS else "mix"


def tail(mine: Candidate, one: Candidate) -> dict[str, float | None]:
    """Difference of the 99.9 % KLD, ours minus the rival's, with its interval over chunks.

    apex compare refuses it below 100,000 tokens, since so few lie beyond the quantile: read it with that in mind.
    """
    a, b = (each.results.arrays() for each in (mine, one))
    if any(not np.array_equal(a[f"kld/{key}"], b[f"kld/{key}"]) for key in ("chunk_hash", "token")):
        raise SystemExit(f"{mine.path} and {one.path} have other tokens")
    x, y = (np.asarray(each["kld/kld"], np.float64) for each in (a, b))
    block = np.unique(a["kld/chunk"], return_inverse=True)[1]
    count = int(block.max()) + 1
    value = float(np.quantile(x, 0.999) - np.quantile(y, 0.999))
    if count < MIN_CHUNKS:
        return {"value": value, "low": None, "high": None, "n": x.size}
    drawn = [bootstrap.drawn_quantiles(each, block, count, 0.999, DRAWS, 0) for each in (x, y)]
    low, high = bootstrap.order_statistics(drawn[0] - drawn[1], bootstrap.expanded(LEVEL, count))
    return {"value": value, "low": low, "high": high, "n": x.size}


def ranked(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Spearman's rank correlation and its 95 % interval: recipes are drawn again, with replacement."""
    from scipy.stats import rankdata

    def correlation(places: Any) -> Any:
        ranks = [rankdata(np.asarray(one)[places], axis=-1) for one in (a, b)]
        x, y = (each - each.mean(axis=-1, keepdims=True) for each in ranks)
        return (x * y).sum(axis=-1) / np.sqrt(np.square(x).sum(axis=-1) * np.square(y).sum(axis=-1))

    every = np.arange(len(a))
    drawn = correlation(np.random.default_rng(0).choice(every, (DRAWS, len(a))))
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(correlation(every)), "low": float(low), "high": float(high)}


def error_of(costs: baselines.ErrorCosts, file: Predicted) -> float:
    """What error alone says of a recipe."""
    return sum(costs.cost(name, kind.name) for name, kind in file.types.items() if name in costs.errors)


def plain(options: argparse.Namespace) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
