"""The model: parameters and forward pass of transformers' ``Qwen3_5MoeForCausalLM`` (text).

Parameter names and meanings are those of transformers, so a saved checkpoint is a normal one.
The delta rule is computed in chunks of 64 tokens; a sequence must be a multiple of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .kernels import (
    CHUNK,
    ChunkedCrossEntropy,
    GatherForExperts,
    ScatterFromExperts,
    carry_state,
    cross_entropy_chunk,
    expert_matmul,
    unit_lower_inverse,
)

Parameters = Mapping[str, Tensor]

ATTENTION_WEIGHTS = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
)
LINEAR_ATTENTION_WEIGHTS = (
    "input_layernorm.weight",
    "linear_attn.in_proj_qkv.weight",
    "linear_attn.in_proj_z.weight",
    "linear_attn.in_proj_b.weight",
    "linear_attn.in_proj_a.weight",
    "linear_attn.conv1d.weight",
    "linear_attn.dt_bias",
    "linear_attn.A_log",
    "linear_attn.norm.weight",
    "linear_attn.out_proj.weight",
)
EXPERT_WEIGHTS = (
    "post_attention_layernorm.weight",
    "mlp.gate.weight",
    "mlp.experts.gate_up_proj",
    "mlp.experts.down_proj",
    "mlp.shared_expert.gate_proj.weight",
    "mlp.shared_expert.up_proj.weight",
    "mlp.shared_expert.down_proj.weight",
    "mlp.shared_expert_gate.weight",
)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter."""
    hidden, experts = config.hidden_size, config.num_experts
    mixed = 2 * config.key_width + config.value_width
    width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    full = dict(
        zip(
            ATTENTION_WEIGHTS,
            ((hidden,), (2 * width, hidden), (kv_width, hidden), (kv_width, hidden), (hidden, width),
             (config.head_dim,), (config.head_dim,)),
            strict=True,
        )
    )  # fmt: skip
    linear = dict(
        zip(
            LINEAR_ATTENTION_WEIGHTS,
            ((hidden,), (mixed, hidden), (config.value_width, hidden), (config.num_value_heads, hidden),
             (config.num_value_heads, hidden), (mixed, 1, config.conv_kernel), (config.num_value_heads,),
             (config.num_value_heads,), (config.linear_head_dim,), (hidden, config.value_width)),
            strict=True,
        )
    )  # fmt: skip
    shared = config.shared_expert_size
    mixture = dict(
        zip(
            EXPERT_WEIGHTS,
            ((hidden,), (experts, hidden), (experts, 2 * config.expert_size, hidden),
             (experts, hidden, config.expert_size), (shared, hidden), (shared, hidden), (hidden, shared),
             (1, hidden)),
            strict=True,
        )
    )  # fmt: skip
    for layer in range(config.num_layers):
        attention = full if config.is_full_attention(layer) else linear
        for name, shape in {**attention, **mixture}.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (hidden,)
    return shapes


def initial_parameters(config: ModelConfig, device: str, seed: int) -> dict[str, nn.Parameter]:
    """Freshly drawn parameters in float32; equal seeds give equal parameters."""
    generator = torch.Generator().manual_seed(seed)
    parameters: dict[str, nn.Parameter] = {}
    for name, shape in parameter_shapes(config).items():
        if name.endswith("A_log"):
            value = torch.log(torch.empty(shape).uniform_(1.0, 16.0, generator=generator))
        elif name.endswith("dt_bias"):
            low, high = math.log(1e-3), math.log(0.1)
            step = torch.exp(torch.rand(shape, generator=generator) * (high - low) + low)
            value = step + torch.log(-torch.expm1(-step))
        elif name.endswith("linear_attn.norm.weight"):
            value = torch.ones(shape)
        elif name.endswith(("norm.weight", "layernorm.weight")):
            value = torch.zeros(shape)
        elif "conv1d" in name:
            value = torch.empty(shape).uniform_(-0.5, 0.5, generator=generator)
        else:
            deviation = 0.03
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "down_proj")):
                deviation = 2 * 0.03 / math.sqrt(2 * config.num_layers)
            elif name.endswith(("embed_tokens.weight", "gate.weight")):
                deviation = 0.02
            value = torch.randn(shape, generator=generator) * deviation
        parameters[name] = nn.Parameter(value.to(device))
    return parameters


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """Root-mean-square norm whose stored weight is the difference to one."""
    x = x.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * (1.0 + weight)).to(dtype)


