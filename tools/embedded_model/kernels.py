"""Differentiable operators the model needs and PyTorch does not bring.

The chunked gated delta rule inverts one small triangular matrix per head and chunk and then
carries a state from chunk to chunk; both are custom operators, so that ``torch.compile`` treats
them as one node each. On a GPU the inverse uses a Triton kernel if it is correct and faster
there than the version made of batched matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installations
    triton = None

CHUNK = 64

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _inverse_by_rows(lower, out, size: tl.constexpr):  # type: ignore[no-untyped-def]
        """Forward substitution of the identity, one matrix per program, row after row."""
        program = tl.program_id(0).to(tl.int64)
        rows = tl.arange(0, size)
        cols = tl.arange(0, size)
        inverse = (rows[:, None] == cols[None, :]).to(tl.float32)
        base = lower + program * size * size
        for i in range(1, size):
            line = tl.load(base + i * size + rows)
            line = tl.where(rows < i, line, 0.0)
            step = tl.sum(line[:, None] * inverse, axis=0)
            inverse = tl.where(rows[:, None] == i, inverse - step[None, :], inverse)
        target = out + program * size * size + rows[:, None] * size + cols[None, :]
        tl.store(target, inverse.to(out.dtype.element_ty))

    @triton.jit  # type: ignore[untyped-decorator]
    def _inverse_by_columns(lower, out, size: tl.constexpr):  # type: ignore[no-untyped-def]
        """The same on the transposed matrix, whose sums stay inside one warp."""
        program = tl.program_id(0).to(tl.int64)
        rows = tl.arange(0, size)
        cols = tl.arange(0, size)
        inverse = (rows[:, None] == cols[None, :]).to(tl.float32)
        base = lower + program * size * size
        for i in range(1, size):
            line = tl.load(base + i * size + cols)
            line = tl.where(cols < i, line, 0.0)
            step = tl.sum(inverse * line[None, :], axis=1)
            inverse = tl.where(cols[None, :] == i, inverse - step[:, None], inverse)
        target = out + program * size * size + cols[None, :] * size + rows[:, None]
        tl.store(target, inverse.to(out.dtype.element_ty))


_inverse_kernel: tuple[Any, int] | None = None


def inverse_reference(lower: Tensor) -> Tensor:
    """``(I + lower)^-1`` in float32 by block doubling, for strictly lower triangular input."""
    shape = lower.shape
    size, block = shape[-1], 16
    lower = lower.reshape(-1, size, size).float()
    count, blocks = lower.shape[0], size // block
    diagonal = torch.stack(
        [lower[:, i * block : (i + 1) * block, i * block : (i + 1) * block] for i in range(blocks)], 1
    ).reshape(-1, block, block)
    inverse = torch.eye(block, device=lower.device, dtype=lower.dtype) - diagonal
    power = torch.bmm(diagonal, diagonal)
    exponent = 2
    while True:
        inverse = torch.baddbmm(inverse, inverse, power)
        exponent *= 2
        if exponent >= block:
            break
        power = torch.bmm(power, power)
    inverse = inverse.view(count, blocks, block, block)
    result = lower.new_zeros(count, size, size)
    for i in range(blocks):
        result[:, i * block : (i + 1) * block, i * block : (i + 1) * block] = inverse[:, i]
    width = block
    while width < size:
        for start in range(0, size, 2 * width):
            middle, end = start + width, start + 2 * width
            upper_left = result[:, start:middle, start:middle].contiguous()
            lower_right = result[:, middle:end, middle:end].contiguous()
            corner = lower[:, middle:end, start:middle].contiguous()
            result[:, middle:end, start:middle] = -torch.bmm(lower_right, torch.bmm(corner, upper_left))
        width *= 2
    return result.view(shape)


def choose_inverse_kernel(dtype: torch.dtype) -> str:
    """Time the Triton kernels on the current GPU and use the fastest correct one, if any."""
    global _inverse_kernel
    if triton is None or not torch.cuda.is_available():
        return "batched matrix products"
    from triton.testing import do_bench

    lower = torch.randn(8192, CHUNK, CHUNK, device="cuda").tril(-1) * 0.15
    expected = inverse_reference(lower)
    best = do_bench(lambda: inverse_reference(lower).to(dtype), warmup=5, rep=25)
    name = f"batched matrix products ({best:.3f} ms)"
    for kernel in (_inverse_by_rows, _inverse_by_columns):
        for warps in (1, 2, 4, 8):
            out = torch.empty(lower.shape, device="cuda", dtype=dtype)

            def launch(kernel: Any = kernel, warps: int = warps, out: Tensor = out) -> None:
                kernel[(lower.shape[0],)](lower, out, CHUNK, num_warps=warps)

            launch()
            error = float((out.float() - expected).norm() / expected.norm())
            time = do_bench(launch, warmup=5, rep=25)
            if error < 0.01 and time < best:
                best, _inverse_kernel = time, (kernel, warps)
                name = f"{kernel.fn.__name__} with {warps} warps ({time:.3f} ms, error {error:.1e})"
    return name


@torch.library.custom_op("apex_embedded::unit_lower_inverse", mutates_args=())  # type: ignore[untyped-decorator]
def unit_lower_inverse(lower: Tensor, dtype: torch.dtype) -> Tensor:
    """``(I + lower)^-1`` for strictly lower triangular matrices, computed in float32."""
    if _inverse_kernel is not None and lower.is_cuda:
        kernel, warps = _inverse_kernel
        lower = lower.contiguous()
        out = torch.empty(lower.shape, device=lower.device, dtype=dtype)
        size = lower.shape[-1]
        kernel[(lower.numel() // (size * size),)](lower, out, size, num_warps=warps)
        return out
    return inverse_reference(lower).to(dtype)


@unit_lower_inverse.register_fake  # type: ignore[untyped-decorator]
def _(lower: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(lower.shape, device=lower.device, dtype=dtype)


def _inverse_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _inverse_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (inverse,) = ctx.saved_tensors
    transposed = inverse.transpose(-1, -2)
    return -(transposed @ gradient.to(inverse.dtype) @ transposed).float().tril(-1), None


unit_lower_inverse.register_autograd(_inverse_backward, setup_context=_inverse_setup)


@torch.library.custom_op("apex_embedded::carry_state", mutates_args=())  # type: ignore[untyped-decorator]
def carry_state(decay: Tensor, update: Tensor, dtype: torch.dtype) -> Tensor:
    """The state before each chunk: ``S[0] = 0``, ``S[n+1] = decay[n] @ S[n] + update[n]``.

    Args:
        decay: [chunks, heads, key, key] in float32.
        update: [chunks, heads, key, value] in float32.
        dtype: of the products in the backward pass.
    """
    state = torch.empty_like(update)
    state[0].zero_()
    if update.shape[0] > 1:
        state[1].copy_(update[0])
    for n in range(1, update.shape[0] - 1):
        torch.baddbmm(update[n], decay[n], state[n], out=state[n + 1])
    return state


@carry_state.register_fake  # type: ignore[untyped-decorator]
def _(decay: Tensor, update: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(update)


@torch.library.custom_op("apex_embedded::carry_state_backward", mutates_args=())  # type: ignore[untyped-decorator]
def carry_state_backward(decay: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of the updates: ``D[n] = G[n+1] + decay[n+1]^T @ D[n+1]``, the last one zero."""
    result = torch.empty_like(gradient)
    last = decay.shape[0] - 1
    result[last].zero_()
    if last > 0:
        result[last - 1].copy_(gradient[last])
    for n in range(last - 2, -1, -1):
        torch.baddbmm(gradient[n + 1], decay[n + 1].transpose(1, 2), result[n + 1], out=result[n])
    return result


