"""Root-mean-square norm (Zhang and Sennrich, 2019), as Llama uses it."""

from __future__ import annotations

import torch

from megatron.kernels.numerics import statistics_dtype


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """hidden [..., h] / sqrt(mean(hidden²) + eps), rounded to its dtype, times weight [h]."""
    wide = hidden.to(statistics_dtype(hidden.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return normed.to(hidden.dtype) * weight
