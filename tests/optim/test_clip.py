"""The gradient norm and clipping against torch's."""

from __future__ import annotations

import pytest
import torch

from megatron.optim.clip import GradientNorm, clip_divisor
from megatron.parallel.mesh import single_rank

from .conftest import MakeBuckets, set_gradients, slots


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_is_that_of_all_gradients(make_buckets: MakeBuckets, dtype: torch.dtype) -> None:
    buckets = make_buckets(dtype)
    norm = GradientNorm(buckets, single_rank())
    set_gradients(buckets, 0)
    gradients = [gradient for _, _, gradient in slots(buckets)]
    expected = torch.nn.utils.get_total_norm([gradient.double() for gradient in gradients])
    assert norm.compute().dtype == gradients[0].dtype
    torch.testing.assert_close(
        norm.compute().double(), expected, rtol=1e-6 if dtype != torch.float64 else 1e-14, atol=0
    )
    # every single parameter takes part
    for name, _, gradient in slots(buckets):
        before = norm.compute()
        gradient.flatten()[-1:].add_(1000.0)
        assert norm.compute() > 1.001 * before, name


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_norm_tells_what_is_not_finite(make_buckets: MakeBuckets, value: float) -> None:
    buckets = make_buckets(torch.float32)
    norm = GradientNorm(buckets, single_rank())
    next(slots(buckets))[2][3] = value
    assert not torch.isfinite(norm.compute())


@pytest.mark.parametrize("limit", [0.1, 1.0, 50.0])
@pytest.mark.parametrize("tokens", [1.0, 37.0])
def test_clipping_is_that_of_torch(make_buckets: MakeBuckets, limit: float, tokens: float) -> None:
    buckets = make_buckets()
    set_gradients(buckets, 0, size=3.0)
    parameters = []
    for _, weight, gradient in slots(buckets):
        parameters.append(torch.nn.Parameter(weight.clone()))
        parameters[-1].grad = gradient / tokens
    divisor = torch.tensor(tokens, dtype=torch.float64)
    norm = GradientNorm(buckets, single_rank()).compute()
    reported = torch.nn.utils.clip_grad_norm_(parameters, limit)
    torch.testing.assert_close(norm / divisor, reported, rtol=1e-13, atol=0.0)
    by = clip_divisor(norm, divisor, limit)
    for parameter, (_, _, gradient) in zip(parameters, slots(buckets), strict=True):
        torch.testing.assert_close(gradient / by, parameter.grad, rtol=1e-12, atol=0.0)
    clipped = norm / by
    assert clipped <= limit and (clipped > 0.999 * limit or torch.equal(by, divisor))


def test_small_gradients_and_no_limit_leave_the_divisor_alone() -> None:
    norm, divisor = torch.tensor(20.0), torch.tensor(8.0)
    assert torch.equal(clip_divisor(norm, divisor, 3.0), divisor)
    assert torch.equal(clip_divisor(1e9 * norm, divisor, 0.0), divisor)
    assert clip_divisor(norm, divisor, 1.25) == pytest.approx(16.0)
