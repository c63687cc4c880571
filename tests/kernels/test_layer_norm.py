"""Layer norm and the GELUs against their formulas, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron.kernels.gelu import gelu, gelu_reference, gelu_tanh, gelu_tanh_reference
from megatron.kernels.layer_norm import add_layer_norm, layer_norm, layer_norm_reference

# Of the largest element: rounding of the result, and of one more operation.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_layer_norm_is_its_formula(dtype: torch.dtype, eps: float) -> None:
    hidden = (3 * random(5, 2, 24, dtype=dtype) + 1).requires_grad_()
    weight, bias = (random(24, dtype=dtype, seed=seed).requires_grad_() for seed in (1, 2))
    upstream = random(5, 2, 24, dtype=dtype, seed=3)
    found = layer_norm(hidden, weight, bias, eps)
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    exact = layer_norm_reference(*wide, eps)
    assert_near(found, exact, dtype)
    assert_near(layer_norm_reference(hidden, weight, bias, eps), exact, dtype)
    gradients = torch.autograd.grad(found, (hidden, weight, bias), upstream)
    for gradient, expected in zip(gradients, torch.autograd.grad(exact, wide, upstream.double()), strict=True):
        assert_near(gradient, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_sum_is_the_one_that_is_normed(dtype: torch.dtype) -> None:
    residual, branch = (random(5, 2, 24, dtype=dtype, seed=seed) for seed in (1, 2))
    weight, bias = (random(24, dtype=dtype, seed=seed) for seed in (3, 4))
    total, normed = add_layer_norm(residual, branch, weight, bias, 1e-5)
    assert torch.equal(total, residual + branch)
    assert torch.equal(normed, layer_norm(total, weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("function", "reference"), [(gelu, gelu_reference), (gelu_tanh, gelu_tanh_reference)])
def test_gelu_is_its_formula(
    function: Callable[..., torch.Tensor], reference: Callable[..., torch.Tensor], dtype: torch.dtype
) -> None:
    inputs = torch.linspace(-6, 6, 400, dtype=torch.float64).to(dtype).requires_grad_()
    upstream = random(400, dtype=dtype)
    wide = inputs.detach().double().requires_grad_()
    found, exact = function(inputs), reference(wide)
    assert_near(found, exact, dtype)
    assert_near(reference(inputs), exact, dtype)
    (gradient,), (expected,) = (
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(exact, wide, upstream.double()),
    )
    assert_near(gradient, expected, dtype)


def test_the_two_gelus_are_different_functions() -> None:
    inputs = torch.linspace(-3, 3, 50, dtype=torch.float64)
    assert 1e-5 < (gelu(inputs) - gelu_tanh(inputs)).abs().max() < 1e-3
