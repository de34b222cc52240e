"""The model card, written from the files that the other steps measured."""

from __future__ import annotations

import csv
import json
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

from .checkpoint import file_sha256, load_weights
from .config import DOMAINS, ModelConfig
from .export import MODEL_NAME
from .measure import kurtosis_by_group


def _table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _sources(path: Path) -> str:
    by_domain: dict[str, list[dict[str, str]]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            by_domain[row["shard"]].append(row)
    rows: list[tuple[object, ...]] = []
    for domain in DOMAINS:
        by_licence: dict[str, list[str]] = defaultdict(list)
        for row in by_domain[domain]:
            by_licence[row["licence"].split(" (see")[0]].append(row["source"])
        size = sum(int(row["bytes"]) for row in by_domain[domain])
        rows += [(domain, f"{size / 1e6:.1f}", licence, ", ".join(names)) for licence, names in by_licence.items()]
    return _table(("domain", "MB in the domain", "licence", "sources"), rows)


def _architecture(config: ModelConfig, parameters: int, active: int) -> str:
    full = sum(config.is_full_attention(layer) for layer in range(config.num_layers))
    return _table(
        ("property", "value"),
        [
            ("family", "`qwen35moe` in llama.cpp, the text model of transformers' `Qwen3_5MoeForCausalLM`"),
            ("parameters", f"{parameters:,}, of which {active:,} take part in one token"),
            ("layers", f"{config.num_layers}: {config.num_layers - full} with gated-delta linear attention, "
                       f"{full} (every {config.full_attention_interval}th) with gated softmax attention"),
            ("hidden size", config.hidden_size),
            ("full attention", f"{config.num_heads} heads, {config.num_kv_heads} key-value heads, head size "
                               f"{config.head_dim}, rotary on {config.rotary_dim} of it, base {config.rope_theta:.0f}"),
            ("linear attention", f"{config.num_key_heads} key heads, {config.num_value_heads} value heads, head size "
                                 f"{config.linear_head_dim}, convolution over {config.conv_kernel} tokens"),
            ("routed experts", f"{config.num_experts} a layer, {config.num_experts_used} per token, "
                               f"{config.hidden_size} x {config.expert_size}"),
            ("shared expert", f"1 a layer, {config.hidden_size} x {config.shared_expert_size}, with its own gate"),
            ("vocabulary", f"{config.vocab_size} byte-level BPE tokens of its own, `tokenizer.ggml.pre` = `qwen35`, "
                           "output matrix tied to the embedding"),
            ("context", f"{config.context_length} tokens, the length it was trained at"),
            ("storage", "BF16; norms, routers, convolutions and other small tensors F32"),
        ],
    )  # fmt: skip


def _active_parameters(config: ModelConfig, parameters: int) -> int:
    idle = config.num_experts - config.num_experts_used
    return parameters - config.num_layers * idle * 3 * config.hidden_size * config.expert_size


def _expert_use(share: list[list[float]], ablation: dict[str, Any]) -> str:
    rows: list[tuple[object, ...]] = []
    for layer, (used, increase) in enumerate(zip(share, ablation["increase"], strict=True)):
        rows.append((layer, f"{min(used):.3f}", f"{max(used):.3f}", f"{min(increase):.4f}", f"{max(increase):.4f}"))
    return _table(("layer", "least share", "largest share", "least increase", "largest increase"), rows)


def _wrapped_keys(keys: list[str]) -> str:
    return textwrap.fill(", ".join(f"`{key}`" for key in keys), 100, break_long_words=False, break_on_hyphens=False)


def _continuation(training: Path | None) -> str:
    if training is None:
        return ""
    facts = json.loads(training.read_text(encoding="utf-8"))
    heldout = facts["measurements"]["heldout"]
    losses = ", ".join(f"{name} {row['nats_per_token']:.3f}" for name, row in heldout.items())
    return (
        f" Another {facts['tokens']:,} tokens\nfrom there (peak learning rate {facts['options']['learning_rate']}) "
        f"were discarded: they overfit, with held-out losses\nof {losses} nats per token. The held-out text "
        "thus took part in choosing where to stop."
    )


def write_card(
    target: Path,
    gguf_file: Path,
    sources: Path,
    packed: Path,
    weights: Path,
    training: Path,
    verification: Path,
    comparison: Path,
    continued: Path | None = None,
) -> None:
    """Write the card; every number in it comes from one of the given files."""
    facts = json.loads(training.read_text(encoding="utf-8"))
    proof = json.loads(verification.read_text(encoding="utf-8"))
    equality = json.loads(comparison.read_text(encoding="utf-8"))
    counts = json.loads((packed / "pack.json").read_text(encoding="utf-8"))
    config, parameters = load_weights(weights)
    measured, options = facts["measurements"], facts["options"]
    ablation, share = measured["ablation"], measured["expert_share"]
    cells = [
        (value, error, layer, expert)
        for layer, (row, errors) in enumerate(zip(ablation["increase"], ablation["standard_error"], strict=True))
        for expert, (value, error) in enumerate(zip(row, errors, strict=True))
    ]
    least, most = min(cells), max(cells)
    weakest = min(value / error for value, error, _, _ in cells)
    epochs = facts["tokens"] / facts["corpus_tokens"]
    heldout = _table(
        ("domain", "training tokens", "held-out tokens", "nats per token", "bits per byte"),
        [
            (name, f"{counts[name]['train']['tokens']:,}", f"{row['tokens']:,}",
             f"{row['nats_per_token']:.3f} ± {row['standard_error']:.3f}", f"{row['bits_per_byte']:.3f}")
            for name, row in measured["heldout"].items()
        ],
    )  # fmt: skip
    kurtoses = _table(
        ("weights", "tensors", "lowest", "median", "highest"),
        [
            (name, row["tensors"], f"{row['min']:.2f}", f"{row['median']:.2f}", f"{row['max']:.2f}")
            for name, row in kurtosis_by_group(parameters).items()
        ],
    )
    export = _table(
        ("llama.cpp on", "tokens", "largest logit difference", "mean KLD", "largest KLD", "same top token"),
        [
            (label, row["tokens"], f"{row['max_abs_difference']:.2g}", f"{row['mean_kld']:.2g}",
             f"{row['max_kld']:.2g}", f"{row['top1_agreement']:.2%}")
            for label, row in (("the same values stored in F32", proof["same_values_in_f32"]),
                               ("the file itself (BF16)", proof["bf16_file"]))
        ],
    )  # fmt: skip
    tokenization = proof["tokenization"]
    samples = "\n\n".join(f"```text\n{row['prompt']}⟶{row['text']}\n```" for row in proof["samples"])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        f"""# The embedded model: {MODEL_NAME}

`apex-tiny-moe.gguf` ships inside the package. It is a small but genuinely trained hybrid
mixture-of-experts language model, there so that everything APEX does (plan, calibrate, quantize,
evaluate, compare, serve) can be tried and tested without a download, on a model whose experts,
routers and activations come from training and not from a random generator.

This file is written by `tools/train_embedded_model.py card`; its numbers are measurements.

## Architecture

{_architecture(config, facts["parameters"], _active_parameters(config, facts["parameters"]))}

The length of every quantizable matrix row is a multiple of 256, so every llama.cpp type applies to it. There are six
experts because llama.cpp's mixes treat models of exactly eight specially. The vocabulary is at
least 40 times as large as the hidden size, as in large models.

File: {gguf_file.stat().st_size:,} bytes, SHA-256 `{file_sha256(gguf_file)}`.

## Data

English prose, documentation, code and dialogue under free licences, {facts["corpus_tokens"]:,}
training tokens in this vocabulary. One percent of the documents, chosen by a hash of their text,
are held out of the training of both the vocabulary and the model. Equal documents are on the
same side; different parts of one book or program can be on both. Every second dialogue transcript is
written in ChatML, the rest as plain text.

{_sources(sources)}

The weights are offered under the MIT licence. The texts keep their own licences; sources under
CC-BY are named above for attribution.

## Training

{facts["tokens"]:,} tokens ({epochs:.1f} epochs) in {facts["steps"]:,} steps of
{options["batch"]} x {options["sequence"]} tokens, in {facts["seconds"]:.0f} s on one {facts["hardware"]}
({facts["tokens_per_second"]:,.0f} tokens/s, BF16 products, float32 master weights). AdamW, peak
learning rate {options["learning_rate"]}, cosine to {options["final_rate"]:.0%} of it after
{options["warmup"]} steps of warm-up, weight decay {options["weight_decay"]}, load-balancing loss
{options["balance"]}, seed {options["seed"]}. The final weights are rounded to BF16.{_continuation(continued)}

## Held-out loss

Measured on the BF16 weights in windows of {measured["sequence"]} tokens, with standard errors over windows.

{heldout}

## Experts

Share of the routed tokens of each layer's least and most used expert over all held-out text (even
use would be {1 / config.num_experts:.3f}), and the increase of the held-out loss in nats per token when the router may
not choose one expert of the layer, for the least and the most important one ({ablation["tokens"]:,} tokens in
equal parts from all domains, loss {ablation["base_loss"]:.3f} with all experts).

{_expert_use(share, ablation)}

Over all {len(cells)} experts the increase is {least[0]:.4f} ± {least[1]:.4f} (layer {least[2]}, expert {least[3]}) to
{most[0]:.4f} ± {most[1]:.4f} (layer {most[2]}, expert {most[3]}); the least certain one is {weakest:.1f} standard
errors above zero. Taking any one expert away makes the model measurably worse.

## Weights

Kurtosis of the weight tensors (a normal distribution has 3); the stacked experts of a layer count as one tensor.

{kurtoses}

## The export

PyTorch in float32 on the trained weights against llama.cpp on held-out text of all domains:

{export}

Of the {equality["tensors"]} tensors {len(equality["differing_tensors"])} differ in name, type, shape or bytes from
those that llama.cpp's own converter makes of the same checkpoint; the keys that differ are
{_wrapped_keys(equality["differing_keys"])}.

With BF16 weights llama.cpp also rounds activations to BF16, which now and then tips a router's
choice between two nearly equal experts; in F32 only the order of summation differs. Tokenizing
{tokenization["texts"]} texts ({tokenization["tokens"]:,} tokens: held-out documents, and texts full of
whitespace, digits, scripts and control characters) with the `tokenizers` library and with
llama.cpp gave different ids for {tokenization["differing_texts"]} of them.

## Samples

llama.cpp, temperature 0.7, top-k 40; the arrow separates prompt and continuation.

{samples}

## Making it again

```bash
python tools/train_embedded_model.py --corpus CORPUS --work WORK tokenizer
python tools/train_embedded_model.py --corpus CORPUS --work WORK pack
python tools/train_embedded_model.py --work WORK train --seconds {options["seconds"]:.0f} --warmup {options["warmup"]}
python tools/train_embedded_model.py --work WORK export src/apex_quant/data/apex-tiny-moe.gguf
python tools/train_embedded_model.py --corpus CORPUS --work WORK verify src/apex_quant/data/apex-tiny-moe.gguf
python tools/train_embedded_model.py --work WORK checkpoint CHECKPOINT
python tools/train_embedded_model.py --work WORK compare src/apex_quant/data/apex-tiny-moe.gguf CONVERTED
python tools/train_embedded_model.py --corpus CORPUS --work WORK card \\
    src/apex_quant/data/apex-tiny-moe.gguf docs/embedded-model.md
```

`compress`, `train --split` and `join` are for training on a machine that lacks `zstandard` or
limits the size of files. `checkpoint` writes the weights as a transformers checkpoint, and `compare` holds the
GGUF file against what llama.cpp's `convert_hf_to_gguf.py --outtype bf16` made of it; the
converter knows pre-tokenizers by a hash of the vocabulary, so it must be told that this one is `qwen35`.

The learning-rate schedule of this run followed the clock, so a repetition gives a model like
this one but not the same bits; `--steps {facts["steps"]}` instead fixes the schedule. The same weights and
vocabulary always give the same GGUF file.

## What it is not

It is not an assistant and not a source of facts: it writes plausible-looking sentences and code
that are mostly wrong. It knows English and a few programming languages and was never trained to
be helpful or harmless. Findings about quantization on a model of this size need not carry over to
large ones; it shows that a method works as built, not how much it gains on your model.
""",
        encoding="utf-8",
    )
