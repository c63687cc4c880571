"""What every rank runs: a few steps of the configuration in float64, and everything they did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from megatron.config.run import RunConfig
from megatron.kernels import native
from megatron.kernels.native import Backend
from megatron.model.config import ModelConfig
from megatron.model.initialize import fill_region, initial_values
from megatron.model.lora import adapter_of
from megatron.parallel.communicator import new_communicator
from megatron.parallel.layout import Region
from megatron.parallel.mesh import ParallelContext, connect
from megatron.train.adapters import plan_lora
from megatron.train.build import Plan, build_step, make_plan, open_loader
from megatron.train.step import TrainingStep
from megatron.verify.communicator import Use, WatchedCommunicator
from megatron.verify.compare import RankResult, Regions

# Two steps: the second one starts from what the first one's update and gathers left.
STEPS = 2
_TIMEOUT_S = 60.0
# Adam divides by the root of the second moment: where gradients are next to nothing it would blow up their rounding.
_LEAST_EPS = 1e-4


def run_rank(
    rank: int, config: RunConfig, model: ModelConfig, world_size: int, backend: Backend, drop: Use | None = None
) -> RankResult:
    """Run the steps as this rank of the grid; all ranks call it together."""
    native.select(backend, "cpu")
    config = in_float64(config)
    plan = make_plan(config, model, world_size)
    used: list[Use] = []
    context = connect(
        plan.grid,
        rank,
        sequence=plan.sequence_parallel,
        num_key_value_heads=model.num_key_value_heads,
        wraps=config.parallel.chunks > 1,
        context_attention=config.parallel.context_attention,
        shard=plan.shard,
        make=lambda ranks: WatchedCommunicator(new_communicator(ranks, _TIMEOUT_S), used, drop),
    )
    for axis in context.axes():
        if isinstance(axis.communicator, WatchedCommunicator):
            axis.communicator.axis = axis.name
    step = build_step(config, plan, model, context, torch.device("cpu"), plan_lora(config.lora, model))
    step.fill(_values(model, config.train.seed))
    result = _run_steps(step, config, plan, model, context)
    result.used = used
    return result


def _values(model: ModelConfig, seed: int) -> Callable[[Region, torch.Tensor], None]:
    """Random weights; of adapters too: as a run begins them, the second factor and with it a gradient would be zero."""
    others = initial_values(model, seed)

    def fill(region: Region, out: torch.Tensor) -> None:
        if adapter_of(region.name) is not None:
            fill_region(region, out, seed, model.initializer_range)
        else:
            others(region, out)

    return fill


def in_float64(config: RunConfig) -> RunConfig:
    """The configuration for a proof: float64, no warm-up, so that the first update shows, and an eps above rounding."""
    optimizer = dataclasses.replace(
        config.optimizer, warmup_steps=0, decay_style="constant", eps=max(config.optimizer.eps, _LEAST_EPS)
    )
    train = dataclasses.replace(config.train, precision="fp64", steps=STEPS)
    kernels = dataclasses.replace(config.kernels, flash_attention=False, apex=False)
    return dataclasses.replace(config, optimizer=optimizer, train=train, kernels=kernels)


def on_one_rank(config: RunConfig) -> RunConfig:
    """The same run, every sample of it, without any parallelism or recomputation."""
    plain = type(config.parallel)()
    return dataclasses.replace(
        config,
        parallel=dataclasses.replace(plain, zero=0, timeout_s=config.parallel.timeout_s),
        train=dataclasses.replace(config.train, recompute="none", recompute_layers=None),
    )


def _run_steps(
    step: TrainingStep, config: RunConfig, plan: Plan, model: ModelConfig, context: ParallelContext
) -> RankResult:
    result = RankResult()
    update = step.optimizer.step

    def record_and_update(rate: float, divisor: torch.Tensor, not_finite: torch.Tensor) -> None:
        result.gradients = result.gradients or _gradients(step, divisor)
        update(rate, divisor, not_finite)

    step.optimizer.step = record_and_update  # type: ignore[method-assign, assignment]
    with open_loader(config, plan, model, context, position=0) as loader:
        for number in range(1, STEPS + 1):
            outcome = step(loader.next_batch(), number)
            result.losses.append(outcome.loss.item())
            result.norms.append(outcome.grad_norm.item())
    result.weights = _weights(step)
    return result


def _gradients(step: TrainingStep, divisor: torch.Tensor) -> Regions:
    """The owned ranges of the reduced gradients, divided by tokens and clipping."""
    found: Regions = []
    for bucket in step.buckets:
        for region, view in bucket.owned_regions(bucket.owned_gradients):
            found.append((region, (view / divisor).numpy().astype(np.float64)))
    return found


def _weights(step: TrainingStep) -> Regions:
    found: Regions = []
    step.weights.gather()
    for parameter in step.model.parameters():
        for region, view in parameter.spec.regions(parameter.detach()):  # type: ignore[attr-defined]
            found.append((region, view.numpy().astype(np.float64)))
    return found
