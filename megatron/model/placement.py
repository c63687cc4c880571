"""Where the weights of a layer lie in the canonical tensors of its family: the specs of linear layers on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.model.families.family import Family, Rows
from megatron.parallel.layers import copied_spec
from megatron.parallel.layout import Piece, Region, ShardSpec
from megatron.parallel.mesh import ParallelContext


@dataclass(frozen=True)
class LinearSpec:
    """Of a linear layer's weight [out, in] and bias [out], None where there is no bias."""

    weight: ShardSpec
    bias: ShardSpec | None


def column_spec(family: Family, prefix: str, rows: Sequence[Rows], in_features: int, *, bias: bool) -> LinearSpec:
    """A column-parallel layer, whose local weight and bias hold these rows one after the other; `prefix` as
    `model.layers.3`."""
    weights, biases, place = [], [], 0
    for run in rows:
        name, shape, size = f"{prefix}.{run.layer}", (run.out_features, in_features), (run.count, in_features)
        weight = _matrix(family, f"{name}.weight", shape, (run.first, 0), size)
        bias_region = Region(f"{name}.bias", shape[:1], (run.first,), size[:1])
        partial = run.copy_axis is not None
        weights.append(Piece(weight, (place, 0), run.copy_axis, run.copy_rank, partial, family.transposed))
        biases.append(Piece(bias_region, (place,), run.copy_axis, run.copy_rank, partial))
        place += run.count
    return LinearSpec(
        ShardSpec((place, in_features), tuple(weights)), ShardSpec((place,), tuple(biases)) if bias else None
    )


def row_spec(
    family: Family, context: ParallelContext, name: str, out_features: int, in_features: int, *, bias: bool
) -> LinearSpec:
    """A row-parallel layer: an even share of the input features, and a copy of the whole bias."""
    columns = in_features // context.tp.size
    start = context.tp.rank * columns
    weight = _matrix(family, f"{name}.weight", (out_features, in_features), (0, start), (out_features, columns))
    return LinearSpec(
        ShardSpec((out_features, columns), (Piece(weight, (0, 0), transposed=family.transposed),)),
        copied_spec(context, f"{name}.bias", (out_features,)) if bias else None,
    )


def _matrix(family: Family, name: str, shape: tuple[int, int], start: tuple[int, int], size: tuple[int, int]) -> Region:
    """A rectangle of a weight [out, in], as the family stores it."""
    if family.transposed:
        return Region(name, shape[::-1], start[::-1], size[::-1])
    return Region(name, shape, start, size)
