"""The norm layer: the same weight on every tensor rank."""

from __future__ import annotations

import torch
from torch import nn

from megatron.kernels.rms_norm import add_rms_norm, rms_norm
from megatron.model.config import ModelConfig
from megatron.parallel.layers import ShardedParameter
from megatron.parallel.layout import Piece, Region, ShardSpec
from megatron.parallel.mesh import ParallelContext


class Norm(nn.Module):
    """RMSNorm over the hidden dim."""

    def __init__(
        self, config: ModelConfig, context: ParallelContext, name: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        spec = norm_spec(config, context, name)
        self.weight = ShardedParameter.create(torch.empty(spec.shape, dtype=dtype, device=device), spec)

    def forward(self, hidden: torch.Tensor, branch: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden + branch, its norm), all [..., h]; without a branch hidden itself is the sum."""
        if branch is None:
            return hidden, self.normalize(hidden)
        return add_rms_norm(hidden, branch, self.weight, self.eps)

    def normalize(self, hidden: torch.Tensor) -> torch.Tensor:
        """The norm alone, [..., h] → the same."""
        return rms_norm(hidden, self.weight, self.eps)


def norm_spec(config: ModelConfig, context: ParallelContext, name: str) -> ShardSpec:
    """The norm weight `name`: a copy on each tensor rank. Under sequence parallelism each rank sees a part of the
    tokens, so its gradient is a part; otherwise all ranks compute the whole gradient."""
    region = Region.whole(name, (config.hidden_size,))
    if context.tp.size == 1:
        return ShardSpec(region.shape, (Piece(region, (0,)),))
    piece = Piece(region, (0,), copy_axis="tp", copy_rank=context.tp.rank, partial=context.sequence)
    return ShardSpec(region.shape, (piece,))
