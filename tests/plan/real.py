"""The same two steps for real, on gloo: what the tensors of this process hold, and what it sends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from megatron.config.run import RunConfig
from megatron.model.config import ModelConfig
from megatron.model.initialize import initial_values
from megatron.parallel.communicator import TorchCommunicator, Work, new_communicator
from megatron.parallel.mesh import connect
from megatron.plan.memory import peak_memory
from megatron.plan.rank import _batch
from megatron.plan.recorder import Recorder
from megatron.train.build import build_step, make_plan


@dataclass(frozen=True)
class Quiet:
    """A real `Work`; no mode sees what gloo allocates when it ends."""

    work: Work

    def wait(self) -> None:
        with _disable_current_modes():
            self.work.wait()


class Counting:
    """Counts what goes through a real communicator: (kind, bytes), in order.

    What gloo allocates for itself is not the program's, so no mode sees it.
    """

    def __init__(self, inner: TorchCommunicator, sent: list[tuple[str, int]]) -> None:
        self._inner, self._sent = inner, sent

    def all_reduce(self, tensor: torch.Tensor, maximum: bool = False) -> Work:
        return self._run("all_reduce", tensor, lambda: self._inner.all_reduce(tensor, maximum))

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        return self._run("all_gather", output, lambda: self._inner.all_gather(output, tensor))

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        return self._run("reduce_scatter", tensor, lambda: self._inner.reduce_scatter(output, tensor))

    def send(self, tensor: torch.Tensor, peer: int) -> Work:
        return self._run("send", tensor, lambda: self._inner.send(tensor, peer))

    def receive(self, tensor: torch.Tensor, peer: int) -> Work:
        return self._run("receive", tensor, lambda: self._inner.receive(tensor, peer))

    def _run(self, kind: str, tensor: torch.Tensor, start: Callable[[], Work]) -> Work:
        self._sent.append((kind, tensor.nbytes))
        with _disable_current_modes():
            return Quiet(start())


def run(rank: int, config: RunConfig, model: ModelConfig, world_size: int) -> dict[str, Any]:
    """Two steps: the peak of live tensors in bytes, and the second step's messages."""
    plan = make_plan(config, model, world_size)
    sent: list[tuple[str, int]] = []
    context = connect(
        plan.grid,
        rank,
        sequence=plan.sequence_parallel,
        num_key_value_heads=model.num_key_value_heads,
        wraps=config.parallel.chunks > 1,
        shard=plan.shard,
        make=lambda ranks: Counting(new_communicator(ranks, 60.0), sent),
    )
    recorder = Recorder()
    with recorder.watching() as recording:
        step = build_step(config, plan, model, context, torch.device("cpu"))
        step.fill(initial_values(model, 1))
        batch = _batch(config, plan, torch.device("cpu"))
        step(batch, 1)
        sent.clear()
        outcome = step(batch, 2)
    assert torch.isfinite(outcome.loss)
    return {"peak": peak_memory(recording).total, "sent": list(sent)}
