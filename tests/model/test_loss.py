"""The cross-entropy of one rank against torch's; how it is split over ranks is shown in tests/dist."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.model.loss import IGNORED, vocabulary_cross_entropy
from megatron.parallel.mesh import Axis

ALONE = Axis("tp")


def example(
    vocab_size: int = 61, padded: int = 64, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [s, b, padded] and labels [s, b] with some ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(7, 3, padded, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, vocab_size, (7, 3), generator=generator)
    labels[2, 1] = labels[6] = IGNORED
    labels[0] = torch.tensor([0, vocab_size - 1, 5])
    return logits, labels


@pytest.mark.parametrize("padded", [61, 64, 128])
def test_values_and_gradients_are_those_of_torch(padded: int) -> None:
    logits, labels = example(padded=padded)
    logits.requires_grad_()
    scale = torch.linspace(0.5, 2.0, 21, dtype=torch.float64).view(7, 3)  # each token's own share in the total
    losses = vocabulary_cross_entropy(logits, labels, 61, ALONE)
    (gradient,) = torch.autograd.grad((losses * scale).sum(), logits)
    expected = F.cross_entropy(
        logits[..., :61].reshape(21, 61), labels.view(21), ignore_index=IGNORED, reduction="none"
    ).view(7, 3)
    (expected_gradient,) = torch.autograd.grad((expected * scale).sum(), logits)
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)
    assert (losses[labels == IGNORED] == 0).all() and (gradient[labels == IGNORED] == 0).all()
    assert (gradient[..., 61:] == 0).all()


def test_padding_columns_have_no_probability() -> None:
    logits, labels = example()
    expected = vocabulary_cross_entropy(logits, labels, 61, ALONE)
    logits[..., 61:] = 1e9
    assert torch.equal(vocabulary_cross_entropy(logits, labels, 61, ALONE), expected)


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    losses = vocabulary_cross_entropy(logits, torch.tensor([[1]]), 3, ALONE)
    losses.sum().backward()
    assert losses.item() == 2e4
    assert logits.grad is not None and logits.grad.tolist() == [[[1.0, -1.0, 0.0]]]


def test_bf16_logits_have_a_float32_loss() -> None:
    logits, labels = example(dtype=torch.bfloat16)
    losses = vocabulary_cross_entropy(logits, labels, 61, ALONE)
    exact = vocabulary_cross_entropy(logits.double(), labels, 61, ALONE)
    assert losses.dtype == torch.float32
    assert (losses - exact).abs().max() <= 1e-5, "the sums are taken in float32, not in bf16"
