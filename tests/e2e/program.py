"""Runs `megatron` in processes that are kept, or under torchrun."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Result:
    """How a run ended: each rank's exit code, what all wrote to standard error, and rank 0's standard output."""

    codes: list[int]
    errors: str
    output: str


@dataclass
class Run:
    """A run under way on some of the pool's processes."""

    program: Program
    processes: list[subprocess.Popen[str]]
    folder: Path
    deadline: float

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; an error if the run ends before."""
        answers = [process.stdout for process in self.processes]
        while not condition():
            if select.select(answers, [], [], 0.005)[0] or time.monotonic() > self.deadline:
                self.kill()
                raise AssertionError(f"it never came to that:\n{self.errors}")

    def wait(self) -> Result:
        """Wait for the end of all ranks."""
        codes = [self._answer(process) for process in self.processes]
        return Result(codes, self.errors, (self.folder / "output-0").read_text())

    def kill(self) -> None:
        """kill -9 to all of them at once."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        self.program.forget(self.processes)

    @property
    def errors(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("errors-*")))

    def _answer(self, process: subprocess.Popen[str]) -> int:
        assert process.stdout is not None
        while not select.select([process.stdout], [], [], 0.2)[0]:
            if time.monotonic() > self.deadline:
                self.kill()
                raise AssertionError(f"the run hangs:\n{self.errors}")
        line = process.stdout.readline()
        if not line:
            self.kill()
            raise AssertionError(f"a process died:\n{self.errors}")
        return int(json.loads(line)["code"])


@dataclass
class Program:
    """`megatron` on up to as many processes as were ever asked for at once."""

    _idle: list[subprocess.Popen[str]] = field(default_factory=list)
    _folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    def start(self, words: Sequence[Any], ranks: int = 1, timeout_s: float = 120.0, record: Path | None = None) -> Run:
        """Start `megatron` with these words, as torchrun would on `ranks` processes (as no launcher would on one).

        What the steps of rank r are given is written down in the file `record`-r.
        """
        self._idle = [process for process in self._idle if process.poll() is None]
        while len(self._idle) < ranks:
            self._idle.append(_start_worker())
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        processes = self._idle[:ranks]
        port = _free_port()
        for rank, process in enumerate(processes):
            order = {
                "environment": _launch(rank, ranks, port),
                "words": [str(word) for word in words],
                "errors": str(folder / f"errors-{rank}"),
                "output": str(folder / f"output-{rank}"),
                "record": None if record is None else f"{record}-{rank}",
            }
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        return Run(self, processes, folder, time.monotonic() + timeout_s)

    def run(self, words: Sequence[Any], ranks: int = 1, expect: int = 0, record: Path | None = None) -> Result:
        """Run `megatron` to its end; every rank must end with the code `expect`."""
        result = self.start(words, ranks, record=record).wait()
        assert result.codes == [expect] * ranks, result.errors
        return result

    def torchrun(self, words: Sequence[Any], ranks: int) -> subprocess.CompletedProcess[str]:
        """The same under torchrun, in processes of its own."""
        command = torchrun_command(words, ranks)
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)

    def forget(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        """These have ended; others will be started in their place."""
        self._idle = [process for process in self._idle if process not in processes]

    def close(self) -> None:
        for process in self._idle:
            process.kill()
        for process in self._idle:
            process.wait()
        self._folder.cleanup()


def torchrun_command(words: Sequence[Any], ranks: int) -> list[str]:
    """The command line of a user's launch on one machine."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port"]
    return [*launch, str(_free_port()), "-m", "megatron", *map(str, words)]


def _launch(rank: int, ranks: int, port: int) -> dict[str, str | None]:
    """The variables that torchrun sets; unset for a process alone."""
    if ranks == 1:
        return dict.fromkeys(LAUNCHER_VARIABLES)
    values = (rank, rank, ranks, ranks, "127.0.0.1", port)
    return {name: str(value) for name, value in zip(LAUNCHER_VARIABLES, values, strict=True)}


def _start_worker() -> subprocess.Popen[str]:
    # One thread each, as torchrun sets it; and the package beside these tests, wherever another may be installed.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
