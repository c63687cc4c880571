"""How far a result may be from the exact one."""

from __future__ import annotations

import torch

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def roundings(exact: torch.Tensor, dtype: torch.dtype, count: int) -> torch.Tensor:
    """The most that `count` roundings to `dtype` change each element: half an epsilon each, relative to it.

    Where `dtype` is also the widest that is used, the sums themselves are some roundings more.
    """
    allowed = count * 0.5 * 1.01 if dtype is torch.bfloat16 else count * 0.5 + 4
    return exact.abs() * allowed * torch.finfo(dtype).eps


def assert_within(found: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor) -> None:
    """Each element of `found` is within its own allowance of the exact float64 value."""
    excess = (found.double() - exact).abs() - allowed
    assert torch.isfinite(found).all()
    worst = int(excess.argmax())
    assert excess.max() <= 0, (
        f"{int((excess > 0).sum())} of {excess.numel()} elements are too far off, worst: {found.flatten()[worst]} "
        f"instead of {exact.flatten()[worst]}"
    )
