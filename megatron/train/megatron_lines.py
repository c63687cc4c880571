"""Megatron-LLM's log lines on standard output, for programs that read them: beside the project's own messages. The same
figures go to its tags, where there are any.

Figures of a line are means since the line before. Steps whose update was skipped carry no loss, as there. The learning
rate is that of the next step, since there the schedule has moved on when a line is written.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime

import torch

from megatron.config.batches import Ramp
from megatron.config.run import RunConfig
from megatron.evaluate.perplexity import Evaluation
from megatron.optim.learning_rate import learning_rate
from megatron.parallel.world import World
from megatron.train.megatron_tags import METRICS, MegatronTags, perplexity
from megatron.train.state import Progress
from megatron.train.step import StepOutcome
from megatron.utils.device import memory_in_use, synchronize


class MegatronLines:
    """Called as a hook after each step, and told of what else happens.

    The training line comes from the last process of each machine, validation from the last of all, the rest from the
    first. `consumed_tokens` count padding as well.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        ramp: Ramp,
        decay_steps: int,
        progress: Progress,
        tags: MegatronTags | None = None,
    ) -> None:
        self.config, self.world, self.ramp, self.decay_steps, self.tags = config, world, ramp, decay_steps, tags
        launch = world.launch
        self._is_first = launch.rank == 0
        self._is_last = launch.rank == launch.world_size - 1
        self._is_last_of_machine = launch.local_rank == launch.local_world_size - 1
        self._outcomes: list[StepOutcome] = []
        self._consumed_samples: list[int] = []  # after each of these steps
        self._memory_was_told = False
        self._mark(progress)

    def begin(self, documents: Sequence[int]) -> None:
        """Say how many samples are wanted, how many documents each training pair has, and that training begins."""
        if not self._is_first:
            return
        config = self.config
        batch, rounds = self.ramp.batch_at(self.ramp.position_after(config.train.steps)), config.evaluate.batches
        interval = config.evaluate.interval
        validations = 0 if interval is None else config.train.steps // interval + 1
        _say(" > datasets target sizes (minimum size):")
        _say(f"    train:      {self.ramp.position_after(config.train.steps)}")
        _say(f"    validation: {validations * rounds * batch}")
        _say(f"    test:       {0 if config.data.test is None else rounds * batch}")
        for count in documents:
            _say(f"    number of documents: {count}")
        _say(f"[before the start of training step] datetime: {datetime.now():%Y-%m-%d %H:%M:%S} ")

    def after_step(self, progress: Progress, outcome: StepOutcome, last: bool) -> None:
        self._outcomes.append(outcome)
        self._consumed_samples.append(progress.consumed_samples)
        if progress.step % self.config.log.interval == 0:
            self._tell(progress)
            self._mark(progress)

    def validated(self, evaluation: Evaluation, progress: Progress) -> None:
        """At an interval of validation."""
        self.evaluated(evaluation, f"iteration {progress.step}")
        if self.tags is not None:
            self.tags.evaluated(progress.step, progress.consumed_samples, evaluation)

    def evaluated(self, evaluation: Evaluation, where: str) -> None:
        """`where`: "iteration 50", or "the end of training for val data"."""
        if self._is_last:
            sys.stdout.write(evaluation_lines(evaluation, where))
            sys.stdout.flush()

    @contextmanager
    def saving(self, step: int, folder: str) -> Iterator[None]:
        """Around a save."""
        if self._is_first:
            _say(f"saving checkpoint at iteration {step:7d} to {folder}")
        with self.paused():
            yield
        if self._is_first:
            _say(f"  successfully saved checkpoint at iteration {step:7d} to {folder}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside out of the next line."""
        synchronize(self.world.device)
        began = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - began

    def timed(self, evaluate: Callable[[], Evaluation]) -> Callable[[], Evaluation]:
        """The same function, its time left out of the next line."""

        def run() -> Evaluation:
            with self.paused():
                return evaluate()

        return run

    def _tell(self, progress: Progress) -> None:
        losses, norms, skips = (
            torch.stack([getattr(outcome, name).to(torch.float64) for outcome in self._outcomes]).tolist()
            for name in ("loss", "grad_norm", "skipped")
        )
        steps = len(losses)
        elapsed_s = max(time.perf_counter() - self._began - self._paused_s, 1e-9)
        tokens_per_s = (progress.consumed_tokens - self._tokens) / elapsed_s
        self._tell_tags(
            progress.step, losses, norms, {"iteration-time": elapsed_s / steps, "tokens-per-sec": tokens_per_s}
        )
        if not self._is_last_of_machine:
            return
        trained = [loss for loss, skipped in zip(losses, skips, strict=True) if not skipped]
        loss = sum(trained) / max(1, len(trained))
        text = f" iteration {progress.step:8d}/{self.config.train.steps:8d} |"
        text += f" consumed samples: {progress.consumed_samples:12d} |"
        text += f" elapsed time per iteration (ms): {1000 * elapsed_s / steps:.1f} |"
        text += f" rate (tokens/sec): {tokens_per_s:.2f} |"
        rate = learning_rate(self.config.optimizer, progress.step + 1, self.decay_steps)
        text += f" learning rate: {rate:.3E} |"
        text += f" global batch size: {self._batch:5d} |"
        if loss > 0:
            text += f" lm loss: {loss:.6E} |"
        text += f" loss scale: {1.0:.1f} | grad norm: {norms[-1]:.3f} |"
        text += f" number of skipped iterations: {int(sum(skips)):3d} |"
        text += f" number of nan iterations: {sum(not math.isfinite(loss) for loss in losses):3d} |"
        _say(text)
        self._tell_memory(progress.step)

    def _tell_tags(
        self, last: int, losses: Sequence[float], norms: Sequence[float], together: Mapping[str, float]
    ) -> None:
        """Each step's own figures up to step `last`, and there those of all of them together."""
        if self.tags is None:
            return
        before = self._samples
        for number, (loss, norm, samples) in enumerate(zip(losses, norms, self._consumed_samples, strict=True), 1):
            step = last - len(losses) + number
            figures = {
                "learning_rate": learning_rate(self.config.optimizer, step + 1, self.decay_steps),
                "batch_size": samples - before,
                "lm loss": loss,
                "loss_scale": 1.0,
                "grad_norm": norm,
            }
            self.tags.write(step, figures, samples)
            before = samples
        memory = memory_in_use(self.world.device) or {}
        held = {f"mem-{name}-bytes": memory[name] for name in ("reserved", "allocated") if name in memory}
        self.tags.write(last, {**together, **held})

    def _tell_memory(self, step: int) -> None:
        figures = None if self._memory_was_told else memory_in_use(self.world.device)
        self._memory_was_told = True
        if figures is not None:
            listed = " | ".join(f"{name}: {count / 2**20}" for name, count in figures.items())
            _say(f"[Rank {self.world.launch.rank}] (after {step} iterations) memory (MB) | {listed}")

    def _mark(self, progress: Progress) -> None:
        self._outcomes.clear()
        self._consumed_samples.clear()
        self._samples = progress.consumed_samples
        self._began, self._paused_s, self._tokens = time.perf_counter(), 0.0, progress.consumed_tokens
        self._batch = self.ramp.batch_at(progress.consumed_samples)


def evaluation_lines(evaluation: Evaluation, where: str) -> str:
    """The figures of an evaluation between two rulers."""
    text = f" validation loss at {where} | lm loss value: {evaluation.loss:.6E} | "
    text += f"lm loss PPL: {perplexity(evaluation.loss):.6E} | "
    for name, value in evaluation.metrics.items():
        text += f"{METRICS[name]} value: {value:.6E} | "
    ruler = "-" * (len(text) + 1)
    return f"{ruler}\n{text}\n{ruler}\n"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
