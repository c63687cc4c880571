"""Rotary position embedding (Su et al., 2021) in half-split order, fused with splitting qkv into heads."""

from __future__ import annotations

from typing import Any

import torch

from megatron.kernels.native import Kernel
from megatron.kernels.numerics import statistics_dtype
from megatron.kernels.operation import define, define_backward

_SPLIT, _JOIN = Kernel("rotary_split", "ppppppiiiii"), Kernel("rotary_join", "ppppppiiiii")

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def rotary_frequencies(turned: int, theta: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """theta^(−2i/turned) for each pair of the `turned` elements of a head that are turned: [pairs], an odd one counting
    as a pair. Computed in max(float32, dtype), as transformers does in float32."""
    exponents = torch.arange(0, turned, 2, dtype=torch.int64, device=device).to(statistics_dtype(dtype)) / turned
    return 1.0 / (theta**exponents)


def angle_tables(sequence_length: int, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position · frequency [d/2], each [sequence_length, d], both halves alike, in the dtype given.

    A frequency of 0 leaves its pair of elements as it is.
    """
    positions = torch.arange(sequence_length, dtype=torch.int64, device=frequencies.device).to(frequencies.dtype)
    angles = torch.outer(positions, frequencies).repeat(1, 2)  # [s, d]
    return angles.cos(), angles.sin()


def rotary_tables(
    sequence_length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position · theta^(−2i/d), each [sequence_length, head_dim], both halves alike."""
    return angle_tables(sequence_length, rotary_frequencies(head_dim, theta, dtype, device))


def rotary_split(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, num_key_value_heads: int
) -> Heads:
    """qkv [s, b, (heads + 2 kv) · d] → query [b, heads, s, d], key and value [b, kv, s, d].

    Query and key are turned by the angles of their position, cos and sin [s, d], or [b, s, d] where samples differ, in
    the tables' dtype.
    """
    return _ROTARY_SPLIT(qkv, cos, sin, num_heads, num_key_value_heads)


def rotary_split_reference(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, num_key_value_heads: int
) -> Heads:
    """The formula itself."""
    heads = qkv.unflatten(-1, (num_heads + 2 * num_key_value_heads, -1)).permute(1, 2, 0, 3)  # [b, n, s, d]
    query, key, value = heads.split([num_heads, num_key_value_heads, num_key_value_heads], dim=1)
    return _turn(query, cos, sin), _turn(key, cos, sin), value.contiguous()


def rotary_join_reference(
    grad_query: torch.Tensor, grad_key: torch.Tensor, grad_value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The gradient of qkv: turned back, since a rotation's transpose is the opposite rotation."""
    heads = torch.cat((_turn(grad_query, cos, -sin), _turn(grad_key, cos, -sin), grad_value), dim=1)
    return heads.permute(2, 0, 1, 3).flatten(2).contiguous()  # [s, b, (heads + 2 kv) · d]


def _turn(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (i, i + d/2) of heads [b, n, s, d] by its angle."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (heads * cos + turned * sin).to(heads.dtype)


def _native(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, num_key_value_heads: int
) -> Heads | None:
    query, key, value = _fake(qkv, cos, sin, num_heads, num_key_value_heads)
    size = (num_heads, num_key_value_heads, query.shape[-1])

    def split(part: torch.Tensor, *rest: torch.Tensor) -> bool:
        part = part.contiguous()
        return _SPLIT(part, part, *rest, *part.shape[:2], *size)

    if cos.dim() == 2:
        done = split(qkv, cos, sin, query, key, value)
    else:  # a kernel has one table for all samples: they go one by one
        done = all(
            split(part, *rest) for part, *rest in zip(qkv.split(1, dim=1), cos, sin, query, key, value, strict=True)
        )
    return (query, key, value) if done else None


def _native_join(
    grad_query: torch.Tensor, grad_key: torch.Tensor, grad_value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor | None:
    batch, heads, sequence_length, head_dim = grad_query.shape
    size = (heads, grad_key.shape[1], head_dim)
    gradients = (grad_query.contiguous(), grad_key.contiguous(), grad_value.contiguous())
    grad_qkv = _fake_join(grad_query, grad_key, grad_value, cos, sin)
    if cos.dim() == 2:
        return grad_qkv if _JOIN(grad_qkv, *gradients, cos, sin, grad_qkv, sequence_length, batch, *size) else None
    for sample, part in enumerate(zip(*gradients, cos, sin, strict=True)):
        joined = grad_qkv.new_empty((sequence_length, 1, grad_qkv.shape[-1]))
        if not _JOIN(joined, *part, joined, sequence_length, 1, *size):
            return None
        grad_qkv[:, sample : sample + 1] = joined
    return grad_qkv


def _fake(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, num_key_value_heads: int) -> Heads:
    sequence_length, batch, width = qkv.shape
    tail = (sequence_length, width // (num_heads + 2 * num_key_value_heads))
    query, key, value = (qkv.new_empty((batch, n, *tail)) for n in (num_heads, *2 * (num_key_value_heads,)))
    return query, key, value


def _fake_join(
    grad_query: torch.Tensor, grad_key: torch.Tensor, grad_value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    batch, heads, sequence_length, head_dim = grad_query.shape
    return grad_query.new_empty((sequence_length, batch, (heads + 2 * grad_key.shape[1]) * head_dim))


_ROTARY_SPLIT = define(
    "rotary_split(Tensor qkv, Tensor cos, Tensor sin, int num_heads, int num_key_value_heads)"
    " -> (Tensor, Tensor, Tensor)",
    reference=rotary_split_reference,
    native=_native,
    fake=_fake,
)
_ROTARY_JOIN = define(
    "rotary_join(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor cos, Tensor sin) -> Tensor",
    reference=rotary_join_reference,
    native=_native_join,
    fake=_fake_join,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Heads) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _backward(
    ctx: Any, grad_query: torch.Tensor, grad_key: torch.Tensor, grad_value: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    return _ROTARY_JOIN(grad_query, grad_key, grad_value, *ctx.saved_tensors), None, None, None, None


define_backward("rotary_split", _backward, _keep)
