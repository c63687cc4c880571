"""Causal scaled-dot-product attention: torch's, which is fused already; a library's may take its place."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megatron.kernels.products import operand

# (query [b, heads, s, d], key and value [b, kv heads, s, d]) → [b, heads, s, d]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Each of the kv heads serves as many query heads; the result may be wider than what comes in."""
    return F.scaled_dot_product_attention(
        operand(query), operand(key), operand(value), is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )
