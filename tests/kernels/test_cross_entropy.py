"""The local parts of the cross-entropy, put together over the shares of a vocabulary in one process.

The last share holds padding alone, the one before it padding behind its real columns.
"""

from __future__ import annotations

import pytest
import torch

from megatron.kernels.cross_entropy import local_maximum, local_sums, logits_gradient
from megatron.model.loss import IGNORED, vocabulary_cross_entropy
from megatron.parallel.mesh import Axis

from .reference import DTYPES, assert_within

VOCABULARY, SHARE, SHARES = 300, 128, 4
WIDE = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}


def example(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [s, b, 512] whose padding columns are the largest, labels [s, b] with some ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20, 2, SHARE * SHARES, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (20, 2), generator=generator)
    labels[0] = torch.tensor([0, VOCABULARY - 1])
    labels[1] = torch.tensor([SHARE - 1, SHARE])
    # Sure of its answer: what is left for the others is below the precision of bf16.
    logits[2:6].scatter_(-1, labels[2:6].unsqueeze(-1), 16.0)
    labels[7, 1] = labels[9] = IGNORED
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
    maxima = torch.stack([local_maximum(part, valid) for part, valid, _ in parts])
    assert maxima.dtype == WIDE[dtype] and (maxima[3] == -torch.inf).all()
    maximum = maxima.amax(dim=0)
    assert torch.equal(maximum.double(), real.amax(dim=-1))
    sums = [local_sums(part, valid, maximum, targets) for part, valid, targets in parts]
    total = torch.stack([one for one, _ in sums]).sum(dim=0)
    picked = torch.stack([one for _, one in sums]).sum(dim=0)
    assert total.dtype == picked.dtype == WIDE[dtype]
    eps = torch.finfo(WIDE[dtype]).eps
    shifted = real - maximum.double().unsqueeze(-1)
    exact_total = shifted.exp().sum(dim=-1)
    assert_within(total, exact_total, 8 * eps * exact_total)
    exact_picked = shifted.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (labels != IGNORED)
    assert_within(picked, exact_picked, eps * exact_picked.abs())
    assert all((one == 0).all() for one in sums[3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_shares_are_rounded_once(dtype: torch.dtype) -> None:
    logits, labels = example(dtype)
    real, eps = logits[..., :VOCABULARY].double(), torch.finfo(WIDE[dtype]).eps
    token_grad = torch.linspace(0.5, 2.0, 40, dtype=WIDE[dtype]).view(20, 2)
    log_sum_exp = real.logsumexp(dim=-1)
    exact = real.softmax(dim=-1)
    exact.scatter_add_(-1, labels.clamp(min=0).unsqueeze(-1), -(labels != IGNORED).double().unsqueeze(-1))
    exact *= token_grad.double().unsqueeze(-1)
    for at, (part, valid, targets) in enumerate(shares(logits, labels)):
        found = logits_gradient(part, valid, log_sum_exp.to(WIDE[dtype]), targets, token_grad)
        assert found.dtype == dtype and found.shape == part.shape
        assert (found[..., valid:] == 0).all()
        if valid:
            expected = exact[..., at * SHARE : at * SHARE + valid]
            rounded = 1.01 * 0.5 * torch.finfo(dtype).eps * expected.abs()
            assert_within(found[..., :valid], expected, rounded + 16 * eps * token_grad.double().unsqueeze(-1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_are_of_statistics_precision_and_zero_where_ignored(dtype: torch.dtype) -> None:
    logits, labels = example(dtype)
    logits.requires_grad_()
    losses = vocabulary_cross_entropy(logits, labels, VOCABULARY, Axis("tp"))
    real = logits[..., :VOCABULARY].detach().double()
    exact = real.logsumexp(dim=-1) - real.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    ignored = labels == IGNORED
    exact[ignored] = 0.0
    assert losses.dtype == WIDE[dtype]
    assert_within(losses.detach(), exact, 8 * torch.finfo(WIDE[dtype]).eps * (1 + exact))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert (losses[ignored] == 0).all() and (gradient[ignored] == 0).all()
    assert (gradient[~ignored][:, :VOCABULARY] != 0).any(dim=-1).all()
