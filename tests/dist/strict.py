"""A communicator with NCCL's habits, for tests: gloo forgives what NCCL does not.

Outputs are poisoned until their work is waited for; inputs must not change before that; operations of one communicator
run one after the other in the order of issue, each after a random delay; a send ends only when its receiver has the
message. Works that nobody waited for are an error, and so are orders that differ between ranks (`Log`).
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron.parallel.communicator import TorchCommunicator, Work, new_communicator


@dataclass
class Log:
    """What this rank issued, by communicator, and the works that are not waited for."""

    issued: dict[str, list[str]] = field(default_factory=dict)
    open_works: int = 0


class StrictWork:
    """Completes when the communicator's thread has run it; `wait` hands over the output."""

    def __init__(self, log: Log, finish: Callable[[], None]) -> None:
        self.done = threading.Event()
        self.failure: BaseException | None = None
        self._log, self._finish, self._waited = log, finish, False
        log.open_works += 1

    def wait(self) -> None:
        assert self.done.wait(60.0), "the operation did not end in 60 s: a deadlock"
        if self.failure is not None:
            raise self.failure
        if not self._waited:
            self._waited = True
            self._log.open_works -= 1
            self._finish()


class StrictCommunicator:
    """Wraps a `TorchCommunicator`."""

    def __init__(self, inner: TorchCommunicator, log: Log, number: int) -> None:
        self._inner, self._log = inner, log
        self._name = f"{number}:{inner.ranks}"
        self._random = random.Random(number)
        self._queue: queue.Queue[tuple[Callable[[], None], StrictWork] | None] = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        """End the thread, once it has run what was issued."""
        self._queue.put(None)

    def all_reduce(self, tensor: torch.Tensor, maximum: bool = False) -> Work:
        private = tensor.clone()
        return self._issue(
            f"all_reduce {tuple(tensor.shape)} {tensor.dtype} {maximum}",
            lambda: self._inner.all_reduce(private, maximum).wait(),
            output=(tensor, private),
        )

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        source, private = tensor.clone(), torch.empty_like(output)
        # A rank's own share may lie within the output: it keeps its values.
        return self._issue(
            f"all_gather {tuple(tensor.shape)} {tensor.dtype}",
            lambda: self._inner.all_gather(private, source).wait(),
            output=(output, private),
            keep=(tensor, source),
        )

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        source, private = tensor.clone(), torch.empty_like(output)
        return self._issue(
            f"reduce_scatter {tuple(tensor.shape)} {tensor.dtype}",
            lambda: self._inner.reduce_scatter(private, source).wait(),
            output=(output, private),
            unchanged=tensor,
        )

    def send(self, tensor: torch.Tensor, peer: int) -> Work:
        source = tensor.clone()

        def exchange() -> None:
            self._inner.send(source, peer).wait()
            self._inner.receive(torch.empty(1), peer).wait()  # the receiver has it

        return self._issue(f"send {peer}", exchange, unchanged=tensor, logged=False)

    def receive(self, tensor: torch.Tensor, peer: int) -> Work:
        private = torch.empty_like(tensor)

        def exchange() -> None:
            self._inner.receive(private, peer).wait()
            self._inner.send(torch.ones(1), peer).wait()

        return self._issue(f"receive {peer}", exchange, output=(tensor, private), logged=False)

    def _issue(
        self,
        what: str,
        run: Callable[[], Any],
        output: tuple[torch.Tensor, torch.Tensor] | None = None,
        keep: tuple[torch.Tensor, torch.Tensor] | None = None,
        unchanged: torch.Tensor | None = None,
        logged: bool = True,
    ) -> StrictWork:
        if logged:
            self._log.issued.setdefault(self._name, []).append(what)
        if output is not None:
            _poison(output[0])
        if keep is not None:
            keep[0].data.copy_(keep[1])  # by `data`, since a tensor that is only read has no new version for autograd
            unchanged = keep[0]
        watched = unchanged if unchanged is not None else output[0] if output is not None else None
        before = None if watched is None else watched.clone()

        def finish() -> None:
            if watched is not None and before is not None:
                same = torch.equal(_bits(watched), _bits(before))
                assert same, f"{what}: a tensor was changed before its operation was waited for"
            if output is not None:
                output[0].copy_(output[1])

        work = StrictWork(self._log, finish)
        self._queue.put((run, work))
        return work

    def _run(self) -> None:
        while True:
            job = self._queue.get()
            if job is None:
                return
            run, work = job
            time.sleep(self._random.random() * 2e-3)
            try:
                run()
            except BaseException as error:  # raised again where the work is waited for
                work.failure = error
            work.done.set()


def _poison(tensor: torch.Tensor) -> None:
    tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


class Communicators:
    """Makes the communicators of one case."""

    def __init__(self, log: Log, strict: bool) -> None:
        self._log, self._strict = log, strict
        self._ranks: list[tuple[int, ...]] = []
        self._strict_ones: list[StrictCommunicator] = []

    def make(self, ranks: tuple[int, ...]) -> TorchCommunicator | StrictCommunicator:
        """A communicator; strict ones report to the log, those of the same ranks numbered alike on all of them."""
        plain = new_communicator(ranks, 120.0)
        if not self._strict:
            return plain
        self._ranks.append(ranks)
        self._strict_ones.append(StrictCommunicator(plain, self._log, self._ranks.count(ranks)))
        return self._strict_ones[-1]

    def close(self) -> None:
        """End the threads of strict ones, which would keep their process groups alive."""
        for communicator in self._strict_ones:
            communicator.close()
