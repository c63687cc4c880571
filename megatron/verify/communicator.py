"""A real communicator that notes what is used and, to show that the certificate can fail, leaves one thing out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron.parallel.collectives import Done
from megatron.parallel.communicator import TorchCommunicator, Work

# A kind of operation of one axis, as ("tp", "all_reduce").
Use = tuple[str, str]


class WatchedCommunicator:
    """A `Communicator`. Where its use is the one to drop, each rank goes on with its own part alone: sums are left
    unsummed, gathers repeat the rank's own share, messages arrive empty."""

    def __init__(self, inner: TorchCommunicator, used: list[Use], drop: Use | None) -> None:
        self._inner, self._used, self._drop = inner, used, drop
        self.axis = ""

    def all_reduce(self, tensor: torch.Tensor, maximum: bool = False) -> Work:
        """Sum, or take the maximum."""
        return self._run("all_reduce", lambda: self._inner.all_reduce(tensor, maximum), lambda: None)

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        """Concatenate."""
        copies = len(self._inner.ranks)
        return self._run(
            "all_gather",
            lambda: self._inner.all_gather(output, tensor),
            lambda: output.copy_(torch.cat([tensor] * copies)),
        )

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        """Sum and keep a share."""
        ranks = self._inner.ranks
        own = tensor.chunk(len(ranks))[ranks.index(torch.distributed.get_rank())]
        return self._run(
            "reduce_scatter", lambda: self._inner.reduce_scatter(output, tensor), lambda: output.copy_(own)
        )

    def send(self, tensor: torch.Tensor, peer: int) -> Work:
        """To one member."""
        return self._run("message", lambda: self._inner.send(tensor, peer), lambda: None)

    def receive(self, tensor: torch.Tensor, peer: int) -> Work:
        """From one member."""
        return self._run("message", lambda: self._inner.receive(tensor, peer), lambda: tensor.zero_())

    def _run(self, kind: str, start: Callable[[], Work], alone: Callable[[], object]) -> Work:
        use = (self.axis, kind)
        if use not in self._used:
            self._used.append(use)
        if use == self._drop:
            alone()
            return Done()
        return start()
