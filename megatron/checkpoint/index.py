"""Where the tensors of a checkpoint are: which file holds which rectangle of which canonical tensor.

Both formats (Hugging Face's and ours) are read through this. It knows no file format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron.parallel.layout import Region

KINDS = ("weights", "master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StoredPiece:
    """A rectangle of a canonical tensor, stored under `key` in the file named `file` of the checkpoint's folder."""

    region: Region
    dtype: torch.dtype
    file: str
    key: str

    @property
    def size_bytes(self) -> int:
        return self.region.numel * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A canonical tensor of `shape`, all of which its disjoint `pieces` hold."""

    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]

    @property
    def size_bytes(self) -> int:
        return sum(piece.size_bytes for piece in self.pieces)


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
    return "two pieces overlap" if len(pieces) > 1 and _overlap([piece.region for piece in pieces]) else None


def _overlap(regions: Sequence[Region]) -> bool:
    """Whether two of some rectangles meet. Compares all pairs: a tensor has a hundred pieces at most."""
    start = np.array([region.start for region in regions])
    stop = start + np.array([region.size for region in regions])
    meet = (np.maximum(start[:, None], start[None]) < np.minimum(stop[:, None], stop[None])).all(axis=-1)
    np.fill_diagonal(meet, False)
    return bool(meet.any())
