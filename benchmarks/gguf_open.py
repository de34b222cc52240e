"""Time to open a large model's header: apex_quant's open_model against PyPI gguf's GGUFReader.

    python benchmarks/gguf_open.py [--tokens 150000] [--tensors 700] [--repeat 3]

Both read the same generated file (a sparse data section, a vocabulary of --tokens with merges, scores and
types) in alternation in one process; the medians and their ratio are printed. `decoded` includes turning every
metadata value into Python objects, which open_model leaves until they are asked for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

import gguf  # noqa: E402
import numpy as np  # noqa: E402

from apex_quant.gguf import TYPES, TensorSpec, Value, ValueType, layout, open_model  # noqa: E402


def write_model(path: Path, tokens: int, tensors: int) -> int:
    """A file with this vocabulary and this many tensors of 64 MB, all holes. Returns the header's bytes."""
    metadata = {
        "general.architecture": Value.string("llama"),
        "tokenizer.ggml.tokens": Value.array(ValueType.STRING, [f"token{i}" for i in range(tokens)]),
        "tokenizer.ggml.merges": Value.array(ValueType.STRING, [f"to ken{i}" for i in range(tokens)]),
        "tokenizer.ggml.scores": Value.array(ValueType.FLOAT32, np.zeros(tokens, np.float32)),
        "tokenizer.ggml.token_type": Value.array(ValueType.INT32, np.ones(tokens, np.int32)),
    }
    names = [f"blk.{i // 10}.part{i % 10}.weight" for i in range(tensors)]
    plan = layout(metadata, [TensorSpec(name, (8192, 4096), TYPES["BF16"]) for name in names])
    with path.open("wb") as file:
        file.write(plan.header)
        file.truncate(plan.total_bytes)
    return plan.data_start


def opened(path: Path) -> None:
    open_model(path).close()


def decoded(path: Path) -> None:
    with open_model(path) as model:
        for value in model.metadata.values():
            _ = value.data


def reader(path: Path) -> None:
    gguf.GGUFReader(path)


def reader_decoded(path: Path) -> None:
    for field in gguf.GGUFReader(path).fields.values():
        field.contents()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--tensors", type=int, default=700)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()

    jobs: dict[str, Callable[[Path], None]] = {
        "open_model": opened,
        "GGUFReader": reader,
        "open_model, decoded": decoded,
        "GGUFReader, decoded": reader_decoded,
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        size = write_model(path, options.tokens, options.tensors)
        print(f"{options.tokens} tokens, {options.tensors} tensors, header of {size} bytes")
        for _ in range(options.repeat):
            for name, job in jobs.items():
                start = time.perf_counter()
                job(path)
                times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, value in median.items():
        print(f"{name:20}  {value * 1e3:9.1f} ms   (fastest {min(times[name]) * 1e3:.1f})")
    print(f"ratio {median['open_model'] / median['GGUFReader']:.4f}", end="")
    print(f", decoded {median['open_model, decoded'] / median['GGUFReader, decoded']:.4f}")


if __name__ == "__main__":
    main()
