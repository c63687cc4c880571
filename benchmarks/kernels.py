"""Each operation of megatron/kernels/ against PyTorch and against the memory-bandwidth floor, on this machine's CPU.

Per operation and precision, at 4096 x 4096 elements (cross-entropy: a vocabulary of 32,000, as many elements), a line
for each who computes it: time of the best call, bytes per second (each input read once, each output written once),
share of the floor, how many times as fast ours is, and the error against float64.

The floor is the best of three passes over buffers much larger than the caches, with the same threads: copy (b = a),
triad (c = a + 3 b) and update (b += 3 a, which need not fetch what it overwrites). They are measured before each call,
in turns, so that what else the machine does hits all, and that no input waits in a cache. With one thread all times are
the thread's own, without those in which others had its processor: on a busy machine only `--threads 1` means something.
Freed memory stays with the process: no call pays for fresh pages.

Below each operation of ours: whether its error is at most that of PyTorch's own kernel of this precision (of the plain
formula where there is none), with a hundredth for the luck of rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness.kernel_cases import OURS, Case, Tensors, cases
from harness.machine import DTYPES, Bandwidth, describe_machine, keep_freed_memory

from megatron.kernels.native import select

_FEWEST, _MOST = 3, 30  # calls of each entry
_LUCK = 1.01


def main() -> None:
    """Measure what was asked for, print a table, write the figures."""
    arguments = parse_arguments()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    machine = describe_machine(arguments.threads)
    kernels = select(arguments.backend, "cpu")
    print(f"{machine}\n{kernels}; {arguments.threads} threads")
    if arguments.quick:
        print("a smoke run: figures mean nothing")
    print(f"{'':34} {'':16} {'ms':>8} {'GB/s':>7} {'of floor':>8} {'ours is':>8}  error (2-norm, largest)", flush=True)
    size, vocab_size = (512, 1000) if arguments.quick else (4096, 32000)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    bandwidth = Bandwidth(2**20 if arguments.quick else 2**28, clock)
    rows: list[dict[str, Any]] = []
    highest: dict[str, float] = {}
    for precision in arguments.precisions.split(","):
        for case in cases(DTYPES[precision], size, vocab_size):
            if arguments.operations and not any(word in case.name for word in arguments.operations.split(",")):
                continue
            measured, rates = measure(case, bandwidth, clock, 0.02 if arguments.quick else arguments.seconds)
            rows += [{"precision": precision, "operation": case.name, **row} for row in measured]
            highest = {name: max(rate, highest.get(name, 0.0)) for name, rate in rates.items()}
            print("\n".join([*describe(precision, case, measured), *verdict(case, measured)]), flush=True)
    print("memory, at best: " + ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in highest.items()))
    if arguments.json is not None:
        figures = {"machine": machine, "kernels": kernels, "threads": arguments.threads, "bandwidth": highest}
        arguments.json.write_text(json.dumps(figures | {"rows": rows}, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", help="comma-separated parts of names (default: all)")
    parser.add_argument("--precisions", default=",".join(DTYPES), help="comma-separated (default %(default)s)")
    parser.add_argument("--backend", default="auto", choices=("auto", "native", "reference"), help="whose kernels")
    parser.add_argument("--seconds", type=float, default=0.4, help="time for each line (default %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: all cores)")
    parser.add_argument("--quick", action="store_true", help="a smoke run on small arrays")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args()


def measure(
    case: Case, bandwidth: Bandwidth, clock: Callable[[], float], budget_s: float
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Errors first, from one call each; then the timed calls, in turns with each other and with the bandwidth."""
    exact = case.reference()
    rows: list[dict[str, Any]] = [{"who": entry.who, **errors(entry.tensors(), exact)} for entry in case.entries]
    del exact
    seconds: list[list[float]] = [[] for _ in case.entries]
    bandwidth.measure_anew()
    start = time.perf_counter()
    while len(seconds[0]) < _FEWEST or (
        len(seconds[0]) < _MOST and time.perf_counter() - start < budget_s * (len(case.entries) + 1)
    ):
        for entry, record in zip(case.entries, seconds, strict=True):
            bandwidth.measure()
            begin = clock()
            entry.call()
            record.append(clock() - begin)
    rates = bandwidth.best
    floor = max(rates.values())
    for row, record in zip(rows, seconds, strict=True):
        row |= {
            "seconds_best": min(record),
            "seconds_median": statistics.median(record),
            "bytes": case.bytes_moved,
            "bytes_per_s": case.bytes_moved / min(record),
            "share_of_floor": case.bytes_moved / min(record) / floor,
        }
    return rows, rates


def errors(results: Tensors, exact: Tensors) -> dict[str, float]:
    """The worst over the results of |result - exact| / |exact|: in the 2-norm, and of the largest elements."""
    norms, largest = [], []
    for result, right in zip(results, exact, strict=True):
        difference = result.detach().double() - right.detach()
        norms.append((difference.norm() / right.norm()).item())
        largest.append((difference.abs().amax() / right.abs().amax()).item())
    return {"error_norm": max(norms), "error_largest": max(largest)}


def describe(precision: str, case: Case, rows: list[dict[str, Any]]) -> list[str]:
    """A line for each entry."""
    lines = []
    ours = rows[0] if rows[0]["who"] == OURS else None
    for number, row in enumerate(rows):
        title = f"{precision} {case.name}" if number == 0 else ""
        ratio = "" if ours is None or row is ours else f"{row['seconds_best'] / ours['seconds_best']:.2f} x"
        lines.append(
            f"{title:34} {row['who']:16} {1e3 * row['seconds_best']:8.2f} {row['bytes_per_s'] / 1e9:7.1f} "
            f"{row['share_of_floor']:8.0%} {ratio:>8}  {row['error_norm']:.2e}, {row['error_largest']:.2e}"
        )
    return lines


def verdict(case: Case, rows: list[dict[str, Any]]) -> list[str]:
    """A line that compares our error with PyTorch's, where both are there."""
    by_name = {row["who"]: row for row in rows}
    if OURS not in by_name or case.rival is None:
        return []
    ours, theirs = (by_name[who]["error_norm"] for who in (OURS, case.rival))
    judgement = "no worse" if ours <= _LUCK * theirs else "WORSE"
    return [f"{'':34} error against float64: {ours:.3e}, {case.rival} {theirs:.3e}: {judgement}"]


if __name__ == "__main__":
    main()