@carry_state_backward.register_fake  # type: ignore[untyped-decorator]
def _(decay: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _carry_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)
    ctx.dtype = inputs[2]


def _carry_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    decay, state = ctx.saved_tensors
    updates = carry_state_backward(decay, gradient.contiguous())
    decays = (updates.to(ctx.dtype) @ state.to(ctx.dtype).transpose(-1, -2)).float()
    return decays, updates, None


carry_state.register_autograd(_carry_backward, setup_context=_carry_setup)


class GatherForExperts(torch.autograd.Function):  # type: ignore[misc]
    """Rows repeated once per chosen expert and sorted by expert."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, used: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.used, ctx.count = used, rows.shape[0]
        return rows[order // used]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        rows = gradient[inverse].view(ctx.count, ctx.used, gradient.shape[-1]).sum(1)
        return rows, None, None, None


class ScatterFromExperts(torch.autograd.Function):  # type: ignore[misc]
    """The inverse permutation of :class:`GatherForExperts`, without the sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[inverse]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return gradient[order], None, None


def expert_matmul(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows grouped by expert times each expert's weights.

    Args:
        rows: [rows, in], the first ``ends[0]`` of them for expert 0 and so on.
        weights: [experts, out, in].
        ends: cumulative row counts.
    """
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return torch._grouped_mm(rows, weights.transpose(1, 2), offs=ends)
    borders = [0, *ends.tolist()]
    return torch.cat(
        [
            torch.nn.functional.linear(rows[start:end], weights[expert])
            for expert, (start, end) in enumerate(pairwise(borders))
        ]
    )


def cross_entropy_chunk(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scaled summed loss of one chunk and its gradient with respect to the logits."""
    logits32 = logits.float()
    normalizer = torch.logsumexp(logits32, -1, keepdim=True)
    loss = (normalizer[:, 0] - logits32.gather(1, targets[:, None])[:, 0]).sum() * scale
    hit = torch.arange(logits.shape[1], device=logits.device)[None] == targets[:, None]
    return loss, (((logits32 - normalizer).exp() - hit.float()) * scale).to(logits.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """Mean loss of a tied output matrix; the logits exist for one chunk of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        embedding: Tensor,
        targets: Tensor,
        chunk: int,
        chunk_function: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]],
        need_gradient: bool,
    ) -> Tensor:
        count = hidden.shape[0]
        matrix = embedding.to(hidden.dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden) if need_gradient else None
        matrix_gradient = torch.zeros_like(embedding, dtype=torch.float32) if need_gradient else None
        for start in range(0, count, chunk):
            rows = hidden[start : start + chunk]
            loss, gradient = chunk_function(rows @ matrix.t(), targets[start : start + chunk], 1.0 / count)
            total = total + loss
            if hidden_gradient is not None and matrix_gradient is not None:
                hidden_gradient[start : start + chunk] = gradient @ matrix
                matrix_gradient += gradient.t() @ rows
        if hidden_gradient is not None and matrix_gradient is not None:
            ctx.save_for_backward(hidden_gradient, matrix_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden_gradient, matrix_gradient = ctx.saved_tensors
        return hidden_gradient * gradient, matrix_gradient * gradient, None, None, None, None
