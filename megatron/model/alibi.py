"""ALiBi (Press et al., 2022): scores are raised in proportion to the key's position, by a slope of each query head.

It is put into the products themselves, as one more element of each head: so every kernel and every way to split a
sequence computes it. The bias is Falcon's, the rule of transformers, which rounds it to bfloat16.
"""

from __future__ import annotations

import math

import torch

# Elements by which heads grow: kernels like multiples of 8.
_MORE = 8


def head_slopes(heads: int, device: torch.device) -> torch.Tensor:
    """bf16[heads]: 2^(−8i/n) for n heads, a power of 2; for other numbers the first so many of n below it, and between
    those the odd ones of 2n."""
    below = 2 ** math.floor(math.log2(heads))
    slopes = _powers(below, torch.arange(1, below + 1, device=device))
    if below < heads:
        between = _powers(2 * below, torch.arange(1, 2 * (heads - below) + 1, 2, device=device))
        slopes = torch.cat((slopes, between))
    return slopes.bfloat16()


def _powers(heads: int, exponents: torch.Tensor) -> torch.Tensor:
    return torch.full((), 2.0 ** (-8.0 / heads), device=exponents.device).pow(exponents)


def key_biases(slopes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """bf16[1 or b, heads, s]: of the keys at positions i64[1 or b, s], as bf16 arithmetic rounds them."""
    return slopes.unsqueeze(-1) * positions.unsqueeze(-2)


def with_biases(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, biases: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query [b, heads, s, d], key and value [b, kv heads, s, d], biases [1 or b, heads, s] → the three with as many
    heads, each 8 elements wider; the mixed values' first d elements are those of softmax((q · k + bias) / √d).

    Attention divides by the root of the wider size, so queries grow by the ratio of the two, and so does the 1 that
    they carry for the bias, which their keys carry.
    """
    batch, heads, length, d = query.shape
    served = heads // key.shape[1]
    key, value = (tensor.repeat_interleave(served, dim=1) if served > 1 else tensor for tensor in (key, value))
    ratio, pad = math.sqrt((d + _MORE) / d), torch.nn.functional.pad
    ones, bias = query.new_ones((batch, heads, length, 1)), biases.to(key.dtype).expand(batch, -1, -1).unsqueeze(-1)
    return (
        pad(torch.cat((query, ones), dim=-1) * ratio, (0, _MORE - 1)),
        pad(torch.cat((key, bias), dim=-1), (0, _MORE - 1)),
        pad(value, (0, _MORE)),
    )
