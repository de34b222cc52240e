#!/usr/bin/env python3
"""Build the embedded model, from a folder of text to a GGUF file.

Run the steps in this order; each writes plain files into the work folder::

    python tools/train_embedded_model.py --corpus CORPUS --work WORK tokenizer
    python tools/train_embedded_model.py --corpus CORPUS --work WORK pack
    python tools/train_embedded_model.py --work WORK train --seconds 540
    python tools/train_embedded_model.py --work WORK export src/apex_quant/data/apex-tiny-moe.gguf
    python tools/train_embedded_model.py --corpus CORPUS --work WORK verify \
        src/apex_quant/data/apex-tiny-moe.gguf
    python tools/train_embedded_model.py --corpus CORPUS --work WORK card \
        src/apex_quant/data/apex-tiny-moe.gguf docs/embedded-model.md

Needs ``torch``, ``tokenizers``, ``safetensors``, ``gguf`` and ``zstandard``; ``verify`` also
``llama-cpp-python``. ``docs/embedded-model.md`` describes the result.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CORPUS = ROOT.parent / "shared" / "corpus"
DEFAULT_WORK = Path("build/embedded-model")


def _tokenizer(arguments: argparse.Namespace) -> None:
    from tools.embedded_model.config import ModelConfig
    from tools.embedded_model.corpus import train_tokenizer

    arguments.work.mkdir(parents=True, exist_ok=True)
    train_tokenizer(arguments.corpus, ModelConfig().vocab_size).save(str(arguments.work / "tokenizer.json"))


def _compress(arguments: argparse.Namespace) -> None:
    from tools.embedded_model.config import DOMAINS
    from tools.embedded_model.corpus import corpus_file, recompress

    arguments.target.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        recompress(corpus_file(arguments.corpus, domain), arguments.target / f"{domain}.jsonl.xz")


def _pack(arguments: argparse.Namespace) -> None:
    from tools.embedded_model.corpus import pack

    tokenizer = arguments.work / "tokenizer.json"
    counts = pack(arguments.corpus, tokenizer, arguments.work / "packed", arguments.processes)
    print(json.dumps(counts))


def _train(arguments: argparse.Namespace) -> None:
    from tokenizers import Tokenizer

    from tools.embedded_model.checkpoint import split_file
    from tools.embedded_model.config import ModelConfig
    from tools.embedded_model.training import TrainingOptions, train

    if arguments.seconds is None and arguments.steps is None:
        raise SystemExit("error: give --seconds, --steps or both")
    options = TrainingOptions(
        seconds=arguments.seconds,
        steps=arguments.steps,
        batch=arguments.batch,
        sequence=arguments.sequence,
        learning_rate=arguments.learning_rate,
        warmup=arguments.warmup,
        balance=arguments.balance,
        seed=arguments.seed,
        device=arguments.device,
        compiled=not arguments.eager,
        heldout_windows=arguments.heldout_windows,
    )
    tokenizer = Tokenizer.from_file(str(arguments.work / "tokenizer.json"))
    config = ModelConfig(num_layers=arguments.layers) if arguments.layers else ModelConfig()
    out = arguments.out or arguments.work / "run"
    train(config, options, arguments.work / "packed", tokenizer, out, arguments.state)
    if arguments.split:
        weights = out / "weights.safetensors"
        split_file(weights, out)
        weights.unlink()


def _join(arguments: argparse.Namespace) -> None:
    from tools.embedded_model.checkpoint import join_files

    join_files(arguments.folder.glob("weights.safetensors.part*"), arguments.folder / "weights.safetensors")


def _export(arguments: argparse.Namespace) -> None:
    from tools.embedded_model.export import export_gguf

    size = export_gguf(arguments.weights or arguments.work / "run" / "weights.safetensors",
                       arguments.work / "tokenizer.json", arguments.target)  # fmt: skip
    print(f"{arguments.target}: {size} bytes")


def _verify(arguments: argparse.Namespace) -> None:
    from tools.embedded_model.verify import verify

    report = verify(arguments.gguf, arguments.weights or arguments.work / "run" / "weights.safetensors",
                    arguments.work / "tokenizer.json", arguments.corpus, arguments.work / "packed")  # fmt: skip
    (arguments.work / "verification.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(report, indent=1, ensure_ascii=False))


def _checkpoint(arguments: argparse.Namespace) -> None:
    from tools.embedded_model.export import write_transformers_checkpoint

    weights = arguments.weights or arguments.work / "run" / "weights.safetensors"
    write_transformers_checkpoint(weights, arguments.work / "tokenizer.json", arguments.folder)


def _compare(arguments: argparse.Namespace) -> None:
    from tools.embedded_model.export import compare_gguf

    report = compare_gguf(arguments.gguf, arguments.converted)
    (arguments.work / "comparison.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def _card(arguments: argparse.Namespace) -> None:
    from tools.embedded_model.card import write_card

    run = arguments.work / "run"
    write_card(
        target=arguments.target,
        gguf_file=arguments.gguf,
        sources=arguments.corpus / "SOURCES.tsv",
        packed=arguments.work / "packed",
        weights=run / "weights.safetensors",
        training=run / "training.json",
        verification=arguments.work / "verification.json",
        comparison=arguments.work / "comparison.json",
        continued=arguments.continued,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=DEFAULT_CORPUS,
                        help="folder with DOMAIN.jsonl.zst or .xz files and SOURCES.tsv")  # fmt: skip
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="folder for what the steps make")
    steps = parser.add_subparsers(dest="step", required=True)

    step = steps.add_parser("tokenizer", help="train the vocabulary")
    step.set_defaults(run=_tokenizer)
    step = steps.add_parser("compress", help="copy the corpus to xz, for machines without zstandard")
    step.add_argument("target", type=Path)
    step.set_defaults(run=_compress)
    step = steps.add_parser("pack", help="tokenize the corpus and hold one percent of it out")
    step.add_argument("--processes", type=int, default=2)
    step.set_defaults(run=_pack)

    step = steps.add_parser("train", help="train and measure")
    step.add_argument("--seconds", type=float, help="end the schedule this long after the start")
    step.add_argument("--steps", type=int, help="end the schedule after this many steps")
    step.add_argument("--batch", type=int, default=32, help="sequences per step")
    step.add_argument("--sequence", type=int, default=2048, help="tokens per sequence, a multiple of 64")
    step.add_argument("--learning-rate", type=float, default=3e-3)
    step.add_argument("--warmup", type=int, default=200, help="steps of linear warm-up")
    step.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    step.add_argument("--seed", type=int, default=1234)
    step.add_argument("--device", default="cuda")
    step.add_argument("--eager", action="store_true", help="do without torch.compile")
    step.add_argument("--heldout-windows", type=int, help="measure on so many windows of each domain only")
    step.add_argument("--layers", type=int, help="another depth, for trying the code out")
    step.add_argument("--out", type=Path, help="folder of results (default: WORK/run)")
    step.add_argument("--state", type=Path, help="continue from this training state, and write it")
    step.add_argument("--split", action="store_true", help="leave the weights in parts of 16 MB")
    step.set_defaults(run=_train)

    step = steps.add_parser("join", help="put the parts of the weights together")
    step.add_argument("folder", type=Path)
    step.set_defaults(run=_join)
    step = steps.add_parser("export", help="write the GGUF file")
    step.add_argument("target", type=Path)
    step.add_argument("--weights", type=Path)
    step.set_defaults(run=_export)
    step = steps.add_parser("verify", help="compare the GGUF file in llama.cpp with the trained weights")
    step.add_argument("gguf", type=Path)
    step.add_argument("--weights", type=Path)
    step.set_defaults(run=_verify)
    step = steps.add_parser("checkpoint", help="write the weights as a transformers checkpoint")
    step.add_argument("folder", type=Path)
    step.add_argument("--weights", type=Path)
    step.set_defaults(run=_checkpoint)
    step = steps.add_parser("compare", help="compare the GGUF file with one that llama.cpp's converter made")
    step.add_argument("gguf", type=Path)
    step.add_argument("converted", type=Path)
    step.set_defaults(run=_compare)
    step = steps.add_parser("card", help="write the model card from the measurements")
    step.add_argument("gguf", type=Path)
    step.add_argument("target", type=Path)
    step.add_argument("--continued", type=Path, help="training.json of a continuation that was discarded")
    step.set_defaults(run=_card)
    return parser


def main() -> int:
    """Run one step."""
    sys.path.insert(0, str(ROOT))  # so that tools.embedded_model is found wherever this is run from
    arguments = _parser().parse_args()
    arguments.run(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
