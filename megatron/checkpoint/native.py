"""Our checkpoint folder: names of files, `checkpoint.json`, what makes a folder whole.

    step_0000100/checkpoint.json          version, step, trainer state, checksums, where every rectangle is
                 config.yaml              resolved configuration of the run (absent after a conversion)
                 config.json              Hugging Face model configuration
                 tokenizer.model …        tokenizer files, under Hugging Face's names
                 weights-00003.safetensors, optimizer-master-00003.safetensors …

It must not know who writes the tensors or how many ranks there are.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.checkpoint.huggingface import MODEL_CONFIG
from megatron.checkpoint.index import StoredPiece, StoredTensor, collect_index
from megatron.checkpoint.safetensors_file import DTYPE_NAMES, DTYPES
from megatron.parallel.layout import Region
from megatron.utils.errors import CheckpointError
from megatron.utils.files import checksum_file, fsync_folder, is_plain_name, parse_json, write_atomically

MANIFEST = "checkpoint.json"
RUN_CONFIG = "config.yaml"
POINTER = "latest"
PARTIAL = ".partial"  # ending of a folder that is being written
REMOVED = ".removed"  # ending of a folder that is being removed
VERSION = 2

_FORMAT = "megatron-med checkpoint"
_CHECKSUM = "xxh3_128"
_STEP_FOLDER = re.compile(r"step_(\d{7,})")

# What goes along with the weights of a model, besides `config.json`; the licence usually asks for it.
CARRIED_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "USE_POLICY.md",
)


class OtherVersionError(CheckpointError):
    """The checkpoint was written by a program with another version of the format."""


class Manifest:
    """The content of `checkpoint.json`. `files`: name -> (bytes, checksum)."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        """Raises KeyError, TypeError, ValueError or AttributeError for a content that is none."""
        self.path = path
        self.step = int(content["step"])
        self.state: dict[str, Any] | None = content["state"]
        self.files = {
            _plain(name): (int(entry["bytes"]), str(entry[_CHECKSUM])) for name, entry in content["files"].items()
        }
        self._tensors: dict[str, dict[str, Any]] = {kind: dict(named) for kind, named in content["tensors"].items()}

    @cached_property
    def index(self) -> dict[str, dict[str, StoredTensor]]:
        """Where every tensor is; raises CheckpointError. Built when asked for: it can be 200,000 rectangles."""
        try:
            index, problems = collect_index(_parse_pieces(self._tensors, self.files))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, AssertionError) as error:
            raise CheckpointError(f"{self.path} is damaged ({error!r}).") from error
        if problems:
            raise CheckpointError(f"{self.path} does not describe whole tensors: {'; '.join(problems[:5])}.")
        return index


def step_folder(step: int) -> str:
    """The name of the folder of a step."""
    return f"step_{step:07d}"


def step_of(name: str) -> int | None:
    """The step that a folder's name tells, or None where it is not one of ours."""
    match = _STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def weights_file(part: int) -> str:
    return f"weights-{part:05d}.safetensors"


def kind_file(kind: str, part: int) -> str:
    """The file in which part (or rank) number `part` keeps its tensors of a kind."""
    return weights_file(part) if kind == "weights" else f"optimizer-{kind}-{part:05d}.safetensors"


def carried_files(folder: Path) -> list[Path]:
    """The tokenizer and other files of a model folder that any copy of the model takes along."""
    return [folder / name for name in CARRIED_FILES if (folder / name).is_file()]


def read_carried(files: Iterable[Path]) -> dict[str, bytes]:
    """Read tokenizer and other files that a checkpoint carries: the name there -> content. Raises CheckpointError.

    A SentencePiece model of another name becomes `tokenizer.model`, by which every reader finds it. Of files that
    get the same name, the first is taken.
    """
    carried: dict[str, bytes] = {}
    for file in files:
        name = file.name
        if name not in CARRIED_FILES and file.suffix == ".model":
            name = "tokenizer.model"
        assert name not in (MANIFEST, RUN_CONFIG, MODEL_CONFIG), file
        if name in carried:
            continue
        try:
            carried[name] = file.read_bytes()
            if file.suffix == ".json":
                parse_json(carried[name])
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror or error}).") from error
        except ValueError as error:
            raise CheckpointError(f"{file} is damaged: it is no JSON ({error}). Copy it again or remove it.") from error
    return carried


