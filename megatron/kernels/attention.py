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

from megatron.kernels.numerics import statistics_dtype
from megatron.kernels.operation import define, define_backward
from megatron.kernels.products import operand

# (query [b, heads, s, d], key and value [b, kv heads, s, d]) → [b, heads, s, d]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Queries whose scores exist at once in the reference.
_BLOCK = 128


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Each of the kv heads serves as many query heads; the result may be wider than what comes in."""
    if query.device.type == "meta":  # where torch knows no fused operation, and would take one apart
        bounds = torch.empty((query.shape[0], query.shape[2]), dtype=torch.int32, device=query.device)
        return ranged_attention(query, key, value, bounds, bounds)[0]
    return F.scaled_dot_product_attention(
        operand(query), operand(key), operand(value), is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )


def ranged_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: torch.Tensor, stop: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [b, heads, s, d]; key and value [b, kv heads, t, d]; start and stop i32[b, s], 0 ≤ both ≤ t: query i of
    sample b attends to the keys start[b, i] … stop[b, i] − 1.

    Returns the mixed values [b, heads, s, d] and the log-sum-exp of the scaled scores [b, heads, s] in
    max(float32, dtype). A query without keys gets 0 and minus infinity. No gradient flows through the log-sum-exp.
    """
    return _ATTENTION(query, key, value, start, stop)


def ranged_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mixed: torch.Tensor,
    log_sum_exp: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value from that of the mixed values.

    `mixed` and `log_sum_exp` may be those over more keys than are given: then the gradients are the parts that these
    keys contribute.
    """
    return _ATTENTION_BACKWARD(grad, query, key, value, mixed, log_sum_exp, start, stop)


def ranged_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: torch.Tensor, stop: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula itself, a block of queries at a time."""
    mixed, log_sum_exp = _fake(query, key, value, start, stop)
    for block, keys, scores in _scores(query, key, start, stop):
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
    start: torch.Tensor,
    stop: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dV = Pᵀ dO; dS = P ∘ (dO Vᵀ − Σ dO ∘ O); dQ = dS K, dK = dSᵀ Q, both by the scale (Dao et al., 2022)."""
    dtype, scale = statistics_dtype(query.dtype), 1.0 / math.sqrt(query.shape[-1])
    grad, mixed, wide_query = grad.to(dtype), mixed.to(dtype), query.to(dtype)
    keys_of, values_of = _per_query_head(key, query), _per_query_head(value, query)
    grad_query, grad_key, grad_value = (torch.zeros_like(wide) for wide in (wide_query, keys_of, values_of))
    dot = (grad * mixed).sum(dim=-1, keepdim=True)
    for block, keys, scores in _scores(query, key, start, stop):
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
    query: torch.Tensor, key: torch.Tensor, start: torch.Tensor, stop: torch.Tensor
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(queries, keys, scaled scores) of each block of queries that has any keys; −∞ outside of the runs."""
    keys_of, scale = _per_query_head(key, query), 1.0 / math.sqrt(query.shape[-1])
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


def _fake(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: torch.Tensor, stop: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=statistics_dtype(query.dtype))


_ATTENTION = define(
    "ranged_attention(Tensor query, Tensor key, Tensor value, Tensor start, Tensor stop) -> (Tensor, Tensor)",
    reference=ranged_attention_reference,
    native=lambda *_: None,
    fake=_fake,
)
_ATTENTION_BACKWARD = define(
    "ranged_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor mixed, Tensor log_sum_exp,"
    " Tensor start, Tensor stop) -> (Tensor, Tensor, Tensor)",
    reference=ranged_attention_backward_reference,
    native=lambda *_: None,
    fake=lambda grad, query, key, value, *_: tuple(t.new_empty(t.shape) for t in (query, key, value)),
)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, start, stop = inputs
    ctx.save_for_backward(query, key, value, *output, start, stop)


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*_ATTENTION_BACKWARD(grad, *ctx.saved_tensors), None, None)


define_backward("ranged_attention", _backward, _keep)
