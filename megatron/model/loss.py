"""The output product and the cross-entropy after it, over a vocabulary that is split over the tensor axis.

Logits are never gathered over the axis, and never exist for all tokens of a micro-batch: they are made, turned into
their gradient and used up a chunk of tokens at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Predictions:
    """Of each label [s, b]: its negative log-likelihood (0 where IGNORED), in max(float32, dtype), and whether it is
    the likeliest token (of equals, the one with the lowest id)."""

    losses: torch.Tensor
    correct: torch.Tensor


def head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    context: ParallelContext,
    loss_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of the negative log-likelihoods of labels [s, b] (global ids, or IGNORED), a scalar of max(float32, dtype);
    each times its weight, where `loss_weights` [s, b] are given.

    hidden [s, b, h] ([s/tp, b, h] under sequence parallelism); weight [padded vocabulary/tp, h], of which the rows from
    `vocab_size` on are padding: no probability, no gradient. The gradients are computed in the forward pass, while each
    chunk of logits is there. So where the weight has a gradient sink, the sum must be what backward starts from:
    another factor than 1 makes the gradient NaN.
    """
    return _HeadLoss.apply(hidden, weight, labels, vocab_size, context, loss_weights, torch.is_grad_enabled())


@torch.no_grad()
def head_predictions(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, vocab_size: int, context: ParallelContext
) -> Predictions:
    """What the model makes of each label, for metrics; shapes as for `head_loss`. Every tensor rank gets all."""
    tp = context.tp
    rows = (all_gather(hidden, tp) if context.sequence else hidden).flatten(0, 1)
    first, valid = _columns(weight, vocab_size, tp)
    flat, factor = labels.flatten(), operand(weight)
    losses, correct = [], []
    for chunk in _chunks(len(rows), factor):
        logits = operand(rows[chunk]) @ factor.t()
        losses.append(_losses(logits, flat[chunk], None, first, valid, tp)[0])
        correct.append(_likeliest(logits, first, valid, tp) == flat[chunk])
    return Predictions(torch.cat(losses).view_as(labels), torch.cat(correct).view_as(labels))


class _HeadLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        context: ParallelContext,
        loss_weights: torch.Tensor | None,
        differentiate: bool,
    ) -> torch.Tensor:
        tp = context.tp
        rows = (all_gather(hidden, tp) if context.sequence else hidden).flatten(0, 1)
        first, valid = _columns(weight, vocab_size, tp)
        labels = labels.flatten()
        loss_weights = None if loss_weights is None else loss_weights.flatten()
        factor = operand(weight)
        sink = sink_of(weight)
        grad_rows = torch.empty_like(rows) if differentiate else None
        returned = differentiate and weight.requires_grad and sink is None
        grad_weight = torch.zeros_like(factor) if returned else None
        losses, chunks = [], _chunks(len(rows), factor)
        memory = factor.new_empty((chunks[0].stop, factor.shape[0]))  # for the logits of each chunk in turn
        for chunk in chunks:
            part = operand(rows[chunk])
            logits = torch.mm(part, factor.t(), out=memory[: len(part)])
            some = None if loss_weights is None else loss_weights[chunk]
            chunk_losses, targets, log_sum_exp, carries = _losses(logits, labels[chunk], some, first, valid, tp)
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
        elif grad_weight is not None:
            grad_weight = grad_weight.mul_(upstream).to(ctx.weight_dtype)
        grad_rows = grad_rows.mul_(upstream).view(ctx.shape)
        grad_hidden = reduce_activations(grad_rows, ctx.context.tp, ctx.context.sequence)
        return grad_hidden, grad_weight, None, None, None, None, None


def _columns(weight: torch.Tensor, vocab_size: int, tp: Axis) -> tuple[int, int]:
    """(first token of this rank's share of the vocabulary, how many of its columns are no padding)."""
    first = tp.rank * weight.shape[0]
    return first, min(max(vocab_size - first, 0), weight.shape[0])


def _losses(
    logits: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor | None, first: int, valid: int, tp: Axis
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row: its loss, its target as an index into this rank's columns, log Σ exp over all ranks, and how much of
    its loss counts: all (1), nothing (0) or its weight."""
    targets = labels - first
    maximum, total, target_logit = local_statistics(logits, targets, valid).unbind()
    local_maximum = maximum.clone()
    maximum = all_reduce(maximum, tp, maximum=True)
    total, target_logit = all_reduce(torch.stack((total * (local_maximum - maximum).exp(), target_logit)), tp)
    log_sum_exp = total.log() + maximum
    carries = labels.ne(IGNORED).to(log_sum_exp.dtype)
    if loss_weights is not None:
        carries = carries * loss_weights
    return (log_sum_exp - target_logit) * carries, targets, log_sum_exp, carries


def _likeliest(logits: torch.Tensor, first: int, valid: int, tp: Axis) -> torch.Tensor:
    """i64[n]: of each row the token with the largest logit over all ranks; of equals the one with the lowest id."""
    if valid > 0:
        largest, token = logits[:, :valid].max(dim=-1)
        token = token + first
    else:  # nothing but padding: no token of this rank may win
        largest = logits.new_full((len(logits),), -torch.inf)
        token = torch.full_like(largest, torch.iinfo(torch.int64).max, dtype=torch.int64)
    largest_of_all = all_reduce(largest.clone(), tp, maximum=True)
    token = torch.where(largest == largest_of_all, token, torch.iinfo(torch.int64).max)
    return all_reduce(token.neg_(), tp, maximum=True).neg_()


def _chunks(rows: int, weight: torch.Tensor) -> list[slice]:
    """Runs of rows whose logits fit in the memory that is set aside for them."""
    row_bytes = weight.shape[0] * weight.element_size()
    chunk_bytes = _CHUNK_BYTES_ON_CPU if weight.device.type == "cpu" else _CHUNK_BYTES
    size = max(_FEWEST_ROWS, chunk_bytes // row_bytes)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
