"""What a conversion writes: of each format its files, made of canonical regions, and what makes the folder complete."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.adapted import adapter_in, lora_of
from megatron.checkpoint.copying import OutputFile, Written
from megatron.checkpoint.huggingface import (
    MODEL_CONFIG,
    SHARD_INDEX,
    config_text,
    read_config,
    shard_index_text,
    shard_names,
)
from megatron.checkpoint.index import StoredPiece, collect_index, piece_key
from megatron.checkpoint.layout import FileTensor, from_spec, whole
from megatron.checkpoint.megatron_layout import MegatronGrid
from megatron.checkpoint.megatron_llm import LATEST, arguments_of, file_content, megatron_files
from megatron.checkpoint.meta import PARAMS, meta_files, params_of
from megatron.checkpoint.native import weights_file, write_carried, write_manifest
from megatron.checkpoint.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, peft_config_text
from megatron.checkpoint.source import Format, Source
from megatron.checkpoint.special_ids import complete_ids, write_generation
from megatron.model.config import ModelConfig, spell_for_both
from megatron.model.lora import names_of_targets
from megatron.model.specs import canonical_shapes, rank_specs
from megatron.parallel.layout import Region
from megatron.utils.errors import ConfigError
from megatron.utils.files import write_atomically

FILE_BYTES = 4 * 10**9  # of a file that is not cut for a grid, unless one tensor is larger or another size is asked for

Finish = Callable[[Path, Mapping[str, Written]], None]


@dataclass(frozen=True)
class Target:
    """The files to copy, and `finish`, which writes everything else once they are there."""

    files: list[OutputFile]
    finish: Finish


@dataclass(frozen=True)
class Request:
    """What is to be written, and from what."""

    source: Source
    config: ModelConfig
    dtypes: Mapping[str, torch.dtype]  # of each canonical tensor, as it will be written
    stated_dtype: str
    tensor: int | None
    pipeline: int | None
    file_bytes: int | None = None  # of a file that is not cut for a grid

    @property
    def grid(self) -> tuple[int, int]:
        return self.tensor or 1, self.pipeline or 1

    @property
    def model_config(self) -> dict[str, Any]:
        return spell_for_both(self.source.model_config, self.stated_dtype)

    def write_config(self, folder: Path, config: Mapping[str, Any] | None = None) -> None:
        """Carry `config.json` over (or what was made of it), byte for byte if it already says all that every reader
        looks for."""
        config = self.model_config if config is None else config
        path = self.source.folder / MODEL_CONFIG
        as_it_is = path.is_file() and config == read_config(self.source.folder)
        write_atomically(folder / MODEL_CONFIG, path.read_bytes() if as_it_is else config_text(config))

    def write_carried(self, folder: Path) -> list[str]:
        """Carry tokenizer and other files over; returns their names."""
        carried = self.source.carried()
        write_carried(carried, folder)
        return list(carried)


def make_target(to: Format, request: Request) -> Target:
    """Plan a conversion; raises ConfigError for what the format cannot hold."""
    by_rank = to in ("meta", "megatron-llm") or request.tensor or request.pipeline
    if request.file_bytes is not None and by_rank:
        raise ConfigError("--max-shard-size cuts Hugging Face's files and uncut native ones; these are cut by ranks.")
    return {
        "huggingface": _huggingface,
        "native": _native,
        "meta": _meta,
        "megatron-llm": _megatron_llm,
        "peft": _peft,
    }[to](request)


def _huggingface(request: Request) -> Target:
    if request.tensor or request.pipeline:
        raise ConfigError(
            "--tensor and --pipeline cut native files, Meta's and Megatron-LLM's; leave them out for Hugging Face's."
        )
    parts = _cut_by_size(request)
    names = shard_names(len(parts))
    files = [OutputFile(name, tuple(part)) for name, part in zip(names, parts, strict=True)]

    def finish(folder: Path, written: Mapping[str, Written]) -> None:
        if len(files) > 1:
            weight_map = {tensor.key: file.name for file in files for tensor in file.tensors}
            total_bytes = sum(file.size_bytes for file in files)
            write_atomically(folder / SHARD_INDEX, shard_index_text(weight_map, total_bytes))
        request.write_carried(folder)
        config = complete_ids(request.model_config, folder)
        request.write_config(folder, config)
        write_generation(folder, config)

    return Target(files, finish)


def _native(request: Request) -> Target:
    parts = _cut_for_grid(request) if request.tensor or request.pipeline else _cut_by_size(request)
    files = [OutputFile(weights_file(number), tuple(part)) for number, part in enumerate(parts)]

    def finish(folder: Path, written: Mapping[str, Written]) -> None:
        index, problems = collect_index(
            pair for file in files for tensor in file.tensors for pair in _as_piece(tensor, file.name)
        )
        assert not problems, problems
        request.write_config(folder)
        others = [MODEL_CONFIG, *request.write_carried(folder)]
        write_manifest(folder, step=0, state=None, tensor_files=written, other_files=others, index=index)

    return Target(files, finish)


def _meta(request: Request) -> Target:
    if request.pipeline not in (None, 1):
        raise ConfigError("Meta's files are cut for tensor ranks alone: leave --pipeline out.")
    params = params_of(request.config)
    planned = meta_files(request.config, request.grid[0], request.dtypes)
    files = [OutputFile(name, tuple(tensors), content=dict) for name, tensors in planned.items()]

    def finish(folder: Path, written: Mapping[str, Written]) -> None:
        write_atomically(folder / PARAMS, json.dumps(params) + "\n")
        request.write_carried(folder)

    return Target(files, finish)


def _megatron_llm(request: Request) -> Target:
    grid = MegatronGrid(*request.grid)
    dtype = getattr(torch, request.stated_dtype, torch.float32)
    arguments = arguments_of(request.config, grid, dtype)
    planned = megatron_files(request.config, grid, request.dtypes)
    content = partial(file_content, arguments)
    files = [OutputFile(name, tuple(tensors), content) for name, tensors in planned.items()]

    def finish(folder: Path, written: Mapping[str, Written]) -> None:
        request.write_config(folder)
        request.write_carried(folder)
        write_atomically(folder / LATEST, "release")

    return Target(files, finish)


def _peft(request: Request) -> Target:
    if request.tensor or request.pipeline or request.file_bytes is not None:
        raise ConfigError("PEFT's adapters are one file: leave --tensor, --pipeline and --max-shard-size out.")
    source, config = request.source, request.config
    adapter, lora = adapter_in(source), lora_of(source, config)
    tensors = tuple(
        whole(Region.whole(name, shape), PREFIX + name, request.dtypes[name]) for name, shape in source.shapes().items()
    )
    base = ((source.run_config or {}).get("model") or {}).get("init_from") or adapter.base
    targets = names_of_targets(lora.targets, config)
    text = peft_config_text(adapter, base, targets, transposed=config.family.transposed)

    def finish(folder: Path, written: Mapping[str, Written]) -> None:
        write_atomically(folder / ADAPTER_CONFIG, text)
        request.write_carried(folder)

    return Target([OutputFile(ADAPTER_WEIGHTS, tensors)], finish)


def _as_piece(tensor: FileTensor, file: str) -> list[tuple[str, StoredPiece]]:
    """A native file's tensor for the manifest, which speaks of whole stored tensors alone."""
    (piece,) = tensor.pieces
    return [(tensor.kind, StoredPiece(piece.region, tensor.dtype, file, tensor.key))]


