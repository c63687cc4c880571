"""What the variable-length flash attention of torch means, for machines without a GPU: one segment after the other."""

from __future__ import annotations

import itertools

import torch

NOTHING = torch.nan  # what a library may leave where nothing was to be computed


def segment_scores(
    query: torch.Tensor, key: torch.Tensor, causal: bool, scale: float, before: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scores [heads, q, k], queries and keys for each head [heads, …, d]) of one segment."""
    queries, keys = query.transpose(0, 1), key.transpose(0, 1).repeat_interleave(query.shape[1] // key.shape[1], dim=0)
    scores = queries @ keys.transpose(1, 2) * scale
    if causal:
        last = torch.arange(query.shape[0]) + key.shape[0] - query.shape[0]  # the last query sees the last key
        place = torch.arange(key.shape[0])
        scores = scores.masked_fill(place > last[:, None], -torch.inf)
        if before is not None:
            scores = scores.masked_fill(place < last[:, None] - before, -torch.inf)
    return scores, queries, keys


def flash_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, begin_q: torch.Tensor, begin_k: torch.Tensor,
    most_q: int, most_k: int, dropout: float, causal: bool, debug: bool, *, scale: float,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """What `aten._flash_attention_forward` means for packed tensors."""
    assert (window_size_left is None) == (window_size_right is None) and window_size_right in (None, 0)
    mixed, total = torch.full_like(query, NOTHING), query.new_full((query.shape[1], len(query)), NOTHING)
    for q, k in segments(begin_q, begin_k, most_q, most_k):
        if k.start == k.stop:
            continue
        scores, _, _ = segment_scores(query[q], key[k], causal, scale, window_size_left)
        values = value[k].transpose(0, 1).repeat_interleave(query.shape[1] // key.shape[1], dim=0)
        total[:, q] = scores.logsumexp(dim=-1)
        mixed[q] = (scores.softmax(dim=-1) @ values).transpose(0, 1)
    return mixed, total, torch.empty(2), torch.empty(0), torch.empty(0)


def flash_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mixed: torch.Tensor,
    total: torch.Tensor, begin_q: torch.Tensor, begin_k: torch.Tensor, most_q: int, most_k: int, dropout: float,
    causal: bool, state: torch.Tensor, unused: torch.Tensor, *, scale: float,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """What `aten._flash_attention_backward` means for packed tensors."""
    assert total.is_contiguous() and total.isfinite().all()
    grad_query, grad_key, grad_value = (torch.full_like(tensor, NOTHING) for tensor in (query, key, value))
    dot = (grad * mixed).sum(dim=-1).t()  # [heads, s]
    for q, k in segments(begin_q, begin_k, most_q, most_k):
        if k.start == k.stop or q.start == q.stop:
            continue
        scores, queries, keys = segment_scores(query[q], key[k], causal, scale, window_size_left)
        values = value[k].transpose(0, 1).repeat_interleave(query.shape[1] // key.shape[1], dim=0)
        upstream, chance = grad[q].transpose(0, 1), (scores - total[:, q, None]).exp()
        change = chance * (upstream @ values.transpose(1, 2) - dot[:, q, None]) * scale
        grad_query[q] = (change @ keys).transpose(0, 1)
        for target, per_head in ((grad_key, change.transpose(1, 2) @ queries),
                                 (grad_value, chance.transpose(1, 2) @ upstream)):  # fmt: skip
            target[k] = per_head.unflatten(0, (key.shape[1], -1)).sum(dim=1).transpose(0, 1)
    return grad_query, grad_key, grad_value


def segments(begin_q: torch.Tensor, begin_k: torch.Tensor, most_q: int, most_k: int) -> list[tuple[slice, slice]]:
    assert begin_q.dtype == begin_k.dtype == torch.int32 and len(begin_q) == len(begin_k)
    cuts = [begin.tolist() for begin in (begin_q, begin_k)]
    sides = [[slice(a, b) for a, b in itertools.pairwise(cut)] for cut in cuts]
    for side, most in zip(sides, (most_q, most_k), strict=True):
        assert all(0 <= part.stop - part.start <= most for part in side)
    return list(zip(*sides, strict=True))
