"""Encoding in several processes, in the order of the input.

Each worker opens the tokenizer once and then answers chunks over its standard input and output. A chunk goes to the
worker that has the fewest, and answers are put back in order, so that a chunk that takes long holds up only its own
worker. How many chunks and bytes are under way is bounded, and memory with it. Workers are plain child processes in a
group of their own, so that Ctrl-C is the parent's to handle; they end when their input does, which is also when the
parent is killed. A message is the length of its header, the header in JSON, and the binary parts whose lengths the
header gives.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import selectors
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron.data.encode import Encoded, Encoding, encode_chunk
from megatron.data.instruction.conversation import Keys
from megatron.data.instruction.encode import ChatEncoding
from megatron.data.jsonl import BadLine, Chunk
from megatron.tokenizer import Form, Tokenizer, load_tokenizer
from megatron.utils.errors import MegatronError, ResourceError
from megatron.utils.logging import configure_logging

_CHUNKS_PER_WORKER = 2  # one that is encoded, one that waits
_AHEAD_PER_WORKER = 8  # chunks between the oldest that is not done and the newest that was sent
_BYTES_PER_WORKER = 4 << 20  # above this a chunk (one very long line) is sent only when nothing else is under way
_PIPE_BYTES = 1 << 20
_LENGTH = struct.Struct("<I")
_START = "import sys; sys.path[:] = sys.argv[1:]; from megatron.data.workers import serve; serve()"

Part = bytes | bytearray | memoryview
Message = tuple[dict[str, Any], list[bytes]]


def encode_in_workers(
    chunks: Iterable[Chunk],
    encoding: Encoding,
    *,
    vocab_size: int,
    workers: int,
    make_form: Callable[[], Form | None] = lambda: None,
) -> Iterator[Encoded]:
    """Encode chunks in `workers` processes, in order.

    `make_form` makes the tokenizer for a faster engine once for all of them, while they start. Raises ResourceError if
    a worker dies or runs out of memory. Closing the iterator ends the workers.
    """
    with _Pool(encoding.dtypes(vocab_size), workers) as pool:
        pool.begin(encoding, make_form())
        for chunk in chunks:
            while not pool.has_room_for(chunk):
                yield from pool.receive()
            pool.send(chunk)
        while pool.under_way:
            yield from pool.receive()


class _Pool:
    """The workers, and the answers that wait for an earlier one."""

    def __init__(self, dtypes: Sequence[np.dtype], workers: int) -> None:
        self._dtypes = dtypes
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._answers: dict[int, Encoded] = {}
        self._sent = self._given = 0
        try:
            for _ in range(workers):
                worker = _Worker()
                self._workers.append(worker)
                self._selector.register(worker.answers, selectors.EVENT_READ, worker)
        except BaseException:
            self._stop()
            raise

    def begin(self, encoding: Encoding, form: Form | None) -> None:
        """Tell every worker what to do with the chunks to come."""
        for number, worker in enumerate(self._workers):
            worker.begin(encoding, form, number)

    @property
    def under_way(self) -> int:
        """Chunks that were sent and whose answers were not given yet."""
        return self._sent - self._given

    def has_room_for(self, chunk: Chunk) -> bool:
        if not self.under_way:
            return True
        if self.under_way >= _AHEAD_PER_WORKER * len(self._workers):
            return False
        bytes_ahead = sum(worker.num_bytes for worker in self._workers) + len(chunk.content)
        return bytes_ahead <= _BYTES_PER_WORKER * len(self._workers) and self._freest().load < _CHUNKS_PER_WORKER

    def send(self, chunk: Chunk) -> None:
        self._freest().send_chunk(self._sent, chunk)
        self._sent += 1

    def receive(self) -> Iterator[Encoded]:
        """Wait for an answer; give those whose turn has come."""
        for key, _ in self._selector.select():
            worker: _Worker = key.data
            number, header, parts = worker.receive_answer()
            self._answers[number] = _encoded(header, parts, self._dtypes)
        while self._given in self._answers:
            encoded = self._answers.pop(self._given)
            self._given += 1
            yield encoded

    def _freest(self) -> _Worker:
        return min(self._workers, key=lambda worker: worker.load)

    def _stop(self) -> None:
        self._selector.close()
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()


class _Worker:
    """The parent's end of a worker."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # what a buffer holds, `select` does not see
            process_group=0,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._chunks, self.answers = self._process.stdin, self._process.stdout
        for pipe in (self._chunks, self.answers):
            with contextlib.suppress(OSError):  # only for speed, and a user may have no right to more
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._waiting: list[tuple[int, int]] = []  # (number, bytes) of the chunks it has, in its order

    def begin(self, encoding: Encoding, form: Form | None, number: int) -> None:
        """Say how to encode, by which form of the tokenizer, if there is one, and which worker it is."""
        header = asdict(encoding) | {"tokenizer": str(encoding.tokenizer), "worker": number}
        if form is None:
            self._send(header | {"form": None}, [])
        else:
            self._send(header | {"form": asdict(form) | {"content": ""}}, [form.content.encode()])

    @property
    def load(self) -> int:
        """Chunks that it has."""
        return len(self._waiting)

    @property
    def num_bytes(self) -> int:
        """Bytes of the chunks that it has."""
        return sum(num_bytes for _, num_bytes in self._waiting)

    def send_chunk(self, number: int, chunk: Chunk) -> None:
        header = {
            "file": str(chunk.file),
            "first_line": chunk.first_line,
            "columnar": chunk.columnar,
            "overlong_bytes": chunk.overlong_bytes,
        }
        self._send(header, [chunk.content])
        self._waiting.append((number, len(chunk.content)))

    def _send(self, header: dict[str, Any], parts: Sequence[Part]) -> None:
        try:
            _write_message(self._chunks, header, parts)
        except OSError as error:
            raise self._died() from error

    def receive_answer(self) -> tuple[int, dict[str, Any], list[bytes]]:
        """The answer to the oldest of its chunks, with the chunk's number."""
        message = _read_message(self.answers)
        if message is None:
            raise self._died()
        header, parts = message
        if "error" in header:
            raise ResourceError(header["error"])
        return self._waiting.pop(0)[0], header, parts

    def _died(self) -> ResourceError:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return ResourceError(f"a worker process {how}; if memory is short, use fewer --workers")

    def stop(self) -> None:
        self._process.kill()  # it holds nothing but memory
        self._process.wait()
        self._chunks.close()
        self.answers.close()


