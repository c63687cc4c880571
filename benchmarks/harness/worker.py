"""One process of a contestant: `python -m harness.worker JOB`, driven by lines of JSON on its standard input.

Each command is answered by one line on what was the standard output; anything that libraries print goes to the
standard error instead. The process ends when its input does.

Memory: `imports` is the resident memory after two steps of a tiny model, which load whatever the code loads late.
`states` are the bytes of weights, gradients and optimizer state, counted from the tensors. `peak` is the high-water
mark of resident memory, started anew after the first step. `beyond` is peak - imports - states: what the contestant
needs beyond its states.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness.contestants import Contestant, Job, Workload
from harness.machine import DTYPES, peak_bytes, product_flops_per_s, reset_peak, resident_bytes
from harness.trainer import Trainer

_BATCHES = 4  # steps' worth of data, used in turn


class Runner:
    """A contestant in this process."""

    def __init__(self, contestant: Contestant, workload: Workload, dtype: torch.dtype) -> None:
        build: Callable[..., Trainer] = importlib.import_module(f"harness.{contestant.module}").build
        rank = int(os.environ.get("RANK", "0"))
        # Data is the slowest of the axes that a benchmark uses, and used with no other.
        data_rank = rank if contestant.data > 1 else 0
        self._imports = 0
        self._measures_memory = not contestant.compiled  # what compiling leaves behind would count
        if self._measures_memory:
            tiny = workload.small()
            trainer = build(contestant, tiny, dtype)
            for step in range(2):
                trainer.step(tiny.batches(data_rank, step))
            del trainer
            gc.collect()
            self._imports = resident_bytes()
        self._batches = [workload.batches(data_rank, step) for step in range(_BATCHES)]
        self._trainer = build(contestant, workload, dtype)
        self._done = 0

    def run(self, steps: int) -> dict[str, Any]:
        """Seconds of each step."""
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self._trainer.step(self._batches[self._done % _BATCHES])
            seconds.append(time.perf_counter() - start)
            if self._done == 0:
                reset_peak()
            self._done += 1
        return {"seconds": seconds}

    def memory(self) -> dict[str, Any]:
        """Bytes, or nothing where they would mislead."""
        if not self._measures_memory:
            return {"memory": None}
        states = self._trainer.state_bytes()
        total = sum(states.values())
        beyond = peak_bytes() - self._imports - total
        return {"memory": {"imports": self._imports, **states, "states": total, "beyond": beyond, "peak": peak_bytes()}}


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    # Else a library that looks for an optional package "kernels", as transformers does, finds the benchmark.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parents[1]]
    try:
        job = Job.from_dict(json.loads(sys.argv[1]))
        dtype = DTYPES[job.precision]
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        if job.contestant is not None:
            importlib.import_module(f"harness.{job.contestant.module}")
        answer({"imported": True})
        runner: Runner | None = None
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "build":
                runner = Runner(job.contestant, job.workload, dtype) if job.contestant is not None else None
                answer({"built": True})
            elif command["do"] == "products":
                answer({"flops_per_s": product_flops_per_s(dtype, command["budget_s"])})
            else:
                assert runner is not None, "not built yet"
                answer(runner.run(command["steps"]) if command["do"] == "run" else runner.memory())
    except Exception as error:  # told to the driver, which reports it and goes on without this contestant
        traceback.print_exc()
        last = [line for line in str(error).splitlines() if line.strip()] or [""]
        answer({"error": f"{type(error).__name__}: {last[0]}"})
    os._exit(0)  # some libraries' threads and groups do not end by themselves


if __name__ == "__main__":
    main()
