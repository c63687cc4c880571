"""The norm layers: the same weights on every tensor rank."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from megatron.kernels.layer_norm import add_layer_norm, layer_norm
from megatron.kernels.rms_norm import add_rms_norm, rms_norm
from megatron.model.config import ModelConfig
from megatron.parallel.layers import ShardedParameter, copied_spec
from megatron.parallel.mesh import ParallelContext


class Norm(nn.Module, ABC):
    """A norm over the hidden dim; `name` is the canonical one, to which `.weight` is added."""

    def __init__(
        self, config: ModelConfig, context: ParallelContext, name: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.eps = config.norm_eps
        spec = copied_spec(context, f"{name}.weight", (config.hidden_size,))
        self.weight = ShardedParameter.empty(spec, dtype, device)

    def forward(self, hidden: torch.Tensor, branch: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden + branch, its norm), all [..., h]; without a branch hidden itself is the sum."""
        if branch is None:
            return hidden, self.normalize(hidden)
        return self.add_and_normalize(hidden, branch)

    @abstractmethod
    def normalize(self, hidden: torch.Tensor) -> torch.Tensor:
        """The norm alone, [..., h] → the same."""

    @abstractmethod
    def add_and_normalize(self, hidden: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden + branch, its norm), all [..., h]."""


class RMSNorm(Norm):
    """Root-mean-square norm (Zhang and Sennrich, 2019)."""

    def normalize(self, hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, self.weight, self.eps)

    def add_and_normalize(self, hidden: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(hidden, branch, self.weight, self.eps)


class LayerNorm(Norm):
    """Layer norm (Ba et al., 2016), with a bias."""

    def __init__(
        self, config: ModelConfig, context: ParallelContext, name: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(config, context, name, dtype, device)
        self.bias = ShardedParameter.empty(copied_spec(context, f"{name}.bias", (config.hidden_size,)), dtype, device)

    def normalize(self, hidden: torch.Tensor) -> torch.Tensor:
        return layer_norm(hidden, self.weight, self.bias, self.eps)

    def add_and_normalize(self, hidden: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return add_layer_norm(hidden, branch, self.weight, self.bias, self.eps)


class HeadNorms(nn.Module):
    """RMSNorm of each query and of each key over the elements of its head, before they are turned.

    All heads share a weight, so a tensor rank's gradient of it, that of its heads, is a part.
    """

    def __init__(
        self, config: ModelConfig, context: ParallelContext, layer: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.eps, self.head_dim = config.norm_eps, config.head_dim
        self.query, self.key = (
            ShardedParameter.empty(
                copied_spec(context, f"{layer}.{name}.weight", (config.head_dim,), partial=True), dtype, device
            )
            for name in config.family.query_key_norms
        )

    def forward(self, fused: torch.Tensor, num_heads: int, num_key_value_heads: int) -> torch.Tensor:
        """fused [s, b, (heads + 2 kv) · d] → the same, its queries and keys normed."""
        heads = fused.unflatten(-1, (-1, self.head_dim))  # [s, b, heads + 2 kv, d]
        query, key, value = heads.split([num_heads, num_key_value_heads, num_key_value_heads], dim=-2)
        normed = rms_norm(query, self.query, self.eps), rms_norm(key, self.key, self.eps)
        return torch.cat((*normed, value), dim=-2).flatten(2)


def make_norm(
    config: ModelConfig, context: ParallelContext, name: str, dtype: torch.dtype, device: torch.device
) -> Norm:
    """The norm that the model's layers have."""
    kind = LayerNorm if config.rms_norm_eps is None else RMSNorm
    return kind(config, context, name, dtype, device)
