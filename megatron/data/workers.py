"""Encoding in several processes, in the order of the input.

Each worker opens the tokenizer once and then answers chunks over its standard input and output. Chunks go round the
workers and are collected in the same turn, so at most two per worker are under way and memory stays bounded.
Workers are plain child processes in a group of their own, so that Ctrl-C is the parent's to handle; they end when
their input does, which is also when the parent is killed. A message is a line of JSON and then the binary parts whose
lengths it gives.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron.data.encode import Encoded, Encoding, encode_chunk
from megatron.data.indexed import dtype_for_vocabulary
from megatron.data.jsonl import Chunk
from megatron.tokenizer import Tokenizer, load_tokenizer
from megatron.utils.errors import DataError, ResourceError

_CHUNKS_PER_WORKER = 2
_START = "import sys; sys.path[:] = sys.argv[1:]; from megatron.data.workers import serve; serve()"

Message = tuple[dict[str, Any], list[bytes]]


def encode_in_workers(
    chunks: Iterable[Chunk], encoding: Encoding, *, vocab_size: int, workers: int
) -> Iterator[Encoded]:
    """Encode chunks in `workers` processes, in order.

    Raises the first bad line's DataError, and ResourceError if a worker dies. Closing the iterator ends the workers.
    """
    started: list[_Worker] = []
    waiting: deque[tuple[_Worker, Chunk]] = deque()
    dtype = dtype_for_vocabulary(vocab_size)
    try:
        for _ in range(workers):
            started.append(_Worker(encoding))
        for number, chunk in enumerate(chunks):
            if len(waiting) == _CHUNKS_PER_WORKER * workers:
                yield _collect(*waiting.popleft(), dtype)
            worker = started[number % workers]
            worker.send({"file": str(chunk.file), "first_line": chunk.first_line}, [chunk.content])
            waiting.append((worker, chunk))
        while waiting:
            yield _collect(*waiting.popleft(), dtype)
    finally:
        for worker in started:
            worker.stop()


def _collect(worker: _Worker, chunk: Chunk, dtype: np.dtype) -> Encoded:
    header, parts = worker.receive()
    if "error" in header:
        raise DataError(header["error"])
    documents = tuple(
        (np.frombuffer(tokens, dtype=dtype), np.frombuffer(sizes, dtype=np.int64))
        for tokens, sizes in zip(parts[::2], parts[1::2], strict=True)
    )
    return Encoded(chunk.file, len(chunk.content), header["num_texts"], documents)


class _Worker:
    """The parent's end of a worker."""

    def __init__(self, encoding: Encoding) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,
        )
        self.send(asdict(encoding) | {"tokenizer": str(encoding.tokenizer)}, [])

    def send(self, header: dict[str, Any], parts: Sequence[bytes]) -> None:
        assert self._process.stdin is not None
        try:
            _write_message(self._process.stdin, header, parts)
        except OSError as error:
            raise self._died() from error

    def receive(self) -> Message:
        assert self._process.stdout is not None
        message = _read_message(self._process.stdout)
        if message is None:
            raise self._died()
        return message

    def _died(self) -> ResourceError:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return ResourceError(f"a worker process {how}; if memory is short, use fewer --workers")

    def stop(self) -> None:
        self._process.kill()  # it holds nothing but memory
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue  # a message that was cut short, to a worker that is gone


def serve() -> None:
    """A worker: answer every chunk with its tokens, or with what is wrong with a line, until there are no more."""
    try:
        _serve()
    except BrokenPipeError:
        os._exit(0)  # the parent is gone
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once: an orderly exit would trip over the thread that is still reading


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library may print must not come between the answers
    first = _read_message(sys.stdin.buffer)
    if first is None:
        return
    options = first[0]
    encoding = Encoding(
        tokenizer=Path(options["tokenizer"]),
        extra_tokens=tuple(options["extra_tokens"]),
        json_keys=tuple(options["json_keys"]),
        eod_id=options["eod_id"],
    )
    # A thread receives, so that the parent can send the next chunk while this one is encoded.
    received: queue.Queue[Chunk | None] = queue.Queue(maxsize=_CHUNKS_PER_WORKER)
    threading.Thread(target=_receive_chunks, args=(received,), daemon=True).start()
    tokenizer = load_tokenizer(encoding.tokenizer, encoding.extra_tokens)
    while (chunk := received.get()) is not None:
        _write_message(answers, *_answer(tokenizer, encoding, chunk))


def _answer(tokenizer: Tokenizer, encoding: Encoding, chunk: Chunk) -> Message:
    try:
        encoded = encode_chunk(tokenizer, encoding, chunk)
    except DataError as error:
        return {"error": str(error)}, []
    arrays = [array for pair in encoded.documents for array in pair]
    return {"num_texts": encoded.num_texts}, [array.tobytes() for array in arrays]


def _receive_chunks(received: queue.Queue[Chunk | None]) -> None:
    while (message := _read_message(sys.stdin.buffer)) is not None:
        header, (content,) = message
        received.put(Chunk(Path(header["file"]), header["first_line"], content))
    received.put(None)


def _write_message(stream: IO[bytes], header: dict[str, Any], parts: Sequence[bytes]) -> None:
    stream.write(json.dumps(header | {"parts": [len(part) for part in parts]}).encode("ascii") + b"\n")
    for part in parts:
        stream.write(part)
    stream.flush()


def _read_message(stream: IO[bytes]) -> Message | None:
    """The next message, or None when the other side has closed, be it in the middle of one."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    header = json.loads(line)
    lengths = header.pop("parts")
    parts = [stream.read(length) for length in lengths]
    return (header, parts) if [len(part) for part in parts] == lengths else None
