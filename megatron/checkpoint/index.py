"""Where the tensors of a checkpoint are: which file holds which rectangle of which canonical tensor.

All formats are read through this. It knows no file format.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from megatron.parallel.layout import Region

KINDS = ("weights", "master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StoredPiece:
    """A rectangle of a canonical tensor, stored under `key` in the file named `file` of the checkpoint's folder.

    It is all of the stored tensor, or (with an `offset`) lies within it, its rows `step` rows apart; `transposed`: as
    its transpose. With a `matrix` (first element, columns) a stored vector is seen as rows from that element on.
    """

    region: Region
    dtype: torch.dtype
    file: str
    key: str
    offset: tuple[int, ...] | None = None
    step: int = 1
    transposed: bool = False
    matrix: tuple[int, int] | None = None

    @property
    def size_bytes(self) -> int:
        return self.region.numel * self.dtype.itemsize

    def slices(self, part: Region) -> tuple[slice, ...]:
        """Index of a part of the region within the stored tensor (its transpose, where that is what is stored)."""
        within = part.within(self.region)
        if self.offset is None:
            return within
        within = within[::-1] if self.transposed else within
        steps = [self.step, *(1 for _ in self.offset[1:])]
        return tuple(
            slice(at + index.start * step, at + (index.stop - 1) * step + 1, step)
            for at, index, step in zip(self.offset, within, steps, strict=True)
        )

    def seen(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a stored tensor as this piece sees it."""
        if self.matrix is None or len(shape) != 1:
            return shape
        first, columns = self.matrix
        return (max(0, shape[0] - first) // columns, columns)

    def fits(self, stored: tuple[int, ...]) -> bool:
        """Whether a stored tensor of this shape can hold the piece."""
        shape = self.seen(stored)
        if self.offset is None:
            return shape == self.region.size
        return len(shape) == len(self.offset) and all(
            index.stop <= extent for index, extent in zip(self.slices(self.region), shape, strict=True)
        )


@dataclass(frozen=True)
class StoredTensor:
    """A canonical tensor of `shape`, all of which its disjoint `pieces` hold; they are sorted by their start."""

    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]

    @property
    def size_bytes(self) -> int:
        return sum(piece.size_bytes for piece in self.pieces)

    def pieces_near(self, region: Region) -> tuple[StoredPiece, ...]:
        """The pieces that can meet a region, by their rows: few of thousands, where a large run cut the tensor."""
        if not self.shape:
            return self.pieces
        row, stop = region.start[0], region.start[0] + region.size[0]
        starts, reaches = self._rows
        return self.pieces[bisect_right(reaches, row) : bisect_left(starts, stop)]

    @cached_property
    def _rows(self) -> tuple[list[int], list[int]]:
        """Each piece's first row, and the row up to which it and those before it reach; both ascend."""
        starts = [piece.region.start[0] for piece in self.pieces]
        stops = (piece.region.start[0] + piece.region.size[0] for piece in self.pieces)
        return starts, list(itertools.accumulate(stops, max))


Index = Mapping[str, Mapping[str, StoredTensor]]  # kind -> canonical name -> where it is


def piece_key(region: Region) -> str:
    """The name of a rectangle within a file: the plain canonical name if it is all of the tensor, else with its extent.

    `model.norm.weight`, `lm_head.weight[0:128,0:64]`.
    """
    if region.is_whole:
        return region.name
    return f"{region.name}[{','.join(f'{part.start}:{part.stop}' for part in region.slices)}]"


def collect_index(pieces: Iterable[tuple[str, StoredPiece]]) -> tuple[dict[str, dict[str, StoredTensor]], list[str]]:
    """Gather (kind, piece) pairs into an index; also says what is wrong with them, one line per tensor."""
    gathered: dict[tuple[str, str], list[StoredPiece]] = {}
    for kind, piece in pieces:
        gathered.setdefault((kind, piece.region.name), []).append(piece)
    index: dict[str, dict[str, StoredTensor]] = {}
    problems = []
    for (kind, name), found in gathered.items():
        problem = _find_problem(found)
        if problem:
            problems.append(f"{kind} of {name}: {problem}")
        found.sort(key=lambda piece: piece.region.start)
        index.setdefault(kind, {})[name] = StoredTensor(found[0].region.shape, tuple(found))
    return index, problems


def _find_problem(pieces: list[StoredPiece]) -> str | None:
    """Why these cannot be the disjoint pieces of one tensor, or None."""
    shapes = {piece.region.shape for piece in pieces}
    if len(shapes) > 1:
        return f"pieces of different shapes {sorted(shapes)}"
    shape = pieces[0].region.shape
    held, whole = sum(piece.region.numel for piece in pieces), math.prod(shape)
    if held != whole:
        return f"the pieces hold {held:,} elements of {whole:,} (shape {shape})"
    return None if len(pieces) == 1 or _tile([piece.region for piece in pieces]) else "two pieces overlap"


def _tile(regions: Sequence[Region]) -> bool:
    """Whether rectangles of a tensor hold each of its elements exactly once.

    How often each element is held is told by the differences of that count along all dims: a rectangle adds 1 or -1 to
    them at each of its corners and nothing elsewhere. They must be those of the whole tensor, so with the tensor's own
    corners subtracted, the sum at every point must be zero. Exact, and takes only a sort of the corners, however many
    pieces a large run cuts a tensor into.
    """
    regions = [*regions, Region.whole(regions[0].name, regions[0].shape)]
    starts = np.array([region.start for region in regions], dtype=np.int64)
    stops = starts + np.array([region.size for region in regions], dtype=np.int64)
    signs = np.ones(len(regions), dtype=np.int64)
    signs[-1] = -1
    corners, values = [], []
    for at_stop in itertools.product((False, True), repeat=starts.shape[1]):
        corners.append(np.where(at_stop, stops, starts))
        values.append(signs * (-1) ** sum(at_stop))
    points, place = np.unique(np.concatenate(corners), axis=0, return_inverse=True)
    return not np.bincount(place.reshape(-1), weights=np.concatenate(values), minlength=len(points)).any()
