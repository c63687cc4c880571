"""Worker processes joined by gloo on this machine, kept between jobs, since starting them takes longest."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class WorkerError(AssertionError):
    """A job failed on some rank, or hangs."""


class Pool:
    """`size` processes that run jobs together. A job is a module-level function job(rank, *arguments)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, job: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
        """Run the job on every rank and return the results in rank order. Raises WorkerError if any rank failed or
        hangs; the workers are thrown away then, since those that are left may wait for one that is gone.
        """
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((job, arguments))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(results) < self.size:
            for rank, (process, pipe) in enumerate(self._workers):
                if rank not in results and pipe.poll(0.001):
                    failed, value = self._receive(rank, process, pipe)
                    if failed:
                        self.close()
                        raise WorkerError(f"rank {rank} of {self.size}:\n{value}")
                    results[rank] = value
            if time.monotonic() > deadline:
                self.close()
                raise WorkerError(f"ranks {sorted(set(range(self.size)) - set(results))} hang after {timeout_s} s")
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self, rank: int, process: Any, pipe: Connection) -> tuple[bool, Any]:
        try:
            received: tuple[bool, Any] = pipe.recv()
            return received
        except EOFError:
            process.join()
            return True, f"the process ended with code {process.exitcode}"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = tempfile.mktemp(prefix="megatron-store-")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))


def _work(rank: int, size: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        for number in itertools.count():
            job, arguments = pipe.recv()
            # Each job has a world of its own: what groups a job leaves behind keep threads of gloo awake.
            world = f"{store}-{number}"
            dist.init_process_group("gloo", store=FileStore(world, size), rank=rank, world_size=size)
            try:
                pipe.send((False, job(rank, *arguments)))
            except Exception:
                pipe.send((True, traceback.format_exc()))
                continue  # these workers are thrown away
            dist.barrier()
            dist.destroy_process_group()
            Path(world).unlink(missing_ok=True)
