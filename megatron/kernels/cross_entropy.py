"""The local parts of a vocabulary-parallel cross-entropy; the collectives between them are the caller's.

Logits are this rank's columns of the vocabulary, of which the first `valid` are real tokens and the rest padding that
gets no probability. A rank may hold padding alone.
"""

from __future__ import annotations

import torch

from megatron.kernels.numerics import statistics_dtype


def local_maximum(logits: torch.Tensor, valid: int) -> torch.Tensor:
    """Largest real logit of each token: [..., v] → [...]; minus infinity where there is none."""
    wide = statistics_dtype(logits.dtype)
    if valid == 0:
        return torch.full(logits.shape[:-1], -torch.inf, dtype=wide, device=logits.device)
    return logits[..., :valid].amax(dim=-1).to(wide)


def local_sums(
    logits: torch.Tensor, valid: int, maximum: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two parts to be summed over the ranks, each [...].

    Σ exp(logit − maximum) over the real columns, and the logit of the target less the maximum where the target (an
    index into these columns) lies here, else 0.
    """
    if valid == 0:
        return torch.zeros_like(maximum), torch.zeros_like(maximum)
    shifted = logits[..., :valid].to(maximum.dtype) - maximum.unsqueeze(-1)
    here = (targets >= 0) & (targets < valid)
    picked = shifted.gather(-1, targets.clamp(0, valid - 1).unsqueeze(-1)).squeeze(-1)
    return shifted.exp().sum(dim=-1), torch.where(here, picked, torch.zeros_like(picked))


def logits_gradient(
    logits: torch.Tensor, valid: int, log_sum_exp: torch.Tensor, targets: torch.Tensor, token_grad: torch.Tensor
) -> torch.Tensor:
    """(softmax − one-hot of the target) · token_grad in the logits' dtype; zero in the padding columns."""
    gradient = torch.zeros_like(logits)
    if valid == 0:
        return gradient
    probabilities = (logits[..., :valid].to(log_sum_exp.dtype) - log_sum_exp.unsqueeze(-1)).exp_()
    here = (targets >= 0) & (targets < valid)
    one_hot = here.to(probabilities.dtype).neg_().unsqueeze(-1)
    probabilities.scatter_add_(-1, targets.clamp(0, valid - 1).unsqueeze(-1), one_hot)
    gradient[..., :valid] = probabilities * token_grad.unsqueeze(-1)
    return gradient