def _unit(x: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + epsilon)


def linear_attention(
    config: ModelConfig,
    dtype: torch.dtype,
    x: Tensor,
    norm_weight: Tensor,
    mixed_weight: Tensor,
    gate_weight: Tensor,
    beta_weight: Tensor,
    alpha_weight: Tensor,
    conv_weight: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    head_norm_weight: Tensor,
    out_weight: Tensor,
) -> Tensor:
    """One gated delta rule block added to its input [batch, tokens, hidden]."""
    batch, tokens, _ = x.shape
    chunks = tokens // CHUNK
    heads, dim = config.num_key_heads, config.linear_head_dim
    repeat = config.num_value_heads // heads
    h = rms_norm(x, norm_weight, config.rms_eps, dtype)
    mixed = F.linear(h, mixed_weight.to(dtype))
    gate = F.linear(h, gate_weight.to(dtype))
    beta = torch.sigmoid(F.linear(h, beta_weight.to(dtype)).float())
    alpha = F.linear(h, alpha_weight.to(dtype)).float()

    taps = config.conv_kernel
    padded = F.pad(mixed, (0, 0, taps - 1, 0))
    convolved = padded[:, 0:tokens] * conv_weight[:, 0, 0]
    for tap in range(1, taps):
        convolved = convolved + padded[:, tap : tap + tokens] * conv_weight[:, 0, tap]
    query, key, value = F.silu(convolved).split([config.key_width, config.key_width, config.value_width], -1)

    def by_chunk(t: Tensor) -> Tensor:  # -> batch, key heads, chunks, CHUNK, dim
        unit = _unit(t.float().view(batch, chunks, CHUNK, heads, dim), 1e-6)
        return unit.permute(0, 3, 1, 2, 4)

    query = (by_chunk(query) * dim**-0.5).to(dtype).contiguous()
    key = by_chunk(key).to(dtype).contiguous()
    value = value.view(batch, chunks, CHUNK, heads, repeat, dim).permute(0, 3, 4, 1, 2, 5)
    beta = beta.view(batch, chunks, CHUNK, heads, repeat).permute(0, 3, 4, 1, 2)
    log_decay = -a_log.float().exp() * F.softplus(alpha + dt_bias)
    total = log_decay.view(batch, chunks, CHUNK, heads, repeat).permute(0, 3, 4, 1, 2).cumsum(-1)

    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).tril()
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, float("-inf")).exp()
    key_key = (key @ key.transpose(-1, -2))[:, :, None].float()
    query_key = (query @ key.transpose(-1, -2))[:, :, None].float()
    inverse = unit_lower_inverse((key_key * decay * beta[..., None]).tril(-1), dtype)
    scores = (query_key * decay).to(dtype)
    from_start = total.exp()
    right = torch.cat(
        [
            (value.float() * beta[..., None]).to(dtype),
            (key[:, :, None].float() * (beta * from_start)[..., None]).to(dtype),
        ],
        -1,
    )
    values_and_keys = inverse @ right
    end = total[..., -1:]
    key_to_end = (key[:, :, None].float() * (end - total).exp()[..., None]).to(dtype)
    summary = (key_to_end.transpose(-1, -2) @ values_and_keys).float()
    identity = torch.eye(dim, device=x.device)

    def chunk_first(t: Tensor) -> Tensor:
        return t.permute(3, 0, 1, 2, 4, 5).reshape(chunks, -1, dim, dim).contiguous()

    state = carry_state(
        chunk_first(end.exp()[..., None] * identity - summary[..., dim:]), chunk_first(summary[..., :dim]), dtype
    )
    state = state.view(chunks, batch, heads, repeat, dim, dim).permute(1, 2, 3, 0, 4, 5).to(dtype).contiguous()
    new_values, new_keys = values_and_keys.split([dim, dim], -1)
    new_values = new_values - new_keys @ state
    out = (query[:, :, None].float() * from_start[..., None]).to(dtype) @ state + scores @ new_values
    out = out.permute(0, 3, 4, 1, 2, 5).reshape(batch, tokens, heads * repeat, dim).float()
    out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + config.rms_eps) * head_norm_weight
    out = (out * F.silu(gate.float().view(out.shape))).to(dtype).reshape(batch, tokens, config.value_width)
    return x + F.linear(out, out_weight.to(dtype)).float()


