"""The local parts of a vocabulary-parallel cross-entropy; the collectives between them are the caller's.

Logits are this rank's columns of the vocabulary, of which the first `valid` are real tokens and the rest padding that
gets no probability. A rank may hold padding alone. Statistics are float32, or float64 for float64 logits.
"""

from __future__ import annotations

import torch

from megatron.kernels.native import Kernel
from megatron.kernels.numerics import statistics_dtype
from megatron.kernels.operation import define

_STATISTICS, _GRADIENT = Kernel("cross_entropy_statistics", "pppiii"), Kernel("cross_entropy_gradient", "ppppiii")


def local_statistics(logits: torch.Tensor, targets: torch.Tensor, valid: int) -> torch.Tensor:
    """Three figures of each row of logits [n, v], as [3, n].

    The largest real logit (minus infinity where there is none), Σ exp(logit − largest) over the real columns, and the
    logit of the target [n] (an index into these columns) where that lies here, else 0.
    """
    return _LOCAL_STATISTICS(logits, targets, valid)


def logits_gradient_(
    logits: torch.Tensor, targets: torch.Tensor, log_sum_exp: torch.Tensor, token_grad: torch.Tensor, valid: int
) -> torch.Tensor:
    """Turn logits [n, v] into (softmax − one-hot of the target) · token_grad, in place; zero in the padding columns.

    log_sum_exp and token_grad [n] have the statistics' dtype.
    """
    _LOGITS_GRADIENT(logits, targets, log_sum_exp, token_grad, valid)
    return logits


def local_statistics_reference(logits: torch.Tensor, targets: torch.Tensor, valid: int) -> torch.Tensor:
    """The formula itself."""
    statistics = _fake_statistics(logits, targets, valid)
    if valid == 0:
        statistics[0], statistics[1:] = -torch.inf, 0.0
        return statistics
    real = logits[:, :valid].to(statistics.dtype)
    statistics[0] = real.amax(dim=-1)
    statistics[1] = (real - statistics[0].unsqueeze(-1)).exp_().sum(dim=-1)
    here = (targets >= 0) & (targets < valid)
    picked = real.gather(-1, targets.clamp(0, valid - 1).unsqueeze(-1)).squeeze(-1)
    statistics[2] = torch.where(here, picked, torch.zeros_like(picked))
    return statistics


def logits_gradient_reference_(
    logits: torch.Tensor, targets: torch.Tensor, log_sum_exp: torch.Tensor, token_grad: torch.Tensor, valid: int
) -> None:
    """The formula itself."""
    if valid > 0:
        probabilities = (logits[:, :valid].to(log_sum_exp.dtype) - log_sum_exp.unsqueeze(-1)).exp_()
        here = (targets >= 0) & (targets < valid)
        one_hot = here.to(probabilities.dtype).neg_().unsqueeze(-1)
        probabilities.scatter_add_(-1, targets.clamp(0, valid - 1).unsqueeze(-1), one_hot)
        logits[:, :valid] = probabilities.mul_(token_grad.unsqueeze(-1))
    logits[:, valid:] = 0.0


def _native_statistics(logits: torch.Tensor, targets: torch.Tensor, valid: int) -> torch.Tensor | None:
    statistics = _fake_statistics(logits, targets, valid)
    logits, targets = logits.contiguous(), targets.contiguous()
    return statistics if _STATISTICS(logits, logits, targets, statistics, *logits.shape, valid) else None


def _native_gradient(
    logits: torch.Tensor, targets: torch.Tensor, log_sum_exp: torch.Tensor, token_grad: torch.Tensor, valid: int
) -> bool | None:
    if not logits.is_contiguous():
        return None
    rows = (targets.contiguous(), log_sum_exp.contiguous(), token_grad.contiguous())
    return _GRADIENT(logits, logits, *rows, *logits.shape, valid) or None


def _fake_statistics(logits: torch.Tensor, targets: torch.Tensor, valid: int) -> torch.Tensor:
    return logits.new_empty((3, logits.shape[0]), dtype=statistics_dtype(logits.dtype))


_LOCAL_STATISTICS = define(
    "cross_entropy_statistics(Tensor logits, Tensor targets, int valid) -> Tensor",
    reference=local_statistics_reference,
    native=_native_statistics,
    fake=_fake_statistics,
)
_LOGITS_GRADIENT = define(
    "cross_entropy_gradient_(Tensor(a!) logits, Tensor targets, Tensor log_sum_exp, Tensor token_grad, int valid)"
    " -> ()",
    reference=logits_gradient_reference_,
    native=_native_gradient,
    fake=lambda *_: None,
)
