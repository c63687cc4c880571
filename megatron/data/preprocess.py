"""`megatron preprocess`: JSON lines to `.bin/.idx` pairs, one per JSON key.

This module owns the checks before the work, the progress, and that the outcome is whole pairs or nothing.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from megatron.data.encode import Encoded, Encoding, encode_here
from megatron.data.indexed import IndexedWriter, dtype_for_vocabulary
from megatron.data.jsonl import CHUNK_BYTES, Chunk, ReadFile, read_chunks
from megatron.data.provenance import Provenance, provenance_path, write_provenance
from megatron.data.workers import encode_in_workers
from megatron.tokenizer import Tokenizer, load_tokenizer
from megatron.utils.errors import ConfigError, DataError, ResourceError
from megatron.utils.files import ensure_writable_folder
from megatron.utils.logging import get_logger
from megatron.utils.units import format_bytes, format_count, format_duration

_LOGGER = get_logger(__name__)
_PROGRESS_S = 10.0


@dataclass(frozen=True)
class PreprocessOptions:
    """What the command line asks for; `eod_token` None means the tokenizer's end of sentence."""

    inputs: tuple[Path, ...]
    output_prefix: str
    tokenizer: Path
    workers: int = 1
    append_eod: bool = False
    eod_token: str | None = None
    json_keys: tuple[str, ...] = ("text",)
    extra_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """A pair that was written."""

    prefix: str
    documents: int
    tokens: int


def preprocess(options: PreprocessOptions) -> list[Pair]:
    """Tokenize JSON lines into `{output_prefix}_{key}_document.{bin,idx,json}`, in the order of the input.

    Raises ConfigError, DataError or ResourceError; nothing is then written, and what was there before is left.
    """
    _check_options(options)
    total_bytes = _check_inputs(options.inputs)
    _check_no_input_is_output(options)
    tokenizer = load_tokenizer(options.tokenizer, options.extra_tokens)
    eod_id = _eod_id(tokenizer, options)
    ensure_writable_folder(Path(options.output_prefix).parent, "--output-prefix")
    return _Run(options, tokenizer, eod_id, total_bytes).write_pairs()


