"""Chunks of JSON lines to tokens, in this process or in several, always in the order of the input.

Each worker process opens the tokenizer once and then answers over a pipe of its own; chunks go round the workers and
are collected in the same turn, so at most two per worker are under way and memory stays bounded. A worker that
loses its parent ends by itself.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import dtype_for_vocabulary
from megatron.data.jsonl import Chunk, parse_texts
from megatron.tokenizer import Tokenizer, load_tokenizer
from megatron.utils.errors import DataError, ResourceError

_CHUNKS_PER_WORKER = 2
_STOP_S = 5.0


@dataclass(frozen=True)
class Encoding:
    """How lines become tokens; `eod_id` is appended to each document unless None."""

    tokenizer: Path
    extra_tokens: tuple[str, ...]
    json_keys: tuple[str, ...]
    eod_id: int | None


@dataclass(frozen=True)
class Encoded:
    """A chunk's documents: per JSON key, their tokens back to back and their sizes i64[documents], none of them empty.

    `num_texts` counts the texts read per key, those without tokens included.
    """

    file: Path
    num_bytes: int
    num_texts: int
    documents: tuple[tuple[NDArray[np.integer], NDArray[np.int64]], ...]


def encode_chunk(tokenizer: Tokenizer, encoding: Encoding, chunk: Chunk) -> Encoded:
    """The tokens of a chunk. Raises DataError for a bad line."""
    dtype = dtype_for_vocabulary(tokenizer.vocab_size)
    ending = [] if encoding.eod_id is None else [encoding.eod_id]
    tokens: list[list[NDArray[np.integer]]] = [[] for _ in encoding.json_keys]
    num_texts = 0
    for texts in parse_texts(chunk, encoding.json_keys):
        num_texts += 1
        for column, text in enumerate(texts):
            if ids := tokenizer.encode(text):
                tokens[column].append(np.array(ids + ending, dtype=dtype))
    empty = np.empty(0, dtype)
    documents = tuple(
        (np.concatenate([empty, *column]), np.array([len(document) for document in column], dtype=np.int64))
        for column in tokens
    )
    return Encoded(chunk.file, chunk.num_bytes, num_texts, documents)


def encode_here(chunks: Iterable[Chunk], tokenizer: Tokenizer, encoding: Encoding) -> Iterator[Encoded]:
    """Encode chunks in this process."""
    for chunk in chunks:
        yield encode_chunk(tokenizer, encoding, chunk)


def encode_in_workers(chunks: Iterable[Chunk], encoding: Encoding, workers: int) -> Iterator[Encoded]:
    """Encode chunks in `workers` processes, in order.

    Raises the first bad line's DataError, and ResourceError if a worker dies. Closing the iterator ends the workers.
    """
    # spawn, not fork: a library may have threads that a forked child would be without.
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_serve, args=(theirs, encoding), daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends when the worker does
            processes.append(process)
            pipes.append(ours)
        yield from _deal(chunks, pipes)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.terminate()
            process.join(_STOP_S)


def _deal(chunks: Iterable[Chunk], pipes: list[Connection]) -> Iterator[Encoded]:
    waiting: deque[Connection] = deque()
    for number, chunk in enumerate(chunks):
        pipe = pipes[number % len(pipes)]
        if len(waiting) == _CHUNKS_PER_WORKER * len(pipes):
            yield _receive(waiting.popleft())
        _send(pipe, chunk)
        waiting.append(pipe)
    while waiting:
        yield _receive(waiting.popleft())


def _send(pipe: Connection, chunk: Chunk) -> None:
    try:
        pipe.send(chunk)
    except OSError as error:
        raise _worker_died() from error


def _receive(pipe: Connection) -> Encoded:
    try:
        answer = pipe.recv()
    except (EOFError, OSError) as error:
        raise _worker_died() from error
    if isinstance(answer, DataError):
        raise answer
    assert isinstance(answer, Encoded), answer
    return answer


def _worker_died() -> ResourceError:
    return ResourceError(
        "a worker process ended without an answer (killed, perhaps for want of memory); use fewer --workers"
    )


def _serve(pipe: Connection, encoding: Encoding) -> None:
    """A worker: answer every chunk with its tokens, or with the error of a bad line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # A thread receives, so that the parent can send the next chunk while this one is encoded.
    received: queue.Queue[Chunk | None] = queue.Queue(maxsize=_CHUNKS_PER_WORKER)
    threading.Thread(target=_receive_chunks, args=(pipe, received), daemon=True).start()
    tokenizer = load_tokenizer(encoding.tokenizer, encoding.extra_tokens)
    while (chunk := received.get()) is not None:
        answer: Encoded | DataError
        try:
            answer = encode_chunk(tokenizer, encoding, chunk)
        except DataError as error:
            answer = DataError(str(error))  # without its cause, which cannot travel
        try:
            pipe.send(answer)
        except OSError:
            return  # the parent is gone


def _receive_chunks(pipe: Connection, received: queue.Queue[Chunk | None]) -> None:
    while True:
        try:
            received.put(pipe.recv())
        except (EOFError, OSError):
            received.put(None)
            return
