"""Attention over runs of keys against torch's own attention with a full mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.kernels.attention import ranged_attention, ranged_attention_backward


def _inputs(queries: int, keys: int, heads: int = 4, kv: int = 2, d: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = [(2, heads, queries, d), (2, kv, keys, d), (2, kv, keys, d)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def _runs(queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random runs of keys, each with at least one."""
    generator = torch.Generator().manual_seed(queries + keys)
    ends = torch.randint(0, keys, (2, 2, queries), generator=generator).sort(dim=0).values
    return ends[0].to(torch.int32), (ends[1] + 1).to(torch.int32)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 9), (128, 128), (129, 40), (300, 300)])
def test_runs_equal_a_mask(queries: int, keys: int) -> None:
    inputs, (start, stop) = _inputs(queries, keys), _runs(queries, keys)
    place = torch.arange(keys)
    mask = (place >= start.unsqueeze(-1)) & (place < stop.unsqueeze(-1))
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask.unsqueeze(1), enable_gqa=True)
    mixed, _ = ranged_attention(*inputs, start, stop)
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(mixed)
    for ours, theirs in zip(
        torch.autograd.grad(mixed, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_parts_of_the_keys_add_up() -> None:
    """Two halves of the keys, put together by their log-sum-exps, are the whole; so are their gradients."""
    with torch.no_grad():
        query, key, value = _inputs(70, 50)
        start, stop = _runs(70, 50)
        mixed, total = ranged_attention(query, key, value, start, stop)
        upstream = torch.randn_like(mixed)
        whole = ranged_attention_backward(upstream, query, key, value, mixed, total, start, stop)
        results, gradients = [], []
        for half in (slice(0, 20), slice(20, 50)):
            bounds = [(bound - half.start).clamp(0, half.stop - half.start) for bound in (start, stop)]
            results.append(ranged_attention(query, key[:, :, half], value[:, :, half], *bounds))
            gradients.append(
                ranged_attention_backward(upstream, query, key[:, :, half], value[:, :, half], mixed, total, *bounds)
            )
        torch.testing.assert_close(torch.logaddexp(results[0][1], results[1][1]), total)
        assert torch.isneginf(results[0][1]).any(), "no query is without keys: the case proves less than it should"
        shares = [(part - total).exp().unsqueeze(-1) for _, part in results]
        torch.testing.assert_close(sum(w * m for w, (m, _) in zip(shares, results, strict=True)), mixed)
        torch.testing.assert_close(gradients[0][0] + gradients[1][0], whole[0])
        for which in (1, 2):
            torch.testing.assert_close(torch.cat([part[which] for part in gradients], dim=2), whole[which])


def test_a_query_without_keys_gets_nothing() -> None:
    query, key, value = _inputs(3, 4)
    start, stop = torch.tensor([[0, 2, 4], [0, 0, 0]], dtype=torch.int32), torch.tensor([[4, 2, 4], [1, 1, 1]]).int()
    mixed, total = ranged_attention(query, key, value, start, stop)
    assert (mixed[0, :, 1:] == 0).all() and torch.isneginf(total[0, :, 1:]).all()
    gradients = torch.autograd.grad(mixed.sum(), (query, key, value))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
