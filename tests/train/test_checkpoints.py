"""Starting from a source: every element of weights, masters and moments has a defined value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.source import open_source
from megatron.config.optimizer import OptimizerConfig
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import single_rank
from megatron.train.checkpoints import start_from
from megatron.train.origin import Origin
from megatron.train.step import TrainingStep

from .conftest import MODEL, random_batch

PADDED = replace(MODEL, vocab_size=50)  # 14 rows of padding


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """What `torch.empty` gives is filled with NaN, so that whatever is never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("fresh_memory_is_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["folder", "random"])
@pytest.mark.parametrize("tied", [False, True])
def test_nothing_is_left_undefined(
    huggingface_folder: Callable[..., Path], dtype: torch.dtype, source: str, tied: bool
) -> None:
    config = replace(PADDED, tie_word_embeddings=tied)
    step = TrainingStep(
        Transformer(config, single_rank(), dtype),
        single_rank(),
        OptimizerConfig(learning_rate=1e-2),
        micro_batches=1,
        zero=0,
        decay_steps=5,
    )
    opened = open_source(huggingface_folder(model=config)) if source == "folder" else None
    start_from(Origin(opened, False, config, config.to_huggingface()), step, seed=1)
    (batch,) = random_batch(1)
    batch.tokens.clamp_(max=49), batch.labels.clamp_(max=49)
    for number in (1, 2, 3):
        outcome = step([batch], number)
        assert torch.isfinite(outcome.loss) and torch.isfinite(outcome.grad_norm), number
    assert step.optimizer.updates == 3
    head = step.model.head.weight
    assert (head[50:] == 0).all() and head[:50].isfinite().all(), "padding rows stay zero"
