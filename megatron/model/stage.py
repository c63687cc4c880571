"""Runs micro-batches through one rank's part of the model: what the pipeline engine calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from megatron.kernels.runs import Documents
from megatron.model.loss import IGNORED
from megatron.model.transformer import ChunkedTransformer, Transformer
from megatron.parallel.context import local_part
from megatron.parallel.mesh import Axis
from megatron.parallel.pipeline.engine import Activations, run_stage
from megatron.parallel.pipeline.schedule import Action
from megatron.parallel.weight_gradient import LaterProducts


class Batch(Protocol):
    """A micro-batch of whole samples: `tokens` and `labels` i64[b, s], labels possibly IGNORED; the `documents` within
    which attention and positions stay, None where a sample is one."""

    @property
    def tokens(self) -> torch.Tensor: ...

    @property
    def labels(self) -> torch.Tensor: ...

    @property
    def documents(self) -> Documents | None: ...


def run_micro_batches(
    model: Transformer | ChunkedTransformer,
    micro_batches: Sequence[Batch],
    actions: Sequence[Action],
    later: LaterProducts | None = None,
) -> torch.Tensor:
    """Run this stage's actions over the micro-batches, all of one shape and on the model's device.

    Under context parallelism each rank works on its part of them. Returns [loss sum, number of loss-carrying tokens] of
    this rank's tokens, in max(float32, dtype): both are zero except
    on the last stage. Gradients are those of the loss *sum*.
    """
    context, weight, chunks = model.context, next(model.parameters()), model.chunks
    batch, sequence_length = micro_batches[0].tokens.shape
    share = sequence_length // context.cp.size // (context.tp.size if context.sequence else 1)
    activations = Activations((share, batch, model.config.hidden_size), weight.dtype, weight.device)

    counts: list[torch.Tensor] = []

    def stage(number: int, chunk: int, hidden: torch.Tensor | None) -> torch.Tensor:
        micro_batch = micro_batches[number]
        tokens, labels = (local_part(whole, context.cp) for whole in (micro_batch.tokens, micro_batch.labels))
        if chunks[chunk].is_last:
            counts.append(labels.ne(IGNORED).sum())
        return chunks[chunk](tokens, hidden, labels, _local_documents(micro_batch.documents, context.cp))

    loss = run_stage(actions, stage, context, activations, chunks=len(chunks), later=later)
    count = torch.stack(counts).sum().to(loss.dtype) if counts else torch.zeros_like(loss)
    return torch.stack((loss, count))


def _local_documents(documents: Documents | None, cp: Axis) -> Documents | None:
    """Of this rank's tokens; their starts are still counted in whole samples."""
    return None if documents is None else Documents(local_part(documents.starts, cp), documents.most)
