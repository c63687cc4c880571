"""What happens after a step besides training: reporting, validation, saving. Each knows its own interval."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, Self

from megatron.evaluate.perplexity import Evaluation
from megatron.train.metrics import Metrics, progress_line
from megatron.train.sinks import Sink
from megatron.train.state import Progress
from megatron.train.step import StepOutcome
from megatron.utils.errors import TrainingError
from megatron.utils.logging import get_logger

_logger = get_logger("megatron.train")

_MOST_SKIPPED = 10  # updates in a row: a gradient that overflows by chance is finite again soon


class Hook(Protocol):
    """Called on all ranks alike after each step; `last` tells that the run is about to end."""

    def after_step(self, progress: Progress, outcome: StepOutcome, last: bool) -> None: ...


class Report:
    """Figures to the sinks and a line for people; with them the validation loss, where it is due, and what
    `read_so_far` tells of a position in the data.

    All ranks hold the figures; those with sinks write them. Where they tell that no update has been made for long, the
    run ends with a TrainingError, before anything is saved over what was trained.
    """

    def __init__(
        self,
        metrics: Metrics,
        sinks: Sequence[Sink],
        *,
        steps: int,
        interval: int,
        evaluate: Callable[[], Evaluation] | None,
        evaluate_interval: int | None,
        read_so_far: Callable[[int], Mapping[str, float | int]] = lambda position: {},
    ) -> None:
        self.metrics, self.sinks, self.steps, self.interval = metrics, sinks, steps, interval
        self.evaluate, self.evaluate_interval = evaluate, evaluate_interval
        self.read_so_far = read_so_far

    def after_step(self, progress: Progress, outcome: StepOutcome, last: bool) -> None:
        self.metrics.record(outcome)
        validate = self.evaluate_interval is not None and (last or progress.step % self.evaluate_interval == 0)
        if not (validate or last or progress.step % self.interval == 0):
            return
        figures = {**self.metrics.figures(progress), **self.read_so_far(progress.consumed_samples)}
        _logger.info(progress_line(progress.step, self.steps, figures))
        if validate and self.evaluate is not None:
            with self.metrics.paused():
                evaluation = self.evaluate()
            figures["validation_loss"] = evaluation.loss
            figures["validation_perplexity"] = evaluation.perplexity
            figures |= {f"validation_loss/{name}": part.loss for name, part in evaluation.parts.items()}
            figures |= {f"validation_{name}": value for name, value in evaluation.metrics.items()}
            _logger.info(
                "step %d  validation loss %.4f  perplexity %.3f%s",
                progress.step,
                evaluation.loss,
                evaluation.perplexity,
                "".join(
                    f"  {name.replace('_', ' ')} {value:.4g}"
                    for name, value in evaluation.metrics.items()
                    if name != "perplexity"
                ),
            )
            for name, part in evaluation.parts.items():
                _logger.info("step %d  %s: loss %.4f  perplexity %.3f", progress.step, name, part.loss, part.perplexity)
        write_figures(self.sinks, progress.step, figures)
        if self.metrics.skipped_in_a_row >= _MOST_SKIPPED:
            raise _no_updates(progress.step, self.metrics.skipped_in_a_row)


class Test:
    """The loss on the test data, once, at the end."""

    def __init__(self, metrics: Metrics, sinks: Sequence[Sink], evaluate: Callable[[], Evaluation]) -> None:
        self.metrics, self.sinks, self.evaluate = metrics, sinks, evaluate

    def after_step(self, progress: Progress, outcome: StepOutcome, last: bool) -> None:
        if not last:
            return
        with self.metrics.paused():
            evaluation = self.evaluate()
        _logger.info("test loss %.4f  perplexity %.3f", evaluation.loss, evaluation.perplexity)
        figures = {"test_loss": evaluation.loss, "test_perplexity": evaluation.perplexity}
        figures |= {f"test_{name}": value for name, value in evaluation.metrics.items()}
        write_figures(self.sinks, progress.step, figures)


class CollectGarbage:
    """Python's garbage collector at fixed steps: while it is open, it runs then and only then."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def __enter__(self) -> Self:
        gc.disable()
        return self

    def after_step(self, progress: Progress, outcome: StepOutcome, last: bool) -> None:
        if progress.step % self.interval == 0:
            gc.collect()

    def __exit__(self, *_: object) -> None:
        gc.enable()


def write_figures(sinks: Sequence[Sink], step: int, figures: Mapping[str, float | int]) -> None:
    """Give figures to all sinks; a full disk there is no reason to lose the run."""
    for sink in sinks:
        try:
            sink.write(step, figures)
        except OSError as error:
            _logger.warning("the figures of step %d were not written: %s", step, error)


def _no_updates(step: int, skipped: int) -> TrainingError:
    return TrainingError(
        f"the last {skipped} updates, of steps {step - skipped + 1} to {step}, were skipped since the gradient was not "
        f"finite; {_MOST_SKIPPED} in a row are taken for a run that has diverged. Nothing was saved now. Continue from "
        "a checkpoint well before these steps (move later ones out of checkpoint.save) with a lower "
        "optimizer.learning_rate, or a longer optimizer.warmup_steps if the run is young; if it happens in the first "
        "steps, the weights it starts from are not finite or do not suit train.precision."
    )


class Save:
    """A checkpoint at each interval. The one at the end is the trainer's, since a stop is not known here."""

    def __init__(self, save: Callable[[], None], metrics: Metrics, interval: int | None) -> None:
        self.save, self.metrics, self.interval = save, metrics, interval

    def after_step(self, progress: Progress, outcome: StepOutcome, last: bool) -> None:
        if self.interval is not None and progress.step % self.interval == 0:
            with self.metrics.paused():
                self.save()
