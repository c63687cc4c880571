"""Scaled-dot-product attention in which each query attends to one run of keys.

A run `start … stop − 1` for each query is what every mask here comes to: causal (all up to itself), a document of a
packed sample (from its first token up to itself), a part of a sequence that is split over ranks (what of the run lies
in the part). Memory grows with the sequence, not with its square. With the log-sum-exp of each query, results over
several parts of the keys can be put together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from megatron.kernels import native
from megatron.kernels.native import Kernel
from megatron.kernels.numerics import statistics_dtype
from megatron.kernels.operation import define, define_backward
from megatron.kernels.products import operand
from megatron.utils.device import cpu_multiplies_bfloat16

# (query [b, heads, s, d], key and value [b, kv heads, s, d]) → [b, heads, s, d]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

Bound = torch.Tensor | None

# Queries whose scores exist at once in the reference.
_BLOCK = 128

# As csrc/cpu/attention.h has them: heads that the kernels take, and the multiple to which rows of gradients are wider.
_LARGEST_HEAD, _ROW_MULTIPLE = 256, 32
_FORWARD, _BACKWARD = Kernel("attention", "pppppppiiiiii"), Kernel("attention_backward", "pppppppppppiiiiiii")


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """torch's own, so that logits are those of `transformers` but for the rest of the model.

    Each of the kv heads serves as many query heads; the result may be wider than what comes in.
    """
    if query.device.type == "meta":  # where torch knows no fused operation, and would take one apart
        return _ATTENTION(query, key, value, None, None)[0]
    return F.scaled_dot_product_attention(
        operand(query), operand(key), operand(value), is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )


def compiled_causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The same by the compiled kernel for the CPU, where there is one and it is the faster: nearer to the exact result,
    and other roundings than torch's."""
    if _compiled_is_faster(query):
        return _ATTENTION(query, key, value, None, None)[0]
    return causal_attention(query, key, value)


def _compiled_is_faster(query: torch.Tensor) -> bool:
    """The kernel computes in float32: where there are instructions for bfloat16 torch's is faster with that."""
    if query.device.type != "cpu" or not native.in_use("cpu") or query.shape[-1] > _LARGEST_HEAD:
        return False
    return query.dtype in (torch.float32, torch.float64) or (
        query.dtype is torch.bfloat16 and not cpu_multiplies_bfloat16()
    )


def ranged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [b, heads, s, d]; key and value [b, kv heads, t, d]; start and stop i32[b, s], 0 ≤ both ≤ t: query i of
    sample b attends to the keys start[b, i] … stop[b, i] − 1, with a window to the last so many of them.

    The mixed values lie in memory as [s, b, heads, d], so that joining the heads of a position moves nothing.
    Returns the mixed values [b, heads, s, d] and the log-sum-exp of the scaled scores [b, heads, s] in
    max(float32, dtype). A query without keys gets 0 and minus infinity. No gradient flows through the log-sum-exp.
    """
    return _ATTENTION(query, key, value, start, stop, window)


def ranged_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mixed: torch.Tensor,
    log_sum_exp: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value from that of the mixed values.

    `mixed` and `log_sum_exp` may be those over more keys than are given: then the gradients are the parts that these
    keys contribute.
    """
    return _ATTENTION_BACKWARD(grad, query, key, value, mixed, log_sum_exp, start, stop, window)


