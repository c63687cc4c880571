"""Hugging Face model folders: where their tensors are, and how to write one's index and configuration.

It knows `model.safetensors`, `pytorch_model.bin`, the indices of their shards and `config.json`, and must not know what
the tensors mean.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.checkpoint.index import StoredPiece, StoredTensor
from megatron.checkpoint.safetensors_file import SafetensorsReader
from megatron.checkpoint.tensor_file import TensorReader
from megatron.checkpoint.torch_file import SUFFIXES, TorchReader
from megatron.parallel.layout import Region
from megatron.utils.errors import CheckpointError
from megatron.utils.files import is_plain_name, parse_json

SINGLE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
MODEL_CONFIG = "config.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def is_huggingface(folder: Path) -> bool:
    """Whether the folder holds weights in a form that `index_huggingface` reads."""
    return any((folder / name).exists() for name in (SINGLE, SHARD_INDEX, PICKLE, PICKLE_INDEX))


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`; raises CheckpointError."""
    path = folder / MODEL_CONFIG
    try:
        config = parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); the weights cannot be used without it."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    return config


def index_huggingface(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Where every tensor is, and the weight files. Opens each file once to check it; raises CheckpointError.

    Of a model that is there twice, the safetensors are taken and the pickles are left alone.
    """
    found = next(name for name in (SINGLE, SHARD_INDEX, PICKLE, PICKLE_INDEX) if (folder / name).exists())
    if found in (SINGLE, PICKLE):
        return _index_file(folder, found), [found]
    weight_map = read_weight_map(folder / found)
    files = sorted(set(weight_map.values()))
    absent = [name for name in files if not (folder / name).exists()]
    if absent:
        raise CheckpointError(
            f"{folder} is incomplete: {_some(absent)} of {len(files)} shards missing. Download or copy it again."
        )
    tensors: dict[str, StoredTensor] = {}
    problems = []
    for file in files:
        for name, stored in _index_file(folder, file).items():
            if name in tensors:
                problems.append(f"{name} is both in {tensors[name].pieces[0].file} and in {file}")
            elif name not in weight_map:
                problems.append(f"{name} is in {file} but not in {found}")
            elif weight_map[name] != file:
                problems.append(f"{name} should be in {weight_map[name]} but is in {file}")
            tensors[name] = stored
    problems += [f"{name} is not in {file}" for name, file in weight_map.items() if name not in tensors]
    if problems:
        raise CheckpointError(f"{folder / found} does not agree with its shards: {_some(problems)}.")
    return tensors, files


def with_prefix(tensors: Mapping[str, StoredTensor], prefix: str, complete: Container[str]) -> dict[str, StoredTensor]:
    """The tensors of a file saved from a model without its head, whose names lack the prefix: under canonical names.

    `complete` are the names that have no prefix in any file.
    """

    def renamed(name: str, stored: StoredTensor) -> StoredTensor:
        region = Region.whole(name, stored.shape)
        return replace(stored, pieces=tuple(replace(piece, region=region) for piece in stored.pieces))

    if any(name.startswith(prefix) for name in tensors):
        return dict(tensors)
    names = {name: name if name in complete else prefix + name for name in tensors}
    return {names[name]: renamed(names[name], stored) for name, stored in tensors.items()}


def shard_names(count: int) -> list[str]:
    """The file names of a model in `count` files."""
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def shard_index_text(weight_map: Mapping[str, str], total_bytes: int) -> str:
    """The content of `model.safetensors.index.json`."""
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2) + "\n"


def config_text(config: Mapping[str, Any]) -> str:
    """The text of `config.json`."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def open_file(path: Path) -> TensorReader:
    """Open a file of tensors of whichever kind its name tells; raises CheckpointError."""
    return TorchReader(path) if path.suffix in SUFFIXES else SafetensorsReader(path)


def _index_file(folder: Path, file: str) -> dict[str, StoredTensor]:
    with open_file(folder / file) as reader:
        return {
            name: StoredTensor(entry.shape, (StoredPiece(Region.whole(name, entry.shape), entry.dtype, file, name),))
            for name, entry in reader.entries.items()
        }


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor -> file by the index of a sharded model. Raises CheckpointError, for names of no plain file too."""
    try:
        weight_map = parse_json(path.read_bytes())["weight_map"]
        entries = [(str(name), str(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not the index of a sharded model ({error!r}).") from error
    outside = sorted({file for _, file in entries if not is_plain_name(file)})
    if outside:
        shown = _some([_shown(file) for file in outside])
        raise CheckpointError(f"{path} names files outside its folder ({shown}): only plain file names are read.")
    if not entries:
        raise CheckpointError(f"{path} lists no tensors.")
    return dict(entries)


def _shown(name: str) -> str:
    return name[:80] if name.isprintable() else repr(name)[:80]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
