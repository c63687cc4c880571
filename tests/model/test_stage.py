"""Sums of losses and token counts of a stage stay exact where the model itself is bf16."""

from __future__ import annotations

import pytest
import torch

from megatron.data.loader import MicroBatch
from megatron.model.config import ModelConfig
from megatron.model.initialize import initialize
from megatron.model.loss import IGNORED
from megatron.model.stage import run_micro_batches
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import single_rank
from megatron.parallel.pipeline.schedule import Schedule, forward_only, one_forward_one_backward

MODEL = ModelConfig(61, 24, 40, 1, 4, 2, 6, initializer_range=0.3)


def make_model(dtype: torch.dtype) -> Transformer:
    model = Transformer(MODEL, single_rank(), dtype)
    initialize(model, MODEL, 3)
    return model


def make_batches() -> list[MicroBatch]:
    """Three micro-batches of 2 x 100 tokens of which 599 carry loss: bf16 counts exactly only up to 256."""
    samples = torch.randint(0, MODEL.vocab_size, (3, 2, 101), generator=torch.Generator().manual_seed(0))
    batches = [MicroBatch(sample[:, :-1], sample[:, 1:].clone()) for sample in samples]
    batches[1].labels[0, 7] = IGNORED
    return batches


def exact_losses(model: Transformer, batch: MicroBatch) -> torch.Tensor:
    """Loss of each token in float64, from the very logits that the model gives."""
    with torch.no_grad():
        logits = model(batch.tokens).transpose(0, 1)[..., : MODEL.vocab_size].double()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="none"
    )


@pytest.mark.parametrize("plan", [forward_only(1, 3), one_forward_one_backward(1, 3)], ids=["forward", "step"])
@pytest.mark.parametrize(
    ("dtype", "totals"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_totals_are_of_statistics_precision(plan: Schedule, dtype: torch.dtype, totals: torch.dtype) -> None:
    model, batches = make_model(dtype), make_batches()
    found = run_micro_batches(model, batches, plan[0])
    assert found.dtype == totals and found.shape == (2,) and not found.requires_grad
    assert found[1].item() == 599
    expected = torch.stack([exact_losses(model, batch).sum() for batch in batches]).sum()
    # A few roundings, relative to sums of hundreds of positive terms. The loss may see logits that are not rounded to
    # bf16 as the model's are, which cancels in the sum; a sum taken in bf16 would be off by more than 2e-3.
    allowed = 3e-4 if dtype is torch.bfloat16 else 8 * torch.finfo(totals).eps
    assert found[0].item() == pytest.approx(expected.item(), rel=allowed)
