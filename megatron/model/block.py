"""One decoder layer: attention and feed-forward, each behind a norm and added to the residual stream."""

from __future__ import annotations

import torch
from torch import nn

from megatron.model.attention import Attention
from megatron.model.config import ModelConfig
from megatron.model.mlp import FeedForward
from megatron.model.norm import Norm
from megatron.parallel.mesh import ParallelContext


class Block(nn.Module):
    """Decoder layer number `index` (counted over the whole model)."""

    def __init__(
        self, config: ModelConfig, context: ParallelContext, index: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        prefix = f"model.layers.{index}"
        self.attention_norm = Norm(config, context, f"{prefix}.input_layernorm.weight", dtype, device)
        self.attention = Attention(config, context, f"{prefix}.self_attn", dtype, device)
        self.feed_forward_norm = Norm(config, context, f"{prefix}.post_attention_layernorm.weight", dtype, device)
        self.feed_forward = FeedForward(config, context, f"{prefix}.mlp", dtype, device)

    def forward(
        self, hidden: torch.Tensor, branch: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream and what is still to be added to it, both [s, b, h] ([s/tp, b, h] under sequence
        parallelism) → the same after this layer. The sum is taken with the norm that follows, in one pass."""
        hidden, normed = self.attention_norm(hidden, branch)
        hidden, normed = self.feed_forward_norm(hidden, self.attention(normed, cos, sin))
        return hidden, self.feed_forward(normed)