def full_attention(
    config: ModelConfig,
    dtype: torch.dtype,
    x: Tensor,
    cosine: Tensor,
    sine: Tensor,
    norm_weight: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    out_weight: Tensor,
    query_norm_weight: Tensor,
    key_norm_weight: Tensor,
) -> Tensor:
    """One gated softmax attention block added to its input [batch, tokens, hidden]."""
    batch, tokens, _ = x.shape
    heads, dim, rotary = config.num_heads, config.head_dim, config.rotary_dim
    h = rms_norm(x, norm_weight, config.rms_eps, dtype)
    query, gate = F.linear(h, query_weight.to(dtype)).view(batch, tokens, heads, 2 * dim).split([dim, dim], -1)
    key = F.linear(h, key_weight.to(dtype)).view(batch, tokens, config.num_kv_heads, dim)
    value = F.linear(h, value_weight.to(dtype)).view(batch, tokens, config.num_kv_heads, dim).transpose(1, 2)

    def rotate(t: Tensor) -> Tensor:
        turned, rest = t[..., :rotary].float(), t[..., rotary:]
        first, second = turned[..., : rotary // 2], turned[..., rotary // 2 :]
        turned = turned * cosine + torch.cat([-second, first], -1) * sine
        return torch.cat([turned.to(dtype), rest], -1)

    query = rotate(rms_norm(query, query_norm_weight, config.rms_eps, dtype).transpose(1, 2))
    key = rotate(rms_norm(key, key_norm_weight, config.rms_eps, dtype).transpose(1, 2))
    repeat = heads // config.num_kv_heads
    out = F.scaled_dot_product_attention(
        query, key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1), is_causal=True
    )
    out = out.transpose(1, 2).reshape(batch, tokens, heads * dim)
    out = out * torch.sigmoid(gate.reshape(batch, tokens, heads * dim).float()).to(dtype)
    return x + F.linear(out, out_weight.to(dtype)).float()


