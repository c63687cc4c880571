"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron.config.batches import Ramp
from megatron.data.loader import BatchLoader, MicroBatch
from megatron.evaluate.perplexity import to_device
from megatron.parallel.world import World
from megatron.train.hooks import Hook
from megatron.train.signals import StopWish
from megatron.train.state import Progress
from megatron.train.step import StepOutcome, TrainingStep
from megatron.utils.errors import DataError
from megatron.utils.logging import get_logger

_logger = get_logger("megatron.train")

# What a rank votes for while a step runs; the largest ballot counts.
_GO_ON, _STOP, _FAILED = 0, 1, 2


class Trainer:
    """Runs steps until `steps` are done or all ranks agreed to stop, then saves.

    `loader` continues at `progress` with the batches of `ramp`; `save` writes a checkpoint of the present state;
    `how_to_continue` is said after a stop.
    """

    def __init__(
        self,
        world: World,
        step: TrainingStep,
        loader: BatchLoader,
        progress: Progress,
        hooks: Sequence[Hook],
        wish: StopWish,
        save: Callable[[], None],
        *,
        steps: int,
        ramp: Ramp,
        how_to_continue: str,
    ) -> None:
        self.world, self.step, self.loader, self.progress = world, step, loader, progress
        self.hooks, self.wish, self.save = hooks, wish, save
        self.steps, self.ramp, self.how_to_continue = steps, ramp, how_to_continue

    def fit(self) -> None:
        """Train. Errors of one rank are raised on all, after the present state was saved."""
        if self.progress.step >= self.steps:
            _logger.info("nothing to do: step %d is done and train.steps=%d", self.progress.step, self.steps)
            return
        batch, tokens = self.world.agree(self.loader.next_batch), self.loader.step_tokens
        ballot = _GO_ON
        while self.progress.step < self.steps and ballot == _GO_ON:
            outcome = self._train_on(batch)
            # While a GPU still computes the step, the next batch is fetched and the vote taken.
            upcoming, failure = self._fetch_next()
            stop = self.wish.wanted(self.progress.step + 1)
            vote = self.world.vote(_FAILED if failure else _STOP if stop else _GO_ON)
            samples = self.ramp.batch_at(self.progress.consumed_samples)
            self.progress.advance(samples, tokens)
            self._run_hooks(outcome)
            ballot, batch, tokens = vote.result(), upcoming, self.loader.step_tokens
        self.save()
        if ballot == _FAILED:
            self.world.raise_together(failure)
        if self.progress.step < self.steps:
            reason = next(filter(None, self.world.exchange(self.wish.reason)), "asked to stop")
            _logger.info("stopped after step %d (%s); %s", self.progress.step, reason, self.how_to_continue)

    def _run_hooks(self, outcome: StepOutcome) -> None:
        try:
            for hook in self.hooks:
                hook.after_step(self.progress, outcome, last=self.progress.step == self.steps)
        except DataError:  # validation data, on all ranks alike: no reason to lose what was trained
            self.save()
            raise

    def _fetch_next(self) -> tuple[list[MicroBatch], Exception | None]:
        """The micro-batches of the step after the present one (none after the last), or why there are none."""
        if self.progress.step + 1 >= self.steps:
            return [], None
        try:
            return self.loader.next_batch(), None
        except Exception as error:  # whatever it is, the others must hear of it
            return [], error

    def _train_on(self, batch: Sequence[MicroBatch]) -> StepOutcome:
        micro_batches = [to_device(micro_batch, self.world.device) for micro_batch in batch]
        return self.step(micro_batches, self.progress.step + 1)
