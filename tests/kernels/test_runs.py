"""Attention to runs by variable-length flash attention (a stand-in of the same meaning runs here), and its cuts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.kernels.attention import (
    ranged_attention,
    ranged_attention_backward,
    ranged_attention_backward_reference,
    ranged_attention_reference,
)
from megatron.kernels.runs import Documents, Runs, whole_attention
from megatron.kernels.varlen import segments_of, varlen_attention, varlen_attention_backward
from megatron.parallel.context import causal_runs, local_part, runs_into
from megatron.parallel.mesh import Axis

from .flash import flash_backward, flash_forward

BATCH, LENGTH, HEADS, KV, SIZE = 3, 24, 4, 2, 8


def document_starts(seed: int) -> torch.Tensor:
    """Samples of one, of a few, and of many documents, some of one token."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.tensor([[0.0], [0.1], [0.5]])
    begins = torch.rand((BATCH, LENGTH), generator=generator) < chance
    return torch.where(begins, torch.arange(LENGTH), 0).cummax(dim=1).values.to(torch.int32)


def most_documents(starts: torch.Tensor) -> int:
    return max(len(row.unique()) for row in starts)


def all_runs(size: int, seed: int) -> list[tuple[str, Runs, int]]:
    """(name, runs, number of keys) of every call that ring and gathered attention make on any of `size` ranks."""
    starts, found = document_starts(seed), []
    for rank in range(size):
        cp = Axis("cp", rank, size)
        documents = Documents(local_part(starts, cp), most_documents(starts))
        for which, some in (("documents", documents), ("causal", None)):
            runs = causal_runs(BATCH, LENGTH // size, some, cp, starts.device)
            for owner in range(size):
                found.append((f"{which} {rank} into {owner}", runs_into(owner, runs, cp)[1], LENGTH // size))
            half = LENGTH // size // 2
            for part in (slice(0, half), slice(half, None)):
                found.append((f"{which} {rank} gathered {part}", runs.of(part), LENGTH))
                for window in (1, 3, LENGTH // 2 + 1):
                    narrow = replace(runs.of(part), window=window)
                    found.append((f"{which} {rank} gathered {part}, window of {window}", narrow, LENGTH))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(2))
def test_segments_mean_what_the_runs_do(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, runs, keys in all_runs(size, seed):
        queries = runs.start.shape[1]
        shapes = [(BATCH, HEADS, queries, SIZE), *2 * [(BATCH, KV, keys, SIZE)], (BATCH, HEADS, queries, SIZE)]
        query, key, value, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        arguments: tuple[Any, ...] = (runs.start, runs.stop, runs.documents, runs.causal)
        theirs = ranged_attention(query, key, value, runs.start, runs.stop, runs.window)
        found = varlen_attention(query, key, value, *arguments, forward=flash_forward, window=runs.window)
        for our, their in zip(found, theirs, strict=True):
            torch.testing.assert_close(our, their, msg=lambda text, name=name: f"{name}: {text}")
        # Backward with the result over some more keys, as in a ring: then no log-sum-exp is infinite.
        mixed, total = theirs[0] + 0.1, theirs[1].logaddexp(torch.tensor(0.3, dtype=torch.float64))
        expected = ranged_attention_backward(grad, query, key, value, mixed, total, runs.start, runs.stop, runs.window)
        found = varlen_attention_backward(
            grad, query, key, value, mixed, total, *arguments, backward=flash_backward, window=runs.window
        )
        for our, their in zip(found, expected, strict=True):
            torch.testing.assert_close(our, their, msg=lambda text, name=name: f"{name}: {text}")


def test_segments_are_bounded_and_stay_on_the_device() -> None:
    """Without values (on meta tensors, where reading one is an error) the cuts have a size: nothing waits for them."""
    bounds = torch.empty((BATCH, LENGTH), dtype=torch.int32, device="meta")
    found = segments_of(bounds, bounds, 5, LENGTH)
    assert found.queries.shape == found.keys.shape == (BATCH * (5 + 2) + 1,)


@pytest.mark.parametrize("window", [None, 3])
def test_torch_takes_the_arguments(window: int | None) -> None:
    """The operations of this release of torch, on tensors without storage: names, order and shapes."""
    shapes = [(BATCH, HEADS, LENGTH, SIZE), *2 * [(BATCH, KV, 2 * LENGTH, SIZE)]]
    query, key, value = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    bounds = torch.empty((BATCH, LENGTH), dtype=torch.int32, device="meta")
    mixed, total = varlen_attention(query, key, value, bounds, bounds, 4, True, window=window)
    assert mixed.shape == query.shape and mixed.dtype == torch.bfloat16
    assert total.shape == query.shape[:3] and total.dtype == torch.float32
    gradients = varlen_attention_backward(
        query, query, key, value, mixed, total, bounds, bounds, 4, True, window=window
    )
    assert [gradient.shape for gradient in gradients] == [query.shape, key.shape, value.shape]


@pytest.mark.parametrize("window", [None, 5])
def test_attention_to_runs_has_its_derivative(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, HEADS, LENGTH, SIZE), *2 * [(BATCH, KV, LENGTH, SIZE)]]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    starts = document_starts(1)
    runs = causal_runs(BATCH, LENGTH, Documents(starts, most_documents(starts)), Axis("cp"), starts.device)
    mixed = whole_attention(*inputs, replace(runs, window=window))
    place = torch.arange(LENGTH)
    mask = (place >= starts.unsqueeze(-1)) & (place <= place.unsqueeze(-1))
    mask &= place > place.unsqueeze(-1) - (window or LENGTH)
    keys, values = (tensor.repeat_interleave(HEADS // KV, dim=1) for tensor in inputs[1:])
    scores = (inputs[0] @ keys.transpose(2, 3) / math.sqrt(SIZE)).masked_fill(~mask.unsqueeze(1), -torch.inf)
    expected = scores.softmax(dim=-1) @ values
    torch.testing.assert_close(mixed, expected)
    upstream = torch.randn(mixed.shape, generator=generator, dtype=torch.float64)
    for our, their in zip(torch.autograd.grad(mixed, inputs, upstream), torch.autograd.grad(expected, inputs, upstream),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(our, their)


def test_a_part_of_the_queries_of_one_sample_is_packed_anew() -> None:
    """The library reads the log-sum-exp as if it were contiguous; a slice of one sample's is a view with gaps."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(s, generator=generator, dtype=torch.float64)
             for s in [(1, HEADS, LENGTH, SIZE), *2 * [(1, KV, LENGTH, SIZE)]]]  # fmt: skip
    bounds = torch.zeros(1, LENGTH, dtype=torch.int32), torch.full((1, LENGTH), LENGTH, dtype=torch.int32)
    late = slice(LENGTH // 2, None)
    mixed, total = ranged_attention(*whole, *bounds)
    query, mixed, total = whole[0][:, :, late], mixed[:, :, late], total[:, :, late]
    arguments = (query, query, *whole[1:], mixed, total, *(bound[:, late] for bound in bounds))
    found = varlen_attention_backward(*arguments, 1, False, backward=flash_backward)
    for our, their in zip(found, ranged_attention_backward(*arguments), strict=True):
        torch.testing.assert_close(our, their)


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("length", [1024, 2048])
def test_memory_does_not_grow_with_the_square_of_the_sequence(length: int) -> None:
    """Even where nothing is compiled: scores exist for a block of queries at a time."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, length, 8, generator=generator) for _ in range(3))
    starts = (torch.arange(length) // 300 * 300).to(torch.int32)[None]
    runs = causal_runs(1, length, Documents(starts, -(-length // 300)), Axis("cp"), starts.device)
    with Largest() as largest:
        mixed, total = ranged_attention_reference(query, key, value, runs.start, runs.stop)
        ranged_attention_backward_reference(mixed, query, key, value, mixed, total, runs.start, runs.stop)
    assert 0 < largest.elements <= 128 * length
