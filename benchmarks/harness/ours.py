"""This project's training step, alone or over a grid of processes, as `megatron train` builds it."""

from __future__ import annotations

import torch

from harness.contestants import Contestant, Workload
from harness.trainer import Trainer, tensor_bytes
from megatron.config.optimizer import OptimizerConfig
from megatron.data.loader import MicroBatch
from megatron.kernels.attention import compiled_causal_attention
from megatron.kernels.vendor.select import VendorKernels
from megatron.model.initialize import initialize
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import Grid, ParallelContext, connect, single_rank
from megatron.parallel.world import World, start_world
from megatron.train.kernels import install
from megatron.train.step import TrainingStep


def build(contestant: Contestant, workload: Workload, dtype: torch.dtype) -> Trainer:
    """Weights in `dtype`; gradients, masters and moments in float32. ZeRO-1 over two data ranks, sequence parallel."""
    world = start_world(timeout_s=600.0)
    context = _context(contestant, workload, world)
    model = Transformer(workload.model, context, dtype, recompute=contestant.recompute)
    initialize(model, workload.model, seed=1)
    step = TrainingStep(
        model,
        context,
        OptimizerConfig(),
        micro_batches=workload.micro_batches,
        zero=int(contestant.data > 1),
        decay_steps=1000,
    )
    install(VendorKernels(attend=compiled_causal_attention), model)
    step.optimizer.reset_masters()
    done = 0

    def run(batches: list[MicroBatch]) -> None:
        nonlocal done
        done += 1
        step(batches, done)

    def state_bytes() -> dict[str, int]:
        return {
            "weights": tensor_bytes(bucket.weights for bucket in step.buckets),
            "gradients": tensor_bytes(bucket.gradients for bucket in step.buckets),
            "optimizer": step.optimizer.state_bytes,
        }

    return Trainer(run, state_bytes)


def _context(contestant: Contestant, workload: Workload, world: World) -> ParallelContext:
    if contestant.world == 1:
        return single_rank()
    return connect(
        Grid.of_world(contestant.world, contestant.tensor, contestant.pipeline),
        world.launch.rank,
        sequence=contestant.tensor > 1,
        num_key_value_heads=workload.model.num_key_value_heads,
        shard=contestant.data,
    )
