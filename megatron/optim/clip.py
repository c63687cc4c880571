"""The global gradient norm, in which every parameter counts once, and what clipping makes of it."""

from __future__ import annotations

import torch

from megatron.parallel.buckets import Bucket
from megatron.parallel.collectives import all_reduce
from megatron.parallel.mesh import ParallelContext


class GradientNorm:
    """L2 norm of the reduced gradients over all ranks of the model.

    Each rank adds the squares of the ranges it owns, less extra copies; the sum goes over the model, and over the data
    ranks too where these own different ranges.
    """

    def __init__(self, buckets: list[Bucket], context: ParallelContext, *, zero: int) -> None:
        self._axis = context.world if zero else context.model
        self._views = [
            view
            for bucket in buckets
            for _, piece, view in bucket.owned_pieces(bucket.owned_gradients)
            if piece.copy_rank == 0
        ]
        self._like = buckets[0].gradients

    def compute(self) -> torch.Tensor:
        """The norm as a scalar on the device, in the gradients' dtype."""
        total = self._like.new_zeros(())
        if self._views:
            total = torch.stack(torch._foreach_norm(self._views)).square().sum()
        return all_reduce(total, self._axis).sqrt()


def clip_divisor(norm: torch.Tensor, divisor: torch.Tensor, limit: float) -> torch.Tensor:
    """By what to divide gradients so that, once divided by `divisor`, their norm is at most `limit` (0: no limit).

    `norm` is the norm of the undivided gradients. The small constant is the one that torch and Megatron add.
    """
    if limit <= 0:
        return divisor
    return divisor * torch.clamp((norm / divisor + 1e-6) / limit, min=1.0)
