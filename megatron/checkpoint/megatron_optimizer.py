"""The optimizer state of a Megatron-LLM checkpoint, plain or distributed: masters and moments as canonical regions.

Parameters are counted in the order of the modules, first those with weight decay (matrices), then the others. In a
distributed state each data rank keeps an even range of a flat buffer that holds the parameters of a model chunk in
reverse order, so that its tensors are runs of flattened parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.index import StoredPiece
from megatron.checkpoint.layout import FileTensor, flat_part, stored_piece
from megatron.checkpoint.torch_file import TorchReader
from megatron.utils.errors import CheckpointError

OPTIMIZER_FILE = "optim.pt"

_MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTERS = re.compile(r"(.*(?:^|/)(?:fp32_from_fp16_params|shard_fp32_from_float16_groups))/\d+/\d+")
_STATE = re.compile(r"(.*(?:^|/)state)/\d+/exp_avg")

Found = Iterator[tuple[str, StoredPiece]]


@dataclass(frozen=True)
class _Shard:
    """Elements `begin … stop` of a flattened parameter."""

    tensor: FileTensor
    begin: int
    stop: int

    @property
    def is_whole(self) -> bool:
        return (self.begin, self.stop) == (0, math.prod(self.tensor.shape))


def plain_state(reader: TorchReader, file: str, chunks: Sequence[Sequence[FileTensor]]) -> Found:
    """Kind and place of everything in the state of a rank that is not distributed; nothing where there is none."""
    shards = [_Shard(tensor, 0, math.prod(tensor.shape)) for chunk in chunks for tensor in chunk]
    yield from _state(reader, file, shards)


def distributed_state(
    readers: Sequence[TorchReader], files: Sequence[str], chunks: Sequence[Sequence[FileTensor]]
) -> Found:
    """The same for a state that data ranks divide; `readers` in their order."""
    for rank, (reader, file) in enumerate(zip(readers, files, strict=True)):
        shards = [shard for chunk in chunks for shard in _owned(chunk, rank, len(readers))]
        yield from _state(reader, file, shards)


def updates_of(content: Any) -> int | None:
    """How many updates were done, by the parameter groups within a file's content."""
    if isinstance(content, Mapping):
        groups = content.get("param_groups")
        if isinstance(groups, list) and groups and isinstance(groups[0], Mapping) and "step" in groups[0]:
            step = groups[0]["step"]
            return step if isinstance(step, int) else None
        found = (updates_of(value) for key, value in content.items() if key in ("optimizer", "optim"))
        return next((step for step in found if step is not None), None)
    return None


def find_optimizer_files(folder: Path, stage_folder: str) -> list[Path]:
    """The files of a distributed state of one (tensor rank, stage), whose folder has this name, by data rank."""
    pattern = re.compile(re.escape(stage_folder) + r"_(\d{3,})")
    matches = ((pattern.fullmatch(child.name), child) for child in folder.iterdir())
    found = sorted(
        (int(match[1]), child / OPTIMIZER_FILE)
        for match, child in matches
        if match and (child / OPTIMIZER_FILE).is_file()
    )
    if [number for number, _ in found] != list(range(len(found))):
        raise CheckpointError(
            f"{folder} is incomplete: of {stage_folder}_… it holds {[number for number, _ in found]}."
        )
    return [path for _, path in found]


def _owned(chunk: Sequence[FileTensor], rank: int, size: int) -> list[_Shard]:
    """What a data rank keeps of a model chunk, in the order of the modules."""
    total = sum(math.prod(tensor.shape) for tensor in chunk)
    share = -(-total // size)
    low, high = rank * share, (rank + 1) * share
    shards, start = [], 0
    for tensor in reversed(chunk):
        stop = start + math.prod(tensor.shape)
        begin, end = max(start, low), min(stop, high)
        if begin < end:
            shards.append(_Shard(tensor, begin - start, end - start))
        start = stop
    return shards[::-1]


def _state(reader: TorchReader, file: str, shards: Sequence[_Shard]) -> Found:
    groups = [[shard for shard in shards if _decays(shard.tensor) is decays] for decays in (True, False)]
    states = [match[1] for name in reader.entries if (match := _STATE.fullmatch(name))]
    masters = [match[1] for name in reader.entries if (match := _MASTERS.fullmatch(name))]
    if not states:
        return
    index = 0
    filled = [group for group in groups if group]
    for number, group in enumerate(filled):
        for position, shard in enumerate(group):
            for kind in _MOMENTS:
                yield from _pieces(reader, file, f"{states[0]}/{index}/{kind}", kind, shard)
            if masters:
                yield from _pieces(reader, file, f"{masters[0]}/{number}/{position}", "master", shard)
            index += 1


def _decays(tensor: FileTensor) -> bool:
    return len(tensor.shape) > 1 and not tensor.key.endswith("bias")


def _pieces(reader: TorchReader, file: str, key: str, kind: str, shard: _Shard) -> Found:
    entry = reader.entries.get(key)
    shape = shard.tensor.shape if shard.is_whole else (shard.stop - shard.begin,)
    if entry is None or (entry.shape != shape and entry.shape != (math.prod(shape),)):
        found = "is not there" if entry is None else f"has shape {list(entry.shape)}"
        raise CheckpointError(
            f"{reader.path} holds another optimizer state than its model has: {key}, {kind} of {shard.tensor.key}, "
            f"{found} where {list(shape)} was expected."
        )
    if entry.shape == shard.tensor.shape:
        for piece in shard.tensor.pieces:
            if not piece.copy:
                yield kind, stored_piece(piece, entry.dtype, file, key)
        return
    for piece, matrix in flat_part(shard.tensor, shard.begin, shard.stop):
        yield kind, stored_piece(piece, entry.dtype, file, key, matrix)