def _cut_by_size(request: Request) -> list[list[FileTensor]]:
    """Whole tensors in the model's order, in files of at most so many bytes as are asked for."""
    tensors = [
        whole(Region.whole(name, shape), name, request.dtypes[name])
        for name, shape in canonical_shapes(request.config).items()
    ]
    parts = pack([tensor.size_bytes for tensor in tensors], request.file_bytes or FILE_BYTES)
    return [[tensors[number] for number in part] for part in parts]


def pack(sizes: Sequence[int], limit: int) -> list[range]:
    """Which of the things of these sizes, in order, go together so that no sum passes the limit where it need not."""
    firsts: list[int] = []
    room = 0
    for number, size in enumerate(sizes):
        if not firsts or size > room:
            firsts.append(number)
            room = limit
        room -= size
    return [range(first, stop) for first, stop in zip(firsts, [*firsts[1:], len(sizes)], strict=True)]


def limit_for(sizes: Sequence[int], parts: int) -> int:
    """The least limit under which `pack` makes at most so many parts."""
    return bisect_left(range(sum(sizes)), True, lo=max(sizes), key=lambda limit: len(pack(sizes, limit)) <= parts)


def _cut_for_grid(request: Request) -> list[list[FileTensor]]:
    """What each rank of a tensor × pipeline grid holds, copies left out."""
    tensor, pipeline = request.grid
    parts = []
    for pipeline_rank in range(pipeline):
        for tensor_rank in range(tensor):
            specs = rank_specs(
                request.config, tensor=tensor, pipeline=pipeline, tensor_rank=tensor_rank, pipeline_rank=pipeline_rank
            )
            regions = (piece.region for spec in specs.values() for piece in from_spec(spec) if not piece.copy)
            parts.append([whole(region, piece_key(region), request.dtypes[region.name]) for region in regions])
    return parts
