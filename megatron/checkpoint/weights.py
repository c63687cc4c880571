"""Filling a built model from a source."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron.checkpoint.source import Source
from megatron.parallel.layers import ShardedParameter


def load_weights(model: torch.nn.Module, source: Source) -> None:
    """Fill this rank's weights. Masters are taken instead where the model has more precision than the stored weights.

    Padding rows become zero. Raises CheckpointError where a weight is missing or damaged.
    """
    kind_of = weight_kinds(source, next(model.parameters()).dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, ShardedParameter), name
            parameter.zero_()
            for region, view in parameter.spec.regions(parameter):
                source.read(region, view, kind_of(region.name))


def weight_kinds(source: Source, dtype: torch.dtype) -> Callable[[str], str]:
    """Which stored kind gives the weights of a model in `dtype`, by name: masters where they are more precise."""
    masters = source.shapes("master")
    return lambda name: "master" if name in masters and dtype != torch.bfloat16 else "weights"
