"""Regions, pieces and specs against plain indexing."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.parallel.layout import Piece, Region, ShardSpec


def _values(region: Region) -> torch.Tensor:
    """A tensor that tells each element's place in the whole."""
    whole = torch.arange(1, torch.Size(region.shape).numel() + 1, dtype=torch.float64).view(region.shape)
    return whole[region.slices]


@st.composite
def specs(draw: st.DrawFn) -> ShardSpec:
    """Two stacked slices of canonical matrices with padding rows below, or a slice of a vector."""
    if draw(st.booleans()):
        length, start = draw(st.integers(1, 9)), draw(st.integers(0, 4))
        return ShardSpec((length + 2,), (Piece(Region("v", (length + start,), (start,), (length,)), (0,)),))
    columns, rows, padding = draw(st.integers(1, 7)), draw(st.integers(1, 5)), draw(st.integers(0, 3))
    left, top = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    transposed = draw(st.booleans())
    turn = slice(None, None, -1) if transposed else slice(None)
    shape, start, size = (rows + top, columns + left)[turn], (top, left)[turn], (rows, columns)[turn]
    pieces = tuple(
        Piece(Region(name, shape, start, size), (at * rows, 0), "tp" if at else None, at, transposed=transposed)
        for at, name in enumerate("ab")
    )
    return ShardSpec((2 * rows + padding, columns), pieces)


@given(specs())
def test_regions_are_views_at_their_place(spec: ShardSpec) -> None:
    local = torch.zeros(spec.shape, dtype=torch.float64)
    for region, view in spec.regions(local):
        view.copy_(_values(region))
    for piece in spec.pieces:
        values = _values(piece.region)
        assert torch.equal(local[piece.local], values.t() if piece.transposed else values)
    assert (local == 0).sum() == local.numel() - sum(piece.region.numel for piece in spec.pieces)


@given(specs(), st.data())
def test_flat_runs_cover_the_same_elements(spec: ShardSpec, data: st.DataObject) -> None:
    """Filling a tensor run by run through rectangles gives what filling it piece by piece gives."""
    expected = torch.zeros(spec.shape, dtype=torch.float64)
    for region, view in spec.regions(expected):
        view.copy_(_values(region))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, spec.numel - 1)), max_size=4)) | {0, spec.numel})
    flat = torch.zeros(spec.numel, dtype=torch.float64)
    for start, stop in itertools.pairwise(cuts):
        found = list(spec.flat_regions(flat[start:stop], start))
        assert len(found) <= 3 * len(spec.pieces)
        for region, view in found:
            assert tuple(view.shape) == region.size
            view.copy_(_values(region))
    assert torch.equal(flat.view(spec.shape), expected)


@given(specs())
def test_copies_are_left_out_when_asked(spec: ShardSpec) -> None:
    local = torch.zeros(spec.shape)
    assert [region.name for region, _ in spec.regions(local, copies=False)] == [
        piece.region.name for piece in spec.pieces if piece.copy_rank == 0
    ]


def test_intersections() -> None:
    one = Region("w", (10, 10), (0, 2), (5, 5))
    two = Region("w", (10, 10), (3, 0), (4, 4))
    common = one.intersect(two)
    assert common == Region("w", (10, 10), (3, 2), (2, 2))
    assert torch.equal(_values(one)[common.within(one)], _values(two)[common.within(two)])
    assert one.intersect(Region("w", (10, 10), (5, 0), (5, 10))) is None
