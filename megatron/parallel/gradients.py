"""Sums gradients over the ranks that read different samples, while the last backward passes still run.

Layers add their weight gradients to a bucket and report it. A bucket whose parameters have all reported as often as
the step's backward passes use them is reduced at once, in one fixed order of buckets on all ranks. After that the
owned ranges of parameters whose copies each hold a part (`Piece.partial`) are summed over those copies.
"""

from __future__ import annotations

import functools

import torch

from megatron.parallel.buckets import Bucket
from megatron.parallel.collectives import all_reduce, start_all_reduce
from megatron.parallel.communicator import Work
from megatron.parallel.mesh import ParallelContext
from megatron.parallel.weight_gradient import GradientSink, LaterProducts, attach_sink, sink_of


class GradientReducer:
    """Gradient accumulation and reduction of one model over `context.grad`.

    A step: `begin`, that many backward passes through each chunk of the model, `finish`. `later` keeps the weights'
    products of schedules that put them off.
    """

    def __init__(self, buckets: list[Bucket], context: ParallelContext, *, zero: int) -> None:
        self.buckets, self.context, self.sharded = buckets, context, zero > 0
        self.later = LaterProducts()
        self._missing: list[int] = []
        self._next = 0
        self._works: list[Work] = []
        for index, bucket in enumerate(buckets):
            for slot in bucket.slots:
                buffer = bucket.gradients[slot.start : slot.stop].view(slot.spec.shape)
                report = functools.partial(self._report, index)
                attach_sink(slot.parameter, GradientSink(buffer, report, self.later))
                if not slot.is_matrix:
                    slot.parameter.register_post_accumulate_grad_hook(_to_sink)

    def begin(self, backward_passes: int) -> None:
        """Forget all gradients: the beginning of a step, whose micro-batches are as many as `backward_passes`."""
        uses = [sum(slot.parameter.uses for slot in bucket.slots) for bucket in self.buckets]
        self._missing = [backward_passes * count for count in uses]
        self._next, self._works = 0, []
        for bucket in self.buckets:
            for slot in bucket.slots:
                sink = sink_of(slot.parameter)
                assert sink is not None
                sink.clear()

    def finish(self) -> None:
        """Wait until the owned ranges hold the sums over the data ranks, then sum the parts that copies hold."""
        assert self._next == len(self.buckets), f"gradients of buckets {self._next}… were never reported"
        for work in self._works:
            work.wait()
        self._works = []
        self._sum_copies()

    def _report(self, index: int) -> None:
        """A gradient of bucket `index` was added."""
        self._missing[index] -= 1
        assert self._missing[index] >= 0, f"bucket {index} got more gradients than its parameters have uses"
        while self._next < len(self.buckets) and self._missing[self._next] == 0:
            self._works.append(self._reduce(self.buckets[self._next]))
            self._next += 1

    def _reduce(self, bucket: Bucket) -> Work:
        grad = self.context.grad
        if self.sharded and grad.size > 1:
            return grad.comm.reduce_scatter(bucket.owned_gradients, bucket.gradients)
        return start_all_reduce(bucket.gradients, grad)

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


def _to_sink(parameter: torch.Tensor) -> None:
    """Hand the gradient that autograd computed (of a norm's weight) to the parameter's sink."""
    sink = sink_of(parameter)
    assert sink is not None and parameter.grad is not None
    gradient, parameter.grad = parameter.grad, None
    sink.add(gradient)


def gather_weights(buckets: list[Bucket], context: ParallelContext) -> None:
    """After each rank updated the weights it owns: give all of them to every data rank."""
    works = [
        context.grad.comm.all_gather(bucket.weights, bucket.owned_weights)
        for bucket in buckets
        if bucket.owned_weights.numel() < bucket.weights.numel()
    ]
    for work in works:
        work.wait()
