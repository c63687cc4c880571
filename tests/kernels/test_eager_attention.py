"""Eager attention gives the numbers of the other, and keeps what it is for: the probabilities of all pairs."""

from __future__ import annotations

import pytest
import torch

from megatron.kernels.attention import causal_attention
from megatron.kernels.eager_attention import eager_causal_attention

LENGTH = 33


def inputs(dtype: torch.dtype, key_value_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    counts = (4, key_value_heads, key_value_heads)
    return [
        torch.randn(2, count, LENGTH, 16, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for count in counts
    ]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
def test_it_equals_the_fused_one(dtype: torch.dtype, tolerance: float, key_value_heads: int) -> None:
    exact_leaves = [tensor.detach().double().requires_grad_() for tensor in inputs(dtype, key_value_heads)]
    exact = causal_attention(*exact_leaves)
    upstream = torch.randn(exact.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = inputs(dtype, key_value_heads)
    found = eager_causal_attention(*leaves)
    gradients = torch.autograd.grad(found, leaves, upstream.to(found.dtype))
    expected = torch.autograd.grad(exact, exact_leaves, upstream)
    for mine, theirs in zip((found, *gradients), (exact, *expected), strict=True):
        assert (mine.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_no_query_sees_a_later_key() -> None:
    query, key, value = inputs(torch.float64, 4)
    before = eager_causal_attention(query, key, value)
    with torch.no_grad():
        key[:, :, 20:] += 1.0
        value[:, :, 20:] += 1.0
    after = eager_causal_attention(query, key, value)
    assert torch.equal(before[:, :, :20], after[:, :, :20])
    assert not torch.equal(before[:, :, 20:], after[:, :, 20:])


def test_the_probabilities_of_all_pairs_are_kept_once() -> None:
    kept: dict[int, tuple[int, ...]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = eager_causal_attention(*inputs(torch.float32, 4))
    assert output.requires_grad
    pairs = [shape for shape in kept.values() if shape[-2:] == (LENGTH, LENGTH) and len(shape) > 2]
    assert len(pairs) == 1, kept
