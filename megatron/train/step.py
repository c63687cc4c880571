"""One training step: forward and backward over the micro-batches, reduce, clip, update.

Nothing here waits for the device: figures stay tensors, and a gradient that is not finite skips the update by a factor
on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ScheduleName
from megatron.model.stage import Batch, run_micro_batches
from megatron.model.transformer import ChunkedTransformer, Transformer
from megatron.optim.adamw import AdamW
from megatron.optim.clip import GradientNorm, clip_divisor
from megatron.optim.learning_rate import learning_rate
from megatron.parallel.buckets import build_buckets, flatten_frozen
from megatron.parallel.collectives import all_reduce
from megatron.parallel.gradients import GradientReducer, ShardedGradientReducer
from megatron.parallel.layout import Region
from megatron.parallel.mesh import ParallelContext
from megatron.parallel.pipeline.schedule import Action, make_schedule
from megatron.parallel.weights import GatheredWeights, ShardedWeights


@dataclass(frozen=True)
class StepOutcome:
    """Figures of one step, still on the device: mean loss, gradient norm before clipping, loss-carrying tokens (the sum
    of their weights, where they do not count alike), and whether the update was skipped (1) because the norm was not
    finite."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    tokens: torch.Tensor
    skipped: torch.Tensor
    learning_rate: float


class TrainingStep:
    """The model of this rank with its buckets and optimizer, and the step over them; `frozen` are the weights that are
    not trained.

    `micro_batches` is the number of micro-batches that each data rank usually runs in a step; a step may be given
    another number. What `zero` divides is divided over `context.shard`. A model on torch's meta device gets its (zero)
    weights on `device`.
    """

    def __init__(
        self,
        model: Transformer | ChunkedTransformer,
        context: ParallelContext,
        config: OptimizerConfig,
        *,
        micro_batches: int,
        zero: int,
        decay_steps: int,
        schedule: ScheduleName = "1f1b",
        bucket_elements: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        assert (zero > 0) == (context.shard.size > 1), f"zero={zero} over {context.shard.size} ranks"
        self.model, self.context, self.config, self.decay_steps = model, context, config, decay_steps
        dtype = next(model.parameters()).dtype
        self.buckets = build_buckets(
            model,
            context.shard,
            zero=zero,
            gradient_dtype=torch.promote_types(torch.float32, dtype),
            bucket_elements=bucket_elements,
            device=device,
        )
        self.frozen = flatten_frozen(model, context.shard, zero=zero, bucket_elements=bucket_elements, device=device)
        if zero == 3:
            self.weights: GatheredWeights = ShardedWeights(model, [*self.buckets, *self.frozen], context)
        else:
            self.weights = GatheredWeights(model, self.buckets, context)
        self.gradients = (ShardedGradientReducer if zero == 3 else GradientReducer)(self.buckets, context)
        self.norm = GradientNorm(self.buckets, context)
        self.optimizer = AdamW(self.buckets, config)
        self._schedule = schedule
        self._actions: dict[int, list[Action]] = {}
        self.actions = self._actions_for(micro_batches)

    def __call__(self, micro_batches: Sequence[Batch], step: int) -> StepOutcome:
        """Train on this data rank's micro-batches as step `step` (from 1)."""
        actions = self._actions_for(len(micro_batches))
        self.gradients.begin(len(micro_batches))
        totals = run_micro_batches(self.model, micro_batches, actions, self.gradients.later)
        self.gradients.finish()
        loss_sum, tokens = all_reduce(totals, self.context.loss)
        tokens = torch.where(tokens > 0, tokens, 1.0)
        norm = self.norm.compute()
        not_finite = torch.isfinite(norm).logical_not().to(torch.float32)
        rate = learning_rate(self.config, step, self.decay_steps)
        self.optimizer.step(rate, clip_divisor(norm, tokens, self.config.clip_grad), not_finite)
        self.weights.updated()
        return StepOutcome(loss_sum / tokens, norm / tokens, tokens, not_finite, rate)

    def _actions_for(self, micro_batches: int) -> list[Action]:
        """This stage's actions in a step of so many micro-batches: under a ramp of the batch, steps differ."""
        if micro_batches not in self._actions:
            stages, chunks = self.context.pp, len(self.model.chunks)
            self._actions[micro_batches] = make_schedule(self._schedule, stages.size, micro_batches, chunks)[
                stages.rank
            ]
        return self._actions[micro_batches]

    def fill(self, values: Callable[[Region, torch.Tensor], None]) -> None:
        """Give the weights new values: `values` writes those of a region of a canonical tensor; padding becomes zero.
        Masters are taken from them."""

        def write(wanted: Sequence[tuple[Region, torch.Tensor]]) -> None:
            for region, view in wanted:
                values(region, view)

        self.fill_together(write)

    def fill_together(
        self, write: Callable[[Sequence[tuple[Region, torch.Tensor]]], None], *, masters: bool = False
    ) -> None:
        """The same with all regions at once. With `masters` their regions are among them, and they keep what is written
        there instead of taking it from the weights."""
        with torch.no_grad():
            for flat in (*self.buckets, *self.frozen):
                flat.owned_weights.zero_()
            self.optimizer.reset_masters()
            frozen = (pair for flat in self.frozen for pair in flat.owned_regions(flat.owned_weights))
            write([*self.weight_regions(), *frozen, *(self.optimizer.state_regions("master") if masters else ())])
        if not masters:
            self.optimizer.reset_masters()
        self.weights.updated()

    def weight_regions(self, copies: bool = True) -> Iterator[tuple[Region, torch.Tensor]]:
        """The weights that are trained and that this rank owns, as rectangles of canonical tensors; `copies=False`:
        without extra copies."""
        for bucket in self.buckets:
            yield from bucket.owned_regions(bucket.owned_weights, copies)
