"""Evaluates a model folder on token streams or conversations: all of `megatron evaluate` but its words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron.checkpoint.check import check_weights
from megatron.checkpoint.hub import local_folder_together
from megatron.checkpoint.source import Source, open_source
from megatron.checkpoint.weights import load_weights
from megatron.config.data import DataConfig
from megatron.data.build import (
    build_validation_datasets,
    check_tokenizer,
    data_prefixes,
    held_out,
    validation_blend,
    validation_prefixes,
)
from megatron.data.dataset import Dataset
from megatron.data.instruction.build import build_instruction_validation
from megatron.data.loader import MicroBatchDataset
from megatron.evaluate.markers import find_markers
from megatron.evaluate.perplexity import Evaluation, evaluate_parts
from megatron.kernels import native
from megatron.model.config import ModelConfig
from megatron.model.specs import canonical_shapes
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import Grid, connect
from megatron.parallel.world import World
from megatron.tokenizer import find_tokenizer, local_tokenizer
from megatron.utils.errors import ConfigError
from megatron.utils.logging import get_logger

_logger = get_logger("megatron.evaluate")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def evaluate_folder(
    world: World,
    *,
    load: str,
    data: DataConfig,
    part: int,
    sequence_length: int | None,
    micro_batch: int,
    precision: str,
    tensor: int,
    context: int,
    pipeline: int,
    document_mask: bool,
    metrics: Sequence[str] = (),
    tokenizer: str | None = None,
) -> Evaluation:
    """Mean loss, and the `metrics`, over all that `data` holds out as its `part` of data.split (or names as such); all
    ranks call it and get the same result on any grid. `tokenizer` is the model's, where it is not beside it.

    Raises an error of ours, alike on all ranks, where folder, data or grid do not fit each other.
    """
    _logger.info("%s", native.select("auto", world.device.type))
    folder = local_folder_together(load, world)
    source = world.agree(lambda: open_source(folder))
    config = world.agree(lambda: _check_model(source))
    length = world.agree(lambda: _check_length(sequence_length, config, context))
    grid = world.agree(lambda: _check_grid(world.launch.world_size, tensor, context, pipeline))
    # Split sequences need lengths that divide; others are evaluated without.
    sequence = length % (tensor * context) == 0
    unit = math.lcm(2 * context if context > 1 else 1, context * (tensor if sequence else 1))
    known = _find_tokenizer(source, tokenizer, world)
    held = world.agree(lambda: held_out(data, part))
    datasets = world.agree(lambda: _open_data(held, part, known, config, length, unit))
    markers = world.agree(lambda: find_markers(metrics, validation_prefixes(held), known))
    parallel = connect(grid, world.launch.rank, sequence=sequence, num_key_value_heads=config.num_key_value_heads)
    model = world.agree(lambda: Transformer(config, parallel, DTYPES[precision], world.device))
    world.agree(lambda: load_weights(model, source))
    return evaluate_parts(
        model,
        datasets,
        world.exchange,
        micro_batch=micro_batch,
        micro_batches=grid.pipeline,
        document_mask=document_mask,
        metrics=metrics,
        markers=markers,
    )


def _find_tokenizer(source: Source, named: str | None, world: World) -> Path | None:
    if named is not None:
        return Path(world.once_per_machine(lambda: str(local_tokenizer(named))))
    return world.agree(lambda: find_tokenizer(source.tokenizer_folder))


def _check_model(source: Source) -> ModelConfig:
    config = ModelConfig.from_huggingface(source.model_config)
    check_weights(source, canonical_shapes(config))
    return config


def _check_length(sequence_length: int | None, config: ModelConfig, context: int) -> int:
    longest = config.max_position_embeddings
    if sequence_length is not None and sequence_length > longest:
        raise ConfigError(
            f"--sequence-length {sequence_length} is above the model's max_position_embeddings={longest}; "
            f"use {longest} or fewer."
        )
    length, unit = sequence_length or longest, 2 * context
    if context > 1 and length % unit:
        raise ConfigError(
            f"--sequence-length {length} is not divisible by {unit}: each of --context {context} ranks holds two equal "
            f"parts of it; use {length - length % unit or unit}, or --context 1."
        )
    return length


def _check_grid(world_size: int, tensor: int, context: int, pipeline: int) -> Grid:
    needed = tensor * context * pipeline
    if needed > world_size:
        split = f" x --context {context}" if context > 1 else ""
        raise ConfigError(
            f"--tensor {tensor}{split} x --pipeline {pipeline} needs {needed} processes, {world_size} "
            f"were started; use torchrun --nproc-per-node {needed}."
        )
    return Grid.of_world(world_size, tensor, pipeline, context)


def _open_data(
    data: DataConfig, part: int, tokenizer: Path | None, config: ModelConfig, length: int, unit: int
) -> Mapping[str, Dataset | MicroBatchDataset]:
    """All that is held out, by source."""
    named = replace(data, train=None, validation=validation_blend(data))
    check_tokenizer(data_prefixes(named), tokenizer, config.vocab_size)
    if data.kind == "instruction":
        return dict(
            build_instruction_validation(
                data, sequence_length=length, samples=None, vocab_size=config.vocab_size, length_unit=unit, part=part
            )
        )
    return dict(
        build_validation_datasets(data, sequence_length=length, samples=None, vocab_size=config.vocab_size, part=part)
    )
