"""Layer norm (Ba et al., 2016), alone and after the residual sum.

torch's own: it is fused on the CPU and on GPUs, forward and backward, with statistics in float32 for narrower inputs.
A kernel of ours could only save the pass that the residual sum takes, in families that few train any more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron.kernels.numerics import statistics_dtype


def layer_norm(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """(hidden [..., h] − mean) / sqrt(variance + eps) · weight [h] + bias [h]."""
    return F.layer_norm(hidden, weight.shape, weight, bias, eps)


def add_layer_norm(
    residual: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum, norm of the sum) of residual and branch, both [..., h]."""
    total = residual + branch
    return total, layer_norm(total, weight, bias, eps)


def layer_norm_reference(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """The formula itself, rounded once."""
    wide = hidden.to(statistics_dtype(hidden.dtype))
    centred = wide - wide.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    return (centred * rstd * weight + bias).to(hidden.dtype)
