"""Sums gradients over the ranks that read different samples, while the backward passes still run.

Layers add their weight gradients to a bucket and report it. A bucket whose parameters have all reported as often as
the step's backward passes use them is reduced at once, in one fixed order of buckets on all ranks. Under full sharding
that happens after every backward pass, to a sum that each rank keeps of its own range. After that the owned ranges of
parameters whose copies each hold a part (`Piece.partial`) are summed over those copies.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from megatron.parallel.buckets import Bucket, Slot, give_storage, has_storage, take_storage
from megatron.parallel.collectives import all_reduce, start_all_reduce
from megatron.parallel.communicator import Work
from megatron.parallel.mesh import ParallelContext
from megatron.parallel.weight_gradient import GradientSink, LaterProducts, attach_sink, sink_of


class GradientReducer:
    """Gradient accumulation and reduction of one model over `context.shard` and `context.replica`.

    A step: `begin`, that many backward passes through each chunk of the model, `finish`. `later` keeps the weights'
    products of schedules that put them off.
    """

    def __init__(self, buckets: list[Bucket], context: ParallelContext) -> None:
        self.buckets, self.context = buckets, context
        self.later = LaterProducts()
        self._uses = [sum(slot.parameter.uses for slot in bucket.slots) for bucket in buckets]
        self._missing: list[int] = []
        self._next = 0
        self._works: list[Work] = []
        for index, bucket in enumerate(buckets):
            for slot, gradient in zip(bucket.slots, bucket.slot_gradients, strict=True):
                report = functools.partial(self._report, index)
                attach_sink(slot.parameter, GradientSink(gradient, report, self.later))
                if not slot.is_matrix:
                    slot.parameter.register_post_accumulate_grad_hook(_to_sink)

    def begin(self, backward_passes: int) -> None:
        """Forget all gradients: the beginning of a step, whose micro-batches are as many as `backward_passes`."""
        self._missing = [backward_passes * count for count in self._uses]
        self._next, self._works = 0, []
        for bucket in self.buckets:
            _clear(bucket)

    def finish(self) -> None:
        """Wait until the owned ranges hold the sums over the data ranks, then sum the parts that copies hold."""
        assert self._next == len(self.buckets), f"gradients of buckets {self._next}… were never reported"
        self._wait()
        if self.context.shard.size > 1 and self.context.replica.size > 1:
            self._works = [self._sum_replicas(bucket) for bucket in self.buckets]
            self._wait()
        self._sum_copies()

    def _wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works = []

    def _report(self, index: int) -> None:
        """A gradient of bucket `index` was added."""
        self._missing[index] -= 1
        assert self._missing[index] >= 0, f"bucket {index} got more gradients than its parameters have uses"
        while self._next < len(self.buckets) and self._missing[self._next] == 0:
            self._works.append(self._reduce(self.buckets[self._next]))
            self._next += 1

    def _reduce(self, bucket: Bucket) -> Work:
        shard = self.context.shard
        if shard.size > 1:
            return shard.comm.reduce_scatter(bucket.owned_gradients, bucket.gradients)
        return self._sum_replicas(bucket)

    def _sum_replicas(self, bucket: Bucket) -> Work:
        """Start summing the owned range over the ranks that own the same."""
        return start_all_reduce(bucket.owned_gradients, self.context.replica)

    def _sum_copies(self) -> None:
        """Sum partial gradients over their copies, one message for each axis."""
        parts: dict[str, list[torch.Tensor]] = {}
        for bucket in self.buckets:
            for _, piece, view in bucket.owned_pieces(bucket.owned_gradients):
                if piece.partial and piece.copy_axis is not None:
                    parts.setdefault(piece.copy_axis, []).append(view)
        for name in sorted(parts):
            joined = torch.cat([view.reshape(-1) for view in parts[name]])
            summed = all_reduce(joined, self.context.axis(name))
            for view, total in zip(parts[name], summed.split([v.numel() for v in parts[name]]), strict=True):
                view.copy_(total.view(view.shape))


@dataclass(frozen=True)
class _Reduction:
    """A reduction under way: the sum of bucket `index` over the ranks comes to `total`; `last` in this step."""

    index: int
    total: torch.Tensor
    work: Work
    last: bool


class ShardedGradientReducer(GradientReducer):
    """The same under full sharding: after each backward pass of a layer its gradients are reduced to the owned range
    and added to those of the passes before, behind the layer that comes next. One reduction is under way at a time, so
    whole gradients are there of two layers at most.
    """

    def __init__(self, buckets: list[Bucket], context: ParallelContext) -> None:
        super().__init__(buckets, context)
        for index, bucket in enumerate(buckets):
            for slot in bucket.slots:
                _sink(slot).prepare = functools.partial(self._prepare, index)

    def begin(self, backward_passes: int) -> None:
        """Forget all gradients: the beginning of a step, whose micro-batches are as many as `backward_passes`."""
        super().begin(backward_passes)
        self._added = [0] * len(self.buckets)
        self._started = [False] * len(self.buckets)
        self._under_way: _Reduction | None = None

    def finish(self) -> None:
        """Wait until the owned ranges hold the sums over the data ranks, then sum the parts that copies hold."""
        assert not any(self._missing), f"gradients of buckets were never reported: {self._missing} are missing"
        self._settle()
        self._wait()
        self._sum_copies()

    def _prepare(self, index: int) -> None:
        """Give the gradients of a bucket storage full of zeros, since others of its parameters may get none."""
        if self._under_way is not None and self._under_way.index == index:
            self._settle()
        gradients = self.buckets[index].gradients
        if not has_storage(gradients):
            give_storage(gradients)
            gradients.zero_()

    def _report(self, index: int) -> None:
        """A gradient of bucket `index` was added; when a pass has given all, they are reduced.

        A head computes its gradient in the forward pass, deferred products come later: what counts is only that each
        addition has a reduction after it, and that all ranks count alike.
        """
        self._missing[index] -= 1
        assert self._missing[index] >= 0, f"bucket {index} got more gradients than its parameters have uses"
        self._added[index] += 1
        if self._added[index] == self._uses[index]:
            self._added[index] = 0
            self._settle()
            self._start(index)

    def _start(self, index: int) -> None:
        bucket = self.buckets[index]
        if has_storage(bucket.gradients):
            total = torch.empty_like(bucket.owned_gradients) if self._accumulates(index) else bucket.owned_gradients
            work = self.context.shard.comm.reduce_scatter(total, bucket.gradients)
            self._under_way = _Reduction(index, total, work, last=self._missing[index] == 0)
            _clear(bucket)
        elif self._missing[index] == 0:  # an earlier reduction had it all
            self._works.append(self._sum_replicas(bucket))

    def _accumulates(self, index: int) -> bool:
        """Whether the step has reduced gradients of the bucket before."""
        before, self._started[index] = self._started[index], True
        return before

    def _settle(self) -> None:
        """Wait for the reduction under way, add what came of it, and free the whole gradients."""
        if self._under_way is None:
            return
        reduction, self._under_way = self._under_way, None
        bucket = self.buckets[reduction.index]
        reduction.work.wait()
        take_storage(bucket.gradients)
        if reduction.total is not bucket.owned_gradients:
            bucket.owned_gradients.add_(reduction.total)
        if reduction.last:
            self._works.append(self._sum_replicas(bucket))


def _clear(bucket: Bucket) -> None:
    """The next addition to each gradient is the first."""
    for slot in bucket.slots:
        _sink(slot).clear()


def _sink(slot: Slot) -> GradientSink:
    sink = sink_of(slot.parameter)
    assert sink is not None
    return sink


def _to_sink(parameter: torch.Tensor) -> None:
    """Hand the gradient that autograd computed (of a norm's weight) to the parameter's sink."""
    sink = sink_of(parameter)
    assert sink is not None and parameter.grad is not None
    gradient, parameter.grad = parameter.grad, None
    sink.add(gradient)
