"""Training: batches from the packed corpus, AdamW, a cosine schedule bounded by steps or by time."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from .architecture import Model, initial_parameters
from .checkpoint import file_sha256, save_weights
from .config import DOMAINS, ModelConfig
from .corpus import read_stream, token_byte_lengths
from .kernels import choose_inverse_kernel
from .measure import heldout_losses, measure_all


@dataclass(frozen=True)
class TrainingOptions:
    """Everything that shapes one training run.

    ``seconds`` bounds the run by the clock, counted from its start with compilation; the learning
    rate follows whichever of ``steps`` and ``seconds`` is further along. ``heldout_windows`` bounds
    the final measurement to so many windows of each domain.
    """

    seconds: float | None = None
    steps: int | None = None
    batch: int = 32
    sequence: int = 2048
    learning_rate: float = 3e-3
    final_rate: float = 0.02
    warmup: int = 200
    weight_decay: float = 0.1
    balance: float = 0.01
    clip: float = 1.0
    seed: int = 1234
    device: str = "cuda"
    compiled: bool = True
    heldout_windows: int | None = None


class Batches:
    """Windows of the training streams in a seeded random order, epoch after epoch.

    Every epoch cuts all streams anew at a random offset, so windows differ between epochs.
    """

    def __init__(self, packed: Path, sequence: int, seed: int, device: str) -> None:
        streams = [read_stream(packed, domain, "train") for domain in DOMAINS]
        self.total_tokens = int(sum(map(len, streams)))
        self._lengths = [len(stream) for stream in streams]
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)[:-1]])
        self._tokens = torch.from_numpy(np.concatenate(streams).view(np.int16)).to(device)
        self._span = torch.arange(sequence + 1, device=device)
        self._sequence, self._device = sequence, device
        self._random = np.random.default_rng(seed)
        self._queue = np.zeros(0, dtype=np.int64)

    def _epoch(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        windows = []
        for start, length in zip(self._starts, self._lengths, strict=True):
            offset = int(self._random.integers(0, min(self._sequence, max(1, length - self._sequence - 1))))
            count = (length - 1 - offset) // self._sequence
            windows.append(start + offset + np.arange(count) * self._sequence)
        order: np.ndarray[Any, np.dtype[np.int64]] = self._random.permutation(np.concatenate(windows))
        return order

    def next(self, count: int) -> tuple[Tensor, Tensor]:
        """The next ``count`` windows as inputs and targets."""
        while len(self._queue) < count:
            self._queue = np.concatenate([self._queue, self._epoch()])
        chosen, self._queue = self._queue[:count], self._queue[count:]
        index = torch.from_numpy(chosen).to(self._device)[:, None] + self._span
        tokens = self._tokens[index].to(torch.int64) & 0xFFFF
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _optimizer(parameters: dict[str, nn.Parameter], options: TrainingOptions) -> torch.optim.AdamW:
    matrices = [p for name, p in parameters.items() if p.ndim >= 2 and "conv1d" not in name]
    others = [p for name, p in parameters.items() if p.ndim < 2 or "conv1d" in name]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), eps=1e-9, fused=True)


def train(
    config: ModelConfig, options: TrainingOptions, packed: Path, tokenizer: Tokenizer, out: Path,
    state_file: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train, write ``weights.safetensors``, ``log.jsonl`` and ``training.json``, and measure.

    Args:
        config: shape of the model.
        options: the run.
        packed: folder of packed streams.
        tokenizer: for bytes per token.
        out: folder for the results.
        state_file: training state to continue from if it exists and to write at the end.

    Returns:
        The facts of the run and the measurements, as ``training.json`` holds them.
    """
    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    on_gpu = options.device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    byte_lengths = token_byte_lengths(tokenizer)
    parameters = initial_parameters(config, options.device, options.seed)
    optimizer = _optimizer(parameters, options)
    seen_before, runs_before = 0, 0
    if state_file is not None and state_file.is_file():
        state = torch.load(state_file, map_location=options.device)
        for name, parameter in parameters.items():
            parameter.data.copy_(state["parameters"][name])
        optimizer.load_state_dict(state["optimizer"])
        seen_before, runs_before = state["tokens"], state["runs"]
    batches = Batches(packed, options.sequence, options.seed + runs_before, options.device)
    kernel = choose_inverse_kernel(dtype) if on_gpu else "batched matrix products"
    model = Model(config, parameters, dtype, compiled=options.compiled)
    log = (out / "log.jsonl").open("a")

    def note(**facts: Any) -> None:
        line = json.dumps({"seconds": round(time.monotonic() - begin, 1), **facts})
        log.write(line + "\n")
        log.flush()
        print(line, flush=True)

    note(parameters=sum(p.numel() for p in parameters.values()), corpus_tokens=batches.total_tokens,
         inverse=kernel, seen_before=seen_before)  # fmt: skip
    ids, targets = batches.next(options.batch)
    model.loss(ids, targets)[0].backward()  # compiles, before the clock of the schedule starts
    optimizer.zero_grad(set_to_none=True)
    note(compiled=True, peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 1) if on_gpu else None)

    started = time.monotonic()
    step, progress = 0, 0.0
    checks = [0.25, 0.5, 0.75]
    window_loss = torch.zeros((), device=options.device)
    window_start, window_steps = started, 0
    while True:
        now = time.monotonic()
        if options.seconds is not None:
            progress = max(progress, (now - started) / max(1e-3, options.seconds - (started - begin)))
        if options.steps is not None:
            progress = max(progress, step / options.steps)
        if progress >= 1:
            break
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        rate = options.learning_rate * (options.final_rate + (1 - options.final_rate) * cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / options.warmup)
        ids, targets = batches.next(options.batch)
        loss, result = model.loss(ids, targets)
        (loss + options.balance * result.balance.mean()).backward()
        norm = nn.utils.clip_grad_norm_(parameters.values(), options.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        window_loss += loss.detach()
        step += 1
        window_steps += 1
        if step % 100 == 0 or step in (1, 10):
            mean = float(window_loss) / window_steps
            now = time.monotonic()
            speed = window_steps * options.batch * options.sequence / (now - window_start)
            note(step=step, loss=round(mean, 4), balance=round(float(result.balance.detach().mean()), 4),
                 gradient=round(float(norm), 3), rate=optimizer.param_groups[0]["lr"], progress=round(progress, 4),
                 tokens_per_second=round(speed))  # fmt: skip
            if not math.isfinite(mean):
                raise RuntimeError(f"the loss is not finite at step {step}")
            window_loss.zero_()
            window_start, window_steps = now, 0
        if checks and progress > checks[0]:
            checks.pop(0)
            report, _ = heldout_losses(model, packed, byte_lengths, options.sequence, options.batch,
                                       options.device, limit=options.batch)  # fmt: skip
            note(step=step, heldout={name: round(value["nats_per_token"], 4) for name, value in report.items()})
            window_start = time.monotonic()
            window_loss.zero_()
            window_steps = 0

    if on_gpu:
        torch.cuda.synchronize()
    trained = time.monotonic() - started
    tokens = step * options.batch * options.sequence
    if state_file is not None:
        torch.save(
            {"parameters": {name: p.detach() for name, p in parameters.items()}, "optimizer": optimizer.state_dict(),
             "tokens": seen_before + tokens, "runs": runs_before + 1}, state_file,
        )  # fmt: skip
    weights = out / "weights.safetensors"
    save_weights(weights, parameters, config)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))
    facts: dict[str, Any] = {
        "config": config.to_dict(),
        "options": asdict(options),
        "parameters": sum(p.numel() for p in parameters.values()),
        "steps": step,
        "tokens": tokens,
        "tokens_before": seen_before,
        "corpus_tokens": batches.total_tokens,
        "seconds": trained,
        "tokens_per_second": tokens / trained,
        "hardware": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch.__version__,
        "weights_sha256": file_sha256(weights),
    }
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    note(trained=True, tokens=tokens, tokens_per_second=round(tokens / trained))
    facts["measurements"] = measure_all(
        model, packed, byte_lengths, options.sequence, options.batch, options.device, options.heldout_windows
    )
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    note(heldout={k: round(v["nats_per_token"], 4) for k, v in facts["measurements"]["heldout"].items()})
    return facts
