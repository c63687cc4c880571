"""Gathers the weights whose optimizer state is divided, each bucket behind the computation before its first use.

ZeRO-1: after an update each rank has only the new values of the ranges it owns. The gathers of all buckets start at
once, in the order of the forward pass, which waits for those of a layer when it comes to that layer.

Full sharding (ZeRO-3; Zhao et al., 2023): weights are whole only while their layer works. They are gathered for the
forward pass and again for the backward pass, the next layer's behind the computation of the present one, and freed
after it. Autograd keeps the parameters themselves, whose storage is filled again before their backward formulas read
it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import Function

from megatron.parallel.buckets import Chunked, FlatWeights, Unit, give_storage, take_storage
from megatron.parallel.communicator import Work
from megatron.parallel.mesh import Axis, ParallelContext


class BucketWeights:
    """The weights of one bucket: whole, on their way, or only the range that this rank owns."""

    def __init__(self, bucket: FlatWeights, shard: Axis) -> None:
        self.bucket, self.shard = bucket, shard
        self._whole = not bucket.sharded
        self._work: Work | None = None

    def start(self) -> None:
        """Start gathering them, unless they are whole or on their way."""
        if self._whole or self._work is not None:
            return
        if self.bucket.sharded:
            give_storage(self.bucket.weights)
        self._work = self.shard.comm.all_gather(self.bucket.weights, self.bucket.owned_weights)

    def wait(self) -> None:
        """Have them whole."""
        self.start()
        if self._work is not None:
            self._work.wait()
            self._whole, self._work = True, None

    def forget(self) -> None:
        """From now on only the owned range counts; with full sharding the rest is freed."""
        if self._work is not None:
            self.wait()
        if self.bucket.sharded and self._whole:
            take_storage(self.bucket.weights)
        self._whole = False


class GatheredWeights:
    """The weights of a model under ZeRO-1 and, without division, of any model: whole whenever a layer is called.

    `buckets` are those that ranks may own different ranges of; weights in none of them are always whole.
    """

    def __init__(self, model: Chunked, buckets: Sequence[FlatWeights], context: ParallelContext) -> None:
        self.buckets = [BucketWeights(bucket, context.shard) for bucket in buckets]
        self._divided = context.shard.size > 1
        of_parameter = {id(slot.parameter): at for at, bucket in enumerate(buckets) for slot in bucket.slots}
        for chunk in model.chunks:
            units = chunk.units
            held = ([id(parameter) for parameter in unit.parameters()] for unit in units)
            needs = [sorted({of_parameter[one] for one in mine if one in of_parameter}) for mine in held]
            # Where a layer lies in several buckets, those that are gathered first come first.
            self._attach(units, [[self.buckets[at] for at in reversed(need)] for need in needs])

    def updated(self) -> None:
        """The owned ranges have new values: start gathering them, in the order of the forward pass."""
        if self._divided:
            for weights in reversed(self.buckets):
                weights.forget()
                weights.start()

    def gather(self) -> None:
        """Have all weights whole until the next step: before they are read elsewhere than in a layer."""
        for weights in reversed(self.buckets):
            weights.wait()

    def _attach(self, units: list[Unit], needs: list[list[BucketWeights]]) -> None:
        if self._divided:
            for unit, need in zip(units, needs, strict=True):
                unit.modules[0].register_forward_pre_hook(functools.partial(_wait_first, need))


class ShardedWeights(GatheredWeights):
    """The weights of a model under full sharding."""

    def updated(self) -> None:
        """The owned ranges have new values, nothing else is kept."""
        for weights in self.buckets:
            weights.forget()

    def _attach(self, units: list[Unit], needs: list[list[BucketWeights]]) -> None:
        layers = [_Layer(unit, need) for unit, need in zip(units, needs, strict=True)]
        for before, after in itertools.pairwise(layers):
            before.next = after
            if before.unit.backward_reads:
                after.before = before
        for layer in layers:
            layer.unit.modules[0].register_forward_pre_hook(layer.begin_forward)
            layer.unit.modules[-1].register_forward_hook(layer.end_forward)


class _Layer:
    """One unit under full sharding, and its neighbours: `before` is None where the backward pass reads nothing more."""

    def __init__(self, unit: Unit, weights: list[BucketWeights]) -> None:
        self.unit, self.weights = unit, weights
        self.next: _Layer | None = None
        self.before: _Layer | None = None

    def begin_forward(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Have the weights, and those of the next unit on their way."""
        self._have(self.next)
        return _at_backward(self.free, inputs) if self.unit.backward_reads else inputs

    def end_forward(self, _: nn.Module, __: tuple[Any, ...], outputs: Any) -> Any:
        """Free the weights, unless the backward pass is about to begin with them."""
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        differentiable = any(isinstance(output, torch.Tensor) and output.requires_grad for output in several)
        if not (differentiable and self.unit.backward_follows):
            self.free()
        if not self.unit.backward_reads:
            return outputs
        several = _at_backward(self.begin_backward, several)
        return several if isinstance(outputs, tuple) else several[0]

    def begin_backward(self) -> None:
        """Have the weights again, and those of the unit before on their way."""
        self._have(self.before)

    def free(self) -> None:
        """Keep only the owned ranges."""
        for weights in self.weights:
            weights.forget()

    def _have(self, neighbour: _Layer | None) -> None:
        for weights in self.weights:
            weights.start()
        for weights in self.weights:
            weights.wait()
        for weights in neighbour.weights if neighbour is not None else []:
            weights.start()


class _AtBackward(Function):
    """The identity; the backward pass calls `act` before it hands the gradients on."""

    @staticmethod
    def forward(ctx: Any, act: Callable[[], None], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.act = act
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        ctx.act()
        return None, *gradients


def _at_backward(act: Callable[[], None], values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values; the backward pass calls `act` when it has the gradients of all tensors among them."""
    places = [at for at, value in enumerate(values) if isinstance(value, torch.Tensor) and value.requires_grad]
    if not places:
        return values
    passed = dict(zip(places, _AtBackward.apply(act, *(values[at] for at in places)), strict=True))
    return tuple(passed.get(at, value) for at, value in enumerate(values))


def _wait_first(needed: list[BucketWeights], _: nn.Module, __: tuple[Any, ...]) -> None:
    for weights in needed:
        weights.wait()
