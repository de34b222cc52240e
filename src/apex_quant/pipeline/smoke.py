"""The smoke check: does a quantized file still write text, as its full-precision model does?

Published files of a large model once wrote garbage because nobody had looked. So every file writes a little, greedily,
from the same prompts as the full model: logits must be numbers, and it must not fall into a loop or silence where the
full model does not. Small models loop by themselves: only what the reference does not do counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from apex_quant.gguf import write_file
from apex_quant.native import Child
from apex_quant.runtime.options import SessionOptions

JOB: Final = "apex_quant.pipeline.smoke_job"
PROMPTS: Final = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea, there lived",
)
MARGIN: Final = 0.4
"""Share of the generated tokens that may be in loops beyond the reference's share: more than one prompt of three."""
_COPIES: Final = 3  # of a piece, from which on it is a loop
_LEAST: Final = 12  # tokens that a loop has

# highest mean KLD (nats per token) of a file that is no garbage, some twenty times what published files of the tier
# have (0.010 to 0.10 for i-balanced to mini of Qwen3.6-35B-A3B); for other files by bits per weight
CEILINGS: Final[Mapping[str, float]] = {
    "quality": 0.3, "i-quality": 0.3, "balanced": 0.3, "i-balanced": 0.3, "compact": 0.9, "i-compact": 0.9,
    "mini": 2.0, "i-mini": 2.0, "nano": 3.0, "i-nano": 3.0, "micro": 4.0, "i-micro": 4.0,
}  # fmt: skip
CEILINGS_BY_BITS: Final = ((7.0, 0.1), (5.0, 0.3), (4.0, 0.6), (3.0, 1.5), (2.3, 3.0), (0.0, 4.0))


def ceiling(tier: str, bpw: float, given: Mapping[str, float]) -> float:
    """The highest mean KLD that a file of this tier may have: the user's, the tier's, or that of its bits."""
    by_bits = next(value for bits, value in CEILINGS_BY_BITS if bpw >= bits)
    return given.get(tier, CEILINGS.get(tier, by_bits))


def generate(model: Path, prompts: Sequence[str], tokens: int, options: SessionOptions) -> list[dict[str, Any]]:
    """Greedy text of a model for each prompt, in a child process. Raises InputError, NativeError."""
    payload = {
        "model": str(model),
        "prompts": list(prompts),
        "tokens": tokens,
        "options": options.model_dump(mode="json"),
    }
    with Child(JOB) as child:
        made = child.run(f"{JOB}:run", payload, lambda event: None, step=f"generating with {model.name}")
    written: list[dict[str, Any]] = made["written"]
    return written


def generate_once(
    model: Path, digest: str, kept: Path, prompts: Sequence[str], tokens: int, options: SessionOptions
) -> list[dict[str, Any]]:
    """The same for the full model, kept in a file: it is slow, and does not change."""
    if (known := written_before(kept, digest, prompts, tokens)) is not None:
        return known
    made = generate(model, prompts, tokens, options)
    document = {"model": digest, "prompts": list(prompts), "tokens": tokens, "written": made}
    write_file(kept, json.dumps(document))
    return made


def written_before(kept: Path, digest: str, prompts: Sequence[str], tokens: int) -> list[dict[str, Any]] | None:
    """What generate_once() kept of this model and these prompts."""
    try:
        known = json.loads(kept.read_bytes())
        written: list[dict[str, Any]] = known["written"]
        same = [known["model"], known["prompts"], known["tokens"]] == [digest, list(prompts), tokens]
        return written if same and all(isinstance(one["tokens"], list) for one in written) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def looping(tokens: Sequence[int]) -> float:
    """Share of the tokens that lie in the longest stretch of one repeated piece, 0 where none is repeated thrice.

    >>> looping([1, 2] * 10)
    1.0
    """
    n, longest = len(tokens), 0
    for period in range(1, n // _COPIES + 1):
        run = 0
        for place in range(period, n):
            run = run + 1 if tokens[place] == tokens[place - period] else 0
            if run >= (_COPIES - 1) * period and run + period >= _LEAST:
                longest = max(longest, run + period)
    return longest / n if n else 0.0


def judge(written: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with a file's text, beside its full model's; [] for nothing."""
    problems = [f"prompt {number + 1}: its logits are NaN or infinite after {len(one['tokens'])} tokens"
                for number, one in enumerate(written) if not one["finite"]]  # fmt: skip
    if problems:
        return problems
    ours, theirs = ([looping(one["tokens"]) for one in every] for every in (written, reference))
    mean, expected = sum(ours) / max(len(ours), 1), sum(theirs) / max(len(theirs), 1)
    if mean > expected + MARGIN:
        worst = max(range(len(ours)), key=ours.__getitem__)
        problems.append(
            f"{mean:.0%} of what it writes is one piece over and over ({expected:.0%} with full precision): "
            f"{written[worst]['text'][-80:]!r}"
        )
    if any(one["tokens"] for one in reference) and not any(one["tokens"] for one in written):
        problems.append("it ends at once on every prompt, which the full-precision model does not")
    return problems
