"""The sum of squares of a flat array, read once."""

from __future__ import annotations

import torch

from megatron.kernels.native import Kernel
from megatron.kernels.numerics import statistics_dtype
from megatron.kernels.operation import define

_SQUARED_NORM = Kernel("squared_norm", "ppii")
_PARTS = {"cpu": 64, "cuda": 1024}


def squared_norm(flat: torch.Tensor) -> torch.Tensor:
    """Σ flat² over [n], a scalar of at least float32."""
    return _OPERATION(flat)


def squared_norm_reference(flat: torch.Tensor) -> torch.Tensor:
    """By torch's norm, which reads once as well, but sums in the array's own dtype."""
    return torch.linalg.vector_norm(flat, dtype=statistics_dtype(flat.dtype)).square()


def _native(flat: torch.Tensor) -> torch.Tensor | None:
    parts = _PARTS.get(flat.device.type, 1)
    sums = flat.new_empty(parts, dtype=torch.float64)
    done = _SQUARED_NORM(flat, flat.contiguous(), sums, parts, flat.numel())
    return sums.sum().to(statistics_dtype(flat.dtype)) if done else None


_OPERATION = define(
    "squared_norm(Tensor flat) -> Tensor",
    reference=squared_norm_reference,
    native=_native,
    fake=lambda flat: flat.new_empty((), dtype=statistics_dtype(flat.dtype)),
)
