"""Planned weak and strong scaling of Llama-2-70B, 8 to 16,384 A100: a table, and a picture with `--picture FILE`.

Strong: every step has 1,024 sequences of 4,096 tokens, however many GPUs share them. Weak: 2 sequences for each GPU.
A layout stops paying where twice as many GPUs do not even give a quarter more tokens/s, or
where the batch no longer divides. Nothing here is measured: it is what `megatron
plan` says (docs/planner.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.load import load_config
from megatron.plan.estimate import estimate
from megatron.plan.hardware import load_gpu, load_interconnect
from megatron.train.origin import shrunk_model
from megatron.utils.errors import ConfigError

SIZES = [8 * 2**power for power in range(12)]
STRONG_BATCH, WEAK_PER_GPU = 1024, 2
# Less than this much more throughput from twice as many GPUs does not pay.
LEAST_GAIN = 1.25


@dataclass(frozen=True)
class Layout:
    """A way to cut the model; the data axis gets the rest of the GPUs."""

    tensor: int
    pipeline: int
    chunks: int = 1
    recompute: str = "none"

    @property
    def name(self) -> str:
        chunks = f" x {self.chunks} chunks" if self.chunks > 1 else ""
        return f"tensor {self.tensor}, pipeline {self.pipeline}{chunks}, recompute {self.recompute}"


LAYOUTS = [
    Layout(8, 1, recompute="full"),
    Layout(8, 2, recompute="full"),
    Layout(8, 4),
    Layout(8, 8, chunks=5),
    Layout(4, 16, chunks=5),
]


def curve(layout: Layout, weak: bool) -> Iterator[tuple[int, float, bool]]:
    """(GPUs, tokens/s in all, fits) of each size that the layout divides."""
    for gpus in SIZES:
        batch = WEAK_PER_GPU * gpus if weak else STRONG_BATCH
        words: dict[str, Any] = {
            "parallel.tensor": layout.tensor,
            "parallel.pipeline": layout.pipeline,
            "parallel.chunks": layout.chunks,
            "parallel.schedule": "interleaved" if layout.chunks > 1 else "1f1b",
            "train.recompute": layout.recompute,
            "train.global_batch": batch,
            "train.micro_batch": 1,
            "data.train": "synthetic",
        }
        config = load_config("llama2-70b", [f"--{name}={value}" for name, value in words.items()])
        try:
            result = estimate(config, shrunk_model(config), gpus, load_gpu("a100-80gb"), load_interconnect("dgx-a100"))
        except ConfigError:
            continue
        yield gpus, result.tokens_per_step / result.step_s, result.fits


def main() -> None:
    """Print the tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write the curves there, as SVG")
    arguments = parser.parse_args()
    curves: dict[tuple[str, bool], list[tuple[int, float]]] = {}
    for weak in (False, True):
        print("weak scaling, 2 sequences a GPU" if weak else f"strong scaling, {STRONG_BATCH} sequences a step")
        for layout in LAYOUTS:
            points = [(gpus, speed) for gpus, speed, fits in curve(layout, weak) if fits]
            curves[layout.name, weak] = points
            last = last_that_pays(points)
            print(f"  {layout.name}: " + ("does not fit" if last is None else f"pays up to {last:,} GPUs"))
            for gpus, speed in points:
                print(f"    {gpus:>6} GPUs  {speed / gpus:>8,.0f} tokens/s a GPU")
            sys.stdout.flush()
    if arguments.picture is not None:
        draw(curves, arguments.picture)


def last_that_pays(points: list[tuple[int, float]]) -> int | None:
    """Up to how many GPUs a layout is worth them; None where it does not fit."""
    paying = None
    for number, (gpus, speed) in enumerate(points):
        if number:
            before, slower = points[number - 1]
            if speed / slower < LEAST_GAIN * (gpus / before) / 2:
                break
        paying = gpus
    return paying


def draw(curves: dict[tuple[str, bool], list[tuple[int, float]]], path: Path) -> None:
    """Tokens/s of a GPU over their number, strong scaling beside weak; a ring where a layout stops paying."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for (name, weak), points in curves.items():
        axes, last = right if weak else left, last_that_pays(points)
        if last is None:
            continue
        (line,) = axes.plot(
            [gpus for gpus, _ in points], [speed / gpus for gpus, speed in points], marker=".", label=name
        )
        axes.plot(last, dict(points)[last] / last, marker="o", markersize=11, fillstyle="none", color=line.get_color())
    for axes, title in ((left, f"strong: {STRONG_BATCH} sequences a step"), (right, "weak: 2 sequences a GPU")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [f"{size:,}" for size in SIZES], rotation=45)
        axes.set_title(f"Llama-2-70B, planned, {title} (ring: pays up to there)", fontsize=9)
        axes.set_xlabel("A100 80 GB")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    left.set_ylabel("tokens/s a GPU")
    left.legend(fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
