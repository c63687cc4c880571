"""From step outcomes to the figures of a log line.

Outcomes stay on the device until a step is logged. Rates are those since the line before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron.train.state import Progress
from megatron.train.step import StepOutcome
from megatron.utils.device import synchronize
from megatron.utils.units import format_count, format_duration


@dataclass(frozen=True)
class Speed:
    """What a token costs, and what the devices could do: for the share of the peak (None where it is not known)."""

    flops_per_token: float
    peak_flops_per_s: float | None
    devices: int


class Metrics:
    """Collects outcomes and times, and gives the figures of a logged step."""

    def __init__(self, speed: Speed, progress: Progress) -> None:
        self._speed = speed
        self._skipped: list[torch.Tensor] = []
        self.skipped_in_a_row = 0  # up to the last step that figures were asked for
        self._outcome: StepOutcome | None = None
        self._mark(progress)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside out of the rates: a save or an evaluation is not training.

        What the device has still to do of the steps before is: so it is waited for.
        """
        if self._outcome is not None:
            synchronize(self._outcome.loss.device)
        began = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - began

    def record(self, outcome: StepOutcome) -> None:
        """Take note of one step; nothing is read from the device."""
        self._outcome = outcome
        self._skipped.append(outcome.skipped)

    def figures(self, progress: Progress) -> dict[str, float | int]:
        """Figures of the last step and rates since the last call; waits for the device."""
        assert self._outcome is not None, "no step was recorded"
        outcome = self._outcome
        values = [value.to(torch.float64) for value in (outcome.loss, outcome.grad_norm, *self._skipped)]
        loss, grad_norm, *skipped = torch.stack(values).tolist()
        skips = sum(skipped)
        for skip in skipped:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skip else 0
        elapsed_s = max(time.perf_counter() - self._started - self._paused_s, 1e-9)
        tokens = progress.consumed_tokens - self._tokens
        rate = tokens / elapsed_s
        figures: dict[str, float | int] = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": outcome.learning_rate,
            "consumed_tokens": progress.consumed_tokens,
            "tokens_per_second": rate,
            "step_time_s": elapsed_s / max(progress.step - self._step, 1),
        }
        if skips:
            figures["skipped_steps"] = int(skips)
        if self._speed.peak_flops_per_s is not None:
            peak = self._speed.peak_flops_per_s * self._speed.devices
            figures["model_flops_utilization"] = rate * self._speed.flops_per_token / peak
        self._skipped.clear()
        self._mark(progress)
        return figures

    def _mark(self, progress: Progress) -> None:
        self._started = time.perf_counter()
        self._paused_s = 0.0
        self._tokens, self._step = progress.consumed_tokens, progress.step


def progress_line(step: int, steps: int, figures: Mapping[str, float | int]) -> str:
    """One line for a person: where the run is, how it learns, how fast, and how long it will take."""
    left_s = (steps - step) * figures["step_time_s"]
    parts = [
        f"step {step:>{len(str(steps))}}/{steps}",
        f"loss {figures['loss']:.4f}",
        f"grad norm {figures['grad_norm']:.3f}",
        f"lr {figures['learning_rate']:.2e}",
        f"{format_count(figures['tokens_per_second'])} tokens/s",
        f"{figures['step_time_s']:.3g} s/step",
    ]
    if "model_flops_utilization" in figures:
        parts.append(f"MFU {100 * figures['model_flops_utilization']:.1f} %")
    if "skipped_steps" in figures:
        parts.append(f"{figures['skipped_steps']} updates skipped: gradient not finite")
    if step < steps:
        parts.append(f"{format_duration(left_s)} left")
    return "  ".join(parts)
