"""Conversion between Hugging Face folders and our checkpoints: a copy of slices, block by block.

Whatever the size of the model, memory holds a few blocks of rows. It must not know the command line.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Literal

import torch

from megatron.checkpoint.check import check_weights
from megatron.checkpoint.huggingface import MODEL_CONFIG, SHARD_INDEX, config_text, shard_index_text, shard_names
from megatron.checkpoint.index import StoredPiece, collect_index, piece_key
from megatron.checkpoint.native import (
    MANIFEST,
    PARTIAL,
    find_damaged,
    read_carried,
    weights_file,
    write_carried,
    write_manifest,
)
from megatron.checkpoint.safetensors_file import SafetensorsWriter
from megatron.checkpoint.source import Source, open_source
from megatron.checkpoint.store import check_space
from megatron.checkpoint.strided import BLOCK_BYTES
from megatron.checkpoint.torch_file import SUFFIXES, is_damaged
from megatron.model.config import ModelConfig, spell_for_both
from megatron.model.specs import canonical_shapes, rank_specs
from megatron.parallel.layout import Region
from megatron.utils.errors import CheckpointError, ConfigError
from megatron.utils.files import fsync_folder, write_atomically

Format = Literal["huggingface", "native"]
Progress = Callable[[str, int, int], None]  # (what is done, bytes so far, bytes in all)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}
FILE_BYTES = 4 * 10**9  # of a file that is not cut for a grid, unless one tensor is larger


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    source: Path
    destination: Path
    format: Format
    files: int
    tensors: int
    parameters: int
    size_bytes: int
    left_out: tuple[str, ...]  # what the source has and the result has not, in words


def convert(
    source_path: Path,
    destination: Path,
    *,
    to: Format | None = None,
    tensor: int | None = None,
    pipeline: int | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Conversion:
    """Write the model at `source_path` (anything that `open_source` takes) to `destination` in a format.

    `to` is native unless told, and Hugging Face's for a native source. `tensor` and `pipeline` cut native files as
    that grid would hold them (anything loads them all the same). `dtype` casts the weights. The destination must be new
    or empty; it appears once it is whole, and not at all after an error.

    Raises CheckpointError and, for a request that cannot be, ConfigError.
    """
    grid = (tensor, pipeline)
    if any(size is not None and size < 1 for size in grid):
        raise ConfigError(f"--tensor {tensor} --pipeline {pipeline}: both must be at least 1.")
    destination = Path(os.path.abspath(destination))
    _check_destination(destination)
    with open_source(source_path) as source:
        to = to or ("huggingface" if source.format == "native" else "native")
        if to == "huggingface" and any(grid):
            raise ConfigError(
                "--tensor and --pipeline cut native files; leave them out when writing a Hugging Face folder."
            )
        config = ModelConfig.from_huggingface(source.model_config)
        shapes = canonical_shapes(config)
        check_weights(source, shapes)
        dtypes = {name: dtype or source.dtype(name) for name in shapes}
        parts = _cut_for_grid(config, grid) if any(grid) else _cut_by_size(shapes, dtypes)
        total_bytes = sum(region.numel * dtypes[region.name].itemsize for part in parts for region in part)
        _check_content(source, progress)
        with _new_folder(destination) as folder:
            check_space(folder, total_bytes)
            copier = _Copier(source, dtypes, total_bytes, progress)
            write = _write_huggingface if to == "huggingface" else _write_native
            write(folder, parts, copier, _stated_dtype(source, dtypes, dtype))
    return Conversion(
        source=source.folder,
        destination=destination,
        format=to,
        files=len(parts),
        tensors=len(shapes),
        parameters=config.num_parameters,
        size_bytes=total_bytes,
        left_out=("the optimizer state",) if source.has_optimizer else (),
    )


@dataclass
class _Copier:
    """Copies regions of the source into files, one block of rows after the other."""

    source: Source
    dtypes: Mapping[str, torch.dtype]
    total_bytes: int
    progress: Progress
    done_bytes: int = 0

    def write_file(self, path: Path, regions: Sequence[Region]) -> tuple[int, str]:
        """Write a file with these regions; returns its bytes and SHA-256."""
        keyed = {piece_key(region): region for region in regions}
        plan = {key: (self.dtypes[region.name], region.size) for key, region in keyed.items()}
        with SafetensorsWriter(path, plan, {"format": "pt"}) as writer:
            for key in writer.order:
                for block in _row_blocks(keyed[key], self.dtypes[keyed[key].name].itemsize):
                    writer.write(key, self._read(block))
            return writer.close()

    def _read(self, block: Region) -> torch.Tensor:
        dtype = self.dtypes[block.name]
        rows = torch.empty(block.size, dtype=dtype)
        self.source.read(block, rows)
        if dtype == torch.float16 and self.source.dtype(block.name) != dtype and not rows.isfinite().all():
            raise CheckpointError(
                f"{block.name} has values that are not finite in fp16 (which ends at 65,504): use --dtype bf16."
            )
        self.done_bytes += rows.numel() * dtype.itemsize
        self.progress(block.name, self.done_bytes, self.total_bytes)
        return rows


def _row_blocks(region: Region, itemsize: int) -> Iterator[Region]:
    row_bytes = region.numel // max(region.size[0], 1) * itemsize
    rows = max(1, BLOCK_BYTES // max(row_bytes, 1))
    for row in range(0, region.size[0], rows):
        start = (region.start[0] + row, *region.start[1:])
        yield Region(region.name, region.shape, start, (min(rows, region.size[0] - row), *region.size[1:]))


def _cut_by_size(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> list[list[Region]]:
    """Whole tensors in the model's order, in files of at most FILE_BYTES."""
    parts: list[list[Region]] = []
    room = 0
    for name, shape in shapes.items():
        region = Region.whole(name, shape)
        size_bytes = region.numel * dtypes[name].itemsize
        if not parts or size_bytes > room:
            parts.append([])
            room = FILE_BYTES
        parts[-1].append(region)
        room -= size_bytes
    return parts


