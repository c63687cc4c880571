"""How a rank's tensors relate to the canonical ones: regions, pieces and `ShardSpec`.

The canonical name and layout of every weight is Hugging Face's. A rank's tensor (a fused qkv, a slice of a padded
vocabulary) is described as rectangles of canonical tensors placed in the local one. Reading, saving, resharding,
exporting, initialising and counting parameters all go through these descriptions and nothing else.

This module knows no process groups and no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Region:
    """A rectangle of a canonical tensor.

    `shape` is the shape of the whole canonical tensor, `start` the rectangle's first index in each dim and `size`
    its extent in each dim.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.start) == len(self.size), self
        for whole, start, size in zip(self.shape, self.start, self.size, strict=True):
            assert 0 <= start and 0 <= size and start + size <= whole, self

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...]) -> Region:
        """The region that is all of a tensor."""
        return cls(name, tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def is_whole(self) -> bool:
        return self.size == self.shape

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of this region within the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.start, self.size, strict=True))

    def intersect(self, other: Region) -> Region | None:
        """The common part of two regions of the same tensor, or None where they do not meet."""
        assert self.name == other.name and self.shape == other.shape, (self, other)
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(
            min(a + m, b + n) for a, m, b, n in zip(self.start, self.size, other.start, other.size, strict=True)
        )
        size = tuple(high - low for low, high in zip(start, stop, strict=True))
        if any(extent <= 0 for extent in size):
            return None
        return replace(self, start=start, size=size)

    def within(self, outer: Region) -> tuple[slice, ...]:
        """Index of this region within a tensor that holds `outer`."""
        return tuple(
            slice(mine - theirs, mine - theirs + size)
            for mine, theirs, size in zip(self.start, outer.start, self.size, strict=True)
        )


@dataclass(frozen=True)
class Piece:
    """A canonical region at `offset` in a local tensor, and which other ranks hold a copy of it.

    `copy_axis` names the axis of the `ParallelContext` over which this piece is a copy (None: no other rank of the
    model holds it; copies over the data axes are not meant here). `copy_rank` is this rank's index among the copies:
    copy 0 is the one that is saved and counted in the gradient norm. `partial` says that each copy's gradient
    is only a part, so that gradients must be summed over `copy_axis`. `transposed` says that the local tensor holds
    the region's transpose: some families store their matrices [in, out].
    """

    region: Region
    offset: tuple[int, ...]
    copy_axis: str | None = None
    copy_rank: int = 0
    partial: bool = False
    transposed: bool = False

    @property
    def local(self) -> tuple[slice, ...]:
        """Index of this piece within the local tensor."""
        return tuple(slice(low, low + size) for low, size in zip(self.offset, self.size, strict=True))

    @property
    def size(self) -> tuple[int, ...]:
        """Extent of this piece within the local tensor."""
        return self.turn(self.region.size)

    def turn(self, extents: tuple[int, ...]) -> tuple[int, ...]:
        """Numbers of the region's dims in the order of the local tensor's, or the other way round."""
        return extents[::-1] if self.transposed else extents


@dataclass(frozen=True)
class ShardSpec:
    """What a local tensor of `shape` consists of. Elements that no piece covers are padding and stay zero."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def regions(self, tensor: torch.Tensor, copies: bool = True) -> Iterator[tuple[Region, torch.Tensor]]:
        """Each canonical region with the view of `tensor` that holds it; `copies=False` leaves out extra copies."""
        assert tuple(tensor.shape) == self.shape, (tensor.shape, self.shape)
        for piece in self.pieces:
            if copies or piece.copy_rank == 0:
                view = tensor[piece.local]
                yield piece.region, view.t() if piece.transposed else view

    def flat_regions(
        self, flat: torch.Tensor, start: int, copies: bool = True
    ) -> Iterator[tuple[Region, torch.Tensor]]:
        """The same for a contiguous run of the flattened tensor.

        `flat` is one-dimensional and holds the elements `start … start + len(flat)` of the flattened local tensor. A
        run of a matrix is at most three rectangles: the end of a row, whole rows, the beginning of a row.
        """
        for piece, region, view in self.flat_pieces(flat, start):
            if copies or piece.copy_rank == 0:
                yield region, view.t() if piece.transposed else view

    def flat_pieces(self, flat: torch.Tensor, start: int) -> Iterator[tuple[Piece, Region, torch.Tensor]]:
        """As `flat_regions`, with the piece that each view belongs to; views lie as in the local tensor."""
        columns = self.shape[1] if len(self.shape) == 2 else 1
        for row, column, rows, width in _rectangles(start, start + flat.numel(), columns):
            begin = row * columns + column - start
            block = flat[begin : begin + (rows - 1) * columns + width].view(rows, width)
            for piece in self.pieces:
                found = _cut(piece, row, column, rows, width)
                if found is not None:
                    region, local_row, local_column = found
                    if len(self.shape) == 1:
                        yield piece, region, block[local_row : local_row + region.size[0], 0]
                        continue
                    high, wide = piece.turn(region.size)
                    view = block[local_row : local_row + high, local_column : local_column + wide]
                    yield piece, region, view


def _rectangles(start: int, stop: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """(row, column, rows, width) of the at most three rectangles of the flat run `start … stop`."""
    while start < stop:
        row, column = divmod(start, columns)
        if column == 0 and stop - start >= columns:
            rows = (stop - start) // columns
            yield row, 0, rows, columns
            start += rows * columns
        else:
            width = min(columns - column, stop - start)
            yield row, column, 1, width
            start += width


def _cut(piece: Piece, row: int, column: int, rows: int, width: int) -> tuple[Region, int, int] | None:
    """The part of `piece` inside a local rectangle, with its row and column within the rectangle."""
    offset = piece.offset if len(piece.offset) == 2 else (piece.offset[0], 0)
    size = piece.size if len(piece.offset) == 2 else (piece.size[0], 1)
    top, left = max(row, offset[0]), max(column, offset[1])
    bottom, right = min(row + rows, offset[0] + size[0]), min(column + width, offset[1] + size[1])
    if top >= bottom or left >= right:
        return None
    shift, extent = (top - offset[0], left - offset[1]), (bottom - top, right - left)
    dims = len(piece.offset)
    start = tuple(a + b for a, b in zip(piece.region.start, piece.turn(shift[:dims]), strict=True))
    return replace(piece.region, start=start, size=piece.turn(extent[:dims])), top - row, left - column
