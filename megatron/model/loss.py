"""The output product and the cross-entropy after it, over a vocabulary that is split over the tensor axis.

Logits are never gathered over the axis, and never exist for all tokens of a micro-batch: they are made, turned into
their gradient and used up a chunk of tokens at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron.kernels.cross_entropy import local_statistics, logits_gradient_
from megatron.kernels.products import operand
from megatron.parallel.collectives import all_gather, all_reduce, reduce_activations
from megatron.parallel.mesh import Axis, ParallelContext
from megatron.parallel.weight_gradient import sink_of

# Labels with this value carry no loss: padding behind a short last window.
IGNORED = -1

# Enough rows for products at full speed, little memory beside the activations of the layers.
_CHUNK_BYTES, _CHUNK_BYTES_ON_CPU = 2**28, 2**25
_FEWEST_ROWS = 64


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, vocab_size: int, context: ParallelContext
) -> torch.Tensor:
    """Sum of the negative log-likelihoods of labels [s, b] (global ids, or IGNORED), a scalar of max(float32, dtype).

    hidden [s, b, h] ([s/tp, b, h] under sequence parallelism); weight [padded vocabulary/tp, h], of which the rows from
    `vocab_size` on are padding: no probability, no gradient. The gradients are computed in the forward pass, while each
    chunk of logits is there. So where the weight has a gradient sink, the sum must be what backward starts from:
    another factor than 1 makes the gradient NaN.
    """
    return _HeadLoss.apply(hidden, weight, labels, vocab_size, context, torch.is_grad_enabled())


class _HeadLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        context: ParallelContext,
        differentiate: bool,
    ) -> torch.Tensor:
        tp = context.tp
        rows = (all_gather(hidden, tp) if context.sequence else hidden).flatten(0, 1)
        first = tp.rank * weight.shape[0]
        valid = min(max(vocab_size - first, 0), weight.shape[0])
        labels = labels.flatten()
        factor = operand(weight)
        sink = sink_of(weight)
        grad_rows = torch.empty_like(rows) if differentiate else None
        grad_weight = torch.zeros_like(factor) if differentiate and sink is None else None
        losses, chunks = [], _chunks(len(rows), factor)
        memory = factor.new_empty((chunks[0].stop, factor.shape[0]))  # for the logits of each chunk in turn
        for chunk in chunks:
            part = operand(rows[chunk])
            logits = torch.mm(part, factor.t(), out=memory[: len(part)])
            chunk_losses, targets, log_sum_exp, carries = _losses(logits, labels[chunk], first, valid, tp)
            losses.append(chunk_losses.sum())
            if grad_rows is None:
                continue
            gradient = logits_gradient_(logits, targets, log_sum_exp, carries, valid)
            grad_rows[chunk] = gradient @ factor
            if sink is not None:
                sink.accumulate_product(gradient, part)
            elif grad_weight is not None:
                torch.addmm(grad_weight, gradient.t(), part, out=grad_weight)
        ctx.context, ctx.sink, ctx.shape, ctx.weight_dtype = context, sink, (-1, *hidden.shape[1:]), weight.dtype
        ctx.gradients = grad_rows, grad_weight
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_rows, grad_weight = ctx.gradients
        ctx.gradients = None
        if ctx.sink is not None:
            upstream = torch.where(upstream == 1.0, upstream, torch.nan)
            ctx.sink.report()
        else:
            grad_weight = grad_weight.mul_(upstream).to(ctx.weight_dtype)
        grad_rows = grad_rows.mul_(upstream).view(ctx.shape)
        grad_hidden = reduce_activations(grad_rows, ctx.context.tp, ctx.context.sequence)
        return grad_hidden, grad_weight, None, None, None, None


def _losses(
    logits: torch.Tensor, labels: torch.Tensor, first: int, valid: int, tp: Axis
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row: its loss, its target as an index into this rank's columns, log Σ exp over all ranks, and whether it
    carries loss (1) or not (0)."""
    targets = labels - first
    maximum, total, target_logit = local_statistics(logits, targets, valid).unbind()
    local_maximum = maximum.clone()
    maximum = all_reduce(maximum, tp, maximum=True)
    total, target_logit = all_reduce(torch.stack((total * (local_maximum - maximum).exp(), target_logit)), tp)
    log_sum_exp = total.log() + maximum
    carries = labels.ne(IGNORED).to(log_sum_exp.dtype)
    return (log_sum_exp - target_logit) * carries, targets, log_sum_exp, carries


def _chunks(rows: int, weight: torch.Tensor) -> list[slice]:
    """Runs of rows whose logits fit in the memory that is set aside for them."""
    row_bytes = weight.shape[0] * weight.element_size()
    chunk_bytes = _CHUNK_BYTES_ON_CPU if weight.device.type == "cpu" else _CHUNK_BYTES
    size = max(_FEWEST_ROWS, chunk_bytes // row_bytes)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
