"""What the measurement of cache types costs beyond the decodes, and how fast the codec is.

    python benchmarks/kv.py                                 # the embedded model
    python benchmarks/kv.py --model MODEL.gguf --threads 4

Prints JSON: seconds of `kv` for some pairs beside those of plain decodes of as many tokens in one context; the bound is
at most 1.3 times the decodes, with one recording of f16 for all pairs. The codec: millions of values a second on one
core, there and back.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from apex_quant import SessionOptions, embedded_model, kv
from apex_quant.evaluation.turbo.codec import BLOCK, TURBO, decode, encode
from apex_quant.runtime.session import Session

CTX, CHUNKS, SEQUENCES = 512, 2, 4
TYPES = ("q8_0", "q4_0")


def measuring(model: Path, threads: int) -> dict[str, Any]:
    """`kv` on the built-in text, and the same number of tokens decoded with logits for half of them."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        found = kv(
            model, types=TYPES, pairs=(), ctx=(CTX,), chunks=CHUNKS, speed=False, out=Path(folder) / "kv.json",
            options=SessionOptions(threads=threads),
        )  # fmt: skip
        seconds = time.perf_counter() - started
    chunks = found.pairs[0]["by_ctx"][0]["chunks"]
    rounds = -(-chunks // SEQUENCES) * (len(found.pairs) + 1)  # and the recording
    options = SessionOptions(threads=threads, ctx=CTX, sequences=SEQUENCES, decode_tokens=512, flash_attention="on")
    wanted = np.arange(512 // SEQUENCES) >= 0
    with Session(model, options) as session:
        tokens = np.random.default_rng(0).integers(5, 500, (SEQUENCES, CTX), dtype=np.int32)
        plain = 0.0
        for number in range(rounds + 1):
            started = time.perf_counter()
            for start in range(0, CTX, len(wanted)):
                part = tokens[:, start : start + len(wanted)]
                session.decode(part, position=start, outputs=wanted if start >= CTX // 2 else ~wanted)
            plain += (time.perf_counter() - started) * (number > 0)  # the first round fills caches
    return {
        "model": model.name,
        "threads": threads,
        "tokens": chunks * CTX * (len(found.pairs) + 1),
        "kv_seconds": round(seconds, 2),
        "decode_seconds": round(plain, 2),
        "ratio": round(seconds / plain, 3),
    }


def codec() -> dict[str, Any]:
    """Millions of values a second, on 2^20 of them."""
    x = np.random.default_rng(0).standard_normal((1 << 20) // BLOCK * BLOCK, dtype=np.float32).reshape(-1, BLOCK)
    found = {}
    for name, kind in TURBO.items():
        times = []
        for _ in range(5):
            started = time.perf_counter()
            decode(encode(x, kind), kind)
            times.append(time.perf_counter() - started)
        found[name] = round(x.size / min(times) / 1e6, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=embedded_model())
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    print(json.dumps({"codec_millions_per_second": codec(), "kv": measuring(given.model, given.threads)}, indent=1))


if __name__ == "__main__":
    main()
