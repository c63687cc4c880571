"""Context parallelism: every sequence is split over the ranks of `cp`, and attention brings the parts together.

The sequence is cut into 2c parts, of which rank r holds part r and part 2c − 1 − r (zigzag): an early and a late one,
so that under a causal mask all ranks have as much to do. Everything but attention works on a rank's own tokens.

Ring (Liu et al., 2023): keys and values are passed on from rank to rank, behind the computation on those at hand, and
results over their parts are put together by their log-sum-exp; backward, they go round again and the gradients behind
them. All-gather (Llama Team, 2024): keys and values, few with grouped heads, are collected at once. In both only the
key/value heads travel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron.kernels.numerics import statistics_dtype
from megatron.kernels.runs import Documents, Runs, run_attention, run_attention_backward, whole_attention
from megatron.parallel.collectives import all_gather, reduce_scatter
from megatron.parallel.communicator import Work
from megatron.parallel.mesh import Axis, ParallelContext


def local_part(whole: torch.Tensor, cp: Axis) -> torch.Tensor:
    """[b, s] → [b, s/c]: this rank's two parts of every sequence, the early one first."""
    if cp.size == 1:
        return whole
    parts = whole.chunk(2 * cp.size, dim=1)
    return torch.cat((parts[cp.rank], parts[2 * cp.size - 1 - cp.rank]), dim=1)


def local_positions(length: int, cp: Axis, device: torch.device) -> torch.Tensor:
    """i64[length]: where in the whole sequence this rank's tokens stand."""
    return local_part(torch.arange(length * cp.size, device=device).unsqueeze(0), cp)[0]


def held_before(position: torch.Tensor, owner: int, cp: Axis, half: int) -> torch.Tensor:
    """How many of the tokens that rank `owner` holds stand before a position; `half` is the length of a part.

    So it turns a run of the whole sequence into a run of that rank's keys, which is one too.
    """
    early, late = owner * half, (2 * cp.size - 1 - owner) * half
    return (position - early).clamp(0, half) + (position - late).clamp(0, half)


def causal_runs(batch: int, length: int, documents: Documents | None, cp: Axis, device: torch.device) -> Runs:
    """Of this rank's queries: all keys of the whole sequence, or of their document, up to themselves."""
    stop = (local_positions(length, cp, device) + 1).to(torch.int32).expand(batch, -1)
    start = torch.zeros_like(stop) if documents is None else documents.starts
    return Runs(start, stop.contiguous(), 1 if documents is None else documents.most, causal=True)


def context_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: Runs, context: ParallelContext
) -> torch.Tensor:
    """query [b, heads, s/c, d], key and value [b, kv heads, s/c, d] of this rank's tokens → [b, heads, s/c, d].

    `runs` are those of this rank's queries, into the whole sequence.
    """
    if context.cp.size == 1:
        return whole_attention(query, key, value, runs)
    assert runs.window is None or context.context_attention == "all_gather", "a window cuts what goes round in a ring"
    kind = _RingAttention if context.context_attention == "ring" else _GatheredAttention
    return kind.apply(query, key, value, runs, context)


class _Passing:
    """A tensor on its way to the next rank, and one like it that comes from the rank before."""

    def __init__(self, sending: Work, coming: torch.Tensor, receiving: Work) -> None:
        self._sending, self._coming, self._receiving = sending, coming, receiving

    def wait(self) -> torch.Tensor:
        """What came, when it is here and the other one gone."""
        self._receiving.wait()
        self._sending.wait()
        return self._coming