def _encoded(header: dict[str, Any], parts: Sequence[bytes], dtypes: Sequence[np.dtype]) -> Encoded:
    keys = (len(parts) - len(header["bad"])) // 3
    tokens, sizes, without = parts[:keys], parts[keys : 2 * keys], parts[2 * keys : 3 * keys]
    return Encoded(
        num_lines=header["num_lines"],
        num_texts=header["num_texts"],
        documents=tuple(
            (np.frombuffer(column, dtype), np.frombuffer(lengths, np.int64))
            for column, lengths, dtype in zip(tokens, sizes, dtypes, strict=True)
        ),
        without_document=tuple(np.frombuffer(places, np.int64) for places in without),
        bad=tuple(
            BadLine(place, reason, bytes(raw), num_bytes)
            for (place, reason, num_bytes), raw in zip(header["bad"], parts[3 * keys :], strict=True)
        ),
    )


def serve() -> None:
    """A worker: answer every chunk with its tokens and bad lines, until there are no more."""
    try:
        _serve()
    except BrokenPipeError:
        os._exit(0)  # the parent is gone
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once: an orderly exit would trip over the thread that is still reading


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library may print must not come between the answers
    first = _read_message(sys.stdin.buffer)
    if first is None:
        return
    configure_logging(first[0].pop("worker"))  # the first tells by which engine texts are encoded
    form = _form(first[0].pop("form"), first[1])
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in first[0].items()
    }
    if fields["chat"] is not None:
        fields["chat"] = ChatEncoding(**fields["chat"] | {"keys": Keys(**fields["chat"]["keys"])})
    encoding = Encoding(**fields | {"tokenizer": Path(first[0]["tokenizer"])})
    # A thread receives, so that the parent can send the next chunk while this one is encoded.
    received: queue.Queue[Chunk | None] = queue.Queue(maxsize=_CHUNKS_PER_WORKER)
    threading.Thread(target=_receive_chunks, args=(received,), daemon=True).start()
    try:
        tokenizer = load_tokenizer(encoding.tokenizer, encoding.extra_tokens, form)
    except MegatronError as error:  # it changed since the parent opened it
        _write_message(answers, {"error": str(error)}, [])
        return
    while (chunk := received.get()) is not None:
        _write_message(answers, *_answer(tokenizer, encoding, chunk))
        del chunk  # it may be large, and the next one comes while this name would still hold it


