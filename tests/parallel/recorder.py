"""A communicator for one process that writes down what is started and waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron.parallel.communicator import Work


@dataclass(frozen=True)
class RecordedWork:
    """Its outputs are handed over by `wait`, as NCCL does."""

    name: str
    events: list[str]
    finish: Callable[[], object]

    def wait(self) -> None:
        self.events.append(f"wait {self.name}")
        self.finish()


class Recorder:
    """Member 0 of two or more, whose other members have the same inputs; until the end of a work outputs are NaN."""

    def __init__(self, events: list[str], name: Callable[[torch.Tensor], str] = lambda _: "", size: int = 2) -> None:
        self.events, self._name, self._size = events, name, size

    def all_reduce(self, tensor: torch.Tensor, maximum: bool = False) -> Work:
        result = tensor.clone() if maximum else self._size * tensor
        return self._start("all_reduce", tensor, tensor, result)

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        return self._start("all_gather", tensor, output, torch.cat([tensor] * self._size))

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        return self._start("reduce_scatter", tensor, output, self._size * tensor.chunk(self._size)[0])

    def send(self, tensor: torch.Tensor, peer: int) -> Work:
        raise AssertionError("nothing is sent here")

    def receive(self, tensor: torch.Tensor, peer: int) -> Work:
        raise AssertionError("nothing is received here")

    def _start(self, kind: str, given: torch.Tensor, output: torch.Tensor, result: torch.Tensor) -> Work:
        what = f"{kind} {self._name(given)}".rstrip()
        self.events.append(f"start {what}")
        output.fill_(torch.nan)
        return RecordedWork(what, self.events, lambda: output.copy_(result))
