"""Proof of the export: llama.cpp on the GGUF file against PyTorch on the trained weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from .architecture import Model
from .checkpoint import load_weights
from .config import DOMAINS, SPECIAL_TOKENS, TURN_END, TURN_START
from .corpus import documents
from .export import export_gguf
from .measure import heldout_windows

WINDOW = 256
PROMPTS = (
    "It was the first evening of the voyage, and the captain",
    "import numpy as np\n\n\ndef normalize(values):\n    ",
    f"{TURN_START}user\nTom has 3 boxes with 12 apples each. He eats 4 apples. How many are left?{TURN_END}\n"
    f"{TURN_START}assistant\n",
)
TRICKY_TEXTS = (
    "Tabs\tand  double  spaces \r\n\r\n   indented\n\n\n  trailing   ",
    "naïve façade — “quotes”, ‘single’, … and e\u0301 (combining) Zürich Ångström",
    "日本語のテキスト 中文文本 한국어 текст на русском नमस्ते العربية ไทย",
    "🚀🦙👩‍🔬 ✅ 3 33 333 3.14159 1,000,000 0xDEADBEEF 1e-5",
    "I'VE we'll don't IT'S 'tis 'RE x'y''z \u00a0nbsp \u200bzero-width \u2028line",
    "def f(x):\n\treturn x**2  # comment\n\n\nclass A:\n    pass\n",
    "\x00\x01\x7f control \ufeffbom \ufffd replacement",
)


def _compare_logits(gguf_file: Path, windows: torch.Tensor, expected: npt.NDArray[np.float64]) -> dict[str, float]:
    from llama_cpp import Llama

    llama = Llama(
        str(gguf_file), n_ctx=WINDOW, n_batch=WINDOW, n_threads=2, logits_all=True, type_k=0, type_v=0, verbose=False
    )
    found = []
    for window in windows[:, :WINDOW]:
        llama.reset()
        llama.eval(window.tolist())
        found.append(np.array(llama.scores[:WINDOW], dtype=np.float64))
    llama.close()
    logits = np.stack(found)

    def log_softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        x = x - x.max(-1, keepdims=True)
        result: npt.NDArray[np.float64] = x - np.log(np.exp(x).sum(-1, keepdims=True))
        return result

    reference, other = log_softmax(expected), log_softmax(logits)
    divergence = (np.exp(reference) * (reference - other)).sum(-1)
    targets = windows[:, 1:].numpy()[..., None]
    return {
        "tokens": int(divergence.size),
        "max_abs_difference": float(np.abs(logits - expected).max()),
        "mean_abs_difference": float(np.abs(logits - expected).mean()),
        "mean_kld": float(divergence.mean()),
        "max_kld": float(divergence.max()),
        "top1_agreement": float((logits.argmax(-1) == expected.argmax(-1)).mean()),
        "loss_llama": float(-np.take_along_axis(other, targets, -1).mean()),
        "loss_torch": float(-np.take_along_axis(reference, targets, -1).mean()),
    }


def _texts(corpus: Path, per_domain: int) -> Iterator[str]:
    yield from TRICKY_TEXTS
    for domain in DOMAINS:
        for text in islice(documents(corpus, domain, "heldout"), per_domain):
            for special in SPECIAL_TOKENS:
                text = text.replace(special, "")
            yield text


def verify(gguf_file: Path, weights: Path, tokenizer_file: Path, corpus: Path, packed: Path) -> dict[str, Any]:
    """Compare logits, tokenization and a sample.

    The logits are compared twice: for the file itself, whose BF16 products llama.cpp computes on
    activations rounded to BF16, and for the same values stored in F32, where only the order of
    summation differs.

    Returns:
        The measurements as plain JSON values.
    """
    from llama_cpp import Llama

    torch.set_num_threads(2)
    config, parameters = load_weights(weights)
    model = Model(config, parameters, torch.float32)
    windows = torch.cat([heldout_windows(packed, domain, WINDOW, 1) for domain in DOMAINS])
    with torch.no_grad():
        expected = model.logits(windows[:, :WINDOW]).double().numpy()
    report: dict[str, Any] = {"bf16_file": _compare_logits(gguf_file, windows, expected)}
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "exact.gguf"
        export_gguf(weights, tokenizer_file, exact, all_float32=True)
        report["same_values_in_f32"] = _compare_logits(exact, windows, expected)

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    llama = Llama(str(gguf_file), n_ctx=WINDOW, n_threads=2, seed=1, verbose=False)
    texts = tokens = differing = 0
    for text in _texts(corpus, 40):
        ours = tokenizer.encode(text, add_special_tokens=False).ids
        theirs = llama.tokenize(text.encode(), add_bos=False, special=True)
        texts += 1
        tokens += len(ours)
        differing += ours != theirs
    report["tokenization"] = {"texts": texts, "tokens": tokens, "differing_texts": differing}

    samples = []
    for prompt in PROMPTS:
        llama.reset()
        result = llama.create_completion(prompt, max_tokens=80, temperature=0.7, top_k=40, seed=1)
        samples.append({"prompt": prompt, "text": result["choices"][0]["text"]})
    report["samples"] = samples
    return report