def _cut_for_grid(config: ModelConfig, grid: tuple[int | None, int | None]) -> list[list[Region]]:
    """What each rank of a tensor × pipeline grid holds, copies left out."""
    tensor, pipeline = (size or 1 for size in grid)
    parts = []
    for pipeline_rank in range(pipeline):
        for tensor_rank in range(tensor):
            specs = rank_specs(
                config, tensor=tensor, pipeline=pipeline, tensor_rank=tensor_rank, pipeline_rank=pipeline_rank
            )
            pieces = (piece for spec in specs.values() for piece in spec.pieces)
            parts.append([piece.region for piece in pieces if piece.copy_rank == 0])
    return parts


def _check_content(source: Source, progress: Progress) -> None:
    """Compare the checksums of the weights, where there are any: a conversion is no time to carry a damage along."""
    if source.manifest is None:
        for name in source.weight_files:
            if Path(name).suffix in SUFFIXES and is_damaged(source.folder / name):
                raise CheckpointError(f"{source.folder / name} is damaged: its checksums are wrong. Use another copy.")
        return
    done, total = 0, sum(source.manifest.files[name][0] for name in source.weight_files)
    for name, damaged in find_damaged(source.folder, source.manifest, source.weight_files):
        if damaged:
            raise CheckpointError(
                f"{source.folder / name} is damaged: its checksum is not the one in {MANIFEST}. Use another copy."
            )
        done += source.manifest.files[name][0]
        progress(f"checking {name}", done, total)


def _stated_dtype(source: Source, dtypes: Mapping[str, torch.dtype], asked: torch.dtype | None) -> str:
    """The dtype to write into `config.json`: the one asked for, that of a run's weights, else what was stated.

    Training may have stored other than the model it began with was stored in, and loaders go by `config.json`.
    """
    found = set(dtypes.values())
    if asked is None and (source.state is None or len(found) > 1):
        stated = source.model_config.get("dtype") or source.model_config.get("torch_dtype")
        if stated is not None:
            return str(stated)
    return str(asked or reduce(torch.promote_types, found)).removeprefix("torch.")


def _write_huggingface(folder: Path, parts: Sequence[Sequence[Region]], copier: _Copier, dtype: str) -> None:
    names = shard_names(len(parts))
    for name, regions in zip(names, parts, strict=True):
        copier.write_file(folder / name, regions)
    if len(names) > 1:
        weight_map = {region.name: name for name, regions in zip(names, parts, strict=True) for region in regions}
        write_atomically(folder / SHARD_INDEX, shard_index_text(weight_map, copier.total_bytes))
    _write_config(folder, copier.source, dtype)
    write_carried(read_carried(copier.source.tokenizer_files), folder)


def _write_native(folder: Path, parts: Sequence[Sequence[Region]], copier: _Copier, dtype: str) -> None:
    files, pieces = {}, []
    for number, regions in enumerate(parts):
        name = weights_file(number)
        files[name] = copier.write_file(folder / name, regions)
        pieces += [
            ("weights", StoredPiece(region, copier.dtypes[region.name], name, piece_key(region))) for region in regions
        ]
    index, problems = collect_index(pieces)
    assert not problems, problems
    _write_config(folder, copier.source, dtype)
    carried = read_carried(copier.source.tokenizer_files)
    write_carried(carried, folder)
    others = [MODEL_CONFIG, *carried]
    write_manifest(folder, step=0, state=None, tensor_files=files, other_files=others, index=index)


def _write_config(folder: Path, source: Source, dtype: str) -> None:
    """Carry `config.json` over, byte for byte if it already says all that every reader looks for."""
    config = spell_for_both(source.model_config, dtype)
    as_it_is = config == source.model_config and (source.folder / MODEL_CONFIG).is_file()
    write_atomically(
        folder / MODEL_CONFIG, (source.folder / MODEL_CONFIG).read_bytes() if as_it_is else config_text(config)
    )


def _check_destination(destination: Path) -> None:
    if destination.is_dir() and not any(destination.iterdir()):
        return
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination} exists already: name a new or empty folder.")


@contextmanager
def _new_folder(destination: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `destination` if all goes well and is removed if not."""
    partial = destination.with_name(f"{destination.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        partial.mkdir(parents=True)
        try:
            yield partial
            fsync_folder(partial)
            partial.rename(destination)  # takes the place of an empty folder
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        fsync_folder(destination.parent)
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written ({error.strerror or error}).") from error
