"""How the tensors of a file are made of canonical ones: which rectangle lies where, in which order of rows.

One description serves both ways: inverted it tells a reader where canonical tensors are, and a writer fills the file's
tensors by it. It must not know file formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from megatron.checkpoint.index import StoredPiece
from megatron.parallel.layout import Region, ShardSpec


@dataclass(frozen=True)
class Placed:
    """A canonical region within a file's tensor, beginning at `offset`, its rows `step` rows apart.

    `transposed`: the file's tensor holds the region's transpose. `copy`: the region is also elsewhere, and is read
    from there.
    """

    region: Region
    offset: tuple[int, ...]
    step: int = 1
    transposed: bool = False
    copy: bool = False

    @property
    def size(self) -> tuple[int, ...]:
        """Extent in the dims of the file's tensor, before rows are spread."""
        return self.region.size[::-1] if self.transposed else self.region.size

    def rows(self, begin: int, stop: int) -> tuple[Region, tuple[slice, ...]] | None:
        """The part within rows `begin … stop` of the file's tensor, and its index among them; None: there is none."""
        if not self.offset:
            return self.region, ()
        first, count = self.offset[0], self.size[0]
        low = max(0, -((first - begin) // self.step))
        high = min(count, -((first - stop) // self.step))
        if low >= high:
            return None
        dim = len(self.offset) - 1 if self.transposed else 0
        start = tuple(at + low * (number == dim) for number, at in enumerate(self.region.start))
        size = tuple(high - low if number == dim else extent for number, extent in enumerate(self.region.size))
        row = first + low * self.step - begin
        others = zip(self.offset[1:], self.size[1:], strict=True)
        place = (slice(row, row + (high - low - 1) * self.step + 1, self.step), *(slice(a, a + n) for a, n in others))
        return replace(self.region, start=start, size=size), place


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file, under `key`. What no piece covers is padding, and zero."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Placed, ...]
    kind: str = "weights"

    @property
    def size_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def stored(self, file: str) -> Iterator[tuple[str, StoredPiece]]:
        """Kind and place of every region that is read from here, for `collect_index`."""
        for piece in self.pieces:
            if not piece.copy:
                yield self.kind, stored_piece(piece, self.dtype, file, self.key)


def whole(region: Region, key: str, dtype: torch.dtype, kind: str = "weights") -> FileTensor:
    """A tensor of a file that is one canonical region."""
    return FileTensor(key, region.size, dtype, (Placed(region, (0,) * len(region.size)),), kind)


def stored_piece(
    piece: Placed, dtype: torch.dtype, file: str, key: str, matrix: tuple[int, int] | None = None
) -> StoredPiece:
    """A placed region as a reader finds it; `matrix` as in `StoredPiece`."""
    return StoredPiece(piece.region, dtype, file, key, piece.offset, piece.step, piece.transposed, matrix)


def from_spec(spec: ShardSpec) -> tuple[Placed, ...]:
    """The pieces of a rank's local tensor."""
    return tuple(
        Placed(piece.region, piece.offset, transposed=piece.transposed, copy=piece.copy_rank > 0)
        for piece in spec.pieces
    )


def interleave(piece: Placed, head_dim: int) -> Iterator[Placed]:
    """A piece of whole heads with each head's halves interleaved: row 2i + c of the file is row c·d/2 + i here.

    That is the order of rotary pairs in Meta's and Megatron-LLM's files; the canonical one is half-split.
    """
    assert piece.step == 1 and piece.size[0] % head_dim == 0, piece
    half, dim = head_dim // 2, len(piece.offset) - 1 if piece.transposed else 0
    for head in range(piece.size[0] // head_dim):
        for part in range(2):
            row = head * head_dim + part * half
            region = replace(
                piece.region,
                start=tuple(at + row * (number == dim) for number, at in enumerate(piece.region.start)),
                size=tuple(half if number == dim else extent for number, extent in enumerate(piece.region.size)),
            )
            offset = (piece.offset[0] + head * head_dim + part, *piece.offset[1:])
            yield replace(piece, region=region, offset=offset, step=2)


def flat_part(tensor: FileTensor, begin: int, stop: int) -> Iterator[tuple[Placed, tuple[int, int] | None]]:
    """What elements `begin … stop` of a file's flattened tensor are, where these are a run of their own.

    Of a matrix, whole rows and the parts of a row before and after them, each placed in a matrix within the run: its
    first element and its number of columns are told along. Of a vector, placed in the run itself (None).
    """
    for piece in tensor.pieces:
        if piece.copy:
            continue
        if len(tensor.shape) == 1:
            found = piece.rows(begin, stop)
            if found is not None:
                yield Placed(found[0], (found[1][0].start,), piece.step), None
            continue
        columns = tensor.shape[1]
        top, bottom = -(-begin // columns), stop // columns
        if top > bottom:  # the run lies within one row
            yield from _row_part(piece, columns, begin, stop, begin)
            continue
        yield from _row_part(piece, columns, begin, top * columns, begin)
        found = piece.rows(top, bottom)
        if found is not None:
            region, place = found
            offset = (place[0].start, place[1].start)
            yield Placed(region, offset, piece.step, piece.transposed), (top * columns - begin, columns)
        yield from _row_part(piece, columns, bottom * columns, stop, begin)


def _row_part(piece: Placed, columns: int, low: int, high: int, base: int) -> Iterator[tuple[Placed, tuple[int, int]]]:
    """The elements `low … high`, all of one row, of a run that begins at element `base`."""
    row = low // columns
    found = piece.rows(row, row + 1) if low < high else None
    if found is None:
        return
    region, place = found
    left = row * columns + place[1].start
    low, high = max(left, low), min(left + piece.size[1], high)
    if low >= high:
        return
    dim = 0 if piece.transposed else 1
    start, size = list(region.start), list(region.size)
    start[dim], size[dim] = start[dim] + low - left, high - low
    part = replace(region, start=tuple(start), size=tuple(size))
    yield Placed(part, (0, 0), transposed=piece.transposed), (low - base, high - low)


def padding_rows(region: Region, row: int, count: int) -> Iterator[Placed]:
    """`count` rows from `row` on as copies of one canonical row."""
    assert region.size[0] == 1, region
    for number in range(count):
        yield Placed(region, (row + number, *(0 for _ in region.size[1:])), copy=True)


def data_bytes(tensors: Iterable[FileTensor]) -> int:
    return sum(tensor.size_bytes for tensor in tensors)
