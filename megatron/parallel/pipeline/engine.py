"""Executes one stage's list of actions: receives, runs the stage's function, sends.

Activations travel over the `forward` axis and their gradients over `backward`, one communicator for each direction, and
over two more where they go from one chunk of the model to the next at the ends of the ring. A message that the next
action needs is asked for before the present one computes. At most one send is under way in each channel; its tensor is
kept until then. The engine knows no model: it runs a `StageFunction`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch.autograd.profiler import record_function

from megatron.parallel.communicator import Work
from megatron.parallel.mesh import Axis, ParallelContext
from megatron.parallel.pipeline.schedule import (
    Action,
    Backward,
    BackwardWeight,
    Channel,
    Forward,
    incoming,
    label,
    next_to_ask,
    outgoing,
)
from megatron.parallel.weight_gradient import LaterProducts


class StageFunction(Protocol):
    """Forward pass of one chunk of the stage: micro-batch number, chunk number, and activations from the chunk before
    (None on the first). Returns activations for the next chunk, or on the last one the loss sum, a scalar.
    """

    def __call__(self, micro_batch: int, chunk: int, hidden: torch.Tensor | None, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Activations:
    """What travels between stages: of each micro-batch the shape, of all the dtype and device."""

    shapes: Sequence[tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device

    def empty(self, micro_batch: int) -> torch.Tensor:
        return torch.empty(self.shapes[micro_batch], dtype=self.dtype, device=self.device)


@dataclass
class _Mail:
    """This stage's messages in all channels."""

    context: ParallelContext
    activations: Activations
    chunks: int
    expected: dict[Action, tuple[torch.Tensor, Work]] = field(default_factory=dict)
    sending: dict[Channel, tuple[torch.Tensor, Work]] = field(default_factory=dict)

    def ask(self, action: Action | None) -> None:
        """Post the receive of the message that `action` needs, once."""
        if action is None or action in self.expected:
            return
        source = incoming(action, self.context.pp.rank, self.context.pp.size, self.chunks)
        if source is not None:
            buffer = self.activations.empty(action.micro_batch)
            self.expected[action] = (buffer, self._axis(source).comm.receive(buffer, source.sender))

    def take(self, action: Action) -> torch.Tensor | None:
        """The message that `action` needs, waited for; None where it needs none."""
        self.ask(action)
        if action not in self.expected:
            return None
        message, work = self.expected.pop(action)
        work.wait()
        return message

    def send(self, action: Action, message: torch.Tensor) -> None:
        """Start sending what `action` gave, after the send before it in that channel has ended."""
        target = outgoing(action, self.context.pp.rank, self.context.pp.size, self.chunks)
        if target is not None:
            self._finish(target)
            message = message.contiguous()
            self.sending[target] = (message, self._axis(target).comm.send(message, target.receiver))

    def finish(self) -> None:
        """Wait for all sends under way."""
        for channel in list(self.sending):
            self._finish(channel)

    def _finish(self, channel: Channel) -> None:
        if channel in self.sending:
            self.sending.pop(channel)[1].wait()

    def _axis(self, channel: Channel) -> Axis:
        if channel.forward:
            return self.context.forward_wrap if channel.wraps else self.context.forward
        return self.context.backward_wrap if channel.wraps else self.context.backward


def run_stage(
    actions: Sequence[Action],
    stage: StageFunction,
    context: ParallelContext,
    activations: Activations,
    *,
    chunks: int = 1,
    later: LaterProducts | None = None,
) -> torch.Tensor:
    """Run this stage's actions and return the sum of its losses (a detached scalar; 0 except on the last stage).

    `later` keeps the weights' products that `BackwardInput` leaves to `BackwardWeight`.
    """
    mail = _Mail(context, activations, chunks)
    differentiate = any(not isinstance(action, Forward) for action in actions)
    alive: dict[tuple[int, int], tuple[torch.Tensor | None, torch.Tensor]] = {}
    losses = torch.zeros((), dtype=torch.promote_types(torch.float32, activations.dtype), device=activations.device)
    for at, action in enumerate(actions):
        message = mail.take(action)
        mail.ask(next_to_ask(actions, at))
        place = (action.micro_batch, action.chunk)
        with record_function(label(action)):
            if isinstance(action, Forward):
                hidden = message.requires_grad_(differentiate) if message is not None else None
                output = stage(action.micro_batch, action.chunk, hidden)
                if differentiate:
                    alive[place] = (hidden, output)
                if output.dim() == 0:
                    losses += output.detach()
                mail.send(action, output.detach())
                del hidden, output  # else they would live on beside the next micro-batches
            elif isinstance(action, BackwardWeight):
                assert later is not None
                later.run(place)
            else:
                gradient = _go_back(*alive.pop(place), message, None if isinstance(action, Backward) else later, place)
                if gradient is not None:
                    mail.send(action, gradient)
    mail.finish()
    return losses


def _go_back(
    hidden: torch.Tensor | None,
    output: torch.Tensor,
    gradient: torch.Tensor | None,
    later: LaterProducts | None,
    place: tuple[int, int],
) -> torch.Tensor | None:
    """The backward pass of one micro-batch through one chunk; products of weights are left to `later`, if given.

    Returns the gradient of `hidden`. Nothing else of the pass is kept.
    """
    with later.collecting(place) if later is not None else nullcontext():
        torch.autograd.backward(output, gradient)
    return None if hidden is None else hidden.grad
