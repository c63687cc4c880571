"""Rotary position embedding (Su et al., 2021) in Hugging Face's half-split order."""

from __future__ import annotations

import torch

from megatron.kernels.numerics import statistics_dtype


def rotary_tables(
    sequence_length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position · theta^(−2i/d), each [sequence_length, 1, 1, head_dim], both halves alike.

    Angles are computed in max(float32, dtype), as transformers does in float32.
    """
    wide = statistics_dtype(dtype)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).to(wide) / head_dim
    inverse_frequency = 1.0 / (theta**exponents)
    positions = torch.arange(sequence_length, dtype=torch.int64, device=device).to(wide)
    angles = torch.outer(positions, inverse_frequency).repeat(1, 2)[:, None, None, :]  # [s, 1, 1, d]
    return angles.cos(), angles.sin()


def apply_rotary(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (i, i + d/2) of heads [s, b, n, d] by its angle; the product is taken in the tables' dtype."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (heads * cos + turned * sin).to(heads.dtype)