def _form(fields: dict[str, Any] | None, parts: Sequence[bytes]) -> Form | None:
    if fields is None:
        return None
    (content,) = parts
    return Form(**fields | {"content": content.decode(), "library_only": tuple(fields["library_only"])})


def _answer(tokenizer: Tokenizer, encoding: Encoding, chunk: Chunk) -> tuple[dict[str, Any], list[Part]]:
    try:
        encoded = encode_chunk(tokenizer, encoding, chunk)
    except MemoryError:
        return {"error": f"{chunk.file}, line {chunk.first_line}: not enough memory for a line as long as this"}, []
    header = {
        "num_lines": encoded.num_lines,
        "num_texts": encoded.num_texts,
        "bad": [(line.place, line.reason, line.num_bytes) for line in encoded.bad],
    }
    arrays = [*(tokens for tokens, _ in encoded.documents), *(sizes for _, sizes in encoded.documents)]
    parts: list[Part] = [array.tobytes() for array in arrays]
    parts += [places.astype(np.int64).tobytes() for places in encoded.without_document]
    return header, [*parts, *(line.raw for line in encoded.bad)]


def _receive_chunks(received: queue.Queue[Chunk | None]) -> None:
    while (message := _read_message(sys.stdin.buffer)) is not None:
        header, (content,) = message
        received.put(Chunk(content=content, **header | {"file": Path(header["file"])}))
        del message, content
    received.put(None)


def _write_message(stream: IO[bytes], header: dict[str, Any], parts: Sequence[Part]) -> None:
    text = json.dumps(header | {"parts": [len(part) for part in parts]}).encode("ascii")
    for part in (_LENGTH.pack(len(text)) + text, *parts):
        rest = memoryview(part)
        while rest:
            written = stream.write(rest)
            rest = rest[written:]


def _read_message(stream: IO[bytes]) -> Message | None:
    """The next message, or None when the other side has closed, be it in the middle of one."""
    try:
        (length,) = _LENGTH.unpack(_read(stream, _LENGTH.size))
        header = json.loads(_read(stream, length))
        return header, [_read(stream, size) for size in header.pop("parts")]
    except EOFError:
        return None


def _read(stream: IO[bytes], size: int) -> bytes:
    """Exactly `size` bytes. (A pipe gives at most what it holds.) Raises EOFError when there are not so many."""
    first = stream.read(size)
    if len(first) == size:
        return first
    content = bytearray(size)
    content[: len(first)] = first
    at = len(first)
    with memoryview(content) as view:
        while at < size:
            count: int = stream.readinto(view[at:])  # type: ignore[attr-defined]  # both kinds of stream have it
            if not count:
                raise EOFError
            at += count
    return content  # type: ignore[return-value]  # bytes to all who read it
