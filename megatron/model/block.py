"""One decoder layer: attention and feed-forward, each behind a norm and added to the residual stream."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron.config.train import Recompute
from megatron.model.attention import Attention
from megatron.model.config import ModelConfig
from megatron.model.mlp import FeedForward
from megatron.model.norm import Norm, make_norm
from megatron.model.places import Places
from megatron.model.recompute import computed_again
from megatron.parallel.mesh import ParallelContext


class Block(nn.Module):
    """Decoder layer number `index` (counted over the whole model)."""

    def __init__(
        self,
        config: ModelConfig,
        context: ParallelContext,
        index: int,
        dtype: torch.dtype,
        device: torch.device,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        self.recompute = recompute
        family, layer = config.family, config.family.layer(index)
        self.attention_norm = make_norm(config, context, f"{layer}.{family.attention_norm}", dtype, device)
        selective = recompute == "selective"
        self.attention = Attention(config, context, index, dtype, device, recompute_order=selective)
        self.feed_forward_norm = make_norm(config, context, f"{layer}.{family.feed_forward_norm}", dtype, device)
        self.feed_forward = FeedForward(config, context, layer, dtype, device, recompute_product=selective)

    def forward(
        self, hidden: torch.Tensor, branch: torch.Tensor | None, places: Places
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream and what is still to be added to it, both [s, b, h] ([s/tp, b, h] under sequence
        parallelism) → the same after this layer. The sum is taken with the norm that follows, in one pass."""
        if self.recompute == "full" and torch.is_grad_enabled():
            return checkpoint(self._layer, hidden, branch, places, use_reentrant=False, preserve_rng_state=False)
        return self._layer(hidden, branch, places)

    def _layer(
        self, hidden: torch.Tensor, branch: torch.Tensor | None, places: Places
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, normed = self.attention_norm(hidden, branch)
        with self._norm_again(self.attention_norm, hidden, normed):
            branch = self.attention(normed, places)
        hidden, normed = self.feed_forward_norm(hidden, branch)
        with self._norm_again(self.feed_forward_norm, hidden, normed):
            return hidden, self.feed_forward(normed)

    def _norm_again(self, norm: Norm, hidden: torch.Tensor, normed: torch.Tensor) -> AbstractContextManager[None]:
        """Within it, what would keep `normed` for the backward pass has it computed from `hidden` there."""
        hidden = hidden.detach()
        return computed_again(normed, lambda: norm.normalize(hidden), active=self.recompute == "selective")
