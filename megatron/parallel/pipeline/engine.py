"""Executes one stage's list of actions: receives, runs the stage's function, sends.

Activations travel over the `forward` axis and their gradients over `backward`, one communicator for each direction. A
message needed by the next action is asked for before the present one computes. At most one send is under way in
each direction; its tensor is kept until then. The engine knows no model: it runs a `StageFunction`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from megatron.parallel.communicator import Work
from megatron.parallel.mesh import Axis, ParallelContext
from megatron.parallel.pipeline.schedule import Action, Backward, Forward


class StageFunction(Protocol):
    """Forward pass of one stage: micro-batch number and activations from the stage before (None on the first).

    Returns activations for the next stage, or on the last one the loss sum, a scalar.
    """

    def __call__(self, micro_batch: int, hidden: torch.Tensor | None, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Activations:
    """Shape, dtype and device of what travels between stages."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


@dataclass
class _Mail:
    """Messages of one direction for this stage: from `source` to `target` (None at the pipeline's ends)."""

    axis: Axis
    source: int | None
    target: int | None
    activations: Activations
    expected: dict[Action, tuple[torch.Tensor, Work]] = field(default_factory=dict)
    sending: tuple[torch.Tensor, Work] | None = None

    def ask(self, action: Action) -> None:
        """Post the receive of the message that `action` needs, once."""
        if self.source is not None and action not in self.expected:
            buffer = self.activations.empty()
            self.expected[action] = (buffer, self.axis.comm.receive(buffer, self.source))

    def take(self, action: Action) -> torch.Tensor | None:
        """The message that `action` needs, waited for; None where there is no source."""
        if self.source is None:
            return None
        self.ask(action)
        message, work = self.expected.pop(action)
        work.wait()
        return message

    def send(self, message: torch.Tensor) -> None:
        """Start sending to the target, after the send before it has ended."""
        if self.target is not None:
            self.finish()
            message = message.contiguous()
            self.sending = (message, self.axis.comm.send(message, self.target))

    def finish(self) -> None:
        """Wait for the send under way."""
        if self.sending is not None:
            self.sending[1].wait()
            self.sending = None


def run_stage(
    actions: Sequence[Action],
    stage: StageFunction,
    context: ParallelContext,
    activations: Activations,
    before_last_backward: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Run this stage's actions and return the sum of its losses (a detached scalar; 0 except on the last stage).

    `before_last_backward` is called before the last backward action: from then on gradients are final once added.
    """
    down, up = context.pp.rank + 1, context.pp.rank - 1
    below = down if down < context.pp.size else None
    above = up if up >= 0 else None
    mail: dict[type, _Mail] = {
        Forward: _Mail(context.forward, above, below, activations),
        Backward: _Mail(context.backward, below, above, activations),
    }
    last_backward = max((at for at, action in enumerate(actions) if isinstance(action, Backward)), default=-1)
    alive: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}
    losses = torch.zeros((), dtype=torch.promote_types(torch.float32, activations.dtype), device=activations.device)
    for at, action in enumerate(actions):
        if at == last_backward:
            before_last_backward()
        message = mail[type(action)].take(action)
        following = actions[at + 1] if at + 1 < len(actions) else None
        # The gradient of this very micro-batch cannot come before its activations went out: ask for it after that.
        if following is not None and following != Backward(action.micro_batch):
            mail[type(following)].ask(following)
        if isinstance(action, Forward):
            hidden = message.requires_grad_(last_backward >= 0) if message is not None else None
            output = stage(action.micro_batch, hidden)
            if last_backward >= 0:
                alive[action.micro_batch] = (hidden, output)
            if below is None:
                losses += output.detach()
            mail[Forward].send(output.detach())
        else:
            hidden, output = alive.pop(action.micro_batch)
            torch.autograd.backward(output, message)
            if hidden is not None:
                assert hidden.grad is not None
                mail[Backward].send(hidden.grad)
    for direction in mail.values():
        direction.finish()
    return losses
