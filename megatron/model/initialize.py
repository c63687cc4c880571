"""Random weights that do not depend on the grid: each is a function of (seed, canonical name, position)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch

from megatron.model.config import ModelConfig
from megatron.parallel.layers import ShardedParameter
from megatron.parallel.layout import Region

# Rows that share one generator. A region that begins within a block draws the whole block and keeps its part.
_BLOCK_ROWS = 16


def initialize(model: torch.nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill this rank's weights: norms 1, matrices normal(0, initializer_range), biases and padding rows 0.

    The two products that write to the residual stream get a deviation smaller by sqrt(2 · layers), so that its
    variance does not grow with depth (Radford et al., 2019).
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, ShardedParameter), name
            parameter.zero_()
            for region, view in parameter.spec.regions(parameter):
                fill_region(region, view, seed, standard_deviation(region.name, config))


def standard_deviation(name: str, config: ModelConfig) -> float | None:
    """Deviation of the weight with this canonical name: 0 for a bias; None for a norm, which starts at 1."""
    layer, kind = name.rsplit(".", 1)
    if kind == "bias":
        return 0.0
    if layer.endswith(config.family.norms):
        return None
    if layer.endswith(config.family.residual_outputs):
        return config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    return config.initializer_range


def initial_values(config: ModelConfig, seed: int) -> Callable[[Region, torch.Tensor], None]:
    """A function that fills a tensor, which holds a region of a model, as `initialize` would."""
    return lambda region, out: fill_region(region, out, seed, standard_deviation(region.name, config))


def fill_region(region: Region, out: torch.Tensor, seed: int, deviation: float | None) -> None:
    """Fill `out`, which holds `region`, with the initial values of that region."""
    if not deviation:
        out.fill_(1.0 if deviation is None else 0.0)
        return
    draw_region(region, out, seed, lambda block, generator: block.normal_(0.0, deviation, generator=generator))


def draw_region(
    region: Region, out: torch.Tensor, seed: int, draw: Callable[[torch.Tensor, torch.Generator], object]
) -> None:
    """Fill `out`, which holds a region of a matrix, with random values; `draw` fills a block of whole rows."""
    first, rows = region.start[0], region.size[0]
    for block in range(first // _BLOCK_ROWS, (first + rows - 1) // _BLOCK_ROWS + 1):
        digest = hashlib.sha256(f"{seed}/{region.name}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        values = torch.empty(_BLOCK_ROWS, region.shape[1])
        draw(values, generator)
        low, high = max(first, block * _BLOCK_ROWS), min(first + rows, (block + 1) * _BLOCK_ROWS)
        taken = values[low - block * _BLOCK_ROWS : high - block * _BLOCK_ROWS, region.slices[1]]
        out[low - first : high - first].copy_(taken)
