"""The processes of one contestant, driven over pipes: started together, told one command at a time, ended together."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness.contestants import Job

_FOLDER = Path(__file__).resolve().parents[1]


class ContestantFailed(Exception):
    """A contestant raised an error, died, or ran out of time; the message says so in one line."""


class Fleet:
    """`world` processes with `threads` threads each, which speak through files descriptors of their own."""

    def __init__(self, job: Job, world: int, threads: int) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._errors = [tempfile.TemporaryFile() for _ in range(world)]  # noqa: SIM115  (closed by `close`)
        self._unread = [b""] * world
        port = _free_port()
        for rank in range(world):
            process = subprocess.Popen(
                [sys.executable, "-m", "harness.worker", json.dumps(job.to_dict())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors[rank],
                cwd=_FOLDER,
                env=os.environ | _environment(rank, world, threads, port),
                start_new_session=True,  # so that what a worker starts (compilers) ends with it
            )
            self._processes.append(process)

    def tell(self, command: dict[str, Any]) -> None:
        """Send a command to all processes."""
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # `answers` finds out why
                process.stdin.write(json.dumps(command).encode() + b"\n")
                process.stdin.flush()

    def answers(self, deadline: float) -> list[dict[str, Any]]:
        """One answer of each process, in rank order. Raises ContestantFailed, after which the fleet is of no use."""
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < len(self._processes):
            waiting = {self._output(rank): rank for rank in range(len(self._processes)) if rank not in answers}
            ready, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise ContestantFailed("out of time")
            for descriptor in ready:
                answer = self._read(descriptor, waiting[descriptor])
                if answer is not None:
                    answers[waiting[descriptor]] = answer
        return [answers[rank] for rank in range(len(answers))]

    def ask(self, command: dict[str, Any], deadline: float) -> list[dict[str, Any]]:
        """`tell`, then `answers`."""
        self.tell(command)
        return self.answers(deadline)

    def close(self) -> None:
        """End the processes and what they started."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        for file in self._errors:
            file.close()

    def _output(self, rank: int) -> int:
        pipe = self._processes[rank].stdout
        assert pipe is not None
        return pipe.fileno()

    def _read(self, descriptor: int, rank: int) -> dict[str, Any] | None:
        received = os.read(descriptor, 65536)
        if not received:
            raise ContestantFailed(self._last_words(rank))
        self._unread[rank] += received
        line, newline, rest = self._unread[rank].partition(b"\n")
        if not newline:
            return None
        self._unread[rank] = rest
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ContestantFailed(answer["error"])
        return answer

    def _last_words(self, rank: int) -> str:
        file = self._errors[rank]
        file.seek(0)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        status = self._processes[rank].wait()
        return f"process ended with {status}: {lines[-1] if lines else 'no message'}"


def _environment(rank: int, world: int, threads: int, port: int) -> dict[str, str]:
    """The launcher's variables for several processes; threads and quiet libraries for all."""
    common = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if world == 1:
        return common
    return common | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
