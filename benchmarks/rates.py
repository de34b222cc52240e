"""Rates that `apex run --dry-run` estimates with: weights encoded and multiplied per second of one processor.

    python benchmarks/rates.py

Processor time of one thread, so that other work on the machine matters little. Encoding: 2^19 Gaussian weights in
rows of 2048, with importance where the type takes it, in a child process for each type; half that is repeated and the
better one counts. Reading text: the embedded model, 4 chunks of 512 tokens, weights that a token is multiplied with.
Hashing: sha256 of 256 MB. Prints JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from apex_quant import SessionOptions, embedded_model  # noqa: E402
from apex_quant.encode.encoder import GgmlEncoder  # noqa: E402
from apex_quant.evaluation.active import active_bytes  # noqa: E402
from apex_quant.gguf import open_model  # noqa: E402
from apex_quant.gguf.types import TYPES  # noqa: E402
from apex_quant.runtime.session import Session  # noqa: E402

KINDS = (
    "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS", "IQ4_NL", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS",
    "IQ2_XXS", "IQ1_M", "IQ1_S",
)  # fmt: skip
N = 2048


def main() -> None:
    rng = np.random.default_rng(0)
    importance = rng.gamma(2.0, 1.0, N).astype(np.float32)
    encoder = GgmlEncoder()
    encoder.prepare([TYPES[name] for name in KINDS])
    encoded = {}
    for name in KINDS:
        kind = TYPES[name]
        rows = rng.standard_normal((256 if name.startswith(("IQ1", "IQ2", "IQ3")) else 1024, N)).astype(np.float32)
        out = np.empty(len(rows) * kind.row_bytes(N), np.uint8)
        best = float("inf")
        for _ in range(2):
            started = time.thread_time()
            encoder.encode(kind, rows, importance, out)
            best = min(best, time.thread_time() - started)
        encoded[name] = round(rows.size / best / 1e6, 2)
    path = embedded_model()
    with open_model(path) as opened:
        active = active_bytes(opened)
        weights = (active.always + active.experts) // 2
        with Session(path, SessionOptions(threads=1, sequences=1)) as session:
            tokens = rng.integers(5, 500, (1, 512), dtype=np.int32)
            session.decode(tokens)
            started = time.process_time()
            for _ in range(4):
                session.decode(tokens)
            spent = time.process_time() - started
    data = bytes(256_000_000)
    started = time.thread_time()
    hashlib.sha256(data).hexdigest()
    hashed = len(data) / (time.thread_time() - started)
    print(json.dumps({
        "encode_million_weights_per_second": encoded,
        "read": {"weights_of_a_token": weights, "tokens_per_second": round(4 * 512 / spent, 1),
                 "giga_weights_per_second": round(weights * 4 * 512 / spent / 1e9, 3)},
        "sha256_mb_per_second": round(hashed / 1e6),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
