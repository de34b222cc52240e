"""The smoke check's judgement against plain definitions, and its job on a real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_quant.errors import InputError, UsageError
from apex_quant.pipeline import jobs, steps_checks
from apex_quant.pipeline.config import make_config
from apex_quant.pipeline.smoke import CEILINGS, ceiling, generate_once, judge, looping, written_before
from apex_quant.publishable import publishable
from apex_quant.recipe.tiers import tier_names
from apex_quant.runtime.options import SessionOptions
from tests.pipeline.conftest import ran, small_run


def brute_looping(tokens: list[int]) -> float:
    """By definition: the longest stretch of at least 12 tokens that is one piece, three times or more, the last
    perhaps cut off."""
    n, best = len(tokens), 0
    for start in range(n):
        for end in range(start + 12, n + 1):
            part = tokens[start:end]
            for period in range(1, len(part) // 3 + 1):
                if all(part[i] == part[i % period] for i in range(len(part))):
                    best = max(best, len(part))
    return best / n if n else 0.0


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 2), max_size=8),
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
    st.integers(0, 8),
    st.lists(st.integers(0, 2), max_size=8),
)
def test_looping(before: list[int], piece: list[int], times: int, after: list[int]) -> None:
    tokens = before + piece * times + after
    assert looping(tokens) == pytest.approx(brute_looping(tokens))


def written(*texts: list[int], finite: bool = True) -> list[dict[str, Any]]:
    return [{"tokens": tokens, "finite": finite, "ended": False, "text": "text"} for tokens in texts]


def test_judge() -> None:
    fine, loop = list(range(64)), [7] * 64
    assert judge(written(fine, fine, fine), written(fine, fine, fine)) == []
    assert judge(written(loop, fine, fine), written(fine, fine, fine)) == []  # small models do that
    assert judge(written(loop, loop, loop), written(loop, loop, fine)) == []  # what the reference does too
    (problem,) = judge(written(loop, loop, fine), written(fine, fine, fine))
    assert problem.startswith("67% of what it writes is one piece over and over (0% with full precision)")
    (problem,) = judge(written([], [], []), written(fine, fine, fine))
    assert problem == "it ends at once on every prompt, which the full-precision model does not"
    assert judge(written([], [], []), written([], [], [])) == []
    problems = judge(written([1, 2], fine, finite=False), written(fine, fine))
    assert problems[0] == "prompt 1: its logits are NaN or infinite after 2 tokens"


def test_ceilings() -> None:
    assert set(CEILINGS) == set(tier_names())
    assert ceiling("i-quality", 6.0, {}) == 0.3
    assert ceiling("i-quality", 6.0, {"i-quality": 0.01}) == 0.01
    found = [ceiling("Q4_K_M", bpw, {}) for bpw in (8.5, 5.5, 4.8, 3.5, 2.5, 1.8)]
    assert found == sorted(found)


def test_the_full_model_writes_once(finished: Path, tmp_path: Path) -> None:
    prompts, options = ("The",), SessionOptions(threads=1)
    kept = tmp_path / "greedy.json"
    made = generate_once(finished / "Small-BF16.gguf", "digest", kept, prompts, 4, options)
    assert len(made) == 1
    assert made[0]["finite"]
    assert len(made[0]["tokens"]) == 4 or made[0]["ended"]
    assert written_before(kept, "digest", prompts, 4) == made
    assert generate_once(Path("/nowhere"), "digest", kept, prompts, 4, options) == made
    for other in (("other", prompts, 4), ("digest", ("A",), 4), ("digest", prompts, 5)):
        assert written_before(kept, *other) is None
    kept.write_text(json.dumps({"model": "digest"}))
    assert written_before(kept, "digest", prompts, 4) is None


def test_a_prompt_without_a_token(finished: Path, tmp_path: Path) -> None:
    """There is nothing to go on from: that is the configuration's fault, and said so."""
    with pytest.raises(UsageError, match=r"verify\.prompts"):
        make_config({"source": "a/b", "verify": {"prompts": ["The", ""]}})
    with pytest.raises(InputError, match=r"verify\.prompts: '' has no token in this vocabulary"):
        generate_once(finished / "Small-BF16.gguf", "d", tmp_path / "k.json", ("",), 4, SessionOptions(threads=1))


def test_a_file_that_writes_garbage_is_quarantined(again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "generate", lambda *_: written([7] * 64, [7] * 64, [7] * 64))
    monkeypatch.setattr(steps_checks, "generate_once", lambda *_: written(*[list(range(64))] * 3))
    made = small_run(again, tiers=["quality"], verify={"generate": 9, "rebuild": "none"}, phases={"from": "verify"})
    assert ran(made) == {"verify": ("quality",)}  # and no time is spent on measuring it
    reasons = {one.name: one.reason for one in made.phases}
    assert reasons["evaluate"] == reasons["report"] == "no file is left for it: all are quarantined"
    (bad,) = made.quarantined
    assert not bad.verified
    note = json.loads((again / "work/release/Small-APEX-Quality.gguf.verify.quarantine.json").read_text())
    assert note["phase"] == "verify"
    assert note["reason"].startswith("100% of what it writes is one piece over and over")
    with pytest.raises(Exception, match="quarantined: 100% of what it writes"):
        publishable(again / "work/release")
