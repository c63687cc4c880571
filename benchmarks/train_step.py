"""One training step here against what a user would take instead, on the same Llama, in turns, on this machine's CPU.

Contestants: this project; transformers (SDPA, fused AdamW, clipping to 1.0), eager and compiled; litgpt. In fp32 and
in bf16. First one process with all threads; then two processes that share them: this project with data, tensor and
pipeline ranks (8 micro-batches), transformers with DistributedDataParallel and with its own tensor parallelism, over
gloo.

Each contestant lives in processes of its own. They take turns, and one computes at a time; the first steps of each are
not counted. What large matrix products reach in the same precision and with the same threads is measured among the
turns: "of peak" is the model's FLOPs (convention "model FLOPs, causal") per second as a share of that. Memory "beyond
states" is the peak of resident memory less imports, weights, gradients and optimizer state (see harness/worker.py).

A peer that is not installed is skipped. litgpt needs only its own files, not the packages it asks for; transformers'
tensor parallelism wants accelerate:

    pip install --no-deps litgpt accelerate psutil

With `--memory`, only memory is measured, one contestant after the other (for a large vocabulary):

    python benchmarks/train_step.py --memory --vocabulary 128256
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.contestants import ONE_PROCESS, OURS, TWO_PROCESSES, Contestant, Workload
from harness.machine import DTYPES, describe_machine
from harness.race import Race, measure_memory, race
from harness.report import figures, memory_table, speed_table

# How the time is dealt out: two processes include a pipeline, whose step has 8 micro-batches.
_WEIGHTS = {1: 1.0, 2: 1.7}


def main() -> None:
    """Run what was asked for, print a table after each part, write the figures."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the workers are ended then, too
    arguments = parse_arguments()
    threads = arguments.threads or len(os.sched_getaffinity(0))
    workload = Workload(vocab_size=arguments.vocabulary, micro_batches=arguments.micro_batches)
    if arguments.quick:
        workload = dataclasses.replace(workload.small(), micro_batches=arguments.micro_batches)
    machine = describe_machine(threads)
    print(machine)
    print(
        f"{workload.model.num_parameters:,} weights, vocabulary {workload.vocab_size:,}, sequence "
        f"{workload.sequence_length}, micro-batch {workload.micro_batch} x {workload.micro_batches}, {threads} threads"
        + (" (a smoke run: figures mean nothing)" if arguments.quick else ""),
        flush=True,
    )
    parts = choose_parts(arguments, threads)
    deadline = time.monotonic() + 60.0 * arguments.minutes
    races = []
    for number, (precision, contestants) in enumerate(parts):
        weights = [_WEIGHTS[max(each.world for each in part)] for _, part in parts[number:]]
        now = time.monotonic()
        until = now + max(0.0, deadline - now) * weights[0] / sum(weights)
        races.append(run_part(arguments, workload, precision, contestants, threads, until))
    if arguments.json is not None:
        write_figures(arguments.json, machine, workload, threads, races)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    names = [contestant.name for contestant in (*ONE_PROCESS, *TWO_PROCESSES)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contestants", default=",".join(names), help=f"comma-separated names, of {', '.join(names)}")
    parser.add_argument("--precisions", default=",".join(DTYPES), help="comma-separated (default %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="size of the vocabulary (default %(default)s)")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches a step (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="at most so many rounds (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="bound on all of it (default %(default)s)")
    parser.add_argument("--threads", type=int, help="threads in all (default: the cores of this process)")
    parser.add_argument("--memory", action="store_true", help="measure only memory, of one process")
    parser.add_argument("--quick", action="store_true", help="a smoke run on a model of two layers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    arguments.contestants = arguments.contestants.split(",")
    arguments.precisions = arguments.precisions.split(",")
    for given, known in ((arguments.contestants, names), (arguments.precisions, list(DTYPES))):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if arguments.quick:
        arguments.rounds = min(arguments.rounds, 2)
    return arguments


def choose_parts(arguments: argparse.Namespace, threads: int) -> list[tuple[str, list[Contestant]]]:
    """(precision, contestants that take turns). Our one process runs beside the two as well, to compare with."""
    chosen = [each for each in ONE_PROCESS if each.name in arguments.contestants]
    if arguments.memory:
        chosen = [each for each in chosen if not each.compiled]
        return [(precision, chosen) for precision in arguments.precisions]
    pairs = [each for each in TWO_PROCESSES if each.name in arguments.contestants]
    if pairs and any(each.name == OURS for each in chosen):
        pairs = [each for each in chosen if each.name == OURS] + pairs
    if threads < 2 and pairs:
        print("two processes are left out: they need two threads")
        pairs = []
    parts = [chosen, pairs]
    return [(precision, part) for part in parts if part for precision in arguments.precisions]


def run_part(
    arguments: argparse.Namespace,
    workload: Workload,
    precision: str,
    contestants: Sequence[Contestant],
    threads: int,
    until: float,
) -> Race:
    """Measure and print one part."""

    def say(text: str) -> None:
        print(text, flush=True)

    if arguments.memory:
        result = measure_memory(contestants, workload, precision, threads=threads, deadline=until, say=say)
        lines = memory_table(result)
    else:
        result = race(
            contestants, workload, precision, threads=threads, rounds=arguments.rounds, deadline=until, say=say
        )
        lines = speed_table(result, workload)
    print("\n".join(["", *lines, ""]), flush=True)
    return result


def write_figures(path: Path, machine: str, workload: Workload, threads: int, races: list[Race]) -> None:
    """All figures as JSON."""
    values: dict[str, Any] = {
        "machine": machine,
        "threads": threads,
        "workload": dataclasses.asdict(workload),
        "races": [figures(each, workload) for each in races],
    }
    path.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
