"""The operations that a group of ranks performs together: the only module that calls `torch.distributed` collectives.

Everything above speaks to a `Communicator`. Asynchronous operations return a `Work`: until it was waited for, outputs
must not be read and inputs must not be changed, and all members must issue operations in the same order. Tests
replace the communicator by one that enforces these rules, since gloo forgives what NCCL does not.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist


class Work(Protocol):
    """An operation under way."""

    def wait(self) -> object:
        """Block (on a GPU: the current stream) until the operation is done."""


class Communicator(Protocol):
    """Collective and point-to-point operations of one group; each is started and returns its `Work`."""

    def all_reduce(self, tensor: torch.Tensor, maximum: bool = False) -> Work:
        """Sum (or take the maximum of) `tensor` over the group, in place."""

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        """Concatenate each member's `tensor` along dim 0 into `output`, in rank order."""

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        """Sum `tensor` over the group and keep this rank's equal share along dim 0 in `output`."""

    def send(self, tensor: torch.Tensor, peer: int) -> Work:
        """Send `tensor` to the member with index `peer`."""

    def receive(self, tensor: torch.Tensor, peer: int) -> Work:
        """Fill `tensor` with what the member with index `peer` sends."""


class TorchCommunicator:
    """A `Communicator` on a `torch.distributed` process group of `ranks` (global ranks, in group order)."""

    def __init__(self, ranks: tuple[int, ...], group: dist.ProcessGroup) -> None:
        self.ranks = ranks
        self.group = group
        # Renamed in torch 2.13; the older names warn there and the newer are absent before.
        self._all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def all_reduce(self, tensor: torch.Tensor, maximum: bool = False) -> Work:
        operation = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
        return dist.all_reduce(tensor, op=operation, group=self.group, async_op=True)

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        return self._all_gather(output, tensor, group=self.group, async_op=True)

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        return self._reduce_scatter(output, tensor, group=self.group, async_op=True)

    def send(self, tensor: torch.Tensor, peer: int) -> Work:
        return _started(dist.isend(tensor, dst=self.ranks[peer], group=self.group))

    def receive(self, tensor: torch.Tensor, peer: int) -> Work:
        return _started(dist.irecv(tensor, src=self.ranks[peer], group=self.group))


def _started(work: Work | None) -> Work:
    assert work is not None, "this rank is not a member of the group"
    return work


def new_communicator(ranks: tuple[int, ...], timeout_s: float, backend: str | None = None) -> TorchCommunicator:
    """Make a process group of `ranks`, which all of them and nobody else call, each in the same order of its groups.

    Making the groups of others as well, as `new_group` wants by default, takes minutes on a thousand ranks.
    """
    group = dist.new_group(
        list(ranks), timeout=timedelta(seconds=timeout_s), backend=backend, use_local_synchronization=True
    )
    return TorchCommunicator(ranks, group)
