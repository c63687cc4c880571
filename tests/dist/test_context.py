"""Attention over a split sequence by itself: rings of any size, and both ways, equal one rank's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron.config.parallel import ContextAttention
from megatron.kernels.runs import Documents, Runs, whole_attention
from megatron.parallel.context import causal_runs, context_attention, local_part
from megatron.parallel.mesh import Axis, Grid, connect
from tests.dist.pool import Pool
from tests.dist.strict import Communicators, Log

BATCH, HEADS, KV, SIZE = 2, 4, 2, 8


def _inputs(length: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """([query, key, value], the gradient of the result, starts of documents), all of whole sequences."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(BATCH, heads, length, SIZE) for heads in (HEADS, KV, KV, HEADS)]
    *inputs, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    begins = torch.rand((BATCH, length), generator=generator) < torch.tensor([[0.05], [0.3]])
    starts = torch.where(begins, torch.arange(length), 0).cummax(dim=1).values.to(torch.int32)
    return inputs, upstream, starts


def _runs(starts: torch.Tensor | None, length: int, cp: Axis) -> Runs:
    documents = None if starts is None else Documents(local_part(starts, cp), length * cp.size)
    return causal_runs(BATCH, length, documents, cp, torch.device("cpu"))


def _attend(
    rank: int, size: int, length: int, kind: ContextAttention, masked: bool, dtype: torch.dtype
) -> tuple[list[torch.Tensor], dict[str, list[str]], int]:
    """This rank's part of [result, gradients of query, key and value]; what it sent; what nobody waited for."""
    log = Log()
    communicators = Communicators(log, strict=True)
    context = connect(Grid(context=size), rank, context_attention=kind, make=communicators.make)
    whole, upstream, starts = _inputs(length, dtype)
    part = [_part(tensor, context.cp).requires_grad_() for tensor in whole]
    runs = _runs(starts if masked else None, length // size, context.cp)
    mixed = context_attention(part[0], part[1], part[2], runs, context)
    gradients = torch.autograd.grad(mixed, part, _part(upstream, context.cp))
    communicators.close()
    return [tensor.detach() for tensor in (mixed, *gradients)], log.issued, log.open_works


def _part(heads: torch.Tensor, cp: Axis) -> torch.Tensor:
    """Of [b, n, s, d]."""
    return local_part(heads.transpose(1, 2), cp).transpose(1, 2).contiguous()


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("kind", ["ring", "all_gather"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_split_attention_equals_whole(
    size: int, kind: ContextAttention, masked: bool, pools: Callable[[int], Pool]
) -> None:
    length = 48
    results = pools(size).run(_attend, size, length, kind, masked, torch.float64)
    whole, upstream, starts = _inputs(length, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in whole]
    mixed = whole_attention(*leaves, _runs(starts if masked else None, length, Axis("cp")))
    expected = (mixed.detach(), *torch.autograd.grad(mixed, leaves, upstream))
    for rank, (found, _, open_works) in enumerate(results):
        assert open_works == 0
        for our, their in zip(found, expected, strict=True):
            torch.testing.assert_close(our, _part(their, Axis("cp", rank, size)), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["ring", "all_gather"])
def test_bf16_is_as_precise_as_on_one_rank(kind: ContextAttention, pools: Callable[[int], Pool]) -> None:
    """Against float64: partial results are rounded, but added up in float32."""
    length, size = 96, 4
    results = pools(size).run(_attend, size, length, kind, True, torch.bfloat16)
    whole, upstream, starts = _inputs(length, torch.bfloat16)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in whole]
        mixed = whole_attention(*leaves, _runs(starts, length, Axis("cp")))
        return [mixed.detach(), *torch.autograd.grad(mixed, leaves, upstream.to(dtype))]

    def error(tensor: torch.Tensor, exact: torch.Tensor) -> float:
        return float((tensor.double() - exact).pow(2).mean().sqrt())

    for at, (exact, alone) in enumerate(zip(run(torch.float64), run(torch.bfloat16), strict=True)):
        ranks = [Axis("cp", rank, size) for rank in range(size)]
        split = [error(found[at], _part(exact, cp)) for (found, _, _), cp in zip(results, ranks, strict=True)]
        assert results[0][0][at].dtype == torch.bfloat16
        assert max(split) <= 2.0 * max(error(_part(alone, cp), _part(exact, cp)) for cp in ranks)
