"""The update of AdamW (Loshchilov and Hutter, 2019, algorithm 2) over flat arrays, in one pass over memory."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch.optim.adamw import adamw

from megatron.kernels.native import Kernel
from megatron.kernels.operation import define

_ADAMW = Kernel("adamw", "ppppppppiddddd")


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers of one update, in the operation's order."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def adamw_update_(
    master: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    weights: torch.Tensor | None,
    divisor: torch.Tensor,
    not_finite: torch.Tensor,
    updates: torch.Tensor,
    numbers: Hyperparameters,
) -> None:
    """Update masters and moments [n] in place from gradient / divisor, and write the weights anew where given.

    `weights` are a copy of the masters in another dtype. `divisor`, `not_finite` and `updates` are scalars on the
    device, the last two float32: where `not_finite` is 1 nothing changes; `updates` counts this update already. The
    gradient is left in a state that nobody should read.
    """
    divisor = divisor.to(master.dtype)
    _UPDATE(master, gradient, exp_avg, exp_avg_sq, weights, divisor, not_finite, updates, *astuple(numbers))


def adamw_update_reference_(
    master: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    weights: torch.Tensor | None,
    divisor: torch.Tensor,
    not_finite: torch.Tensor,
    updates: torch.Tensor,
    *numbers: float,
) -> None:
    """torch's fused update, between a pass for the division and one for the rounding."""
    learning_rate, beta1, beta2, eps, weight_decay = numbers
    gradient.div_(divisor)  # the fused kernel could, but reads the scale as float32 only
    adamw(
        [master],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [updates - 1.0],
        fused=True,
        found_inf=not_finite,
        amsgrad=False,
        maximize=False,
        lr=learning_rate,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
    )
    if weights is not None:
        weights.copy_(master)


def _native(
    master: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    weights: torch.Tensor | None,
    *rest: torch.Tensor | float,
) -> bool | None:
    flat = (master, gradient, exp_avg, exp_avg_sq)
    if weights is not None and weights.dtype is not torch.bfloat16:
        return None
    assert all(tensor.is_contiguous() for tensor in flat)
    return _ADAMW(master, *flat, weights, *rest[:3], master.numel(), *rest[3:]) or None


_UPDATE = define(
    "adamw_(Tensor(a!) master, Tensor(b!) gradient, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor(e!)? weights, "
    "Tensor divisor, Tensor not_finite, Tensor updates, float learning_rate, float beta1, float beta2, float eps, "
    "float weight_decay) -> ()",
    reference=adamw_update_reference_,
    native=_native,
    fake=lambda *_: None,
)
