"""At size 1 every parallel layer is the plain layer, bit for bit, and gradients go where they should."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.parallel.layers import column_linear, position_embedding, row_linear, vocabulary_embedding
from megatron.parallel.mesh import single_rank
from megatron.parallel.weight_gradient import GradientSink, attach_sink


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layer", [column_linear, row_linear])
def test_linear_is_torch_linear(layer: object, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(6, 2, 8, dtype=dtype, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(10, 8, dtype=dtype))
    grad = torch.randn(6, 2, 10, dtype=dtype)
    ours = layer(inputs, weight, single_rank())  # type: ignore[operator]
    ours_gradients = torch.autograd.grad(ours, (inputs, weight), grad)
    theirs = F.linear(inputs, weight)
    theirs_gradients = torch.autograd.grad(theirs, (inputs, weight), grad)
    assert torch.equal(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours_gradients, theirs_gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layer", [column_linear, row_linear])
def test_linear_with_a_bias_is_torch_linear(layer: object, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(6, 2, 8, dtype=dtype, requires_grad=True)
    weight, bias = (torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((10, 8), (10,)))
    grad = torch.randn(6, 2, 10, dtype=dtype)
    ours = layer(inputs, weight, single_rank(), bias)  # type: ignore[operator]
    theirs = F.linear(inputs, weight, bias)
    assert torch.equal(ours, theirs)
    *gradients, grad_bias = torch.autograd.grad(ours, (inputs, weight, bias), grad)
    *expected, expected_bias = torch.autograd.grad(theirs, (inputs, weight, bias), grad)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert grad_bias.dtype == dtype
    torch.testing.assert_close(grad_bias, expected_bias)


@pytest.mark.parametrize("samples", [1, 3])
def test_positions_are_looked_up_and_summed(samples: int) -> None:
    """Rows for all samples alike, and of each sample; into the autograd gradient and into a sink."""
    hidden = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(7, 5, dtype=torch.float64))
    rows = torch.randint(0, 7, (4, samples), generator=torch.Generator().manual_seed(0))
    grad = torch.randn(4, 3, 5, dtype=torch.float64)
    ours, theirs = position_embedding(hidden, rows, weight), hidden + F.embedding(rows, weight)
    assert torch.equal(ours, theirs)
    mine = torch.autograd.grad(ours, (hidden, weight), grad)
    expected = torch.autograd.grad(theirs, (hidden, weight), grad)
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b)
    buffer, reports = torch.zeros(7, 5, dtype=torch.float64), []
    attach_sink(weight, GradientSink(buffer, lambda: reports.append(1)))
    position_embedding(hidden, rows, weight).backward(grad)
    torch.testing.assert_close(buffer, expected[1])
    assert weight.grad is None and len(reports) == 1


def test_embedding_is_torch_embedding() -> None:
    tokens = torch.tensor([[1, 1], [3, 0]])
    weight = torch.nn.Parameter(torch.randn(5, 4))
    grad = torch.randn(2, 2, 4)
    ours, theirs = vocabulary_embedding(tokens, weight, single_rank()), F.embedding(tokens, weight)
    assert torch.equal(ours, theirs)
    (mine,), (reference,) = (torch.autograd.grad(output, (weight,), grad) for output in (ours, theirs))
    assert torch.equal(mine, reference)


def test_weight_gradients_add_up_in_float32_and_are_reported() -> None:
    inputs = torch.randn(6, 2, 8, dtype=torch.bfloat16)
    weight = torch.nn.Parameter(torch.randn(10, 8, dtype=torch.bfloat16))
    buffer, reports = torch.zeros(10, 8), []
    attach_sink(weight, GradientSink(buffer, lambda: reports.append(1)))
    for _ in range(3):
        column_linear(inputs, weight, single_rank()).sum().backward()
    one = torch.ones(12, 10).t() @ inputs.flatten(0, 1).float()
    assert weight.grad is None and len(reports) == 3
    # A product is rounded to bf16 where the machine multiplies bf16; sums of three are not.
    torch.testing.assert_close(buffer, 3 * one, rtol=2**-8, atol=2**-7)
