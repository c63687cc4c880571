"""One training step on one rank: what its figures mean and what it does with numbers that are not finite."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.config.optimizer import OptimizerConfig
from megatron.model.initialize import initialize
from megatron.model.loss import IGNORED
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import single_rank
from megatron.train.step import TrainingStep

from .conftest import MODEL, random_batch


def make_step(micro_batches: int, dtype: torch.dtype = torch.float64, **settings: float) -> TrainingStep:
    model = Transformer(MODEL, single_rank(), dtype)
    initialize(model, MODEL, 3)
    config = OptimizerConfig(learning_rate=1e-2, decay_style="constant", **settings)
    return TrainingStep(model, single_rank(), config, micro_batches=micro_batches, zero=0, decay_steps=10)


def weights(step: TrainingStep) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in step.model.named_parameters()}


def test_loss_is_the_mean_over_all_tokens_of_the_batch() -> None:
    step, batch = make_step(2), random_batch(2)
    batch[0].labels[0, 3:] = IGNORED
    batch[0].labels[1] = IGNORED
    model = Transformer(MODEL, single_rank(), torch.float64)  # one whose gradients autograd keeps
    initialize(model, MODEL, 3)
    logits = [model(micro_batch.tokens).transpose(0, 1)[..., : MODEL.vocab_size] for micro_batch in batch]
    labels = torch.cat([micro_batch.labels for micro_batch in batch])
    expected = F.cross_entropy(torch.cat(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    outcome = step(batch, 1)
    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-13)
    assert outcome.tokens.item() == 3 + 24
    assert outcome.grad_norm.item() == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), rel=1e-12)
    assert outcome.learning_rate == 1e-2 and outcome.skipped.item() == 0


def test_micro_batches_do_not_matter() -> None:
    """The same samples in 1, 2 or 4 micro-batches, with unequal numbers of tokens, give the same step."""
    (whole,) = random_batch(1, micro_batch=4)
    whole.labels[0] = IGNORED
    whole.labels[2, 5:] = IGNORED
    results = []
    for parts in (1, 2, 4):
        step = make_step(parts)
        batch = [
            type(whole)(tokens, labels)
            for tokens, labels in zip(whole.tokens.chunk(parts), whole.labels.chunk(parts), strict=True)
        ]
        outcomes = [step(batch, number) for number in (1, 2)]
        results.append((outcomes, weights(step)))
    (first, expected), *others = results
    for outcomes, found in others:
        for one, other in zip(first, outcomes, strict=True):
            assert other.loss.item() == pytest.approx(one.loss.item(), rel=1e-13)
            assert other.grad_norm.item() == pytest.approx(one.grad_norm.item(), rel=1e-12)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_not_finite_is_skipped(dtype: torch.dtype) -> None:
    step, calm = make_step(1, dtype), make_step(1, dtype)
    for one in (step, calm):
        one(random_batch(1), 1)
    before = weights(step)
    final_norm = step.model.final_norm.weight
    with torch.no_grad():
        kept = final_norm[0].clone()
        final_norm[0] = torch.inf
    outcome = step(random_batch(1, seed=1), 2)
    assert outcome.skipped.item() == 1 and not torch.isfinite(outcome.grad_norm)
    with torch.no_grad():
        final_norm[0] = kept
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(step).items())
    assert step.optimizer.updates == 1
    # nothing of it is left in gradients or moments
    last = [one(random_batch(1, seed=2), 3) for one in (step, calm)]
    assert torch.equal(last[0].loss, last[1].loss) and torch.equal(last[0].grad_norm, last[1].grad_norm)
    expected = weights(calm)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(step).items())


def test_a_batch_without_a_prediction_is_harmless() -> None:
    step, batch = make_step(1, weight_decay=0.0), random_batch(1)
    batch[0].labels[:] = IGNORED
    before = weights(step)
    outcome = step(batch, 1)
    assert outcome.loss.item() == 0.0 and outcome.grad_norm.item() == 0.0 and outcome.skipped.item() == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(step).items())


def test_the_rate_is_that_of_the_step() -> None:
    model = Transformer(MODEL, single_rank(), torch.float32)
    initialize(model, MODEL, 3)
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    step = TrainingStep(model, single_rank(), config, micro_batches=1, zero=0, decay_steps=20)
    before = weights(step)
    outcomes = [step(random_batch(1), 1)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(step).items()), "the first rate is 0"
    outcomes += [step(random_batch(1), number) for number in (2, 3)]
    assert [outcome.learning_rate for outcome in outcomes] == [0.0, 0.25, 0.5]
