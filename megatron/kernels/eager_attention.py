"""Causal attention that keeps the probabilities of all pairs: as systems before flash attention computed it.

For reproducing and planning those (SC'21's Table 1 was measured so): the memory and the traffic of scores [b, heads, s,
s] are what this is for. It is slower than `causal_attention` and gives the same numbers.
"""

from __future__ import annotations

import math

import torch

from megatron.kernels.products import operand


def eager_causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """query [b, heads, s, d]; key and value [b, kv heads, s, d], each serving as many query heads → [b, heads, s, d].

    The softmax is computed in max(float32, dtype) and rounded to the operands' dtype, in which it is kept.
    """
    query, key, value = operand(query), operand(key), operand(value)
    served = query.shape[1] // key.shape[1]
    if served > 1:
        key, value = key.repeat_interleave(served, dim=1), value.repeat_interleave(served, dim=1)
    scores = query @ key.transpose(-1, -2) * (1.0 / math.sqrt(query.shape[-1]))  # [b, heads, s, s]
    length = query.shape[2]
    later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(dim=-1) @ value
