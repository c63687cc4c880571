"""The local parts of the cross-entropy, put together over the shares of a vocabulary in one process.

The last share holds padding alone, the one before it padding behind its real columns.
"""

from __future__ import annotations

import pytest
import torch

from megatron.kernels.cross_entropy import local_statistics, logits_gradient_
from megatron.model.loss import IGNORED

from .reference import DTYPES, assert_within

VOCABULARY, SHARE, SHARES = 300, 128, 4
WIDE = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}


def example(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [n, 512] whose padding columns are the largest, labels [n] with some ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, SHARE * SHARES, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (40,), generator=generator)
    labels[:4] = torch.tensor([0, VOCABULARY - 1, SHARE - 1, SHARE])
    # Sure of its answer: what is left for the others is below the precision of bf16.
    logits[4:12].scatter_(-1, labels[4:12].unsqueeze(-1), 16.0)
    labels[15] = labels[18:20] = IGNORED
    logits[..., VOCABULARY:] = 90.0
    return logits.to(dtype), labels


def shares(logits: torch.Tensor, labels: torch.Tensor) -> list[tuple[torch.Tensor, int, torch.Tensor]]:
    """(columns, real ones among them, targets as indices into them) of each share."""
    return [
        (part, min(max(VOCABULARY - at * SHARE, 0), SHARE), labels - at * SHARE)
        for at, part in enumerate(logits.split(SHARE, dim=-1))
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_shares_add_up_to_the_whole(dtype: torch.dtype) -> None:
    logits, labels = example(dtype)
    parts = shares(logits, labels)
    assert [valid for _, valid, _ in parts] == [128, 128, 44, 0]
    real = logits[..., :VOCABULARY].double()
    statistics = torch.stack([local_statistics(part, targets, valid) for part, valid, targets in parts])
    maxima, sums, picked = statistics.unbind(dim=1)
    assert statistics.dtype == WIDE[dtype] and (maxima[3] == -torch.inf).all()
    assert (sums[3] == 0).all() and (picked[3] == 0).all()
    maximum = maxima.amax(dim=0)
    assert torch.equal(maximum.double(), real.amax(dim=-1))
    eps = torch.finfo(WIDE[dtype]).eps
    total = (sums * (maxima - maximum).exp()).sum(dim=0)
    exact_total = (real - maximum.double().unsqueeze(-1)).exp().sum(dim=-1)
    assert_within(total, exact_total, 8 * eps * exact_total)
    exact_picked = real.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (labels != IGNORED)
    assert torch.equal(picked.sum(dim=0).double(), exact_picked)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_shares_are_rounded_once(dtype: torch.dtype) -> None:
    logits, labels = example(dtype)
    real, eps = logits[..., :VOCABULARY].double(), torch.finfo(WIDE[dtype]).eps
    token_grad = torch.linspace(0.5, 2.0, 40, dtype=WIDE[dtype])
    log_sum_exp = real.logsumexp(dim=-1)
    exact = real.softmax(dim=-1)
    exact.scatter_add_(-1, labels.clamp(min=0).unsqueeze(-1), -(labels != IGNORED).double().unsqueeze(-1))
    exact *= token_grad.double().unsqueeze(-1)
    for at, (part, valid, targets) in enumerate(shares(logits, labels)):
        found = logits_gradient_(part.contiguous(), targets, log_sum_exp.to(WIDE[dtype]), token_grad, valid)
        assert found.dtype == dtype and found.shape == part.shape
        assert (found[..., valid:] == 0).all()
        if valid:
            expected = exact[..., at * SHARE : at * SHARE + valid]
            rounded = 1.01 * 0.5 * torch.finfo(dtype).eps * expected.abs()
            assert_within(found[..., :valid], expected, rounded + 16 * eps * token_grad.double().unsqueeze(-1))
