"""Fits the efficiencies of a GPU to published runs: `python -m tools.fit_hardware a100-80gb`.

Every run is recorded once and priced anew for each try. Least squares on the logarithms of planned over published time
(Gauss and Newton, with a weak pull towards the figures in the YAML file, so that what the runs do not tell stays as it
is). Printed are the figures, the error of each run, and its error when the figures are fitted to all others.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron.plan.estimate import RecordedRun, price, record
from megatron.plan.hardware import Gpu, Interconnect, load_gpu, load_interconnect
from megatron.plan.published import Row, published

# What is fitted, of the GPU and of what joins it.
GPU_FIGURES = ("product_efficiency", "product_half_depth", "memory_efficiency", "attention_efficiency", "launch_s")
WIRE_FIGURES = ("link_efficiency",)
_ITERATIONS, _STEP, _PULL = 5, 0.05, 0.02

Case = tuple[Row, RecordedRun]


def main() -> int:
    """Record, fit, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpu", help="name of the GPU whose published runs are taken")
    arguments = parser.parse_args()
    cases = []
    for row in published():
        if row.gpu == arguments.gpu:
            cases.append((row, record(row.config, row.model, row.gpus, both_ends=False)))
            say(f"recorded {row.name}")
    fitted = fit(cases, arguments.gpu)
    report(cases, arguments.gpu, fitted)
    return 0


def report(cases: Sequence[Case], gpu: str, fitted: NDArray[np.float64]) -> None:
    """The figures and the errors."""
    for name, value in zip((*GPU_FIGURES, *WIRE_FIGURES), np.exp(start(gpu) + fitted), strict=True):
        say(f"{name}: {value:.4g}")
    errors = residuals(cases, gpu, fitted)
    for number, (row, _) in enumerate(cases):
        others = [case for case in cases if case[0].name != row.name]
        left_out = residuals([cases[number]], gpu, fit(others, gpu, fitted, iterations=1))[0]
        say(f"{row.name:<24} {np.expm1(errors[number]):+7.1%}   fitted without it {np.expm1(left_out):+7.1%}")
    absolute = [abs(np.expm1(error)) for error in errors]
    middle, largest = statistics.median(absolute), max(absolute)
    say(f"median {middle:.1%}, largest {largest:.1%}; {len(fitted)} figures, {len(cases)} runs")


def fit(
    cases: Sequence[Case], gpu: str, begin: NDArray[np.float64] | None = None, iterations: int = _ITERATIONS
) -> NDArray[np.float64]:
    """Logarithms of the figures, relative to those of the file, that make the errors small."""
    figures = np.zeros(len(GPU_FIGURES) + len(WIRE_FIGURES)) if begin is None else begin.copy()
    for _ in range(iterations):
        here = residuals(cases, gpu, figures)
        columns = [(residuals(cases, gpu, figures + step) - here) / _STEP for step in np.eye(len(figures)) * _STEP]
        jacobian = np.stack(columns, axis=1)
        pull = _PULL * len(cases) * np.eye(len(figures))
        change = np.linalg.solve(jacobian.T @ jacobian + pull, -jacobian.T @ here - pull @ figures)
        figures = figures + np.clip(change, -0.3, 0.3)
    return figures


def residuals(cases: Sequence[Case], gpu: str, figures: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(planned / published) of each run."""
    errors = []
    for row, run in cases:
        tried, wires = hardware(gpu, row.interconnect, figures)
        errors.append(np.log(price(run, tried, wires).step_s / row.step_s))
    return np.array(errors)


def hardware(gpu: str, interconnect: str, figures: NDArray[np.float64]) -> tuple[Gpu, Interconnect]:
    """The file's hardware with these figures in place."""
    values = np.exp(start(gpu) + figures)
    tried = dataclasses.replace(load_gpu(gpu), **dict(zip(GPU_FIGURES, values, strict=False)))
    wires = dict(zip(WIRE_FIGURES, values[len(GPU_FIGURES) :], strict=True))
    return tried, dataclasses.replace(load_interconnect(interconnect), **wires)


def start(gpu: str) -> NDArray[np.float64]:
    """Logarithms of the figures in the files."""
    chip, wires = load_gpu(gpu), load_interconnect("dgx-a100")
    values = [getattr(chip, name) for name in GPU_FIGURES] + [getattr(wires, name) for name in WIRE_FIGURES]
    return np.log(np.array(values))


def say(line: str) -> None:
    """One line of the result."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
