"""Runs micro-batches through one rank's part of the model: what the pipeline engine calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from megatron.kernels.runs import Documents
from megatron.model.loss import IGNORED, Predictions
from megatron.model.transformer import ChunkedTransformer, Transformer
from megatron.parallel.context import local_part
from megatron.parallel.mesh import Axis
from megatron.parallel.pipeline.engine import Activations, run_stage
from megatron.parallel.pipeline.schedule import Action
from megatron.parallel.weight_gradient import LaterProducts


class Batch(Protocol):
    """A micro-batch of whole samples: `tokens` and `labels` i64[b, s], labels possibly IGNORED; the `documents` within
    which attention and positions stay, None where a sample is one; `loss_weights` [b, s], None where all labels count
    alike."""

    @property
    def tokens(self) -> torch.Tensor: ...

    @property
    def labels(self) -> torch.Tensor: ...

    @property
    def documents(self) -> Documents | None: ...

    @property
    def loss_weights(self) -> torch.Tensor | None: ...


Measure = Callable[[int, Predictions], None]


def run_micro_batches(
    model: Transformer | ChunkedTransformer,
    micro_batches: Sequence[Batch],
    actions: Sequence[Action],
    later: LaterProducts | None = None,
    measure: Measure | None = None,
) -> torch.Tensor:
    """Run this stage's actions over the micro-batches, which are on the model's device.

    Their lengths may differ. Under context parallelism each rank works on its part of them. Returns [loss sum, sum of
    the loss's weights: the number of loss-carrying tokens where all count alike] of this rank's tokens, in
    max(float32, dtype): both are zero except on the last stage. Gradients are those of the loss *sum*. `measure` is
    told of the predictions [s, b] for each micro-batch by its number, where nothing is differentiated.
    """
    context, weight, chunks = model.context, next(model.parameters()), model.chunks
    division = context.cp.size * (context.tp.size if context.sequence else 1)
    shapes = []
    for micro_batch in micro_batches:
        batch, length = micro_batch.tokens.shape
        assert length % division == 0, (length, division)
        shapes.append((length // division, batch, model.config.hidden_size))
    activations = Activations(shapes, weight.dtype, weight.device)

    counts: list[torch.Tensor] = []

    def stage(number: int, chunk: int, hidden: torch.Tensor | None) -> torch.Tensor:
        micro_batch = micro_batches[number]
        tokens, labels = (local_part(whole, context.cp) for whole in (micro_batch.tokens, micro_batch.labels))
        documents = _local_documents(micro_batch.documents, context.cp)
        weights = None if micro_batch.loss_weights is None else local_part(micro_batch.loss_weights, context.cp)
        if chunks[chunk].is_last:
            counts.append(_total_weight(labels, weights))
        told = None if measure is None else partial(measure, number)
        return chunks[chunk](tokens, hidden, labels, documents, weights, told)

    loss = run_stage(actions, stage, context, activations, chunks=len(chunks), later=later)
    count = torch.stack(counts).sum().to(loss.dtype) if counts else torch.zeros_like(loss)
    return torch.stack((loss, count))


def _total_weight(labels: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Exact, so that it does not depend on how labels are split."""
    carries = labels.ne(IGNORED)
    return carries.sum() if weights is None else (weights * carries).sum(dtype=torch.float64)


def _local_documents(documents: Documents | None, cp: Axis) -> Documents | None:
    """Of this rank's tokens; their starts are still counted in whole samples."""
    return None if documents is None else Documents(local_part(documents.starts, cp), documents.most)
