"""Runs micro-batches through one rank's part of the model: what the pipeline engine calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from megatron.model.loss import IGNORED
from megatron.model.transformer import ChunkedTransformer, Transformer
from megatron.parallel.pipeline.engine import Activations, run_stage
from megatron.parallel.pipeline.schedule import Action
from megatron.parallel.weight_gradient import LaterProducts


class Batch(Protocol):
    """A micro-batch: `tokens` and `labels` i64[b, s], labels possibly IGNORED."""

    @property
    def tokens(self) -> torch.Tensor: ...

    @property
    def labels(self) -> torch.Tensor: ...


def run_micro_batches(
    model: Transformer | ChunkedTransformer,
    micro_batches: Sequence[Batch],
    actions: Sequence[Action],
    later: LaterProducts | None = None,
) -> torch.Tensor:
    """Run this stage's actions over the micro-batches, all of one shape and on the model's device.

    Returns [loss sum, number of loss-carrying tokens] of this data rank, in max(float32, dtype): both are zero except
    on the last stage. Gradients are those of the loss *sum*.
    """
    context, weight, chunks = model.context, next(model.parameters()), model.chunks
    batch, sequence_length = micro_batches[0].tokens.shape
    share = sequence_length // context.tp.size if context.sequence else sequence_length
    activations = Activations((share, batch, model.config.hidden_size), weight.dtype, weight.device)

    counts: list[torch.Tensor] = []

    def stage(number: int, chunk: int, hidden: torch.Tensor | None) -> torch.Tensor:
        micro_batch = micro_batches[number]
        if chunks[chunk].is_last:
            counts.append(micro_batch.labels.ne(IGNORED).sum())
        return chunks[chunk](micro_batch.tokens, hidden, micro_batch.labels)

    loss = run_stage(actions, stage, context, activations, chunks=len(chunks), later=later)
    count = torch.stack(counts).sum().to(loss.dtype) if counts else torch.zeros_like(loss)
    return torch.stack((loss, count))
