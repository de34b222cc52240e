"""The embedded model is what the documents say, and stock llama.cpp loads it and its quantized forms and generates."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apex_quant import embedded_model, open_model, quantize
from apex_quant.model.inspect import inspect

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "The number of people who live in the city is"
TEXT = "The city lies on the river. In the morning the old man went down to the harbour and looked at the ships."

# llama.cpp in a process of its own: it prints to standard error and may abort
GENERATE = """
import json, sys
import numpy as np
from apex_quant.native.bindings import bindings
bindings()  # its defaults for this machine (decision 7)
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=256, n_threads=2, seed=1, verbose=False, logits_all=True)
out = llm.create_completion(sys.argv[2], max_tokens=24, temperature=0.0)
llm.reset()
tokens = llm.tokenize(sys.argv[3].encode())
llm.eval(tokens)
logits = np.array(llm.scores[: len(tokens)], dtype=np.float64)
logits -= logits.max(axis=1, keepdims=True)
logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
nll = -np.mean([logp[i, t] for i, t in enumerate(tokens[1:])])
print(json.dumps({"text": out["choices"][0]["text"], "nll": float(nll), "tokens": len(tokens)}))
"""


def generate(path: Path) -> dict[str, Any]:
    """Greedy continuation of PROMPT and mean negative log-likelihood of TEXT by stock llama.cpp."""
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(path), PROMPT, TEXT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    return generate(embedded_model())


def test_shape_is_as_promised() -> None:
    path = embedded_model()
    assert path.stat().st_size <= 50_000_000
    with open_model(path) as model:
        report = inspect(model)
        assert all(t.shape[0] % 256 == 0 for t in model.tensors.values() if t.type.name == "BF16")
    assert report.architecture == "qwen35moe"
    assert (report.layers, report.experts, report.experts_used) == (12, 6, [2])
    assert report.vocabulary is not None
    assert report.embedding_length * 40 <= report.vocabulary


def test_card_names_this_file() -> None:
    card = (ROOT / "docs" / "embedded-model.md").read_text(encoding="utf-8")
    assert hashlib.sha256(embedded_model().read_bytes()).hexdigest() in card


def test_llama_cpp_generates_from_it(full: dict[str, Any]) -> None:
    text = full["text"]
    assert len(text.split()) >= 5
    assert text.isprintable() or "\n" in text
    # an untrained model has ln(10240) = 9.2 nats a token; the card measures 3.6 on held-out prose
    assert full["nll"] < math.log(10240) / 2


def test_quantized_forms_load_and_stay_close(full: dict[str, Any], tmp_path: Path) -> None:
    made = quantize(embedded_model(), ["quality", "compact"], out=tmp_path, threads=2)
    for output, allowed in zip(made.outputs, (0.05, 0.3), strict=True):
        answer = generate(output.path)
        assert answer["tokens"] == full["tokens"]
        assert len(answer["text"].split()) >= 5
        assert abs(answer["nll"] - full["nll"]) < allowed, output.tier
