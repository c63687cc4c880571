"""Cross-entropy over a vocabulary that is split over the tensor axis; logits are never gathered."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function

from megatron.kernels.cross_entropy import local_maximum, local_sums, logits_gradient
from megatron.parallel.collectives import all_reduce
from megatron.parallel.mesh import Axis

# Labels with this value carry no loss: padding behind a short last window.
IGNORED = -1


class _VocabularyCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, tp: Axis) -> torch.Tensor:
        first = tp.rank * logits.shape[-1]
        valid = min(max(vocab_size - first, 0), logits.shape[-1])
        targets = labels - first
        maximum = all_reduce(local_maximum(logits, valid), tp, maximum=True)
        total, target_logit = all_reduce(torch.stack(local_sums(logits, valid, maximum, targets)), tp)
        log_total = total.log()
        ctx.save_for_backward(logits, targets, log_total + maximum, labels)
        ctx.valid = valid
        return (log_total - target_logit).masked_fill(labels == IGNORED, 0.0)

    @staticmethod
    def backward(ctx: Any, token_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, targets, log_sum_exp, labels = ctx.saved_tensors
        token_grad = token_grad.masked_fill(labels == IGNORED, 0.0)
        return logits_gradient(logits, ctx.valid, log_sum_exp, targets, token_grad), None, None, None


def vocabulary_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, tp: Axis) -> torch.Tensor:
    """Negative log-likelihood of each token.

    logits [s, b, padded vocabulary/tp] of this rank, labels [s, b] (global ids, or IGNORED) → [s, b] in
    max(float32, dtype), 0 at ignored labels. Columns from `vocab_size` on are padding: no probability, no gradient.
    """
    return _VocabularyCrossEntropy.apply(logits, labels, vocab_size, tp)
