"""What measuring sensitivities costs: tokens, passes and seconds, and how its numbers hold up with half the text.

    python benchmarks/measure.py --imatrix imatrix.gguf                        # the embedded model, defaults
    python benchmarks/measure.py --model MODEL.gguf --tokens 2048 --groups role,layer --threads 2
    python benchmarks/measure.py --read sensitivity.json                       # of a file measured earlier

Prints JSON. The bound: at most 8 passes over 16,384 tokens for each layer. `halves` compares the costs that the even
and the odd chunks of the same probes give: rank correlation and median absolute logarithmic difference.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from apex_quant import SessionOptions, embedded_model
from apex_quant.allocation.cost import CostModel
from apex_quant.allocation.measure import measure
from apex_quant.allocation.sensitivity import Sensitivities, load

PASS = 16_384
BOUND = 8.0


def spent(found: Sensitivities, layers: int) -> dict[str, Any]:
    """Tokens and passes for each layer."""
    passes = found.tokens_spent / PASS / layers
    return {
        "groups": len(found.groups),
        "probes": sum(len(group.probes) for group in found.groups) + len(found.joint),
        "tokens_of_a_probe": found.text.tokens,
        "tokens": found.tokens_spent,
        "passes_per_layer": round(passes, 2),
        "within_bound": passes <= BOUND,
        "seconds_of_probes": round(found.seconds, 1),
        "seconds_per_layer": round(found.seconds / layers, 1),
    }


def halves(found: Sensitivities) -> dict[str, float]:
    """Agreement of the first probes' KLD on even and on odd chunks."""
    chunks = [(p.model_extra or {}).get("by_chunk") for group in found.groups for p in group.probes[:1]]
    each = np.array([one for one in chunks if one and len(one) > 1])
    if each.size == 0:
        return {}
    even, odd = each[:, ::2].mean(axis=1), each[:, 1::2].mean(axis=1)
    return {
        "rank_correlation": round(float(spearmanr(even, odd)[0]), 4),
        "median_log_difference": round(float(np.median(np.abs(np.log(even / odd)))), 4),
        "chunks": each.shape[1],
    }


def laws(found: Sensitivities) -> dict[str, Any]:
    """Exponents, and each joint probe's prediction from the others."""
    model = CostModel.from_sensitivities(found)
    errors = []
    for number, joint in enumerate(found.joint):
        others = [one for place, one in enumerate(found.joint) if place != number]
        left = CostModel.from_sensitivities(found.model_copy(update={"joint": others}))
        errors.append(left.in_place(left.total(joint.types)) / joint.kld - 1)
    return {
        "alpha": model.exponents.alpha,
        "beta": model.exponents.beta,
        "rounding": model.rounding,
        "joint_probes": len(found.joint),
        "left_out_median_error": round(float(np.median(np.abs(errors))), 4) if errors else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=embedded_model())
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--groups", default="tensor")
    parser.add_argument("--joint", type=int, default=12)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--read", type=Path)
    asked = parser.parse_args()
    started = time.monotonic()
    if asked.read is not None:
        found = load(asked.read)
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(
                asked.model, out=Path(folder) / "s.json", imatrix=asked.imatrix, tokens=asked.tokens,
                groups=asked.groups, joint=asked.joint, options=SessionOptions(threads=asked.threads),
            )  # fmt: skip
    layers = len({group.layer for group in found.groups if group.layer is not None})
    shown = {"model": found.model.name, "layers": layers, **spent(found, layers)}
    if asked.read is None:
        shown["seconds_in_all"] = round(time.monotonic() - started, 1)
    print(json.dumps({**shown, "halves": halves(found), "laws": laws(found)}, indent=1))


if __name__ == "__main__":
    main()
