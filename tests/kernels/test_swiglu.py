"""The gated activation against its formula in float64."""

from __future__ import annotations

import pytest
import torch

from megatron.kernels.swiglu import swiglu

from .reference import DTYPES, assert_within, roundings


def exact_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1.0 + (-gate).exp()) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_two_roundings(dtype: torch.dtype, scale: float) -> None:
    """silu is rounded, and its product with the other half."""
    gate_up = scale * torch.randn(64, 2, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gate_up[0, 0, :4] = torch.tensor([0.0, -60.0, 60.0, -10.0])
    gate_up = gate_up.to(dtype)
    found, exact = swiglu(gate_up), exact_swiglu(gate_up)
    assert found.dtype == dtype and found.shape == (64, 2, 96)
    assert_within(found, exact, roundings(exact, dtype, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_formula(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    gate_up = torch.randn(16, 2, 64, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    grad = torch.randn(16, 2, 32, generator=generator, dtype=torch.float64).to(dtype)
    (found,) = torch.autograd.grad(swiglu(gate_up), gate_up, grad)
    wide = gate_up.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(exact_swiglu(wide), wide, grad.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=2 * eps, atol=8 * eps)
