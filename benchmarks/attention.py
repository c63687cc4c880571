"""The compiled causal attention against PyTorch's and against the products of matrices, on this machine's CPU.

Batch 2, 8 heads that share 4 key/value heads, head size 64. For each length, forward alone and with backward: time of
the best call, FLOP/s (the causal half of the pairs: 2 products forward, 5 backward), their share of what a product of
1024 x 1024 matrices reaches with the same threads in between, and how many times as fast ours is. Calls take turns, so
that what else the machine does hits all. With one thread times are the thread's own, without those in which others
had its processor: on a busy machine only `--threads 1` means something.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness.kernel_cases import OURS
from harness.machine import DTYPES, describe_machine, keep_freed_memory

from megatron.kernels.attention import compiled_causal_attention
from megatron.kernels.native import select

BATCH, HEADS, KEY_VALUE_HEADS, HEAD_DIM = 2, 8, 4, 64
PRODUCT = 1024


def main() -> None:
    """Measure and print a line for each."""
    arguments = parse_arguments()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    print(f"{describe_machine(arguments.threads)}\n{select('auto', 'cpu')}; {arguments.threads} threads")
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    print(f"{'':30} {'':14} {'ms':>8} {'GFLOP/s':>8} {'of product':>10} {'ours is':>8}")
    for precision in arguments.precisions.split(","):
        for length in (128,) if arguments.quick else (512, 2048):
            for backward in (False, True):
                title = f"{precision} s {length} forward{' + backward' if backward else ''}"
                best, product = measure(DTYPES[precision], length, backward, clock, arguments.seconds)
                flops = (7 if backward else 2) * 2 * BATCH * HEADS * HEAD_DIM * length * (length + 1) / 2
                for who, seconds in best.items():
                    rate = flops / seconds
                    ratio = "" if who == OURS else f"{seconds / best[OURS]:.2f} x"
                    print(
                        f"{title:30} {who:14} {1e3 * seconds:8.2f} {rate / 1e9:8.1f} {rate / product:10.0%} {ratio:>8}"
                    )
                    title = ""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", default="fp32", help="comma-separated (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each case (default %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: all cores)")
    parser.add_argument("--quick", action="store_true", help="a smoke run on a short sequence")
    return parser.parse_args()


def measure(
    dtype: torch.dtype, length: int, backward: bool, clock: Callable[[], float], budget_s: float
) -> tuple[dict[str, float], float]:
    """(seconds of the best call of each, FLOP/s of the product)."""
    shapes = [(BATCH, heads, length, HEAD_DIM) for heads in (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS)]
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    # As it comes in a step, through the product behind: [s, b, heads, d] in memory.
    upstream = torch.randn(length, BATCH, HEADS, HEAD_DIM).to(dtype).permute(1, 2, 0, 3)
    left, right = torch.randn(PRODUCT, PRODUCT), torch.randn(PRODUCT, PRODUCT)

    def torchs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def run(function: Callable[..., torch.Tensor]) -> None:
        mixed = function(*inputs)
        if backward:
            torch.autograd.grad(mixed, inputs, upstream)

    calls: dict[str, Callable[[], object]] = {
        OURS: lambda: run(compiled_causal_attention),
        "torch SDPA": lambda: run(torchs),
        "product": lambda: left @ right,
    }
    best = dict.fromkeys(calls, float("inf"))
    start = time.perf_counter()
    while best[OURS] == float("inf") or time.perf_counter() - start < budget_s:
        for who, call in calls.items():
            begin = clock()
            call()
            best[who] = min(best[who], clock() - begin)
    return best, 2.0 * PRODUCT**3 / best.pop("product")


if __name__ == "__main__":
    main()
