"""Which of weights and masters a model is filled from, and that nothing of what it held before is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.checkpoint.source import open_source
from megatron.checkpoint.weights import load_weights
from megatron.model.config import ModelConfig
from megatron.model.specs import canonical_shapes
from megatron.model.transformer import Transformer
from megatron.parallel.layers import ShardedParameter
from megatron.parallel.mesh import Grid, ParallelContext, describe, single_rank

from .conftest import save

MODEL = ModelConfig(41, 24, 40, 2, 4, 2, 6, max_position_embeddings=32)


@pytest.fixture
def tensors() -> dict[str, dict[str, torch.Tensor]]:
    """bf16 weights and float32 masters that are not each other rounded, so that it shows which were read."""
    generator = torch.Generator().manual_seed(0)
    masters = {
        name: torch.randn(shape, generator=generator, dtype=torch.float32)
        for name, shape in canonical_shapes(MODEL).items()
    }
    return {"weights": {name: (2 * tensor).bfloat16() for name, tensor in masters.items()}, "master": masters}


def load(folder: Path, dtype: torch.dtype, context: ParallelContext) -> dict[str, torch.Tensor]:
    """Fill a model that was full of NaN; returns what it holds, by parameter."""
    model = Transformer(MODEL, context, dtype)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    with open_source(folder) as source:
        load_weights(model, source)
    loaded: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, ShardedParameter)
        loaded[name] = parameter
    return loaded


def assert_holds(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Every region of every parameter is that of `expected`, and all else (padding) is zero."""
    for name, parameter in loaded.items():
        assert isinstance(parameter, ShardedParameter)
        wanted = torch.zeros_like(parameter.data)
        for region, view in parameter.spec.regions(wanted):
            view.copy_(expected[region.name][region.slices])
        assert torch.equal(parameter.data, wanted), name


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "master"), (torch.float64, "master"), (torch.bfloat16, "weights")]
)
@pytest.mark.parametrize("tensor", [1, 2])
def test_masters_fill_a_model_of_more_precision(
    tmp_path: Path, tensors: dict[str, dict[str, torch.Tensor]], dtype: torch.dtype, kind: str, tensor: int
) -> None:
    assert save(tmp_path, tensors, ranks=2, cuts=2) == [None] * 2
    for rank in range(tensor):
        context = describe(Grid(tensor=tensor), rank, num_key_value_heads=MODEL.num_key_value_heads)
        assert_holds(load(tmp_path, dtype, context), tensors[kind])


def test_without_masters_the_weights_are_taken(tmp_path: Path, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    save(tmp_path, {"weights": tensors["weights"]})
    assert_holds(load(tmp_path, torch.float32, single_rank()), tensors["weights"])