class _Ring:
    """This rank's place in the ring: it sends to the next rank what it receives from the one before.

    A message goes over `ring_even` or `ring_odd`, by its sender's index: so a rank sends and receives at the same time,
    and two ranks that send to each other do not wait for each other. (Where an odd number of ranks closes the ring the
    first one has both in one communicator, and sends first.)
    """

    def __init__(self, context: ParallelContext) -> None:
        self.rank, self.size = context.cp.rank, context.cp.size
        self.next, self.before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        axes = (context.ring_even, context.ring_odd)
        self.outward, self.inward = axes[self.rank % 2], axes[self.before % 2]

    def pass_on(self, tensor: torch.Tensor) -> _Passing:
        """Start sending a tensor, which must not change until then, and receiving one of its shape."""
        sending, coming = self.outward.comm.send(tensor, self.next), torch.empty_like(tensor)
        return _Passing(sending, coming, self.inward.comm.receive(coming, self.before))

    def blocks(self, own: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(owner, its block) of each rank, this one's first; the next block comes while the caller uses the present."""
        block = own
        for step in range(self.size - 1):
            passing = self.pass_on(block)
            yield (self.rank - step) % self.size, block
            block = passing.wait()
        yield self.next, block


class _RingAttention(Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: Runs, context: ParallelContext
    ) -> torch.Tensor:
        mixed = torch.zeros_like(query, dtype=statistics_dtype(query.dtype))
        total = torch.full_like(mixed[..., 0], -torch.inf)
        for owner, (keys, values) in _Ring(context).blocks(torch.stack((key, value))):  # [2, b, kv heads, s/c, d]
            queries, owners_runs = runs_into(owner, runs, context.cp)
            part = run_attention(query[:, :, queries], keys, values, owners_runs)
            _merge(mixed[:, :, queries], total[:, :, queries], *part)
        mixed = mixed.to(query.dtype)
        ctx.save_for_backward(query, key, value, mixed, total)
        ctx.runs, ctx.context = runs, context
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mixed, total = ctx.saved_tensors
        ring, wide = _Ring(ctx.context), statistics_dtype(query.dtype)
        grad_query = torch.zeros_like(query, dtype=wide)
        own = gradients = torch.empty(0)
        for step, (owner, (keys, values)) in enumerate(ring.blocks(torch.stack((key, value)))):
            # What was found for a block follows it, a step behind; a rank's own block stays with it.
            following = ring.pass_on(gradients) if step > 1 else None
            queries, owners_runs = runs_into(owner, ctx.runs, ctx.context.cp)
            sides = [tensor[:, :, queries] for tensor in (mixed, total)]
            part, *parts = run_attention_backward(
                grad[:, :, queries], query[:, :, queries], keys, values, sides[0], sides[1], owners_runs
            )
            grad_query[:, :, queries] += part
            gradients = torch.stack(parts).to(wide)
            if step == 0:
                own = gradients
            elif following is not None:
                gradients += following.wait()
        own += ring.pass_on(gradients).wait()  # home from the rank that was last
        grad_key, grad_value = own.to(key.dtype)
        return grad_query.to(query.dtype), grad_key, grad_value, None, None


class _GatheredAttention(Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: Runs, context: ParallelContext
    ) -> torch.Tensor:
        keys, values = _gather(torch.stack((key, value)), context.cp)
        parts = [run_attention(query[:, :, half], keys, values, runs.of(half)) for half in _halves(query)]
        mixed, total = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
        ctx.save_for_backward(query, key, value, mixed, total)  # not the gathered ones: they are gathered anew
        ctx.runs, ctx.context = runs, context
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mixed, total = ctx.saved_tensors
        keys, values = _gather(torch.stack((key, value)), ctx.context.cp)
        grad_queries, gradients = (
            [],
            torch.zeros((2, *keys.shape), dtype=statistics_dtype(key.dtype), device=key.device),
        )
        for half in _halves(query):
            sides = [tensor[:, :, half] for tensor in (mixed, total)]
            part, *parts = run_attention_backward(
                grad[:, :, half], query[:, :, half], keys, values, sides[0], sides[1], ctx.runs.of(half)
            )
            grad_queries.append(part)
            gradients += torch.stack(parts)
        grad_key, grad_value = _scatter(gradients, ctx.context.cp).to(key.dtype)
        return torch.cat(grad_queries, dim=2), grad_key, grad_value, None, None


def runs_into(owner: int, runs: Runs, cp: Axis) -> tuple[slice, Runs]:
    """(this rank's queries that may see keys of `owner`, their runs among these keys).

    A rank with a larger index holds parts between this rank's two: the early queries see none of its keys, the late
    ones may see all. Of one with a smaller index all queries may see the early part.
    """
    half = runs.start.shape[1] // 2
    queries = slice(half, None) if owner > cp.rank else slice(None)
    some = runs.of(queries)
    start, stop = (held_before(position, owner, cp, half) for position in (some.start, some.stop))
    return queries, Runs(start, stop, runs.documents, causal=owner == cp.rank)


def _merge(mixed: torch.Tensor, total: torch.Tensor, part: torch.Tensor, part_total: torch.Tensor) -> None:
    """Put what other keys gave into `mixed` [b, heads, s, d], and their log-sum-exp into `total` [b, heads, s].

    A rank's own keys come first, of which each query sees at least itself: so the joined one is finite.
    """
    joined = torch.logaddexp(total, part_total)
    mixed.mul_((total - joined).exp_().unsqueeze(-1)).add_(part * (part_total - joined).exp_().unsqueeze(-1))
    total.copy_(joined)


def _halves(query: torch.Tensor) -> tuple[slice, slice]:
    half = query.shape[2] // 2
    return slice(0, half), slice(half, None)


def _gather(block: torch.Tensor, cp: Axis) -> torch.Tensor:
    """[2, b, kv heads, s/c, d] of each rank → [2, b, kv heads, s, d] in the sequence's order."""
    early, late = all_gather(block.unsqueeze(0), cp).chunk(2, dim=4)  # [c, 2, b, kv heads, s/2c, d] each
    return torch.cat((*early, *late.flip(0)), dim=3)


def _scatter(whole: torch.Tensor, cp: Axis) -> torch.Tensor:
    """The sum over the ranks of [2, b, kv heads, s, d] → this rank's part [2, b, kv heads, s/c, d]."""
    parts = torch.stack(whole.chunk(2 * cp.size, dim=3))  # [2c, 2, b, kv heads, s/2c, d]
    held = torch.cat((parts[: cp.size], parts[cp.size :].flip(0)), dim=4)
    return reduce_scatter(held, cp)[0]
