"""Filling a built model from a source."""

from __future__ import annotations

import torch

from megatron.checkpoint.source import Source
from megatron.parallel.layers import ShardedParameter


def load_weights(model: torch.nn.Module, source: Source) -> None:
    """Fill this rank's weights. Masters are taken instead where the model has more precision than the stored weights.

    Padding rows become zero. Raises CheckpointError where a weight is missing or damaged.
    """
    masters = source.shapes("master")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, ShardedParameter), name
            parameter.zero_()
            for region, view in parameter.spec.regions(parameter):
                precise = region.name in masters and parameter.dtype != torch.bfloat16
                source.read(region, view, "master" if precise else "weights")
