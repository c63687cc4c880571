"""Tries the layouts that a number of GPUs allows, and returns the fastest that fit.

Candidates keep the run's model, batch and precision. Each is first asked for the memory of its fullest stages alone,
which is cheap; only what fits is planned as a whole. Layouts that keep a group of the tensor axis within a node and
give each stage as many layers are considered, as clusters are run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from megatron.config.batches import largest_batch
from megatron.config.run import RunConfig
from megatron.config.train import Recompute
from megatron.model.config import ModelConfig
from megatron.plan.estimate import estimate, peak_bytes_of_first_stage
from megatron.plan.hardware import Gpu, Interconnect
from megatron.plan.result import Result
from megatron.utils.errors import ConfigError

_MICRO_BATCHES: tuple[int, ...] = (1, 2, 4, 8)
_RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
# Plans that are made in full, and results that are returned.
_MOST_PLANS, _MOST_RESULTS = 24, 10


def search(
    config: RunConfig, model: ModelConfig, world_size: int, gpu: Gpu, interconnect: Interconnect, title: str
) -> list[Result]:
    """The fastest layouts that fit, best first. Raises ConfigError where none does."""
    fitting = []
    for candidate in candidates(config, model, world_size, interconnect):
        try:
            peak = peak_bytes_of_first_stage(candidate, model, world_size, gpu)
        except ConfigError:
            continue  # a rule of the configuration forbids it
        if peak <= gpu.memory_bytes:
            fitting.append(candidate)
    if not fitting:
        raise ConfigError(
            f"no layout of {world_size} GPUs holds the model: use more GPUs, or a smaller train.global_batch or "
            "data.sequence_length"
        )
    fitting.sort(key=promise)
    results = [estimate(each, model, world_size, gpu, interconnect, title) for each in fitting[:_MOST_PLANS]]
    return sorted((result for result in results if result.fits), key=lambda result: result.step_s)[:_MOST_RESULTS]


def candidates(
    config: RunConfig, model: ModelConfig, world_size: int, interconnect: Interconnect
) -> Iterator[RunConfig]:
    """Every layout that divides GPUs, layers, heads and batch, with the least recomputation that fits tried first."""
    global_batch = largest_batch(config.train.global_batch)
    tensors = [size for size in _divisors(interconnect.gpus_per_node) if model.num_attention_heads % size == 0]
    pipelines = [size for size in _divisors(world_size) if model.num_hidden_layers % size == 0]
    for tensor, pipeline in itertools.product(tensors, pipelines):
        if world_size % (tensor * pipeline):
            continue
        data = world_size // (tensor * pipeline)
        for micro_batch, recompute in itertools.product(_MICRO_BATCHES, _RECOMPUTES):
            if global_batch % (micro_batch * data):
                continue
            micro_batches = global_batch // (micro_batch * data)
            for chunks in _chunks(model.num_hidden_layers, pipeline, micro_batches):
                yield dataclasses.replace(
                    config,
                    parallel=dataclasses.replace(
                        config.parallel,
                        tensor=tensor,
                        pipeline=pipeline,
                        chunks=chunks,
                        schedule="interleaved" if chunks > 1 else "1f1b",
                        layers="even",
                        sequence=None,
                        zero=None,
                    ),
                    train=dataclasses.replace(config.train, micro_batch=micro_batch, recompute=recompute),
                )


def promise(config: RunConfig) -> tuple[float, ...]:
    """What to plan first: a small bubble, little recomputation, few tensor ranks, large micro-batches."""
    parallel, train = config.parallel, config.train
    extra = {"none": 0.0, "selective": 0.03, "full": 0.33}[train.recompute]
    tensor = 0.05 * (parallel.tensor.bit_length() - 1)
    micro_batches = largest_batch(train.global_batch) / train.micro_batch
    bubble = (parallel.pipeline - 1) * parallel.pipeline / micro_batches / parallel.chunks
    return (extra + tensor + bubble, -train.micro_batch)


def _chunks(layers: int, pipeline: int, micro_batches: int) -> list[int]:
    if pipeline == 1 or micro_batches % pipeline:
        return [1]
    return [count for count in (1, 2, 4) if layers % (pipeline * count) == 0]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
