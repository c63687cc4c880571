"""Draws the loss curve of a run from its metrics.jsonl.

    python examples/quickstart/plot_loss.py METRICS PICTURE --start RESULT --phase 0 "one grid" --phase 100 "another"

`--start` is what `megatron evaluate` said of the held-out text before the first step; a phase begins after its step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # there may be no display; it has to be said before the next import
from matplotlib import pyplot as plt

TRAINING, HELD_OUT, SHADES = "#7a9cc6", "#b3402a", ("#f4f1ea", "#e6ecdf")


def draw(metrics: list[dict[str, Any]], start: float, phases: list[tuple[int, str]], picture: Path) -> None:
    """Write the picture: training loss as a line, held-out loss as points, the phases as shaded spans."""
    last = metrics[-1]["step"]
    held_out = [(0, start)] + [(line["step"], line["validation_loss"]) for line in metrics if "validation_loss" in line]
    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    ends = [step for step, _ in phases[1:]] + [last]
    for (first, name), end, shade in zip(phases, ends, SHADES * len(phases), strict=False):
        axes.axvspan(first, end, color=shade, zorder=0)
        axes.text(
            (first + end) / 2, 0.97, name, transform=axes.get_xaxis_transform(), ha="center", va="top", color="#444"
        )
    for first, _ in phases[1:]:
        axes.axvline(first, color="#888", linestyle="--", linewidth=1)
    steps, losses = [line["step"] for line in metrics], [line["loss"] for line in metrics]
    axes.plot(steps, losses, color=TRAINING, linewidth=1.4, label="training batch")
    style: dict[str, Any] = {"marker": "o", "markersize": 5, "linewidth": 1.6, "clip_on": False, "zorder": 3}
    axes.plot(*zip(*held_out, strict=True), color=HELD_OUT, label="held-out text", **style)
    for (step, loss), offset in ((held_out[0], (9, -3)), (held_out[-1], (-4, 9))):
        side = "left" if step == 0 else "right"
        axes.annotate(f"{loss:.2f}", (step, loss), offset, textcoords="offset points", ha=side, color=HELD_OUT)
    axes.set(xlabel="step", ylabel="loss (nats per token)", xlim=(0, last), title="A tiny Llama reads medical notes")
    axes.set_ylim(min(losses + [loss for _, loss in held_out]) - 0.3, max(start, *losses) + 0.7)
    axes.grid(axis="y", color="#d8d8d8", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the loss curve of a run.")
    parser.add_argument("metrics", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--start", type=Path, required=True, metavar="RESULT")
    parser.add_argument("--phase", nargs=2, action="append", required=True, metavar=("STEP", "NAME"))
    arguments = parser.parse_args(words)
    metrics = [json.loads(line) for line in arguments.metrics.read_text(encoding="utf-8").splitlines()]
    start = json.loads(arguments.start.read_text(encoding="utf-8"))["loss"]
    draw(metrics, start, [(int(step), name) for step, name in arguments.phase], arguments.picture)
    print(f"{arguments.picture}: {len(metrics)} points of {metrics[-1]['step']} steps")


if __name__ == "__main__":
    main()
