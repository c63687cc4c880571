"""Conversion between the formats: a copy of slices in one pass, that can be interrupted and gone on with.

Whatever the size of the model, memory holds a few blocks of rows. It must not know the command line.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch

from megatron.checkpoint.adapted import AdaptedSource, open_adapter
from megatron.checkpoint.check import check_weights
from megatron.checkpoint.checksums import compare_checksums, damage
from megatron.checkpoint.copying import JOURNAL, Copier, Progress
from megatron.checkpoint.native import PARTIAL
from megatron.checkpoint.source import Format, Source, open_source
from megatron.checkpoint.store import check_space
from megatron.checkpoint.targets import Request, make_target
from megatron.checkpoint.vocabulary import ExtendedSource, Extension
from megatron.model.config import ModelConfig
from megatron.model.specs import canonical_shapes
from megatron.utils.errors import CheckpointError, ConfigError
from megatron.utils.files import fsync_folder
from megatron.utils.logging import get_logger

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}

_logger = get_logger(__name__)


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
    source_path: str | Path,
    destination: Path,
    *,
    to: Format | None = None,
    tensor: int | None = None,
    pipeline: int | None = None,
    dtype: torch.dtype | None = None,
    extension: Extension | None = None,
    file_bytes: int | None = None,
    adapter: str | Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Conversion:
    """Write the model at `source_path` (anything that `open_source` takes) to `destination` in a format.

    `to` is native unless told, and Hugging Face's for a native source or one with adapters. `tensor` and `pipeline` cut
    the files as that grid would hold them (native ones load on any grid all the same). `dtype` casts the weights,
    `extension` changes the vocabulary, `adapter` (PEFT's, or of a run) is put into the weights; to `peft` the adapters
    of a run are written as they are. `file_bytes` is the most that a file holds which is not cut for a grid, unless one
    tensor is larger. The destination must be new or empty; it appears once it is whole, and not at all after an error.
    After an interruption the same call goes on with the files that are not finished.

    Raises CheckpointError and, for a request that cannot be, ConfigError.
    """
    if any(size is not None and size < 1 for size in (tensor, pipeline)):
        raise ConfigError(f"--tensor {tensor} --pipeline {pipeline}: both must be at least 1.")
    destination = Path(os.path.abspath(destination))
    _check_destination(destination)
    with _open(source_path, adapter, to) as opened, _extended(opened, extension) as source:
        to = to or ("huggingface" if source.format == "native" or len(source.parts) > 1 else "native")
        config = ModelConfig.from_huggingface(source.model_config)
        shapes = canonical_shapes(config) if source.adapter is None else source.shapes()
        dtypes = {name: dtype or source.dtype(name) for name in shapes}
        request = Request(source, config, dtypes, _stated_dtype(source, dtypes, dtype), tensor, pipeline, file_bytes)
        target = make_target(to, request)
        total_bytes = sum(file.size_bytes for file in target.files)
        identity = _identity(source, to, tensor, pipeline, dtype, extension, file_bytes)
        with _new_folder(destination, identity) as folder, _checked(source):
            copier = Copier(source, folder, target.files, progress)
            check_space(folder, copier.missing_bytes)
            written = copier.run()
            target.finish(folder, written)
    return Conversion(
        source=source.folder,
        destination=destination,
        format=to,
        files=len(target.files),
        tensors=len(shapes),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        size_bytes=total_bytes,
        left_out=("the optimizer state",) if source.has_optimizer else (),
    )


def _open(path: str | Path, adapter: str | Path | None, to: Format | None) -> Source:
    """What is converted: a model, with the adapter in its weights if there is one, or the adapters of a run."""
    if to != "peft":
        return open_source(path) if adapter is None else AdaptedSource(open_source(path), open_adapter(adapter))
    stored = open_adapter(path)
    if adapter is not None or stored.format == "peft":
        raise ConfigError(
            "--to peft writes the adapters of a run as they are: SRC must be its checkpoint or save folder, and "
            "--adapter must be left out."
        )
    return stored


def _extended(source: Source, extension: Extension | None) -> Source:
    """The source, once its weights are known to be those of its model, with an extension if there is one."""
    if extension is not None and (source.adapter is not None or len(source.parts) > 1):
        raise ConfigError(
            "--extra-tokens and --vocab-size do not go with adapters: convert with the adapters alone, then change the "
            "vocabulary of the result."
        )
    if source.adapter is not None:
        return source
    check_weights(source, canonical_shapes(ModelConfig.from_huggingface(source.model_config)))
    return source if extension is None else ExtendedSource(source, extension)


def _identity(source: Source, *request: object) -> str:
    """A word for what is converted to what: an interrupted conversion is gone on with by the same one alone."""
    files = [
        [os.path.abspath(part.folder / name), *_stamp(part.folder / name)]
        for part in source.parts
        for name in part.weight_files
    ]
    text = json.dumps([files, source.model_config, [str(part) for part in request]])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _stamp(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@contextmanager
def _checked(source: Source) -> Iterator[None]:
    """Compare the checksums of the source's files meanwhile, so that each is read from the disk once.

    A conversion is no time to carry a damage along: raises CheckpointError at the end where there is one.
    """
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        check = pool.submit(_check_content, source, stopped)
        try:
            yield
            check.result()
        except BaseException:
            stopped.set()
            raise


def _check_content(source: Source, stopped: threading.Event) -> None:
    for part in source.parts:
        for name, damaged in compare_checksums(part, part.weight_files):
            if stopped.is_set():
                return
            if damaged:
                raise damage(part, [name])


def _stated_dtype(source: Source, dtypes: Mapping[str, torch.dtype], asked: torch.dtype | None) -> str:
    """The dtype to write into `config.json`: the one asked for, that of a run's weights, else what was stated.

    Training may have stored other than the model it began with was stored in, and loaders go by `config.json`.
    """
    found = set(dtypes.values())
    if asked is None and (source.state is None or len(found) > 1):
        stated = source.model_config.get("dtype") or source.model_config.get("torch_dtype")
        if isinstance(getattr(torch, str(stated), None), torch.dtype):
            return str(stated)
    return str(asked or reduce(torch.promote_types, found)).removeprefix("torch.")


def _check_destination(destination: Path) -> None:
    if destination.is_dir() and not any(destination.iterdir()):
        return
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination} exists already: name a new or empty folder.")


@contextmanager
def _new_folder(destination: Path, identity: str) -> Iterator[Path]:
    """A folder to write in, which becomes `destination` if all goes well and is removed if not.

    After Ctrl-C it stays, as it does when the process is killed: the same conversion finds it by its `identity`.
    """
    partial = destination.with_name(f"{destination.name}.{identity}{PARTIAL}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            try:
                yield partial
                (partial / JOURNAL).unlink(missing_ok=True)
                for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
                    fsync_folder(folder)
                partial.rename(destination)  # takes the place of an empty folder
            except KeyboardInterrupt:
                _logger.warning("interrupted: the same command goes on with %s, which may also be deleted", partial)
                raise
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        fsync_folder(destination.parent)
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written ({error.strerror or error}).") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{folder} is being written by another process: wait for it.") from error
        yield
    finally:
        os.close(descriptor)
