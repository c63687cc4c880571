"""Linear and embedding layers cut over the tensor axis (Shoeybi et al., 2019), with sequence parallelism
(Korthikanti et al., 2022).

A column-parallel layer holds a share of the output features, a row-parallel layer a share of the input features, a
vocabulary-parallel embedding a share of the rows. Under sequence parallelism the activations between them are split
along the sequence, [s/tp, b, h]; column layers gather them and row layers scatter them again. At size 1 each is the
plain layer. A weight that is not trained gets no gradient, and nothing is kept for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from megatron.kernels.numerics import statistics_dtype
from megatron.kernels.products import linear, operand
from megatron.parallel.collectives import (
    Done,
    all_gather,
    reduce_activations,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron.parallel.layout import Piece, Region, ShardSpec
from megatron.parallel.mesh import Axis, ParallelContext
from megatron.parallel.weight_gradient import (
    bias_gradient,
    embedding_weight_gradient,
    linear_weight_gradient,
    sink_of,
)

_ALONE = Axis("alone")


class ShardedParameter(nn.Parameter):
    """A parameter that knows which canonical regions it holds, and how often one forward pass uses it."""

    spec: ShardSpec
    uses: int

    @staticmethod
    def create(data: torch.Tensor, spec: ShardSpec, uses: int = 1, trained: bool = True) -> ShardedParameter:
        """Wrap a tensor of the spec's shape."""
        assert tuple(data.shape) == spec.shape, (data.shape, spec.shape)
        parameter = ShardedParameter(data, requires_grad=trained)
        parameter.spec, parameter.uses = spec, uses
        return parameter

    @staticmethod
    def empty(spec: ShardSpec, dtype: torch.dtype, device: torch.device, uses: int = 1) -> ShardedParameter:
        """A parameter whose values are not set yet."""
        return ShardedParameter.create(torch.empty(spec.shape, dtype=dtype, device=device), spec, uses)


class _ColumnLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tp: Axis, sequence: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs if weight.requires_grad else None, weight, bias)
        ctx.sink, ctx.tp, ctx.sequence = sink_of(weight), tp, sequence
        return linear(all_gather(inputs, tp) if sequence else inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight, bias = ctx.saved_tensors
        _, trains_weight, trains_bias, *_ = ctx.needs_input_grad
        # Only the share was kept: gather the inputs anew behind the product that gives their gradient, then
        # reduce that gradient behind the product that gives the weight's.
        grad_bias = bias_gradient(bias, grad_output) if trains_bias else None
        again = ctx.sequence and trains_weight
        gathered, gathering = start_all_gather(inputs, ctx.tp) if again else (inputs, Done())
        grad_inputs, grad_output = _input_gradient(grad_output, weight)
        if ctx.sequence:
            grad_inputs, reducing = start_reduce_scatter(grad_inputs, ctx.tp)
        else:
            reducing = start_all_reduce(grad_inputs, ctx.tp)
        gathering.wait()
        grad_weight = linear_weight_gradient(ctx.sink, grad_output, gathered) if trains_weight else None
        reducing.wait()
        return grad_inputs, grad_weight, grad_bias, None, None


class _RowLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tp: Axis, sequence: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs if weight.requires_grad else None, weight, bias)
        ctx.sink, ctx.tp, ctx.sequence = sink_of(weight), tp, sequence
        if tp.size == 1:
            return linear(inputs, weight, bias)
        output = reduce_activations(linear(inputs, weight), tp, sequence)
        return output if bias is None else _add_once(output, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight, bias = ctx.saved_tensors
        _, trains_weight, trains_bias, *_ = ctx.needs_input_grad
        # Of this rank's tokens alone under sequence parallelism: a part, which is summed with those of its copies.
        grad_bias = bias_gradient(bias, grad_output) if trains_bias else None
        if ctx.sequence:
            grad_output = all_gather(grad_output, ctx.tp)
        grad_inputs, grad_output = _input_gradient(grad_output, weight)
        grad_weight = linear_weight_gradient(ctx.sink, grad_output, inputs) if trains_weight else None
        return grad_inputs, grad_weight, grad_bias, None, None


class _VocabularyEmbedding(Function):
    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: torch.Tensor, tp: Axis, sequence: bool) -> torch.Tensor:
        rows = tokens - tp.rank * weight.shape[0]
        elsewhere = (rows < 0) | (rows >= weight.shape[0]) if tp.size > 1 else None
        if elsewhere is not None:
            rows = rows.masked_fill(elsewhere, 0)
        output = F.embedding(rows, weight)
        if elsewhere is not None:
            output.masked_fill_(elsewhere.unsqueeze(-1), 0.0)
        ctx.save_for_backward(rows, elsewhere, weight)
        ctx.sink, ctx.tp, ctx.sequence = sink_of(weight), tp, sequence
        return reduce_activations(output, tp, sequence)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, elsewhere, weight = ctx.saved_tensors
        if ctx.sequence:
            grad_output = all_gather(grad_output, ctx.tp)
        if elsewhere is not None:
            grad_output = grad_output.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return None, embedding_weight_gradient(ctx.sink, weight, rows, grad_output), None, None


