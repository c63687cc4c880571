"""ALiBi as one more element of each head: against the formula, and in low precision."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from megatron.kernels.attention import causal_attention
from megatron.model.alibi import head_slopes, key_biases, with_biases

CPU = torch.device("cpu")


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 16, 64, 71])
def test_biases_are_those_of_transformers_at_every_position(heads: int) -> None:
    length = 1500  # bfloat16 has no odd numbers from 256 on
    theirs = build_alibi_tensor(torch.ones(1, length, dtype=torch.long), heads, torch.float32)[:, 0]
    assert torch.equal(key_biases(head_slopes(heads, CPU), torch.arange(length)[None])[0].float(), theirs)


def by_formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    length, served = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (tensor.double().repeat_interleave(served, dim=1) for tensor in (key, value))
    scores = (query.double() @ key.transpose(-1, -2) + biases.double().unsqueeze(-2)) / math.sqrt(query.shape[-1])
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(dim=-1) @ value


def inputs(dtype: torch.dtype, heads: int, length: int, key_value_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, count, length, 16) for count in (heads, key_value_heads, key_value_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("key_value_heads", [1, 2, 6])
def test_attention_and_gradients_are_those_of_the_formula(key_value_heads: int) -> None:
    leaves = inputs(torch.float64, 6, 33, key_value_heads)
    biases = key_biases(head_slopes(6, CPU), torch.arange(33)[None])
    found = causal_attention(*with_biases(*leaves, biases))[..., :16]
    expected = by_formula(*leaves, biases)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    upstream = torch.randn_like(found)
    for our, their in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(our, their, rtol=1e-11, atol=1e-12)


@torch.no_grad()
def test_large_biases_stay_precise_in_bfloat16() -> None:
    """At position 1,000 they are hundreds; the products that they are part of are summed in float32."""
    leaves = inputs(torch.bfloat16, 4, 1000, 4)
    biases = key_biases(head_slopes(4, CPU), torch.arange(1000)[None])
    without = torch.zeros_like(biases)

    def error(some: torch.Tensor) -> float:
        found = causal_attention(*with_biases(*leaves, some))[..., :16]
        return float((found.double() - by_formula(*leaves, some)).square().mean().sqrt())

    spread = float(
        by_formula(*leaves, biases).square().mean().sqrt() / by_formula(*leaves, without).square().mean().sqrt()
    )
    assert error(biases) <= 2.0 * spread * error(without)