def write_carried(carried: Mapping[str, bytes], folder: Path) -> None:
    """Write what `read_carried` gave into a checkpoint's folder; raises OSError."""
    for name, content in carried.items():
        write_atomically(folder / name, content)


def write_manifest(
    folder: Path,
    *,
    step: int,
    state: Mapping[str, Any] | None,
    tensor_files: Mapping[str, tuple[int, str]],
    other_files: Sequence[str],
    index: Mapping[str, Mapping[str, StoredTensor]],
) -> None:
    """Write `checkpoint.json`, which makes the folder whole. `tensor_files`: name -> (bytes, checksum)."""
    files = dict(tensor_files)
    for name in other_files:
        files[name] = ((folder / name).stat().st_size, checksum_file(folder / name))
    head = {
        "format": _FORMAT,
        "version": VERSION,
        "step": step,
        "state": state,
        "files": {name: {"bytes": size, _CHECKSUM: digest} for name, (size, digest) in sorted(files.items())},
    }
    text = json.dumps(head, indent=1)[: -len("\n}")] + ',\n "tensors": ' + "".join(_format_index(index)) + "\n}\n"
    write_atomically(folder / MANIFEST, text)
    fsync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read and check `checkpoint.json` (not the files that it lists); raises CheckpointError."""
    path = folder / MANIFEST
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not the index of a checkpoint of this program.")
    if content.get("version") != VERSION:
        raise OtherVersionError(
            f"{folder} has version {content.get('version')} of the checkpoint format, this program reads {VERSION}: "
            "use the version of the program that wrote it."
        )
    try:
        return Manifest(path, content)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}).") from error


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raise CheckpointError, naming every file of a checkpoint that is missing or has another size."""
    problems = []
    for name, (size, _) in manifest.files.items():
        try:
            found = os.stat(folder / name).st_size
        except OSError as error:
            problems.append(f"{name} ({error.strerror})")
            continue
        if found != size:
            problems.append(f"{name} (has {found:,} bytes, was written with {size:,})")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{folder} is incomplete: {', '.join(problems[:5])}{more}.")


def find_damaged(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> Iterator[tuple[str, bool]]:
    """Read files (default: all) and compare their checksums: yields each name and whether it is damaged."""
    for name in manifest.files if names is None else names:
        try:
            yield name, checksum_file(folder / name) != manifest.files[name][1]
        except OSError as error:
            raise CheckpointError(f"{folder / name} cannot be read ({error.strerror}).") from error


def piece_record(piece: StoredPiece) -> dict[str, Any]:
    """A piece as JSON; the tensor's name and shape are stored once, around it."""
    return {
        "start": list(piece.region.start),
        "size": list(piece.region.size),
        "dtype": DTYPE_NAMES[piece.dtype],
        "file": piece.file,
        "key": piece.key,
    }


def parse_piece(name: str, shape: Sequence[int], record: Mapping[str, Any]) -> StoredPiece:
    """The inverse of `piece_record`; raises KeyError, TypeError or AssertionError for what is none."""
    region = Region(name, tuple(shape), tuple(record["start"]), tuple(record["size"]))
    return StoredPiece(region, DTYPES[record["dtype"]], str(record["file"]), str(record["key"]))


def _parse_pieces(tensors: Mapping[str, Any], files: Mapping[str, Any]) -> Iterator[tuple[str, StoredPiece]]:
    for kind, named in tensors.items():
        for name, entry in named.items():
            for record in entry["pieces"]:
                piece = parse_piece(name, entry["shape"], record)
                if piece.file not in files:
                    raise ValueError(f"{name} is said to be in {piece.file}, which is not listed")
                yield kind, piece


def _format_index(index: Mapping[str, Mapping[str, StoredTensor]]) -> Iterator[str]:
    """The index as JSON with one line per tensor: readable, and a tenth of the lines that indenting gives."""
    yield "{"
    for number, (kind, tensors) in enumerate(index.items()):
        yield ("," if number else "") + f"\n  {json.dumps(kind)}: {{"
        for position, (name, stored) in enumerate(tensors.items()):
            entry = {"shape": list(stored.shape), "pieces": [piece_record(piece) for piece in stored.pieces]}
            yield ("," if position else "") + f"\n   {json.dumps(name)}: {json.dumps(entry)}"
        yield "\n  }"
    yield "\n }"


def _plain(name: str) -> str:
    """A file name, which must not lead out of the folder."""
    if not is_plain_name(name):
        raise ValueError(f"{name!r} is not a plain file name")
    return name
