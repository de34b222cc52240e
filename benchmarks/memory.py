"""Peak memory of `apex quantize` on a large synthetic model.

    python benchmarks/memory.py --gigabytes 8 --tier quality

The model has real shapes and its data is a hole in a sparse file (zeros), so that it needs no disk; memory does not
depend on values. Peak resident sizes are the kernel's, of the largest single process, as /usr/bin/time -v shows them.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from apex_quant.gguf import open_model  # noqa: E402
from tests.helpers.random_models import write_random_gguf  # noqa: E402

GOAL = 1.5e9


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the model")
    parser.add_argument("--tier", default="quality")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work-dir", type=Path, help="where the model and the output go")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="apex-memory-", dir=options.work_dir) as folder:
        model = make_model(Path(folder) / "synthetic-BF16.gguf", int(options.gigabytes * 1e9))
        with open_model(model) as opened:
            size = sum(info.nbytes for info in opened.tensors.values())
            slices = [info.nbytes // (info.shape[2] if len(info.shape) > 2 else 1) for info in opened.tensors.values()]
            tensor = max(info.nbytes for info in opened.tensors.values())
        command = [sys.executable, "-m", "apex_quant", "quantize", str(model), "--tier", options.tier]
        command += ["-o", folder, "-j", str(options.threads)]
        done = subprocess.run(command, cwd=ROOT / "src", capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    limit = max(slices) + GOAL
    print(f"model {size / 1e9:.2f} GB, largest tensor {tensor / 1e6:.0f} MB, largest slice {max(slices) / 1e6:.1f} MB")
    print(f"peak resident size of the largest process: {peak / 1e6:.0f} MB with {options.threads} threads")
    print(f"goal: under the largest slice + 1.5 GB = {limit / 1e6:.0f} MB: {'met' if peak < limit else 'MISSED'}")
    print(f"ratio to the model's size: {peak / size:.4f}")
    return 0 if peak < limit else 1


def make_model(path: Path, size: int) -> Path:
    """A qwen3moe of real widths with as many layers as fit into `size` bytes."""
    one = _bytes(write_random_gguf(path, "qwen3moe", scale="real", sparse=True, layers="M"))
    two = _bytes(write_random_gguf(path, "qwen3moe", scale="real", sparse=True, layers="MM"))
    count = max(1, -(-(size - one) // (two - one)) + 1)
    return write_random_gguf(path, "qwen3moe", scale="real", sparse=True, layers="M" * count)


def _bytes(path: Path) -> int:
    with open_model(path) as model:
        return sum(info.nbytes for info in model.tensors.values())


if __name__ == "__main__":
    sys.exit(main())
