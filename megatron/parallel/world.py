"""All processes of a run together: starting them up, and the words they exchange beside the tensors.

Control messages (texts, votes, errors) travel over a gloo group of their own, so they never wait for a GPU nor disturb
the order of the collectives there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from types import TracebackType
from typing import Self, TypeVar

import torch
import torch.distributed as dist

from megatron.parallel.agreement import agree, raise_together
from megatron.parallel.collectives import all_gather, start_all_reduce
from megatron.parallel.communicator import Work, new_communicator
from megatron.parallel.mesh import Axis
from megatron.utils.device import communication_backend, keep_freed_memory, local_device
from megatron.utils.environment import Launch, read_launch
from megatron.utils.errors import MegatronError

T = TypeVar("T")

_BEAT_S = 0.5  # how often those that wait for long work hear that it still goes on


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
        """Run `action` on every rank; if it failed on any, raise on all, so that none waits for one that is gone."""
        return agree(self.exchange, action)

    def once_per_machine(self, action: Callable[[], str]) -> str:
        """What `action` gives on the first process of this machine, which alone runs it, however long it takes.

        The others wait with it in small steps, so that no collective lasts long; if it fails on any machine, it raises
        on all ranks at once. All ranks call it.
        """
        results, failures = list[str](), list[Exception]()

        def run() -> None:
            try:
                results.append(action())
            except Exception as error:
                failures.append(error)

        first = self.launch.local_rank == 0
        # A thread that an end of the process does not wait for: Ctrl-C, or a failure elsewhere, ends it.
        thread = Thread(target=run, daemon=True)
        if first:
            thread.start()
        while True:
            if first:
                thread.join(_BEAT_S)
            self.raise_together(failures[0] if failures else None)
            answers = self.exchange(json.dumps(results if first else [""]))
            found = [json.loads(answer) for answer in answers]
            if all(found):
                return str(found[self.launch.rank - self.launch.local_rank][0])

    def raise_together(self, failure: Exception | None) -> None:
        """Raise on all ranks the error of the lowest rank that has one; return where none has. All ranks call it."""
        raise_together(self.exchange, failure)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the process groups in good order, unless this process alone has failed: others may still be waiting in
        a collective for it, and leaving would wait for them."""
        agreed = error is None or (isinstance(error, MegatronError) and error.met_by == "world")
        if agreed and dist.is_initialized():
            dist.destroy_process_group()


def start_world(timeout_s: float) -> World:
    """Join the processes that the launcher started (one alone needs no launcher) and find this one's device.

    A collective that waits longer than `timeout_s` seconds fails.
    """
    launch = read_launch()
    device = local_device(launch.local_rank)
    keep_freed_memory(device)
    if launch.world_size == 1:
        return World(launch, device, Axis("control"))
    if not dist.is_initialized():
        dist.init_process_group(communication_backend(device), timeout=timedelta(seconds=timeout_s))
    ranks = tuple(range(launch.world_size))
    communicator = new_communicator(ranks, timeout_s, backend="gloo")
    return World(launch, device, Axis("control", launch.rank, launch.world_size, ranks, communicator))
