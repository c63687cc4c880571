"""All processes of a run together: starting them up, and the words they exchange beside the tensors.

Control messages (texts, votes, errors) travel over a gloo group of their own, so they never wait for a GPU nor disturb
the order of the collectives there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron.parallel.collectives import all_gather, start_all_reduce
from megatron.parallel.communicator import Work, new_communicator
from megatron.parallel.mesh import Axis
from megatron.utils import errors
from megatron.utils.device import communication_backend, local_device
from megatron.utils.environment import Launch, read_launch
from megatron.utils.errors import MegatronError

T = TypeVar("T")


class Vote:
    """A number of each rank on its way to the maximum over all ranks."""

    def __init__(self, ballot: torch.Tensor, work: Work) -> None:
        self._ballot, self._work = ballot, work

    def result(self) -> int:
        """The maximum; waits for the slowest rank."""
        self._work.wait()
        return int(self._ballot.item())


@dataclass(frozen=True)
class World:
    """This process among all of the run: its launch, its device, and the control group."""

    launch: Launch
    device: torch.device
    control: Axis

    def exchange(self, text: str) -> list[str]:
        """Every rank's text, in rank order; a barrier as well."""
        payload = text.encode()
        lengths = all_gather(torch.tensor([len(payload)]), self.control).tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        if payload:
            padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        gathered = all_gather(padded, self.control).view(len(lengths), -1)
        return [row[:length].numpy().tobytes().decode() for row, length in zip(gathered, lengths, strict=True)]

    def vote(self, ballot: int) -> Vote:
        """Start finding the largest ballot of all ranks; the step goes on meanwhile."""
        tensor = torch.tensor([ballot])
        return Vote(tensor, start_all_reduce(tensor, self.control, maximum=True))

    def agree(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if it raised a user's error on any, raise that of the lowest such rank on all.

        So no rank waits for one that has failed, and all end with the same words and exit code.
        """
        failure: MegatronError | None = None
        result: T | None = None
        try:
            result = action()
        except MegatronError as error:
            failure = error
        self.raise_together(failure)
        return result  # type: ignore[return-value]

    def raise_together(self, failure: MegatronError | None) -> None:
        """Raise on all ranks the error of the lowest rank that has one; return where none has. All ranks call it."""
        own = "" if failure is None else json.dumps([type(failure).__name__, str(failure)])
        first = next(((rank, text) for rank, text in enumerate(self.exchange(own)) if text), None)
        if first is None:
            return
        kind, message = json.loads(first[1])
        agreed = failure if first[0] == self.launch.rank else getattr(errors, kind, MegatronError)(message)
        assert isinstance(agreed, MegatronError)
        agreed.met_by = "world"
        raise agreed

    def close(self) -> None:
        """Leave the process groups; the process may then end in its own time."""
        if dist.is_initialized():
            dist.destroy_process_group()


def start_world(timeout_s: float) -> World:
    """Join the processes that the launcher started (one alone needs no launcher) and find this one's device.

    A collective that waits longer than `timeout_s` seconds fails.
    """
    launch = read_launch()
    device = local_device(launch.local_rank)
    if launch.world_size == 1:
        return World(launch, device, Axis("control"))
    if not dist.is_initialized():
        dist.init_process_group(communication_backend(device), timeout=timedelta(seconds=timeout_s))
    ranks = tuple(range(launch.world_size))
    communicator = new_communicator(ranks, timeout_s, backend="gloo")
    return World(launch, device, Axis("control", launch.rank, launch.world_size, ranks, communicator))
