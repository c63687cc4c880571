"""Copying canonical regions from a source into the files of another format: block by block, several files at a time.

Memory holds a few blocks of each worker, whatever the size of the model. What was finished is noted in a journal, from
which an interrupted copy goes on. It must not know formats but for the two kinds of files.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron.checkpoint.layout import FileTensor
from megatron.checkpoint.safetensors_file import SafetensorsWriter
from megatron.checkpoint.source import Source
from megatron.checkpoint.torch_writer import Content, TorchWriter
from megatron.utils.errors import CheckpointError

Progress = Callable[[str, int, int], None]  # (what is done, bytes so far, bytes in all)
Written = tuple[int, str]  # a file's bytes and checksum ("": it holds checksums of its own)

BLOCK_BYTES = 8 * 2**20  # that a processor's cache holds, so that what was read is checksummed and written from there
JOURNAL = ".conversion.jsonl"
_WORKERS = 2


@dataclass(frozen=True)
class OutputFile:
    """A file to write, by its path in the folder. With `content` it is one of torch.save, else safetensors."""

    name: str
    tensors: tuple[FileTensor, ...]
    content: Content | None = None
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors)


class Copier:
    """Writes files from one source into one folder."""

    def __init__(self, source: Source, folder: Path, files: Sequence[OutputFile], progress: Progress) -> None:
        self.source, self.folder, self.files, self._progress = source, folder, files, progress
        self.total_bytes = sum(file.size_bytes for file in files)
        listed = read_journal(folder)
        self._done = {
            file.name: listed[file.name]
            for file in files
            if file.name in listed and self._is_whole(file.name, listed[file.name])
        }
        self._done_bytes = sum(file.size_bytes for file in files if file.name in self._done)
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    @property
    def missing_bytes(self) -> int:
        """What is still to be written."""
        return self.total_bytes - self._done_bytes

    def run(self) -> dict[str, Written]:
        """Write every file that the journal does not list; returns size and checksum of each by its name."""
        done = dict(self._done)
        left = [file for file in self.files if file.name not in done]
        workers = max(1, min(_WORKERS, len(left)))
        with _one_thread_each(), ThreadPoolExecutor(workers) as pool:
            futures = {file.name: pool.submit(self._write_file, file) for file in left}
            try:
                for name, future in futures.items():
                    done[name] = future.result()
            except BaseException:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
        return {file.name: done[file.name] for file in self.files}

    def _is_whole(self, name: str, written: Written) -> bool:
        path = self.folder / name
        return path.is_file() and path.stat().st_size == written[0]

    def _write_file(self, file: OutputFile) -> Written:
        path = self.folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # half written when it was interrupted
        by_key = {tensor.key: tensor for tensor in file.tensors}
        assert len(by_key) == len(file.tensors), f"{file.name} has a key twice"
        plan = {tensor.key: (tensor.dtype, tensor.shape) for tensor in file.tensors}
        writer: SafetensorsWriter | TorchWriter
        if file.content is None:
            writer = SafetensorsWriter(path, plan, file.metadata)
        else:
            writer = TorchWriter(path, plan, file.content)
        source = self.source.again()
        try:
            with writer, ThreadPoolExecutor(1) as ahead:
                for tensor, block in _ahead(ahead, source, [by_key[key] for key in writer.order]):
                    writer.write(tensor.key, block)
                    self._report(tensor.key, block.numel() * block.element_size())
                written = writer.close()
        finally:
            source.close()
        with self._lock:
            _append(self.folder / JOURNAL, json.dumps([file.name, *written]))
        return written

    def _report(self, what: str, count: int) -> None:
        with self._lock:
            if self._stopped.is_set():
                raise CheckpointError("stopped, since another file failed")
            self._done_bytes += count
            self._progress(what, self._done_bytes, self.total_bytes)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Have torch copy a block in the thread that asks for it: blocks are so small that to deal each out to several
    threads takes longer than copying it, and there are several blocks at a time as it is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def read_journal(folder: Path) -> dict[str, Written]:
    """What was finished before an interruption. A last line that was cut is as good as none."""
    try:
        lines = (folder / JOURNAL).read_text(encoding="utf-8").splitlines(keepends=True)
    except (FileNotFoundError, UnicodeDecodeError):
        return {}
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return {name: (size, digest) for name, size, digest in entries}


def _append(path: Path, line: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def _ahead(
    pool: ThreadPoolExecutor, source: Source, tensors: Sequence[FileTensor]
) -> Iterator[tuple[FileTensor, torch.Tensor]]:
    """The blocks of all tensors, each read while the one before is being written, in two buffers that are used anew."""
    buffers = [torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)]
    waiting: tuple[FileTensor, Future[torch.Tensor]] | None = None
    for number, (tensor, begin, stop) in enumerate(_blocks(tensors)):
        needed = stop - begin if tensor.shape else 1
        size_bytes = needed * torch.Size(tensor.shape[1:]).numel() * tensor.dtype.itemsize
        if buffers[number % 2].numel() < size_bytes:
            buffers[number % 2] = torch.empty(size_bytes, dtype=torch.uint8)
        rows = (
            buffers[number % 2][:size_bytes]
            .view(tensor.dtype)
            .view((needed, *tensor.shape[1:]) if tensor.shape else ())
        )
        following = tensor, pool.submit(_fill, source, tensor, begin, stop, rows)
        if waiting is not None:
            yield waiting[0], waiting[1].result()
        waiting = following
    if waiting is not None:
        yield waiting[0], waiting[1].result()


def _blocks(tensors: Sequence[FileTensor]) -> Iterator[tuple[FileTensor, int, int]]:
    """Runs of rows of at most BLOCK_BYTES (or one row)."""
    for tensor in tensors:
        if not tensor.shape:
            yield tensor, 0, 1
            continue
        row_bytes = torch.Size(tensor.shape[1:]).numel() * tensor.dtype.itemsize
        rows = max(1, BLOCK_BYTES // max(row_bytes, 1))
        for begin in range(0, tensor.shape[0], rows):
            yield tensor, begin, min(begin + rows, tensor.shape[0])


def _fill(source: Source, tensor: FileTensor, begin: int, stop: int, rows: torch.Tensor) -> torch.Tensor:
    """Fill rows `begin … stop` of a file's tensor."""
    parts = [found for piece in tensor.pieces if (found := piece.rows(begin, stop)) is not None]
    if sum(region.numel for region, _ in parts) < rows.numel():
        rows.zero_()
    turned = {piece.region.name: piece.transposed for piece in tensor.pieces}
    for region, place in parts:
        view = rows[place]
        source.read(region, view.t() if turned[region.name] else view, tensor.kind)
        _check_range(source, region.name, tensor, view)
    return rows


def _check_range(source: Source, name: str, tensor: FileTensor, view: torch.Tensor) -> None:
    if tensor.dtype == torch.float16 and source.dtype(name, tensor.kind) != torch.float16 and not view.isfinite().all():
        raise CheckpointError(
            f"{name} has values that are not finite in fp16 (which ends at 65,504): use --dtype bf16."
        )
