"""Root-mean-square norm (Zhang and Sennrich, 2019), alone and fused with the residual sum before it."""

from __future__ import annotations

from typing import Any

import torch

from megatron.kernels.native import Kernel
from megatron.kernels.numerics import statistics_dtype
from megatron.kernels.operation import define, define_backward
from megatron.utils.device import multiprocessors

_FORWARD, _ADD_FORWARD = Kernel("rms_norm", "ppppiid"), Kernel("add_rms_norm", "ppppppiid")
_BACKWARD = Kernel("rms_norm_backward", "pppppppiii")
# On a CPU a part of the weight's gradient sums at most so many rows one after the other, and there are enough parts for
# all cores; parts are then summed in pairs, which rounds less. On a GPU there are so many for each multiprocessor.
_ROWS_OF_A_PART, _FEWEST_PARTS, _PARTS_OF_A_MULTIPROCESSOR = 16, 16, 2


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """hidden [..., h] / sqrt(mean(hidden²) + eps) · weight [h], rounded once."""
    return _RMS_NORM(hidden, weight, eps)[0]


def add_rms_norm(
    residual: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum, norm of the sum) of residual and branch, both [..., h]."""
    total, normed, _ = _ADD_RMS_NORM(residual, branch, weight, eps)
    return total, normed


def rms_norm_reference(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, 1 / root of the mean square [...], wide)."""
    wide = hidden.to(statistics_dtype(hidden.dtype))
    rstd = torch.rsqrt(wide.square().mean(dim=-1) + eps)
    return (wide * rstd.unsqueeze(-1) * weight).to(hidden.dtype), rstd


def add_rms_norm_reference(
    residual: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum, its norm, 1 / root of the mean square)."""
    total = residual + branch
    return total, *rms_norm_reference(total, weight, eps)


def rms_norm_backward_reference(
    grad_normed: torch.Tensor,
    grad_sum: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of hidden, with `grad_sum` added, and of weight), rounded to their dtypes."""
    dtype = rstd.dtype
    scale = rstd.unsqueeze(-1)
    normed = hidden.to(dtype) * scale
    weighted = grad_normed.to(dtype) * weight.to(dtype)
    grad_hidden = scale * (weighted - normed * (weighted * normed).mean(dim=-1, keepdim=True))
    if grad_sum is not None:
        grad_hidden = grad_hidden + grad_sum
    grad_weight = (grad_normed.to(dtype) * normed).flatten(0, -2).sum(dim=0)
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype)


def _native(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor] | None:
    hidden, (normed, rstd) = hidden.contiguous(), _fake(hidden, weight, eps)
    columns = hidden.shape[-1]
    done = _FORWARD(hidden, hidden, weight, normed, rstd, rstd.numel(), columns, eps)
    return (normed, rstd) if done else None


def _native_add(
    residual: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    residual, branch = residual.contiguous(), branch.contiguous()
    total, normed, rstd = _fake_add(residual, branch, weight, eps)
    size = (rstd.numel(), residual.shape[-1])
    done = _ADD_FORWARD(residual, residual, branch, weight, total, normed, rstd, *size, eps)
    return (total, normed, rstd) if done else None


def _native_backward(
    grad_normed: torch.Tensor,
    grad_sum: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    grad_normed, hidden = grad_normed.contiguous(), hidden.contiguous()
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    rows, columns = rstd.numel(), hidden.shape[-1]
    parts = _parts(rows, hidden.device)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = rstd.new_empty((parts, columns))
    arguments = (grad_normed, grad_sum, hidden, weight, rstd, grad_hidden, grad_weight, parts, rows, columns)
    return (grad_hidden, grad_weight.sum(dim=0).to(weight.dtype)) if _BACKWARD(hidden, *arguments) else None


def _parts(rows: int, device: torch.device) -> int:
    """Into how many parts the rows are divided, whose shares of the weight's gradient are summed at the end."""
    wanted = max(_FEWEST_PARTS, -(-rows // _ROWS_OF_A_PART))
    if device.type == "cuda":
        wanted = _PARTS_OF_A_MULTIPROCESSOR * multiprocessors(device)
    return max(1, min(rows, wanted))


def _fake(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    rstd = hidden.new_empty(hidden.shape[:-1], dtype=statistics_dtype(hidden.dtype))
    return hidden.new_empty(hidden.shape), rstd


def _fake_add(
    residual: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return residual.new_empty(residual.shape), *_fake(residual, weight, eps)


_RMS_NORM = define(
    "rms_norm(Tensor hidden, Tensor weight, float eps) -> (Tensor, Tensor)",
    reference=rms_norm_reference,
    native=_native,
    fake=_fake,
)
_ADD_RMS_NORM = define(
    "add_rms_norm(Tensor residual, Tensor branch, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    reference=add_rms_norm_reference,
    native=_native_add,
    fake=_fake_add,
)
_RMS_NORM_BACKWARD = define(
    "rms_norm_backward(Tensor grad_normed, Tensor? grad_sum, Tensor hidden, Tensor weight, Tensor rstd)"
    " -> (Tensor, Tensor)",
    reference=rms_norm_backward_reference,
    native=_native_backward,
    fake=lambda grad_normed, grad_sum, hidden, weight, rstd: (
        hidden.new_empty(hidden.shape),
        weight.new_empty(weight.shape),
    ),
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    """Keep what the backward pass reads: the input of the norm, which of the fused operation is its first output."""
    hidden = inputs[0] if len(output) == 2 else output[0]
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, inputs[-2], output[-1])


def _backward(ctx: Any, grad_normed: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
    return *_RMS_NORM_BACKWARD(grad_normed, None, *ctx.saved_tensors), None


def _backward_add(
    ctx: Any, grad_sum: torch.Tensor | None, grad_normed: torch.Tensor | None, _: None
) -> tuple[torch.Tensor | None, ...]:
    if grad_normed is None:  # only the sum was used
        return grad_sum, grad_sum, None, None
    grad_hidden, grad_weight = _RMS_NORM_BACKWARD(grad_normed, grad_sum, *ctx.saved_tensors)
    return grad_hidden, grad_hidden, grad_weight, None


define_backward("rms_norm", _backward, _keep)
define_backward("add_rms_norm", _backward_add, _keep)
