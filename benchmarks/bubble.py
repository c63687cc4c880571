"""Idle time of each pipeline schedule, measured: the real engine on gloo, with stages that sleep instead of computing.

For each schedule a process for each stage runs steps; forward, backward for the inputs and backward for the weights
sleep for fixed times. "measured" is the time in which stages wait (for messages, and for the engine itself) as a share
of that in which they slept, from the start that all begin with to the end of the last; "theory" is (p − 1)/m,
(p − 1)/(v m) for v chunks, and ZB-H1's (p − 1)(F + I − W)/(m (F + I + W)). It exits with an error where a bubble is off
by more than 5 % of itself: the sleeps are long, since each action costs the engine up to a millisecond on a busy
machine. All of it takes about six minutes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from megatron.config.parallel import ScheduleName
from megatron.parallel.mesh import Grid, connect
from megatron.parallel.pipeline.engine import Activations, run_stage
from megatron.parallel.pipeline.schedule import make_schedule
from megatron.parallel.weight_gradient import LaterProducts

TOLERANCE = 0.05


@dataclass(frozen=True)
class Setting:
    """One schedule on so many stages; seconds of a whole stage's forward, input and weight part."""

    schedule: ScheduleName
    stages: int
    micro_batches: int
    chunks: int = 1
    forward_s: float = 0.64
    inputs_s: float = 0.64
    weights_s: float = 0.48

    def quick(self) -> Setting:
        """The same with short sleeps, to warm up."""
        return replace(self, forward_s=self.forward_s / 50, inputs_s=self.inputs_s / 50, weights_s=self.weights_s / 50)

    @property
    def theory(self) -> float:
        """The bubble as a share of the work."""
        idle = (self.stages - 1) / (self.micro_batches * self.chunks)
        if self.schedule == "zero_bubble":
            work = self.forward_s + self.inputs_s + self.weights_s
            idle *= (self.forward_s + self.inputs_s - self.weights_s) / work
        return idle


SETTINGS = [
    Setting("gpipe", 4, 8),
    Setting("1f1b", 4, 8),
    Setting("1f1b", 4, 16),
    Setting("interleaved", 4, 8, chunks=2),
    Setting("interleaved", 4, 8, chunks=4, forward_s=1.28, inputs_s=1.28, weights_s=0.96),
    Setting("zero_bubble", 4, 8),
    Setting("zero_bubble", 4, 16),
    Setting("1f1b", 2, 4),
    Setting("zero_bubble", 2, 4),
]


class Sleep(torch.autograd.Function):
    """A chunk that only takes time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, setting: Setting, later: LaterProducts, slept: list[float]
    ) -> torch.Tensor:
        ctx.setting, ctx.later, ctx.slept = setting, later, slept
        sleep(setting.forward_s / setting.chunks, slept)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        setting, slept = ctx.setting, ctx.slept
        sleep(setting.inputs_s / setting.chunks, slept)

        def weights() -> None:
            sleep(setting.weights_s / setting.chunks, slept)

        if not ctx.later.keep(weights):
            weights()
        return gradient.clone(), None, None, None


def sleep(seconds: float, slept: list[float]) -> None:
    """Sleep, and write down how long it was: a busy machine wakes late, which is no idle time of the schedule's."""
    begin = time.perf_counter()
    time.sleep(seconds)
    slept.append(time.perf_counter() - begin)


def run_steps(rank: int, setting: Setting, store: str, pipe: Connection) -> None:
    """A short and a measured step as one stage; sends the seconds of the second, and those that it slept in it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, setting.stages), rank=rank, world_size=setting.stages)
    context = connect(Grid(pipeline=setting.stages), rank, wraps=setting.chunks > 1)
    actions = make_schedule(setting.schedule, setting.stages, setting.micro_batches, setting.chunks)[rank]
    later = LaterProducts()
    slept: list[float] = []
    last = setting.stages - 1

    def timed(pace: Setting) -> float:
        def stage(micro_batch: int, chunk: int, hidden: torch.Tensor | None) -> torch.Tensor:
            hidden = torch.zeros(8, requires_grad=True) if hidden is None else hidden
            result = Sleep.apply(hidden, pace, later, slept)
            return result.sum() if rank == last and chunk == setting.chunks - 1 else result

        slept.clear()
        dist.barrier()
        begin = time.perf_counter()
        activations = Activations([(8,)] * setting.micro_batches, torch.float32, torch.device("cpu"))
        run_stage(actions, stage, context, activations, chunks=setting.chunks, later=later)
        return time.perf_counter() - begin

    timed(setting.quick())
    seconds = timed(setting)
    pipe.send((seconds, sum(slept)))
    dist.destroy_process_group()


def measure(setting: Setting) -> float:
    """The measured bubble of a setting."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(setting.stages):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=run_steps, args=(rank, setting, f"{folder}/store", theirs), daemon=True)
            process.start()
            pipes.append(ours)
            processes.append(process)
        seconds, slept = zip(*(pipe.recv() for pipe in pipes), strict=True)
        for process in processes:
            process.join()
    return max(seconds) * setting.stages / sum(slept) - 1.0


def main() -> None:
    """Print a line for each setting; exit code 1 where one is not as theory says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print("schedule      stages  micro-batches  chunks   theory  measured  measured / theory")
    far = 0
    for setting in SETTINGS:
        found = measure(setting)
        if abs(found / setting.theory - 1.0) > TOLERANCE:
            found = min(found, measure(setting))  # what disturbs can only add to it
        far += abs(found / setting.theory - 1.0) > TOLERANCE
        print(
            f"{setting.schedule:<12}  {setting.stages:>6}  {setting.micro_batches:>13}  {setting.chunks:>6}  "
            f"{setting.theory:>7.1%}  {found:>8.1%}  {found / setting.theory:.3f}",
            flush=True,
        )
    sys.exit(1 if far else 0)


if __name__ == "__main__":
    main()
