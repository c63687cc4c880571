"""Saving a checkpoint from all ranks together: everybody writes its own files, rank 0 publishes the folder.

What is written is named tensors as rectangles of canonical ones; it must not know models, grids or process groups
(`exchange` is all it has of the other ranks).
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.huggingface import MODEL_CONFIG, config_text
from megatron.checkpoint.index import StoredPiece, collect_index, piece_key
from megatron.checkpoint.native import (
    PARTIAL,
    POINTER,
    REMOVED,
    RUN_CONFIG,
    kind_file,
    parse_piece,
    piece_record,
    step_of,
    write_carried,
    write_manifest,
)
from megatron.checkpoint.safetensors_file import SafetensorsWriter
from megatron.parallel.layout import Region
from megatron.utils.errors import CheckpointError, MegatronError
from megatron.utils.files import fsync_folder, write_atomically
from megatron.utils.logging import get_logger
from megatron.utils.units import format_bytes

_logger = get_logger(__name__)

Exchange = Callable[[str], list[str]]
Listed = Mapping[str, Sequence[tuple[Region, torch.Tensor]]]  # kind -> what a rank writes of it


def save_checkpoint(
    folder: Path,
    *,
    rank: int,
    exchange: Exchange,
    tensors: Mapping[str, Iterable[tuple[Region, torch.Tensor]]],
    state: Mapping[str, Any],
    model_config: Mapping[str, Any],
    run_config_yaml: str,
    carried: Mapping[str, bytes],
) -> None:
    """Write the checkpoint SAVE/step_0000100 (`folder`); all ranks call it together, on one shared file system.

    `exchange` gathers a text from every rank in rank order, and so is a barrier. `tensors[kind]` are the rectangles
    that this rank must write, each exactly once over all ranks. `state` holds at least `step`, the one in the folder's
    name. `carried` are the tokenizer and other files to keep along (`read_carried`): their content, since the files may
    lie in a checkpoint that is removed meanwhile. Only rank 0's `state`, configurations and carried files are used.

    Afterwards the folder is whole and durable, or it is not there. If any rank fails, all raise CheckpointError with
    the same text (a rank with an error that is a bug raises that one).
    """
    assert state["step"] == step_of(folder.name), (state["step"], folder)
    partial = folder.with_name(folder.name + PARTIAL)
    listed = {kind: list(pairs) for kind, pairs in tensors.items()}
    try:
        total_bytes = sum(_together(folder, rank, exchange, lambda: _prepare(partial, rank, listed)))
        records = _together(folder, rank, exchange, lambda: _write_rank(partial, rank, listed, total_bytes))

        def publish() -> None:
            if rank == 0:
                _describe(partial, list(records), state, model_config, run_config_yaml, carried)
                _publish(partial, folder)

        _together(folder, rank, exchange, publish)
    except BaseException:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _together(folder: Path, rank: int, exchange: Exchange, work: Callable[[], Any]) -> Iterator[Any]:
    """Do this rank's `work`, then return every rank's (JSON) result, or fail on all ranks if one failed.

    The results are parsed as they are taken: of a large run they are hundreds of megabytes, which rank 0 alone needs.
    """
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # whatever it is, the other ranks wait in `exchange` and must hear of it
        failure = error
    expected = isinstance(failure, (MegatronError, OSError))
    text = None if failure is None else str(failure) if expected else repr(failure)
    # Two lines: JSON has no line breaks of its own, and an empty first one needs no parsing.
    reports = exchange(f"{'' if text is None else json.dumps(text)}\n{json.dumps(result)}")
    failed = [(number, report) for number, report in enumerate(reports) if not report.startswith("\n")]
    failures = [f"rank {number}: {json.loads(report.splitlines()[0])}" for number, report in failed]
    if failure is not None and not expected:
        raise failure
    if failures:
        more = f" (and {len(failures) - 3} more ranks)" if len(failures) > 3 else ""
        raise CheckpointError(f"{folder} was not saved: {' '.join(failures[:3])}{more}") from failure
    return (json.loads(report.partition("\n")[2]) for report in reports)


def _prepare(partial: Path, rank: int, listed: Listed) -> int:
    """Make the temporary folder, free of what an earlier crash left there; returns the bytes this rank will write."""
    if rank == 0:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    return sum(region.numel * tensor.dtype.itemsize for pairs in listed.values() for region, tensor in pairs)


def _write_rank(partial: Path, rank: int, listed: Listed, total_bytes: int) -> dict[str, Any]:
    """Write this rank's files; returns their sizes, checksums and rectangles for `checkpoint.json`."""
    check_space(partial, total_bytes)
    files, tensors = {}, []
    for kind, pairs in listed.items():
        if not pairs:
            continue
        file = kind_file(kind, rank)
        keyed = {piece_key(region): (region, tensor) for region, tensor in pairs}
        assert len(keyed) == len(pairs), f"{kind}: rank {rank} writes a rectangle twice"
        plan = {key: (tensor.dtype, region.size) for key, (region, tensor) in keyed.items()}
        with SafetensorsWriter(partial / file, plan, {"format": "pt"}) as writer:
            for key in writer.order:
                writer.write(key, keyed[key][1])
            files[file] = writer.close()
        for key, (region, tensor) in keyed.items():
            record = piece_record(StoredPiece(region, tensor.dtype, file, key))
            tensors.append([kind, region.name, region.shape, record])
    return {"files": files, "tensors": tensors}


def _describe(
    partial: Path,
    records: Sequence[Mapping[str, Any]],
    state: Mapping[str, Any],
    model_config: Mapping[str, Any],
    run_config_yaml: str,
    carried: Mapping[str, bytes],
) -> None:
    """Write everything beside the tensors into the temporary folder, `checkpoint.json` last."""
    index, problems = collect_index(
        (kind, parse_piece(name, shape, piece)) for record in records for kind, name, shape, piece in record["tensors"]
    )
    assert not problems, f"the ranks did not write every element once: {problems[:5]}"
    files = {name: (size, digest) for record in records for name, (size, digest) in record["files"].items()}
    write_atomically(partial / RUN_CONFIG, run_config_yaml)
    write_atomically(partial / MODEL_CONFIG, config_text(model_config))
    write_carried(carried, partial)
    others = [RUN_CONFIG, MODEL_CONFIG, *carried]
    write_manifest(partial, step=state["step"], state=state, tensor_files=files, other_files=others, index=index)


def _publish(partial: Path, folder: Path) -> None:
    """Give the finished folder its name, in place of what may be there, and point `latest` to it."""
    replaced = folder.with_name(folder.name + REMOVED)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    partial.rename(folder)
    fsync_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    try:
        write_atomically(folder.parent / POINTER, folder.name + "\n")
    except OSError as error:  # the checkpoint is there and is found by its name
        _logger.warning("%s cannot be written (%s)", folder.parent / POINTER, error.strerror or error)


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise CheckpointError where a file system has clearly less room than is needed, before it is filled."""
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < needed_bytes:
        raise CheckpointError(
            f"{folder.parent} has {format_bytes(usage.free)} left, {format_bytes(needed_bytes)} are needed: "
            "make room there or choose another folder."
        )
