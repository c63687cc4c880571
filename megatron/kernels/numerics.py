"""In which dtype sensitive arithmetic is done."""

from __future__ import annotations

import torch


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for norm statistics, rotary angles, softmax and the loss: float32, or float64 where inputs are."""
    return torch.promote_types(torch.float32, dtype)