def ranged_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: Bound = None,
    stop: Bound = None,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula itself, a block of queries at a time. Without start and stop: causal."""
    mixed, log_sum_exp = _fake(query, key, value)
    for block, keys, scores in _scores(query, key, _narrowed(start, stop, window), stop):
        total = scores.logsumexp(dim=-1)
        log_sum_exp[:, :, block] = total
        probabilities = _probabilities(scores, total)
        mixed[:, :, block] = (probabilities @ _per_query_head(value, query)[:, :, keys]).to(mixed.dtype)
    return mixed, log_sum_exp


def ranged_attention_backward_reference(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mixed: torch.Tensor,
    log_sum_exp: torch.Tensor,
    start: Bound = None,
    stop: Bound = None,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dV = Pᵀ dO; dS = P ∘ (dO Vᵀ − Σ dO ∘ O); dQ = dS K, dK = dSᵀ Q, both by the scale (Dao et al., 2022)."""
    dtype, scale = statistics_dtype(query.dtype), 1.0 / math.sqrt(query.shape[-1])
    grad, mixed, wide_query = grad.to(dtype), mixed.to(dtype), query.to(dtype)
    keys_of, values_of = _per_query_head(key, query), _per_query_head(value, query)
    grad_query, grad_key, grad_value = (torch.zeros_like(wide) for wide in (wide_query, keys_of, values_of))
    dot = (grad * mixed).sum(dim=-1, keepdim=True)
    for block, keys, scores in _scores(query, key, _narrowed(start, stop, window), stop):
        probabilities = _probabilities(scores, log_sum_exp[:, :, block])
        grad_value[:, :, keys] += probabilities.transpose(-1, -2) @ grad[:, :, block]
        grad_scores = grad[:, :, block] @ values_of[:, :, keys].transpose(-1, -2)
        grad_scores = probabilities * (grad_scores - dot[:, :, block]) * scale
        grad_query[:, :, block] = grad_scores @ keys_of[:, :, keys]
        grad_key[:, :, keys] += grad_scores.transpose(-1, -2) @ wide_query[:, :, block]
    groups = (key.shape[1], query.shape[1] // key.shape[1])
    grad_key, grad_value = (g.unflatten(1, groups).sum(dim=2).to(key.dtype) for g in (grad_key, grad_value))
    return grad_query.to(query.dtype), grad_key, grad_value


def _scores(
    query: torch.Tensor, key: torch.Tensor, start: Bound, stop: Bound
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(queries, keys, scaled scores) of each block of queries that has any keys; −∞ outside of the runs."""
    keys_of, scale = _per_query_head(key, query), 1.0 / math.sqrt(query.shape[-1])
    if start is None or stop is None:
        stop = torch.arange(1, query.shape[2] + 1, device=query.device).clamp_(max=key.shape[2])
        stop = stop.expand(query.shape[0], -1)
        start = torch.zeros_like(stop)
    for first in range(0, query.shape[2], _BLOCK):
        block = slice(first, min(first + _BLOCK, query.shape[2]))
        low, high = start[:, block], stop[:, block]
        keys = slice(int(low.min()), max(int(low.min()), int(high.max())))
        scores = query[:, :, block].to(keys_of.dtype) @ keys_of[:, :, keys].transpose(-1, -2) * scale
        place = torch.arange(keys.start, keys.stop, device=key.device)
        inside = (place >= low.unsqueeze(-1)) & (place < high.unsqueeze(-1))
        yield block, keys, scores.masked_fill_(~inside.unsqueeze(1), -torch.inf)


def _probabilities(scores: torch.Tensor, log_sum_exp: torch.Tensor) -> torch.Tensor:
    """exp(score − log-sum-exp); 0 in rows without keys, where that would be −∞ − −∞."""
    return (scores - log_sum_exp.unsqueeze(-1).clamp(min=torch.finfo(scores.dtype).min)).exp_()


def _per_query_head(keys: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """[b, kv heads, t, d] → [b, heads, t, d] in the statistics' dtype."""
    return keys.to(statistics_dtype(query.dtype)).repeat_interleave(query.shape[1] // keys.shape[1], dim=1)


def _narrowed(start: Bound, stop: Bound, window: int | None) -> Bound:
    """The first key of each query within its window."""
    if window is None:
        return start
    assert start is not None and stop is not None
    return torch.maximum(start, stop - window)


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, queries, d = query.shape
    mixed = query.new_empty((queries, batch, heads, d)).permute(1, 2, 0, 3)
    return mixed, query.new_empty((batch, heads, queries), dtype=statistics_dtype(query.dtype))


def _native(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: Bound, stop: Bound, window: int | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if query.device.type != "cpu":
        return None
    mixed, log_sum_exp = _fake(query, key, value)
    inputs = (*_contiguous(query, key, value), *_bounds(_narrowed(start, stop, window), stop))
    done = _FORWARD(query, *inputs, mixed, log_sum_exp, *_sizes(query, key))
    return (mixed, log_sum_exp) if done else None


def _native_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mixed: torch.Tensor,
    log_sum_exp: torch.Tensor,
    start: Bound,
    stop: Bound,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    if query.device.type != "cpu":
        return None
    # What was put together of several parts may be wider than they are: then so is the arithmetic.
    dtype, d = mixed.dtype, query.shape[-1]
    inputs = _contiguous(*(each.to(dtype) for each in (query, key, value)))
    outputs = _contiguous(*(each.to(dtype).permute(2, 0, 1, 3) for each in (grad, mixed)))
    row = -(-d // _ROW_MULTIPLE) * _ROW_MULTIPLE
    grad_query = query.new_empty(query.shape, dtype=dtype)
    grad_key, grad_value = (key.new_empty((*key.shape[:-1], row), dtype=statistics_dtype(dtype)) for _ in (key, value))
    upstream, mixed, log_sum_exp = (*outputs, log_sum_exp.contiguous())
    bounds = _bounds(_narrowed(start, stop, window), stop)
    words = (upstream, *inputs, mixed, log_sum_exp, *bounds, grad_query, grad_key, grad_value)
    if not _BACKWARD(grad_query, *words, *_sizes(query, key), row):
        return None
    grad_key, grad_value = (each[..., :d].to(key.dtype).contiguous() for each in (grad_key, grad_value))
    return grad_query.to(query.dtype), grad_key, grad_value


def _contiguous(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _bounds(start: Bound, stop: Bound) -> tuple[Bound, Bound]:
    """As the kernels take them."""
    if start is None or stop is None:
        return None, None
    return start.int().contiguous(), stop.int().contiguous()


def _sizes(query: torch.Tensor, key: torch.Tensor) -> tuple[int, ...]:
    """(b, heads, kv, s, t, d)"""
    return query.shape[0], query.shape[1], key.shape[1], query.shape[2], key.shape[2], query.shape[3]


_ATTENTION = define(
    "ranged_attention(Tensor query, Tensor key, Tensor value, Tensor? start, Tensor? stop, int? window=None)"
    " -> (Tensor, Tensor)",
    reference=ranged_attention_reference,
    native=_native,
    fake=_fake,
)
_ATTENTION_BACKWARD = define(
    "ranged_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor mixed, Tensor log_sum_exp,"
    " Tensor? start, Tensor? stop, int? window=None) -> (Tensor, Tensor, Tensor)",
    reference=ranged_attention_backward_reference,
    native=_native_backward,
    fake=lambda grad, query, key, value, *_: tuple(t.new_empty(t.shape) for t in (query, key, value)),
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, start, stop, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output, start, stop)


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*_ATTENTION_BACKWARD(grad, *ctx.saved_tensors, ctx.window), None, None, None)


define_backward("ranged_attention", _backward, _keep)
