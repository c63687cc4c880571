"""The loop: when it stops, when it saves, and what becomes of an error in the data."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.config.batches import Ramp
from megatron.data.loader import MicroBatch
from megatron.parallel.world import World
from megatron.train.hooks import CollectGarbage, Report, Save
from megatron.train.metrics import Metrics, Speed
from megatron.train.signals import StopWish
from megatron.train.state import Progress
from megatron.train.step import StepOutcome
from megatron.train.trainer import Trainer
from megatron.utils.errors import DataError, TrainingError

from .conftest import random_batch


class Diary:
    """Stands in for everything around the loop and writes down what happened."""

    def __init__(self, world: World, *, steps: int, start: int = 0, broken_batch: int | None = None) -> None:
        self.lines: list[str] = []
        self.progress = Progress(start, start * 4, start * 48)
        self.batches = 0
        self.step_tokens = 48
        self.broken_batch = broken_batch
        self.before_step: Callable[[int], None] = lambda step: None
        self.wish = StopWish(None)
        self.trainer = Trainer(
            world,
            self.step,
            self,
            self.progress,
            [self],
            self.wish,
            lambda: self.lines.append(f"save {self.progress.step}"),
            steps=steps,
            ramp=Ramp.of(4, 12),
            how_to_continue="ask again",
        )

    def next_batch(self) -> list[MicroBatch]:
        self.batches += 1
        if self.batches == self.broken_batch:
            raise DataError("the data end here")
        return random_batch(2)

    def step(self, micro_batches: Any, step: int) -> StepOutcome:
        assert len(micro_batches) == 2
        self.before_step(step)
        self.lines.append(f"train {step}")
        zero = torch.zeros(())
        return StepOutcome(zero, zero, zero, zero, 0.0)

    def after_step(self, progress: Progress, outcome: StepOutcome, last: bool) -> None:
        self.lines.append(f"after {progress.step}{' (last)' if last else ''}")


def test_runs_to_the_end_and_saves_there(world: World) -> None:
    diary = Diary(world, steps=3)
    diary.trainer.fit()
    assert diary.lines == ["train 1", "after 1", "train 2", "after 2", "train 3", "after 3 (last)", "save 3"]
    assert diary.progress == Progress(step=3, consumed_samples=12, consumed_tokens=144)
    assert diary.batches == 3, "no batch beyond the last step is asked for: there may be none"


def test_continues_where_it_stands(world: World) -> None:
    diary = Diary(world, steps=5, start=3)
    diary.trainer.fit()
    assert [line for line in diary.lines if line.startswith("train")] == ["train 4", "train 5"]


@pytest.mark.parametrize("start", [3, 4])
def test_has_nothing_to_do_after_the_last_step(world: World, start: int) -> None:
    diary = Diary(world, steps=3, start=start)
    diary.trainer.fit()
    assert diary.lines == [] and diary.batches == 0


@pytest.mark.parametrize("asked_during", [1, 2])
def test_stops_after_the_step_of_the_wish_and_saves(world: World, asked_during: int) -> None:
    diary = Diary(world, steps=9)

    def ask(step: int) -> None:
        if step == asked_during:
            diary.wish.reason = "received SIGTERM"

    diary.before_step = ask
    diary.trainer.fit()
    assert diary.lines[-1] == f"save {asked_during}"
    assert [line for line in diary.lines if line.startswith("train")] == [
        f"train {step}" for step in range(1, asked_during + 1)
    ]


@pytest.mark.parametrize("broken", [2, 3, 4])
def test_an_error_in_the_data_is_raised_after_what_was_done_is_saved(world: World, broken: int) -> None:
    diary = Diary(world, steps=9, broken_batch=broken)
    with pytest.raises(DataError, match="end here"):
        diary.trainer.fit()
    assert diary.progress.step == broken - 1, "every step whose data were there is trained"
    assert diary.lines[-1] == f"save {broken - 1}"


def test_an_error_in_the_first_batch_saves_nothing(world: World) -> None:
    diary = Diary(world, steps=9, broken_batch=1)
    with pytest.raises(DataError, match="end here"):
        diary.trainer.fit()
    assert diary.lines == []


class Sheet:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.figures: dict[int, dict[str, float]] = {}

    def write(self, step: int, figures: Any) -> None:
        self.figures[step] = dict(figures)

    def close(self) -> None:
        raise AssertionError("not the hook's business")


def run_hooks(
    *, steps: int, interval: int, evaluate_interval: int | None, save_interval: int | None
) -> tuple[Any, ...]:
    from megatron.evaluate.perplexity import Evaluation

    progress, sheet, saved, evaluated = Progress(), Sheet(), [], []

    def evaluate() -> Evaluation:
        evaluated.append(progress.step)
        return Evaluation(2.0, 7)

    metrics = Metrics(Speed(1.0, None, 1), progress)
    report = Report(
        metrics, [sheet], steps=steps, interval=interval, evaluate=evaluate, evaluate_interval=evaluate_interval
    )
    save = Save(lambda: saved.append(progress.step), metrics, save_interval)
    one = torch.ones(())
    for step in range(1, steps + 1):
        progress.advance(4, 48)
        for hook in (report, save):
            hook.after_step(progress, StepOutcome(one, one, one, 0 * one, 0.0), last=step == steps)
    return sheet.figures, saved, evaluated


def test_intervals() -> None:
    figures, saved, evaluated = run_hooks(steps=10, interval=4, evaluate_interval=3, save_interval=5)
    assert list(figures) == [3, 4, 6, 8, 9, 10], "logged, evaluated, and the last"
    assert evaluated == [3, 6, 9, 10]
    assert [step for step, line in figures.items() if "validation_loss" in line] == evaluated
    assert figures[6]["validation_perplexity"] == pytest.approx(7.389056)
    assert saved == [5, 10]


@pytest.mark.parametrize(("skips", "ended_at"), [(range(6, 16), 15), (range(6, 15), None), (range(8, 40), 20)])
def test_ten_skipped_updates_in_a_row_end_the_run_without_a_save(
    world: World, skips: range, ended_at: int | None
) -> None:
    """Judged where figures are read anyway, every fifth step; the checkpoint before all these stays the newest."""
    diary = Diary(world, steps=25)
    metrics, sheet = Metrics(Speed(1.0, None, 1), diary.progress), Sheet()
    report = Report(metrics, [sheet], steps=25, interval=5, evaluate=None, evaluate_interval=None)
    diary.trainer.hooks = [report, Save(diary.trainer.save, metrics, 5)]
    one = torch.ones(())

    def step(micro_batches: Any, number: int) -> StepOutcome:
        return StepOutcome(one, one, one, one * (number in skips), 0.0)

    diary.trainer.step = step
    if ended_at is None:
        diary.trainer.fit()
        assert diary.lines[-1] == "save 25"
        return
    with pytest.raises(TrainingError, match=rf"of steps {skips.start} to {ended_at}, .*optimizer\.learning_rate"):
        diary.trainer.fit()
    assert diary.progress.step == ended_at and ended_at in sheet.figures
    assert diary.lines == [f"save {number}" for number in range(5, ended_at, 5)]


def test_nothing_is_evaluated_or_saved_unasked() -> None:
    figures, saved, evaluated = run_hooks(steps=5, interval=2, evaluate_interval=None, save_interval=None)
    assert list(figures) == [2, 4, 5] and saved == evaluated == []


def test_garbage_is_collected_at_fixed_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    zero = torch.zeros(())
    outcome = StepOutcome(zero, zero, zero, zero, 0.0)
    with CollectGarbage(3) as hook:
        assert not gc.isenabled()
        for step in range(1, 8):
            monkeypatch.setattr(gc, "collect", lambda step=step: runs.append(step))
            hook.after_step(Progress(step, 0, 0), outcome, last=step == 7)
    assert runs == [3, 6]
    assert gc.isenabled()
