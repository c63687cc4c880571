"""From outcomes to figures: what is averaged, what is counted, and what a person reads."""

from __future__ import annotations

import time

import pytest
import torch

from megatron.train.metrics import Metrics, Speed, progress_line
from megatron.train.state import Progress
from megatron.train.step import StepOutcome

SPEED = Speed(flops_per_token=1000.0, peak_flops_per_s=None, devices=2)


def outcome(loss: float = 2.0, skipped: float = 0.0) -> StepOutcome:
    one = torch.tensor(1.0)
    return StepOutcome(one * loss, one * 3, one * 64, torch.tensor(skipped), 1e-3)


def advance(metrics: Metrics, progress: Progress, losses: list[float], skipped: float = 0.0) -> None:
    for loss in losses:
        progress.advance(4, 64)
        metrics.record(outcome(loss, skipped))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only the test moves."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_figures_are_those_of_the_last_step_and_rates_since_the_line_before(clock: list[float]) -> None:
    progress = Progress(step=10, consumed_samples=40, consumed_tokens=640)
    metrics = Metrics(SPEED, progress)
    advance(metrics, progress, [5.0, 4.0])
    clock[0] += 4.0
    figures = metrics.figures(progress)
    assert figures == {
        "loss": 4.0,
        "grad_norm": 3.0,
        "learning_rate": 1e-3,
        "consumed_tokens": 768,
        "tokens_per_second": 32.0,
        "step_time_s": 2.0,
    }
    advance(metrics, progress, [3.0])
    clock[0] += 0.5
    figures = metrics.figures(progress)
    assert (figures["loss"], figures["tokens_per_second"], figures["step_time_s"]) == (3.0, 128.0, 0.5)


def test_time_of_saves_and_evaluations_does_not_count(clock: list[float]) -> None:
    progress = Progress()
    metrics = Metrics(SPEED, progress)
    advance(metrics, progress, [5.0])
    clock[0] += 1.0
    with metrics.paused():
        clock[0] += 100.0
    assert metrics.figures(progress)["step_time_s"] == 1.0
    # and what is paused after a line counts neither in the next one
    with metrics.paused():
        clock[0] += 50.0
    advance(metrics, progress, [5.0])
    clock[0] += 2.0
    assert metrics.figures(progress)["step_time_s"] == 2.0


def test_utilization_is_of_all_devices(clock: list[float]) -> None:
    progress = Progress()
    metrics = Metrics(Speed(1000.0, 64_000.0, 2), progress)
    advance(metrics, progress, [5.0])
    clock[0] += 1.0
    figures = metrics.figures(progress)
    assert figures["model_flops_utilization"] == 64 * 1000.0 / (2 * 64_000.0)
    assert "MFU 50.0 %" in progress_line(1, 2, figures)


def test_skipped_steps_are_counted_once() -> None:
    progress = Progress()
    metrics = Metrics(SPEED, progress)
    advance(metrics, progress, [5.0], skipped=1.0)
    advance(metrics, progress, [5.0, 5.0])
    figures = metrics.figures(progress)
    assert figures["skipped_steps"] == 1
    assert "1 updates skipped" in progress_line(3, 9, figures)
    advance(metrics, progress, [5.0])
    assert "skipped_steps" not in metrics.figures(progress)


def test_skipped_steps_in_a_row_are_counted_over_lines_and_begin_anew_after_an_update() -> None:
    progress = Progress()
    metrics = Metrics(SPEED, progress)
    counts = []
    for skips in ([1.0, 1.0], [1.0], [1.0, 0.0, 1.0], [0.0]):
        for skipped in skips:
            advance(metrics, progress, [5.0], skipped)
        metrics.figures(progress)
        counts.append(metrics.skipped_in_a_row)
    assert counts == [2, 3, 1, 0]


def test_progress_line() -> None:
    figures = {
        "loss": 2.34567,
        "grad_norm": 0.98765,
        "learning_rate": 3e-4,
        "consumed_tokens": 1,
        "tokens_per_second": 45_600.0,
        "step_time_s": 0.5,
    }
    line = progress_line(6, 1000, figures)
    for part in (
        "step    6/1000",
        "loss 2.3457",
        "grad norm 0.988",
        "lr 3.00e-04",
        "45.6 k tokens/s",
        "8 min 17 s left",
    ):
        assert part in line, (part, line)
    assert "left" not in progress_line(1000, 1000, figures)
