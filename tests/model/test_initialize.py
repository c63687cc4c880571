"""Random weights are a function of (seed, name, position), so no grid changes them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.model.config import ModelConfig
from megatron.model.initialize import fill_region, initialize, standard_deviation
from megatron.model.transformer import Transformer
from megatron.parallel.layout import Region
from megatron.parallel.mesh import Grid, describe

CONFIG = ModelConfig(
    vocab_size=147,
    hidden_size=40,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    initializer_range=0.05,
)


def weights(grid: Grid, config: ModelConfig = CONFIG, seed: int = 5) -> dict[str, torch.Tensor]:
    """Canonical name → whole weight, put together from all ranks of a grid; copies must agree."""
    whole: dict[str, torch.Tensor] = {}
    for rank in range(grid.world_size):
        context = describe(grid, rank, sequence=True, num_key_value_heads=config.num_key_value_heads)
        model = Transformer(config, context)
        torch.manual_seed(rank)  # torch's own generator must not matter
        initialize(model, config, seed)
        for parameter in model.parameters():
            covered = torch.zeros_like(parameter, dtype=torch.bool)
            for region, view in parameter.spec.regions(parameter.detach()):
                place = whole.setdefault(region.name, torch.full(region.shape, torch.nan))[region.slices]
                assert torch.isnan(place).all() or torch.equal(place, view), region
                place.copy_(view)
            for piece in parameter.spec.pieces:
                covered[piece.local] = True
            assert (parameter[~covered] == 0).all(), "padding rows are zero"
    assert not any(torch.isnan(tensor).any() for tensor in whole.values())
    return whole


@pytest.mark.parametrize(
    "grid", [Grid(tensor=2), Grid(tensor=4), Grid(pipeline=3), Grid(tensor=2, pipeline=2), Grid(2, 1, 2, 2)], ids=str
)
@pytest.mark.parametrize("tied", [False, True])
def test_every_grid_starts_alike(grid: Grid, tied: bool) -> None:
    config = ModelConfig(**{**vars(CONFIG), "tie_word_embeddings": tied})
    alone, together = weights(Grid(), config), weights(grid, config)
    assert alone.keys() == together.keys()
    assert ("lm_head.weight" in alone) != tied
    for name, tensor in alone.items():
        assert torch.equal(tensor, together[name]), name


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("grid", [Grid(tensor=2), Grid(tensor=2, pipeline=2)], ids=str)
def test_every_grid_starts_gpt_alike(grid: Grid, model_type: str) -> None:
    sizes = {"vocab_size": 147, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 3}
    config = ModelConfig.from_settings({"model_type": model_type, **sizes, "num_attention_heads": 4})
    alone, together = weights(Grid(), config), weights(grid, config)
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        assert torch.equal(tensor, together[name]), name


@settings(max_examples=60)
@given(st.data())
def test_any_region_is_the_slice_of_the_whole(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 70)), data.draw(st.integers(1, 9)))
    start = tuple(data.draw(st.integers(0, extent - 1)) for extent in shape)
    size = tuple(data.draw(st.integers(1, extent - low)) for extent, low in zip(shape, start, strict=True))
    whole = torch.empty(shape)
    fill_region(Region.whole("a.weight", shape), whole, 3, 0.02)
    region = Region("a.weight", shape, start, size)
    part = torch.empty(size)
    fill_region(region, part, 3, 0.02)
    assert torch.equal(part, whole[region.slices])


def test_distribution() -> None:
    config = ModelConfig(4000, 64, 400, 8, 4, 4, 16, initializer_range=0.02)
    tensors = weights(Grid(), config)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            assert (tensor == 1).all()
            continue
        expected = 0.02 / math.sqrt(16) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        assert standard_deviation(name, config) == pytest.approx(expected)
        assert tensor.std().item() == pytest.approx(expected, rel=5 / math.sqrt(tensor.numel()))
        assert abs(tensor.mean().item()) <= 5 * expected / math.sqrt(tensor.numel())
        # neighbouring rows and blocks of rows are independent
        for distance in (1, 16):
            correlation = (tensor[distance:] * tensor[:-distance]).mean().item() / expected**2
            assert abs(correlation) <= 5 / math.sqrt(tensor.numel()), (name, distance)


def test_seed_name_and_layer_all_matter() -> None:
    first, second = weights(Grid(), seed=5), weights(Grid(), seed=6)
    matrices = {name: tensor for name, tensor in first.items() if tensor.dim() == 2}
    assert not any(torch.equal(tensor, second[name]) for name, tensor in matrices.items())
    same_shape = [tensor for name, tensor in matrices.items() if name.endswith(("q_proj.weight", "gate_proj.weight"))]
    assert not any(
        torch.equal(one, other)
        for at, one in enumerate(same_shape)
        for other in same_shape[:at]
        if one.shape == other.shape
    )