class _PositionEmbedding(Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.sink = sink_of(weight)
        return hidden + F.embedding(rows, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        gradient = grad_output
        if rows.shape != grad_output.shape[:-1]:  # the same positions for all samples
            gradient = grad_output.sum(dim=1, keepdim=True, dtype=statistics_dtype(grad_output.dtype))
        return grad_output, None, embedding_weight_gradient(ctx.sink, weight, rows, gradient)


class _IntoColumns(Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, tp: Axis, sequence: bool) -> torch.Tensor:
        ctx.tp, ctx.sequence = tp, sequence
        return all_gather(inputs, tp) if sequence else inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        own = grad_output.clone(memory_format=torch.contiguous_format)  # which is summed in place
        return reduce_activations(own, ctx.tp, ctx.sequence), None, None


class _AddFeatures(Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, firsts: Sequence[int], *parts: torch.Tensor) -> torch.Tensor:
        ctx.places = [(first, part.shape[-1]) for first, part in zip(firsts, parts, strict=True)]
        for (first, count), part in zip(ctx.places, parts, strict=True):
            output.narrow(-1, first, count).add_(part)
        # Not told to autograd: it would not have it of a view, as a product of three dims with a bias is, and of those
        # that gave the output none has kept it.
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad_output, None, *(grad_output.narrow(-1, first, count) for first, count in ctx.places)


def _add_once(output: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Add a row layer's bias, which all ranks hold, in place: after the sum over the ranks, not on each before it."""
    return output.add_(bias)


def _input_gradient(grad_output: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_output · weight in grad_output's dtype, grad_output as the next product takes it)."""
    factor = operand(grad_output)
    return (factor @ operand(weight)).to(grad_output.dtype), factor


def column_linear(
    inputs: torch.Tensor, weight: torch.Tensor, context: ParallelContext, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """inputs [s, b, in] ([s/tp, b, in] under sequence parallelism) · weightᵀ [out/tp, in] + bias [out/tp]
    → [s, b, out/tp]."""
    return _ColumnLinear.apply(inputs, weight, bias, context.tp, context.sequence)


def row_linear(
    inputs: torch.Tensor, weight: torch.Tensor, context: ParallelContext, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """inputs [s, b, in/tp] · weightᵀ [out, in/tp], summed over tp, + bias [out] → [s, b, out], or [s/tp, b, out]."""
    return _RowLinear.apply(inputs, weight, bias, context.tp, context.sequence)


def whole_linear(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """inputs [..., in] · weightᵀ [out, in] → [..., out], of a weight that is not cut over the tensor axis."""
    return _RowLinear.apply(inputs, weight, None, _ALONE, False)


def into_columns(inputs: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """What every tensor rank is to multiply with its own output features: inputs [s, b, n], the same on all of them, or
    [s/tp, b, n] under sequence parallelism → [s, b, n], whose gradient is summed over the ranks."""
    return _IntoColumns.apply(inputs, context.tp, context.sequence) if context.tp.size > 1 else inputs


def add_features(output: torch.Tensor, firsts: Sequence[int], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add parts [..., n] to the features of output [..., out] from `firsts` on, and return it: in its place, so it must
    be a product that nobody else has."""
    return _AddFeatures.apply(output, firsts, *parts)


def vocabulary_embedding(tokens: torch.Tensor, weight: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """tokens [s, b], weight [vocabulary/tp, h] → [s, b, h], or [s/tp, b, h] under sequence parallelism."""
    return _VocabularyEmbedding.apply(tokens, weight, context.tp, context.sequence)


def position_embedding(hidden: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden [s, b, h] + the rows i64[s, b], or [s, 1] for all samples alike, of the learned positions [n, h].

    Under sequence parallelism hidden is [s/tp, b, h], and so are the rows those of this rank's share: the gradient of
    the positions is then a part.
    """
    return _PositionEmbedding.apply(hidden, rows, weight)


def copied_spec(context: ParallelContext, name: str, shape: tuple[int, ...], partial: bool | None = None) -> ShardSpec:
    """A weight of which each tensor rank holds a copy, whose gradient is a part if `partial`. Unless told otherwise it
    is one under sequence parallelism, where a rank applies the weight to a part of the tokens."""
    region = Region.whole(name, shape)
    offset = (0,) * len(shape)
    if context.tp.size == 1:
        return ShardSpec(shape, (Piece(region, offset),))
    partial = context.sequence if partial is None else partial
    piece = Piece(region, offset, copy_axis="tp", copy_rank=context.tp.rank, partial=partial)
    return ShardSpec(shape, (piece,))
