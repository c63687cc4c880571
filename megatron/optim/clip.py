"""The global gradient norm, in which every parameter counts once, and what clipping makes of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron.kernels.squared_norm import squared_norm
from megatron.parallel.buckets import ALIGNMENT, Bucket
from megatron.parallel.collectives import all_reduce
from megatron.parallel.mesh import ParallelContext


class GradientNorm:
    """L2 norm of the reduced gradients over all ranks of the model.

    Each rank adds the squares of the ranges it owns, less extra copies; the sum goes over the model, and over the data
    ranks too where these own different ranges.
    """

    def __init__(self, buckets: list[Bucket], context: ParallelContext) -> None:
        divided = context.shard.size > 1
        self._axis = context.world if divided else context.model
        self._counts = context.replica.size if divided else 1  # how often the sum over the axis has each range
        self._runs = [run for bucket in buckets for run in _counted_runs(bucket)]
        self._like = buckets[0].gradients

    def compute(self) -> torch.Tensor:
        """The norm as a scalar on the device, in the gradients' dtype."""
        total = self._like.new_zeros(())
        if self._runs:
            total = torch.stack([squared_norm(run) for run in self._runs]).sum()
        return (all_reduce(total, self._axis) / self._counts).sqrt()


def _counted_runs(bucket: Bucket) -> Iterator[torch.Tensor]:
    """The parts of the owned gradients that this rank counts, as few flat runs as there can be.

    Neighbours join over the gap between them, which is zero.
    """
    flat, runs, open_run = bucket.owned_gradients, list[tuple[int, int]](), False
    for _, piece, view in bucket.owned_pieces(flat):
        start = int(view.storage_offset()) - int(flat.storage_offset())
        stop = start + view.numel()
        assert view.is_contiguous(), "a piece of a parameter is whole rows"
        if piece.copy_rank == 0 and open_run and start - runs[-1][1] < ALIGNMENT:
            runs[-1] = (runs[-1][0], stop)
        elif piece.copy_rank == 0:
            runs.append((start, stop))
        open_run = piece.copy_rank == 0
    return (flat[start:stop] for start, stop in runs)


def clip_divisor(norm: torch.Tensor, divisor: torch.Tensor, limit: float) -> torch.Tensor:
    """By what to divide gradients so that, once divided by `divisor`, their norm is at most `limit` (0: no limit).

    `norm` is the norm of the undivided gradients. The small constant is the one that torch and Megatron add.
    """
    if limit <= 0:
        return divisor
    return divisor * torch.clamp((norm / divisor + 1e-6) / limit, min=1.0)
