"""Reading a model by all ranks of a stage together: each byte once, in large requests, and from there to who needs it.

Tensor ranks hold columns of the same rows, data ranks the same rows again: read by each for itself, a file would be
read many times over, in small parts. Here the rows of a stage are dealt out in blocks, each rank reads the blocks that
fall to it, and all of them see every block. It must not know models; what a rank needs is named by regions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from megatron.checkpoint.source import Source
from megatron.parallel.collectives import all_gather, all_reduce
from megatron.parallel.layout import Region
from megatron.parallel.mesh import Axis
from megatron.utils.errors import CheckpointError

_BLOCK_BYTES = 8 * 2**20  # that a rank reads at a time
_ROUND_BYTES = 256 * 2**20  # that all ranks read at a time and each then holds
_LEAST_BYTES = 2**20

Wanted = Sequence[tuple[Region, torch.Tensor]]
Block = list[Region]  # rows of one or several tensors


def read_together(source: Source, wanted: Wanted, axes: Sequence[Axis], kind_of: Callable[[str], str]) -> None:
    """Fill each region's tensor (any strides, dtype and device), as `source.read` would.

    The ranks along `axes` call it together, with the same source, whatever each of them wants; `kind_of` tells which
    kind of a name is read. Raises CheckpointError, after the others were served, on the rank that could not read its
    part.
    """
    by_name: dict[str, list[tuple[Region, torch.Tensor]]] = defaultdict(list)
    for region, out in wanted:
        by_name[region.name].append((region, out))
    device = wanted[0][1].device if wanted else torch.device("cpu")
    names = _needed_by_any(source, by_name.keys(), axes, device, kind_of)
    count = math.prod(axis.size for axis in axes)
    block_bytes = max(_LEAST_BYTES, min(_BLOCK_BYTES, _ROUND_BYTES // count))
    place = 0
    for axis in axes:
        place = place * axis.size + axis.rank
    blocks = list(_blocks(source, names, kind_of, block_bytes))
    largest = max((_bytes_of(source, block, kind_of) for block in blocks), default=0)
    failure: CheckpointError | None = None
    mine = torch.zeros(largest, dtype=torch.uint8)
    for begin in range(0, len(blocks), count):
        turn = blocks[begin : begin + count]
        try:
            if place < len(turn) and failure is None:
                _read_block(source, turn[place], mine, kind_of)
        except CheckpointError as error:  # the others wait for this rank's part
            failure = error
        gathered = mine.to(device)
        for axis in reversed(axes):
            gathered = all_gather(gathered, axis)
        for number, block in enumerate(turn):
            _take(source, block, gathered[number * largest : (number + 1) * largest], by_name, kind_of)
    if failure is not None:
        raise failure


def _needed_by_any(
    source: Source, mine: Collection[str], axes: Sequence[Axis], device: torch.device, kind_of: Callable[[str], str]
) -> list[str]:
    """The names that some rank of the group wants, in the order in which they are stored."""
    stored = list(source.shapes())
    for name in mine:
        source.dtype(name, kind_of(name))  # raises where it is missing
    flags = torch.tensor([float(name in mine) for name in stored], dtype=torch.float32, device=device)
    for axis in axes:
        all_reduce(flags, axis, maximum=True)
    return [name for name, flag in zip(stored, flags.tolist(), strict=True) if flag]


def _blocks(source: Source, names: Sequence[str], kind_of: Callable[[str], str], block_bytes: int) -> Iterator[Block]:
    """Runs of whole rows, small tensors together, of at most `block_bytes` (or one row)."""
    block: Block = []
    room = block_bytes
    for name in names:
        kind = kind_of(name)
        shape = source.shapes(kind)[name]
        row_bytes = math.prod(shape[1:]) * source.dtype(name, kind).itemsize
        rows = shape[0] if shape else 1
        row = 0
        while row < rows:
            fitting = room // max(row_bytes, 1)
            if not fitting and block:
                yield block
                block, room = [], block_bytes
                continue
            taken = max(1, min(fitting, rows - row))
            start, size = (row, *(0 for _ in shape[1:])), (taken, *shape[1:])
            block.append(Region(name, shape, start, size) if shape else Region.whole(name, shape))
            # Parts begin where wide elements may lie.
            room -= -(-taken * row_bytes // 8) * 8
            row += taken
    if block:
        yield block


def _parts(
    source: Source, block: Block, buffer: torch.Tensor, kind_of: Callable[[str], str]
) -> Iterator[tuple[Region, torch.Tensor]]:
    """Each region of a block with the part of its memory that holds it."""
    at = 0
    for region in block:
        dtype = source.dtype(region.name, kind_of(region.name))
        size_bytes = region.numel * dtype.itemsize
        yield region, buffer[at : at + size_bytes].view(dtype).view(region.size)
        at += -(-size_bytes // 8) * 8


def _bytes_of(source: Source, block: Block, kind_of: Callable[[str], str]) -> int:
    sizes = (region.numel * source.dtype(region.name, kind_of(region.name)).itemsize for region in block)
    return sum(-(-size // 8) * 8 for size in sizes)


def _read_block(source: Source, block: Block, buffer: torch.Tensor, kind_of: Callable[[str], str]) -> None:
    for region, view in _parts(source, block, buffer, kind_of):
        source.read(region, view, kind_of(region.name))


def _take(
    source: Source,
    block: Block,
    buffer: torch.Tensor,
    by_name: dict[str, list[tuple[Region, torch.Tensor]]],
    kind_of: Callable[[str], str],
) -> None:
    """Copy what this rank wants of a block."""
    for region, view in _parts(source, block, buffer, kind_of):
        for wanted, out in by_name.get(region.name, ()):
            common = wanted.intersect(region)
            if common is not None:
                out[common.within(wanted)].copy_(view[common.within(region)])
