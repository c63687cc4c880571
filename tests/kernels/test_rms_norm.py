"""The norm against its formula in float64: statistics must not be of the inputs' precision."""

from __future__ import annotations

import pytest
import torch

from megatron.kernels.rms_norm import rms_norm

from .reference import DTYPES, assert_within, roundings

SCALES = (1e-3, 1.0, 300.0)  # at the first one eps is most of the denominator


def inputs(dtype: torch.dtype, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = scale * (torch.randn(32, 2, 192, generator=generator, dtype=torch.float64) + 0.3)
    weight = 1.0 + 0.2 * torch.randn(192, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype)


def normed(hidden: torch.Tensor) -> torch.Tensor:
    wide = hidden.double()
    return wide / ((wide * wide).sum(dim=-1, keepdim=True) / wide.shape[-1] + 1e-5).sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_without_a_weight_the_only_error_is_one_rounding(dtype: torch.dtype, scale: float) -> None:
    hidden, _ = inputs(dtype, scale)
    found = rms_norm(hidden, torch.ones(192, dtype=dtype), 1e-5)
    assert found.dtype == dtype
    assert_within(found, normed(hidden), roundings(normed(hidden), dtype, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_with_a_weight_there_are_two(dtype: torch.dtype, scale: float) -> None:
    hidden, weight = inputs(dtype, scale)
    exact = normed(hidden) * weight.double()
    assert_within(rms_norm(hidden, weight, 1e-5), exact, roundings(exact, dtype, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_formula(dtype: torch.dtype) -> None:
    hidden, weight = inputs(dtype, 1.0)
    grad = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    of_hidden, of_weight = torch.autograd.grad(rms_norm(hidden, weight, 1e-5), (hidden, weight), grad)
    wide, wide_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(normed(wide) * wide_weight, (wide, wide_weight), grad.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(of_hidden.double(), exact[0], rtol=2 * eps, atol=8 * eps)
    torch.testing.assert_close(of_weight.double(), exact[1], rtol=2 * eps, atol=64 * eps)
