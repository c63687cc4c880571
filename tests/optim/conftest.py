"""A tiny model in buckets, and torch's view of the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from megatron.model.config import ModelConfig
from megatron.model.initialize import initialize
from megatron.model.transformer import Transformer
from megatron.parallel.buckets import Bucket, build_buckets
from megatron.parallel.mesh import Grid, describe

MODEL = ModelConfig(83, 24, 40, 2, 4, 2, 6)

MakeBuckets = Callable[..., list[Bucket]]


@pytest.fixture
def make_buckets() -> MakeBuckets:
    """`make_buckets(dtype, data=2, rank=1, zero=1)`: the buckets of that data rank's model, small ones."""

    def make(
        dtype: torch.dtype = torch.float64, *, data: int = 1, rank: int = 0, zero: int = 0, elements: int = 3000
    ) -> list[Bucket]:
        context = describe(Grid(data=data), rank)
        model = Transformer(MODEL, context, dtype)
        initialize(model, MODEL, 1)
        wide = torch.promote_types(torch.float32, dtype)
        return build_buckets(model, context.grad, zero=zero, gradient_dtype=wide, bucket_elements=elements)

    return make


def slots(buckets: list[Bucket]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, weight, gradient) of each parameter, without the vocabulary's padding rows."""
    for bucket in buckets:
        for slot in bucket.slots:
            rows = max(piece.offset[0] + piece.region.size[0] for piece in slot.spec.pieces)
            weight, gradient = (
                flat[slot.start : slot.stop].view(slot.spec.shape)[:rows] for flat in (bucket.weights, bucket.gradients)
            )
            yield slot.name, weight, gradient


def set_gradients(buckets: list[Bucket], step: int, size: float = 1.0) -> None:
    """Random gradients that depend on the step and the parameter, not on how parameters lie in buckets."""
    for name, _, gradient in slots(buckets):
        generator = torch.Generator().manual_seed(hash_of(name) + step)
        gradient.copy_(size * torch.randn(gradient.shape, generator=generator, dtype=torch.float64))


def hash_of(name: str) -> int:
    return sum(ord(letter) * 31**at for at, letter in enumerate(name)) % 2**31
