"""The fused output product and cross-entropy of one rank against torch's; tests/dist shows it split over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.model import loss
from megatron.model.loss import IGNORED, head_loss, head_predictions
from megatron.parallel.mesh import single_rank
from megatron.parallel.weight_gradient import GradientSink, attach_sink

ALONE = single_rank()
VOCABULARY = 61


def example(padded: int = 64, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [s, b, h], weight [padded, h] and labels [b, s] with some ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 3, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(padded, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (3, 50), generator=generator)
    labels[1, 2] = labels[:, 6] = IGNORED
    labels[:, 0] = torch.tensor([0, VOCABULARY - 1, 5])
    return hidden, weight, labels


def torch_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = (hidden @ weight[:VOCABULARY].t()).transpose(0, 1)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.fixture(params=[2**30, 64 * 64 * 8], ids=["one chunk", "three chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_CHUNK_BYTES_ON_CPU", request.param)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("padded", [61, 64, 128])
def test_values_and_gradients_are_those_of_torch(padded: int) -> None:
    hidden, weight, labels = example(padded)
    found = head_loss(hidden, weight, labels.t(), VOCABULARY, ALONE)
    expected = torch_loss(hidden, weight, labels)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0.0)
    factor = 1.75  # without a sink any factor may follow
    mine = torch.autograd.grad(factor * found, (hidden, weight))
    theirs = torch.autograd.grad(factor * expected, (hidden, weight))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
    assert (mine[0][6] == 0).all() and (mine[1][VOCABULARY:] == 0).all()


@pytest.mark.usefixtures("chunks")
def test_each_loss_counts_by_its_weight() -> None:
    hidden, weight, labels = example()
    loss_weights = torch.rand(3, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss_weights[2, 5] = 0.0
    found = head_loss(hidden, weight, labels.t(), VOCABULARY, ALONE, loss_weights.t())
    logits = (hidden @ weight[:VOCABULARY].t()).transpose(0, 1)
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    expected = (each * loss_weights.flatten()).sum()
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0.0)
    mine, theirs = (torch.autograd.grad(value, (hidden, weight)) for value in (found, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
    assert (mine[0][5, 2] == 0).all() and mine[0][5, 1].any()


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("padded", [61, 128])
def test_predictions_are_the_losses_and_whether_the_label_is_likeliest(padded: int) -> None:
    hidden, weight, labels = example(padded)
    logits = (hidden @ weight[:VOCABULARY].t()).transpose(0, 1)
    labels[0, 10:30] = logits[0, 10:30].argmax(dim=-1)
    with torch.no_grad():
        weight[VOCABULARY:] = 1e9
    found = head_predictions(hidden, weight, labels.t(), VOCABULARY, ALONE)
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(found.losses, each.view_as(labels).t(), rtol=1e-12, atol=1e-14)
    assert found.losses.dtype == torch.float64 and not found.losses.requires_grad
    expected = logits.argmax(dim=-1) == labels
    assert torch.equal(found.correct, expected.t()) and 20 <= expected.sum() < 40


def test_of_equally_likely_tokens_the_first_is_the_prediction() -> None:
    weight = torch.tensor([[0.0], [1.0], [1.0]])
    found = head_predictions(torch.ones(2, 1, 1), weight, torch.tensor([[1], [2]]), 3, ALONE)
    assert found.correct.flatten().tolist() == [True, False]


@pytest.mark.usefixtures("chunks")
def test_the_weight_gradient_goes_to_its_sink_and_is_reported_in_the_backward_pass() -> None:
    hidden, weight, labels = example()
    weight = torch.nn.Parameter(weight.detach())
    reports: list[int] = []
    buffer = torch.full_like(weight, torch.nan, requires_grad=False)
    attach_sink(weight, GradientSink(buffer, lambda: reports.append(1)))
    for _ in range(2):
        found = head_loss(hidden, weight, labels.t(), VOCABULARY, ALONE)
        before = len(reports)
        found.backward()
        assert len(reports) == before + 1
    (expected,) = torch.autograd.grad(torch_loss(hidden, weight, labels), weight)
    torch.testing.assert_close(buffer, 2 * expected, rtol=1e-11, atol=1e-13)
    assert weight.grad is None


def test_a_factor_that_came_too_late_for_the_sink_is_noticed() -> None:
    hidden, weight, labels = example()
    weight = torch.nn.Parameter(weight.detach())
    attach_sink(weight, GradientSink(torch.zeros_like(weight), lambda: None))
    (2.0 * head_loss(hidden, weight, labels.t(), VOCABULARY, ALONE)).backward()
    assert hidden.grad is not None and hidden.grad.isnan().all()


def test_nothing_is_differentiated_where_nobody_asks() -> None:
    hidden, weight, labels = example()
    weight = torch.nn.Parameter(weight.detach())
    buffer = torch.zeros_like(weight)
    attach_sink(weight, GradientSink(buffer, lambda: None))
    with torch.no_grad():
        found = head_loss(hidden, weight, labels.t(), VOCABULARY, ALONE)
    torch.testing.assert_close(found, torch_loss(hidden, weight, labels), rtol=1e-13, atol=0.0)
    assert not buffer.any()


def test_padding_rows_have_no_probability() -> None:
    hidden, weight, labels = example()
    expected = head_loss(hidden, weight, labels.t(), VOCABULARY, ALONE)
    with torch.no_grad():
        weight[VOCABULARY:] = 1e9
    assert torch.equal(head_loss(hidden, weight, labels.t(), VOCABULARY, ALONE), expected)


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.ones(1, 1, 1, requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    found = head_loss(hidden, weight, torch.tensor([[1]]), 3, ALONE)
    found.backward()
    assert found.item() == 2e4
    assert weight.grad is not None and weight.grad.flatten().tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sum_is_float32(dtype: torch.dtype) -> None:
    hidden, weight, labels = example(dtype=dtype)
    found = head_loss(hidden, weight, labels.t(), VOCABULARY, ALONE)
    assert found.dtype == torch.float32
    exact = torch_loss(hidden.double(), weight.double(), labels)
    # Where bf16 is multiplied as such, logits of up to about 10 are rounded to it; the sums are not.
    assert found.item() == pytest.approx(exact.item(), rel=1e-6 if dtype == torch.float32 else 2e-3)
