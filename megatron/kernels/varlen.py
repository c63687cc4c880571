"""Runs of keys as the segments of variable-length flash attention (Dao, 2023), which torch brings for GPUs.

Packed queries [b · s, heads, d] and keys [b · t, kv heads, d] are cut into as many segments; the queries of a segment
attend to its keys, causally with the last query at the last key, or to all of them. Here every sample has a segment
of keys before the first run, one for each document, and one of keys behind the last run; where a sample has fewer
documents than there is place for, some are empty. The cuts are computed on the device: the host waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# torch.ops.aten._flash_attention_forward and …_backward; tests put stand-ins of the same meaning here.
Forward = Callable[..., Any]


@dataclass(frozen=True)
class Segments:
    """Where segments begin: i32[segments + 1] among the packed queries and keys; the longest they may be."""

    queries: torch.Tensor
    keys: torch.Tensor
    most_queries: int
    most_keys: int


def segments_of(start: torch.Tensor, stop: torch.Tensor, documents: int, num_keys: int) -> Segments:
    """The segments of runs start … stop − 1, i32[b, s], into `num_keys` keys of each sample (see `Runs`)."""
    batch, num_queries = start.shape
    changes = torch.nn.functional.pad(start[:, 1:] != start[:, :-1], (1, 0))
    document = changes.cumsum(dim=1, dtype=torch.int32)  # of each query: how many starts there were before its own
    numbers = torch.arange(documents, dtype=torch.int32, device=start.device).expand(batch, -1).contiguous()
    first_query = torch.searchsorted(document, numbers, out_int32=True)  # num_queries where there is no such document
    last_stop = stop[:, -1:]
    first_key = torch.cat((start, last_stop), dim=1).gather(1, first_query.long())
    nothing = torch.zeros_like(last_stop)
    queries = torch.cat((nothing, first_query, torch.full_like(nothing, num_queries)), dim=1)
    keys = torch.cat((nothing, first_key, last_stop), dim=1)
    return Segments(_packed(queries, num_queries), _packed(keys, num_keys), num_queries, num_keys)


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    documents: int,
    causal: bool,
    forward: Forward | None = None,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `run_attention`: query [b, heads, s, d] → mixed [b, heads, s, d], log-sum-exp f32[b, heads, s]."""
    segments = segments_of(start, stop, documents, key.shape[2])
    forward = forward or torch.ops.aten._flash_attention_forward
    packed = [_pack(tensor) for tensor in (query, key, value)]
    options = {"scale": _scale(query), **_window_arguments(window)}
    mixed, log_sum_exp, *_ = forward(*packed, *_arguments(segments), 0.0, causal, False, **options)
    empty = (start >= stop).unsqueeze(1)  # [b, 1, s]; what is said of a query without keys differs between releases
    mixed = _unpack(mixed, query).masked_fill(empty.unsqueeze(-1), 0.0)
    return mixed, _per_sample(log_sum_exp, query).masked_fill(empty, -torch.inf)


def varlen_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mixed: torch.Tensor,
    log_sum_exp: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    documents: int,
    causal: bool,
    backward: Forward | None = None,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `run_attention_backward`; the log-sum-exp must be finite, as it is over all keys of a query."""
    segments = segments_of(start, stop, documents, key.shape[2])
    backward = backward or torch.ops.aten._flash_attention_backward
    packed = [_pack(tensor) for tensor in (grad, query, key, value, mixed)]
    flat = log_sum_exp.transpose(0, 1).flatten(1).contiguous()  # [heads, b · s]
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
    grad_query, grad_key, grad_value = backward(
        *packed, flat, *_arguments(segments), 0.0, causal, *no_dropout, scale=_scale(query), **_window_arguments(window)
    )
    # Segments without a query or without a key may be left as they were: their gradients are 0.
    empty = (start >= stop)[:, None, :, None]
    place = torch.arange(key.shape[2], device=key.device)
    first = start if window is None else torch.maximum(start, stop - window)
    unseen = ((place < first[:, :1]) | (place >= stop[:, -1:]))[:, None, :, None]
    return (
        _unpack(grad_query, query).masked_fill(empty, 0.0),
        _unpack(grad_key, key).masked_fill(unseen, 0.0),
        _unpack(grad_value, value).masked_fill(unseen, 0.0),
    )


def _arguments(segments: Segments) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    return segments.queries, segments.keys, segments.most_queries, segments.most_keys


def _window_arguments(window: int | None) -> dict[str, int]:
    """The window, as the library takes it: so many keys before the query's own, and none behind."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _scale(query: torch.Tensor) -> float:
    return 1.0 / math.sqrt(query.shape[-1])


def _packed(begin: torch.Tensor, length: int) -> torch.Tensor:
    """Begins within each sample of `length`, [b, segments], as those among all samples, and the end."""
    samples = torch.arange(len(begin), dtype=torch.int32, device=begin.device).unsqueeze(1)
    return torch.nn.functional.pad((begin + samples * length).flatten(), (0, 1), value=len(begin) * length)


def _pack(heads: torch.Tensor) -> torch.Tensor:
    """[b, n, s, d] → [b · s, n, d]"""
    return heads.transpose(1, 2).flatten(0, 1)


def _unpack(packed: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[b · s, n, d] → [b, n, s, d]"""
    return packed.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


def _per_sample(log_sum_exp: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """[heads, b · s] → [b, heads, s]"""
    return log_sum_exp.unflatten(1, (query.shape[0], query.shape[2])).transpose(0, 1)
