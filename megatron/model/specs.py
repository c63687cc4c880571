"""Which canonical regions any rank of any grid holds: by building that rank's model without storage."""

from __future__ import annotations

import math

import torch

from megatron.model.config import ModelConfig
from megatron.model.lora import Lora, adapt, adapter_of
from megatron.model.transformer import Transformer
from megatron.parallel.layers import ShardedParameter
from megatron.parallel.layout import ShardSpec
from megatron.parallel.mesh import Grid, describe


def parameter_specs(model: torch.nn.Module) -> dict[str, ShardSpec]:
    """Local parameter name → spec of a built model."""
    specs = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, ShardedParameter), name
        specs[name] = parameter.spec
    return specs


def rank_specs(
    config: ModelConfig, *, tensor: int, pipeline: int, tensor_rank: int, pipeline_rank: int
) -> dict[str, ShardSpec]:
    """Local parameter name → spec, for the rank at these coordinates. Raises ConfigError where the grid is
    impossible.
    """
    grid = Grid(tensor=tensor, pipeline=pipeline)
    rank = grid.rank(tensor_rank, 0, 0, pipeline_rank)
    context = describe(grid, rank, num_key_value_heads=config.num_key_value_heads)
    return parameter_specs(Transformer(config, context, device="meta"))


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of every weight of the model, in the model's order."""
    specs = rank_specs(config, tensor=1, pipeline=1, tensor_rank=0, pipeline_rank=0)
    return {piece.region.name: piece.region.shape for spec in specs.values() for piece in spec.pieces}


def adapter_shapes(config: ModelConfig, lora: Lora) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of every weight of the model's adapters."""
    context = describe(Grid(), 0, num_key_value_heads=config.num_key_value_heads)
    model = Transformer(config, context, device="meta")
    adapt(model, lora)
    pieces = (piece for spec in parameter_specs(model).values() for piece in spec.pieces)
    return {piece.region.name: piece.region.shape for piece in pieces if adapter_of(piece.region.name) is not None}


def count_adapters(config: ModelConfig, lora: Lora | None) -> int | None:
    """Number of weights of the model's adapters; None where there are none."""
    return None if lora is None else sum(math.prod(shape) for shape in adapter_shapes(config, lora).values())
