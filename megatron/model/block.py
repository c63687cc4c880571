"""One decoder layer: attention and feed-forward, behind norms, added to the residual stream one after the other or, in
parallel layers (Wang and Komatsuzaki, 2021), at once."""

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
        layer = config.family.layer(index)
        self.parallel = config.parallel_norms is not None
        first, *second = (f"{layer}.{name}" for name in config.family.layer_norms(config))
        self.attention_norm = make_norm(config, context, first, dtype, device)
        selective = recompute == "selective"
        self.attention = Attention(config, context, index, dtype, device, recompute_order=selective)
        self.feed_forward_norm = make_norm(config, context, second[0], dtype, device) if second else None
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
            if self.feed_forward_norm is None:
                return hidden, branch + self.feed_forward(normed)
        if self.parallel:
            normed = self.feed_forward_norm.normalize(hidden)
        else:
            hidden, normed = self.feed_forward_norm(hidden, branch)
        with self._norm_again(self.feed_forward_norm, hidden, normed):
            product = self.feed_forward(normed)
        return hidden, branch + product if self.parallel else product

    def _norm_again(self, norm: Norm, hidden: torch.Tensor, normed: torch.Tensor) -> AbstractContextManager[None]:
        """Within it, what would keep `normed` for the backward pass has it computed from `hidden` there."""
        hidden = hidden.detach()
        return computed_again(normed, lambda: norm.normalize(hidden), active=self.recompute == "selective")
