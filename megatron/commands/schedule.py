"""`megatron schedule`: a pipeline schedule as a picture, with its bubble and what it keeps alive."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from megatron.config.parallel import ScheduleName
from megatron.utils.errors import ConfigError

HELP = "show a pipeline schedule: its order, idle time and memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("--schedule", choices=get_args(ScheduleName), default="1f1b", help="default %(default)s")
    parser.add_argument("--stages", type=int, default=4, help="pipeline stages (default %(default)s)")
    parser.add_argument("--micro-batches", type=int, default=8, help="of each data rank (default %(default)s)")
    parser.add_argument("--chunks", type=int, default=1, help="parts of the model on each stage (default %(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        nargs=3,
        metavar=("F", "I", "W"),
        default=(1.0, 1.0, 1.0),
        help="what forward, backward for the inputs and backward for the weights take on a stage (default 1 1 1)",
    )
    parser.add_argument("--svg", metavar="FILE", help="write the picture there")


def run(arguments: argparse.Namespace) -> int:
    """Print the picture. Raises ConfigError for sizes that make no schedule."""
    _check(arguments)
    from megatron.parallel.pipeline.check import check_schedule
    from megatron.parallel.pipeline.picture import to_svg, to_text
    from megatron.parallel.pipeline.schedule import (
        Action,
        Backward,
        BackwardInput,
        BackwardWeight,
        Forward,
        make_schedule,
    )
    from megatron.parallel.pipeline.simulate import simulate
    from megatron.utils.files import write_atomically

    stages, micro_batches, chunks = arguments.stages, arguments.micro_batches, arguments.chunks
    forward, inputs, weights = arguments.seconds
    seconds = {Forward: forward, Backward: inputs + weights, BackwardInput: inputs, BackwardWeight: weights}

    def duration(stage: int, action: Action) -> float:
        return seconds[type(action)] / chunks

    plan = make_schedule(arguments.schedule, stages, micro_batches, chunks)
    check_schedule(plan, micro_batches, chunks=chunks)
    result = simulate(plan, duration, chunks=chunks)
    if arguments.svg:
        write_atomically(Path(arguments.svg), to_svg(result))
    print(to_text(result, min(forward, inputs, weights) / chunks))
    alive = ", ".join(f"{result.peak_live(stage) / chunks:g}" for stage in range(stages))
    print(
        f"step {result.step_s:g} s; bubble {result.bubble:.1%} of the work; micro-batches alive on each stage: {alive}"
    )
    return 0


def _check(arguments: argparse.Namespace) -> None:
    stages, micro_batches, chunks = arguments.stages, arguments.micro_batches, arguments.chunks
    problems = [
        f"--{name} {value} must be at least 1"
        for name, value in (("stages", stages), ("micro-batches", micro_batches), ("chunks", chunks))
        if value < 1
    ]
    if min(arguments.seconds) <= 0.0:
        problems.append(f"--seconds {' '.join(map(str, arguments.seconds))}: each must be above 0")
    if not problems and arguments.schedule != "interleaved" and chunks > 1:
        problems.append(f"--chunks {chunks} is for --schedule interleaved, not {arguments.schedule}; leave it out")
    elif not problems and arguments.schedule == "interleaved" and min(stages, chunks) < 2:
        problems.append(
            f"--schedule interleaved with --stages {stages} and --chunks {chunks}: it wants 2 or more of both; use "
            "--chunks 2, or --schedule 1f1b"
        )
    elif not problems and chunks > 1 and micro_batches % stages:
        below = micro_batches // stages * stages
        problems.append(
            f"--micro-batches {micro_batches} is not a multiple of --stages {stages}, in groups of which micro-batches "
            f"go through the chunks; use {f'{below} or ' if below else ''}{below + stages}"
        )
    if problems:
        raise ConfigError("; ".join(problems))
