"""Time of `apex report` for many results files.

    python benchmarks/report.py --files 200 [--formats html,png,svg,md,csv]

The results are made up: numbers of 55,000 scored tokens each, beside files with the headers of a small model, in three
families, as a year of measurements would leave them.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from apex_quant.report.report import FORMATS, report  # noqa: E402
from tests.evaluation.synthetic import tokens  # noqa: E402
from tests.helpers.random_models import write_random_gguf  # noqa: E402
from tests.report import results_folder  # noqa: E402

GOAL = 20.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--work-dir", type=Path, help="where files are made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="apex-report-", dir=options.work_dir) as name:
        folder = Path(name)
        make_results(folder, options.files)
        used, started = time.process_time(), time.perf_counter()
        made = report(
            folder,
            folder / "report",
            family=["Alpha=UD-*", "Beta=b-*"],
            formats=options.formats.split(","),
            progress=lambda what: print(f"{time.perf_counter() - started:6.1f} s  {what}", file=sys.stderr),
        )
        seconds, used = time.perf_counter() - started, time.process_time() - used
        page = made.paths["html"].stat().st_size if "html" in made.paths else 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{options.files} files: {seconds:.1f} s, {used:.1f} s of processor time, peak {peak / 1e6:.0f} MB")
    print(f"page of {page / 1e6:.2f} MB (limit 5), {len(made.paths)} files written, {len(made.sentences)} claims")
    print(f"goal: under {GOAL:.0f} s: {'met' if seconds < GOAL else 'MISSED'}")
    return 0 if seconds < GOAL and page < 5e6 else 1


def make_results(folder: Path, count: int) -> None:
    """Results of `count` files of rising size and falling divergence, not quite in order."""
    results_folder.IDS = tokens(54, 2048)
    model = write_random_gguf(folder / "first.gguf", "qwen3moe", layers="M" * 24)
    for number in range(count):
        prefix = ("APEX", "UD", "b")[number % 3]
        name = f"model-{prefix}-{number:03d}"
        shutil.copyfile(model, folder / f"{name}.gguf")
        with (folder / f"{name}.gguf").open("ab") as file:  # of other sizes: nobody reads beyond the tensors
            file.truncate(model.stat().st_size + 4096 * number)
        scale = (1.5 - 1.2 * number / count) * (1 + 0.05 * ((7 * number) % 5))
        size = (folder / f"{name}.gguf").stat().st_size
        results_folder.add(folder, name, scale=scale, size=size, seed=number)
    model.unlink()


if __name__ == "__main__":
    sys.exit(main())
