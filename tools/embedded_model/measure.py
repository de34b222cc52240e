"""What is measured on a trained model: held-out loss, expert use, ablations, weight kurtosis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .architecture import Model
from .config import DOMAINS
from .corpus import read_stream

KURTOSIS_GROUPS: dict[str, tuple[str, ...]] = {
    "routed experts": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    "shared expert": ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight",
                      "mlp.shared_expert.down_proj.weight"),
    "full attention": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
                       "self_attn.o_proj.weight"),
    "linear attention": ("linear_attn.in_proj_qkv.weight", "linear_attn.in_proj_z.weight",
                         "linear_attn.out_proj.weight"),
    "embedding": ("model.embed_tokens.weight",),
}  # fmt: skip


def heldout_windows(packed: Path, domain: str, sequence: int, limit: int | None = None) -> Tensor:
    """Consecutive windows of ``sequence + 1`` held-out tokens, each starting with the last one's end."""
    stream = read_stream(packed, domain, "heldout").astype(np.int64)
    count = (len(stream) - 1) // sequence
    count = count if limit is None else min(count, limit)
    return torch.from_numpy(np.stack([stream[i * sequence : (i + 1) * sequence + 1] for i in range(count)]))


def window_losses(
    model: Model, windows: Tensor, batch: int, device: str, expert_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss of every token [windows, tokens] in nats, and the tokens per layer and expert.

    The last batch is filled up with repeated windows, so that compiled code keeps its shape;
    what they add is dropped from the losses and is negligible in the expert counts.
    """
    count = len(windows)
    filled = -(-count // batch) * batch
    windows = windows[torch.arange(filled) % count]
    embedding = model.parameters["model.embed_tokens.weight"].detach().to(model.dtype)
    losses, used = [], torch.zeros(model.config.num_layers, model.config.num_experts, dtype=torch.float64)
    for start in range(0, filled, batch):
        chunk = windows[start : start + batch].to(device)
        result = model.forward(chunk[:, :-1].contiguous(), expert_bias)
        used += result.expert_tokens.detach().cpu().double()
        hidden = result.hidden.detach()
        for row in range(batch):
            logits = F.linear(hidden[row], embedding).float()
            losses.append(F.cross_entropy(logits, chunk[row, 1:], reduction="none").cpu())
    return torch.stack(losses)[:count], used


def heldout_losses(
    model: Model, packed: Path, byte_lengths: npt.NDArray[np.int64], sequence: int, batch: int, device: str,
    limit: int | None = None,
) -> tuple[dict[str, dict[str, float]], list[list[float]]]:  # fmt: skip
    """Per domain the held-out loss, and over all domains the share of tokens of each expert."""
    report: dict[str, dict[str, float]] = {}
    used = torch.zeros(model.config.num_layers, model.config.num_experts, dtype=torch.float64)
    for domain in DOMAINS:
        windows = heldout_windows(packed, domain, sequence, limit)
        losses, counts = window_losses(model, windows, batch, device)
        used += counts
        values = losses.double().flatten()
        size = int(byte_lengths[windows[:, 1:].numpy()].sum())
        per_window = losses.double().mean(1)
        report[domain] = {
            "nats_per_token": float(values.mean()),
            "standard_error": float(per_window.std() / math.sqrt(len(per_window))),
            "bits_per_byte": float(values.sum()) / math.log(2) / size,
            "tokens": int(values.numel()),
            "bytes": size,
        }
    return report, (used / used.sum(1, keepdim=True)).tolist()


def ablation_increases(model: Model, packed: Path, sequence: int, batch: int, device: str) -> dict[str, Any]:
    """How much the held-out loss rises when the router may not choose one expert.

    Every expert of every layer is taken away alone, on one batch with equal parts of all
    domains; differences are paired by window, which gives their standard errors.
    """
    share = batch // len(DOMAINS)
    windows = torch.cat([heldout_windows(packed, domain, sequence, share) for domain in DOMAINS])
    base = window_losses(model, windows, batch, device)[0].double().mean(1)
    config = model.config
    increases, errors = [], []
    for layer in range(config.num_layers):
        row, row_errors = [], []
        for expert in range(config.num_experts):
            bias = torch.zeros(config.num_layers, config.num_experts, device=device)
            bias[layer, expert] = -math.inf
            without = window_losses(model, windows, batch, device, bias)[0].double().mean(1)
            difference = without - base
            row.append(float(difference.mean()))
            row_errors.append(float(difference.std() / math.sqrt(len(difference))))
        increases.append(row)
        errors.append(row_errors)
    return {
        "tokens": int(windows.shape[0] * sequence),
        "base_loss": float(base.mean()),
        "increase": increases,
        "standard_error": errors,
    }


def kurtosis(values: npt.NDArray[np.float32]) -> float:
    """Fourth standardized moment; 3 for a normal distribution."""
    centered = values.astype(np.float64).ravel()
    centered -= centered.mean()
    return float((centered**4).mean() / (centered**2).mean() ** 2)


def kurtosis_by_group(parameters: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Lowest, median and highest kurtosis of the weight tensors of each kind."""
    report = {}
    for group, suffixes in KURTOSIS_GROUPS.items():
        values = [kurtosis(t.float().numpy()) for name, t in parameters.items() if name.endswith(suffixes)]
        report[group] = {
            "tensors": len(values), "min": min(values), "median": float(np.median(values)), "max": max(values),
        }  # fmt: skip
    return report


def measure_all(
    model: Model, packed: Path, byte_lengths: npt.NDArray[np.int64], sequence: int, batch: int, device: str,
    limit: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Held-out losses, expert use and ablations as plain JSON values."""
    losses, use = heldout_losses(model, packed, byte_lengths, sequence, batch, device, limit)
    return {
        "heldout": losses,
        "expert_share": use,
        "ablation": ablation_increases(model, packed, sequence, batch, device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "sequence": sequence,
    }