def mixture_of_experts(
    config: ModelConfig,
    dtype: torch.dtype,
    x: Tensor,
    expert_bias: Tensor,
    norm_weight: Tensor,
    router_weight: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    shared_gate_weight: Tensor,
    shared_up_weight: Tensor,
    shared_down_weight: Tensor,
    shared_router_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One mixture of experts added to its input; also the balance loss and the tokens per expert.

    ``expert_bias`` is added to the router's logits: zeros, or minus infinity to switch one off.
    """
    batch, tokens, hidden = x.shape
    experts, used = config.num_experts, config.num_experts_used
    rows = batch * tokens
    h = rms_norm(x, norm_weight, config.rms_eps, dtype).view(rows, hidden)
    shared = F.silu(F.linear(h, shared_gate_weight.to(dtype))) * F.linear(h, shared_up_weight.to(dtype))
    shared = F.linear(shared, shared_down_weight.to(dtype)) * torch.sigmoid(F.linear(h, shared_router_weight.to(dtype)))
    probabilities = (F.linear(h.float(), router_weight) + expert_bias).softmax(-1)
    weights, chosen = probabilities.topk(used, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    by_expert, order = torch.sort(chosen.reshape(-1).to(torch.int32), stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
    counts = (by_expert[:, None] == torch.arange(experts, device=x.device, dtype=torch.int32)).sum(0)
    ends = counts.cumsum(0).to(torch.int32)
    balance = experts * ((counts.float() / (rows * used)) * probabilities.mean(0)).sum()
    gathered = GatherForExperts.apply(h, order, inverse, used)
    gate, up = expert_matmul(gathered, gate_up_weight.to(dtype), ends).chunk(2, -1)
    out = expert_matmul(F.silu(gate) * up, down_weight.to(dtype), ends)
    out = ScatterFromExperts.apply(out, order, inverse).view(rows, used, hidden)
    out = (out.float() * weights[..., None]).sum(1) + shared.float()
    return x + out.view(batch, tokens, hidden), balance, counts


@dataclass(frozen=True)
class Forward:
    """What one pass gives: the normed hidden states, and per layer balance loss and expert use."""

    hidden: Tensor
    balance: Tensor
    expert_tokens: Tensor


class Model:
    """The forward pass over a dictionary of parameters.

    Args:
        config: the shape.
        parameters: float32 tensors by name.
        dtype: of the matrix products, bfloat16 on a GPU and float32 for comparisons.
        compiled: whether the blocks go through ``torch.compile``.
        loss_chunk: rows whose logits exist at a time.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: Parameters,
        dtype: torch.dtype,
        compiled: bool = False,
        loss_chunk: int = 16384,
    ) -> None:
        self.config, self.parameters, self.dtype, self.loss_chunk = config, parameters, dtype, loss_chunk

        def prepare(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=False) if compiled else function

        self._linear = prepare(lambda *tensors: linear_attention(config, dtype, *tensors))
        self._full = prepare(lambda *tensors: full_attention(config, dtype, *tensors))
        self._mixture = prepare(lambda *tensors: mixture_of_experts(config, dtype, *tensors))
        self._norm = prepare(lambda x, weight: rms_norm(x, weight, config.rms_eps, dtype))
        self._loss = prepare(cross_entropy_chunk)
        self._rotary: dict[int, tuple[Tensor, Tensor]] = {}

    def _rotary_tables(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if tokens not in self._rotary:
            dim = self.config.rotary_dim
            powers = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
            frequencies = 1.0 / self.config.rope_theta**powers
            angles = torch.arange(tokens, device=device, dtype=torch.float32)[:, None] * frequencies[None]
            angles = torch.cat([angles, angles], -1)
            self._rotary[tokens] = (angles.cos(), angles.sin())
        return self._rotary[tokens]

    def forward(self, ids: Tensor, expert_bias: Tensor | None = None) -> Forward:
        """Run token ids [batch, tokens]; ``expert_bias`` is [layers, experts]."""
        weights, config = self.parameters, self.config
        if expert_bias is None:
            expert_bias = torch.zeros(config.num_layers, config.num_experts, device=ids.device)
        x = F.embedding(ids, weights["model.embed_tokens.weight"]).float()
        cosine, sine = self._rotary_tables(ids.shape[1], ids.device)
        balances, counts = [], []
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}."
            if config.is_full_attention(layer):
                x = self._full(x, cosine, sine, *[weights[prefix + name] for name in ATTENTION_WEIGHTS])
            else:
                x = self._linear(x, *[weights[prefix + name] for name in LINEAR_ATTENTION_WEIGHTS])
            x, balance, count = self._mixture(
                x, expert_bias[layer], *[weights[prefix + name] for name in EXPERT_WEIGHTS]
            )
            balances.append(balance)
            counts.append(count)
        hidden = self._norm(x, weights["model.norm.weight"])
        return Forward(hidden, torch.stack(balances), torch.stack(counts))

    def loss(
        self, ids: Tensor, targets: Tensor, need_gradient: bool = True, expert_bias: Tensor | None = None
    ) -> tuple[Tensor, Forward]:
        """Mean next-token loss in nats, and the pass it came from."""
        result = self.forward(ids, expert_bias)
        rows = result.hidden.reshape(-1, self.config.hidden_size)
        embedding = self.parameters["model.embed_tokens.weight"]
        loss = ChunkedCrossEntropy.apply(
            rows, embedding, targets.reshape(-1), self.loss_chunk, self._loss, need_gradient
        )
        return loss, result

    def logits(self, ids: Tensor) -> Tensor:
        """All logits of one pass [batch, tokens, vocabulary]."""
        return F.linear(self.forward(ids).hidden, self.parameters["model.embed_tokens.weight"].to(self.dtype))
