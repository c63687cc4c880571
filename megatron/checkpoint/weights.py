"""Filling a built model from a source."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron.checkpoint.source import Source
from megatron.parallel.layers import ShardedParameter
from megatron.parallel.layout import Region


def load_weights(model: torch.nn.Module, source: Source) -> None:
    """Fill this rank's weights. Masters are taken instead where the model has more precision than the stored weights.

    Padding rows become zero. Raises CheckpointError where a weight is missing or damaged.
    """
    read = weight_reader(source, next(model.parameters()).dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, ShardedParameter), name
            parameter.zero_()
            for region, view in parameter.spec.regions(parameter):
                read(region, view)


def weight_reader(source: Source, dtype: torch.dtype) -> Callable[[Region, torch.Tensor], None]:
    """A function that fills a tensor, which holds a region of a model in `dtype`, as `load_weights` would."""
    masters = source.shapes("master")

    def read(region: Region, out: torch.Tensor) -> None:
        precise = region.name in masters and dtype != torch.bfloat16
        source.read(region, out, "master" if precise else "weights")

    return read