class _Run:
    """One tokenization under way."""

    def __init__(self, options: PreprocessOptions, tokenizer: Tokenizer, eod_id: int | None, total_bytes: int) -> None:
        self._options = options
        self._tokenizer = tokenizer
        self._eod_id = eod_id
        self._dtype = dtype_for_vocabulary(tokenizer.vocab_size)
        self._progress = _Progress(total_bytes)
        self._read_files: list[ReadFile] = []
        self._documents = [dict.fromkeys(options.inputs, 0) for _ in options.json_keys]  # per key and file

    def write_pairs(self) -> list[Pair]:
        prefixes = _output_prefixes(self._options)
        try:
            with ExitStack() as stack:
                writers = [stack.enter_context(IndexedWriter(prefix, self._dtype)) for prefix in prefixes]
                with closing(self._encoded()) as encoded_chunks:
                    for encoded in encoded_chunks:
                        self._add(writers, encoded)
                self._finish(writers)
        except OSError as error:
            raise ResourceError(
                f"writing {self._options.output_prefix}_* failed: {error.strerror or error}; "
                "nothing was kept; free some space or choose another folder"
            ) from error
        self._progress.tell_end(writers, self._dtype.name)
        return [Pair(writer.prefix, writer.num_documents, writer.num_tokens) for writer in writers]

    def _encoded(self) -> Generator[Encoded, None, None]:
        options = self._options
        encoding = Encoding(
            options.tokenizer, options.extra_tokens, options.json_keys, self._eod_id if options.append_eod else None
        )
        chunks = self._chunks()
        # Starting a process takes longer than encoding a chunk.
        workers = min(options.workers, -(-self._progress.total_bytes // CHUNK_BYTES))
        if workers <= 1:
            yield from encode_here(chunks, self._tokenizer, encoding)
        else:
            yield from encode_in_workers(chunks, encoding, vocab_size=self._tokenizer.vocab_size, workers=workers)

    def _chunks(self) -> Iterator[Chunk]:
        for file in self._options.inputs:
            yield from read_chunks(file, self._read_files.append)

    def _add(self, writers: Sequence[IndexedWriter], encoded: Encoded) -> None:
        for writer, (tokens, sizes), documents in zip(writers, encoded.documents, self._documents, strict=True):
            writer.add_documents(tokens, sizes)
            documents[encoded.file] += len(sizes)
        self._progress.add(encoded, sum(tokens.size for tokens, _ in encoded.documents))

    def _finish(self, writers: Sequence[IndexedWriter]) -> None:
        """Put the pairs in place, or raise if one would be empty."""
        for writer, key in zip(writers, self._options.json_keys, strict=True):
            if writer.num_documents == 0:
                raise DataError(
                    f"no line of {', '.join(map(str, self._options.inputs))} has any tokens under {key!r}; "
                    "nothing was written"
                )
        for writer, key, documents in zip(writers, self._options.json_keys, self._documents, strict=True):
            provenance_path(writer.prefix).unlink(missing_ok=True)  # it may describe the pair that is about to go
            writer.close()
            write_provenance(writer.prefix, self._provenance(writer, key, documents))

    def _provenance(self, writer: IndexedWriter, key: str, documents: dict[Path, int]) -> Provenance:
        sources = [
            {"file": str(read.file), "bytes": read.num_bytes, "sha256": read.sha256, "documents": documents[read.file]}
            for read in self._read_files
        ]
        return Provenance(
            tokenizer=self._tokenizer.files[0].name,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            vocabulary_size=self._tokenizer.vocab_size,
            added_tokens=self._tokenizer.added_tokens,
            eod_id=self._eod_id,
            append_eod=self._options.append_eod,
            json_key=key,
            dtype=self._dtype.name,
            documents=writer.num_documents,
            tokens=writer.num_tokens,
            sources=sources,
        )


class _Progress:
    """Says every ten seconds how far the work is and how fast it goes, and at the end what was done."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._read_bytes = 0
        self._texts = 0
        self._tokens = 0
        self._start_s = self._told_s = time.monotonic()

    def add(self, encoded: Encoded, tokens: int) -> None:
        self._read_bytes += encoded.num_bytes
        self._texts += encoded.num_texts
        self._tokens += tokens
        now_s = time.monotonic()
        if now_s - self._told_s >= _PROGRESS_S:
            self._told_s = now_s
            left_s = (now_s - self._start_s) * (self.total_bytes / self._read_bytes - 1)
            _LOGGER.info(
                "%s of %s (%.0f %%), %s tokens, %s, about %s left",
                format_bytes(self._read_bytes),
                format_bytes(self.total_bytes),
                100 * self._read_bytes / self.total_bytes,
                format_count(self._tokens),
                self._rates(now_s),
                format_duration(max(0.0, left_s)),
            )

    def tell_end(self, writers: Sequence[IndexedWriter], dtype: str) -> None:
        now_s = time.monotonic()
        for writer in writers:
            _LOGGER.info(
                "wrote %s.{bin,idx,json}: %s documents, %s tokens (%s); %s texts had no tokens",
                writer.prefix,
                f"{writer.num_documents:,}",
                f"{writer.num_tokens:,}",
                dtype,
                f"{self._texts - writer.num_documents:,}",
            )
        _LOGGER.info(
            "read %s in %s: %s",
            format_bytes(self._read_bytes),
            format_duration(now_s - self._start_s),
            self._rates(now_s),
        )

    def _rates(self, now_s: float) -> str:
        elapsed_s = max(now_s - self._start_s, 1e-9)
        return f"{self._read_bytes / elapsed_s / 1e6:.1f} MB/s, {format_count(self._tokens / elapsed_s)} tokens/s"


def _output_prefixes(options: PreprocessOptions) -> list[str]:
    return [f"{options.output_prefix}_{key}_document" for key in options.json_keys]


def _check_options(options: PreprocessOptions) -> None:
    if options.workers < 1:
        raise ConfigError(f"--workers {options.workers} is not a number of processes; use 1 or more")
    if len(set(options.json_keys)) != len(options.json_keys):
        raise ConfigError(f"--json-keys {' '.join(options.json_keys)} names a key twice; name each once")
    unusable = [key for key in options.json_keys if not key or "/" in key]
    if unusable:
        raise ConfigError(f"--json-keys: {unusable[0]!r} cannot be part of a file name; rename the key in the input")
    if not Path(options.output_prefix).name or options.output_prefix.endswith(("/", "/.")):
        raise ConfigError(
            f"--output-prefix {options.output_prefix} is a folder; add the first part of a file name, "
            f"as in {options.output_prefix.rstrip('/.')}/corpus"
        )


def _check_inputs(inputs: Sequence[Path]) -> int:
    """Check that every input is a file, each given once; the sum of their sizes in bytes."""
    wrong = [f"{file} ({'not a file' if file.exists() else 'not there'})" for file in inputs if not file.is_file()]
    if wrong:
        raise DataError(f"--input: {', '.join(wrong)}; give JSON-lines files")
    seen: dict[Path, Path] = {}
    for file in inputs:
        if (first := seen.setdefault(file.resolve(), file)) is not file:
            raise ConfigError(
                f"--input names the same file twice ({first} and {file}); name it once, and repeat it by its weight in "
                "a blend if that is meant"
            )
    for file in inputs:
        if file.stat().st_size == 0:
            _LOGGER.warning("%s is empty", file)
    return sum(file.stat().st_size for file in inputs)


def _check_no_input_is_output(options: PreprocessOptions) -> None:
    outputs = {provenance_path(prefix).resolve() for prefix in _output_prefixes(options)}
    if overwritten := [file for file in options.inputs if file.resolve() in outputs]:
        raise ConfigError(f"{overwritten[0]} is an input and would be overwritten; choose another --output-prefix")


def _eod_id(tokenizer: Tokenizer, options: PreprocessOptions) -> int | None:
    if options.eod_token is not None:
        eod_id = tokenizer.token_id(options.eod_token)
        if eod_id is None:
            raise ConfigError(
                f"--eod-token {options.eod_token!r} is not in the vocabulary of {options.tokenizer}; "
                "name one that is, or add it with --extra-tokens"
            )
        return eod_id
    if tokenizer.eos_id is None and options.append_eod:
        raise ConfigError(
            f"--append-eod: {options.tokenizer} does not say which token ends a sentence; name it with --eod-token"
        )
    return tokenizer.eos_id
