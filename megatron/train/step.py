"""One training step: forward and backward over the micro-batches, reduce, clip, update.

Nothing here waits for the device: figures stay tensors, and a gradient that is not finite skips the update by a factor
on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ScheduleName
from megatron.model.stage import Batch, run_micro_batches
from megatron.model.transformer import ChunkedTransformer, Transformer
from megatron.optim.adamw import AdamW
from megatron.optim.clip import GradientNorm, clip_divisor
from megatron.optim.learning_rate import learning_rate
from megatron.parallel.buckets import build_buckets
from megatron.parallel.collectives import all_reduce
from megatron.parallel.gradients import GradientReducer, gather_weights
from megatron.parallel.mesh import ParallelContext
from megatron.parallel.pipeline.schedule import make_schedule


@dataclass(frozen=True)
class StepOutcome:
    """Figures of one step, still on the device: mean loss, gradient norm before clipping, loss-carrying tokens, and
    whether the update was skipped (1) because the norm was not finite."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    tokens: torch.Tensor
    skipped: torch.Tensor
    learning_rate: float


class TrainingStep:
    """The model of this rank with its buckets and optimizer, and the step over them.

    `micro_batches` is the number of micro-batches that each data rank runs in a step.
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
    ) -> None:
        self.model, self.context, self.config, self.decay_steps = model, context, config, decay_steps
        dtype = next(model.parameters()).dtype
        self.buckets = build_buckets(
            model,
            context.grad,
            zero=zero,
            gradient_dtype=torch.promote_types(torch.float32, dtype),
            bucket_elements=bucket_elements,
        )
        self.gradients = GradientReducer(self.buckets, context, zero=zero)
        self.norm = GradientNorm(self.buckets, context, zero=zero)
        self.optimizer = AdamW(self.buckets, config)
        self.micro_batches = micro_batches
        self.actions = make_schedule(schedule, context.pp.size, micro_batches, len(model.chunks))[context.pp.rank]

    def __call__(self, micro_batches: Sequence[Batch], step: int) -> StepOutcome:
        """Train on this data rank's micro-batches as step `step` (from 1)."""
        self.gradients.begin(self.micro_batches)
        totals = run_micro_batches(self.model, micro_batches, self.actions, self.gradients.later)
        self.gradients.finish()
        loss_sum, tokens = all_reduce(totals, self.context.loss)
        tokens = tokens.clamp(min=1.0)
        norm = self.norm.compute()
        not_finite = torch.isfinite(norm).logical_not().to(torch.float32)
        rate = learning_rate(self.config, step, self.decay_steps)
        self.optimizer.step(rate, clip_divisor(norm, tokens, self.config.clip_grad), not_finite)
        gather_weights(self.buckets, self.context)
        return StepOutcome(loss_sum / tokens, norm / tokens, tokens, not_finite, rate)
