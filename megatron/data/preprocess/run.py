"""One run of `megatron preprocess`: JSON lines to `.bin/.idx` pairs, one per JSON key.

This module owns the checks before the work, the order of things, and that the outcome is whole pairs, or progress that
the same command goes on with, or nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron.data.encode import Encoded, Encoding, encode_here
from megatron.data.jsonl import Chunk
from megatron.data.preprocess.inputs import STANDARD_INPUT, Source, find_sources, take_shard
from megatron.data.preprocess.journal import (
    Journal,
    Recorder,
    Snapshot,
    choose_snapshot,
    only_run,
    read_journal,
    write_journal,
)
from megatron.data.preprocess.options import PreprocessOptions
from megatron.data.preprocess.outputs import Lengths, Outputs, publish, quarantine_path, write_partial_provenance
from megatron.data.preprocess.progress import Progress
from megatron.data.preprocess.reading import CHUNK_BYTES, Position, read_chunks, start_of
from megatron.data.preprocess.tally import Tally, length
from megatron.data.provenance import Provenance, provenance_path, read_provenance
from megatron.data.workers import encode_in_workers
from megatron.tokenizer import Tokenizer, load_tokenizer
from megatron.utils.errors import ConfigError, DataError, ResourceError
from megatron.utils.files import ensure_writable_folder
from megatron.utils.logging import get_logger
from megatron.utils.units import format_bytes

_LOGGER = get_logger(__name__)
_TOLD_BAD_LINES = 3
_UNPACKED_TIMES = 4  # about how much longer text is than its archive


@dataclass(frozen=True)
class Pair:
    """A pair that was written."""

    prefix: str
    documents: int
    tokens: int


def preprocess(options: PreprocessOptions) -> list[Pair]:
    """Tokenize JSON lines into `{output_prefix}_{key}_document.{bin,idx,json}`, in the order of the input.

    Raises ConfigError, DataError or ResourceError; what was there before is then left, and what was done is kept for
    the same command to go on with if the work took longer than a moment.
    """
    options.check()
    sources = find_sources(options.inputs)
    if options.shard is not None:
        sources = take_shard(sources, options.shard)
    _check_no_input_is_output(options, sources)
    tokenizer = load_tokenizer(options.tokenizer, options.extra_tokens)
    encoding = _encoding(tokenizer, options)
    ensure_writable_folder(Path(options.output_prefix).parent, "--output-prefix")
    with only_run(options.run_prefix):
        return _Run(options, sources, tokenizer, encoding).write_pairs()


class TooManyBadLines(DataError):
    """More lines are bad than the budget allows."""


class _Run:
    """One tokenization under way."""

    def __init__(
        self, options: PreprocessOptions, sources: Sequence[Source], tokenizer: Tokenizer, encoding: Encoding
    ) -> None:
        self._options, self._sources = options, list(sources)
        self._tokenizer, self._encoding = tokenizer, encoding
        self._eod_id = _eod_id(tokenizer, options)
        self._that_matter = options.that_matter(tokenizer.fingerprint, self._eod_id)
        self._journal_path = Path(f"{options.run_prefix}.progress.json")
        self._resumable = not any(source.is_stream for source in sources)
        self._under_way: deque[tuple[int, Position, Position, int]] = deque()  # of the chunks that are encoded now

    def write_pairs(self) -> list[Pair]:
        """Do the work, from where an earlier run left it."""
        if self._options.restart:
            self._journal_path.unlink(missing_ok=True)
        journal = read_journal(self._journal_path)
        begin = (
            None if journal is None else choose_snapshot(journal, self._journal_path, self._that_matter, self._sources)
        )
        if journal is not None and journal.complete:
            return self._publish()
        self._recorder = Recorder(self._journal_path, exists=journal is not None)
        try:
            self._open(journal, begin)  # outputs that cannot be opened leave nothing
            try:
                with closing(self._encoded()) as encoded_chunks:
                    for encoded in encoded_chunks:
                        self._add(encoded)
                self._finish()
            except BaseException as error:
                self._progress.clear()
                self._stop(keep_quarantine=isinstance(error, TooManyBadLines))
                raise
        except OSError as error:
            kept = (
                "what was done is kept for the same command to go on with"
                if self._recorder.exists
                else ("nothing was kept")
            )
            raise ResourceError(
                f"writing {self._options.run_prefix}_* failed: {error.strerror or error}; {kept}; "
                "free some space or choose another folder"
            ) from error
        return self._publish()

    def _open(self, journal: Journal | None, begin: Snapshot | None) -> None:
        options = self._options
        lengths = None if begin is None else Lengths(begin.pairs, begin.gap_entries, begin.quarantine_bytes)
        dtypes = self._encoding.dtypes(self._tokenizer.vocab_size)
        self._outputs = Outputs(options.run_prefix, options.pair_prefixes, dtypes, lengths)
        self._tally = Tally(self._sources, len(options.pair_prefixes), self._outputs.lengths)
        if journal is not None and begin is not None:
            self._tally.go_on(journal, begin)
            done = f"{format_bytes(begin.done_bytes)} of {format_bytes(self._total_bytes or 0)}"
            _LOGGER.info("going on after %s, which an earlier run has done", done)
        if not self._resumable:
            _LOGGER.info("what is piped in can be read only once: an interrupted run cannot be continued")
        self._progress = Progress(self._total_bytes, self._tally.latest.done_bytes)

    @property
    def _total_bytes(self) -> int | None:
        if not self._resumable:
            return None
        return sum(length(source, source.begin) for source in self._sources)

    def _encoded(self) -> Generator[Encoded, None, None]:
        chunks = self._chunks()
        workers = min(self._options.workers, self._worth_workers())
        if workers <= 1:
            yield from encode_here(chunks, self._tokenizer, self._encoding)
        else:
            yield from encode_in_workers(
                chunks,
                self._encoding,
                vocab_size=self._tokenizer.vocab_size,
                workers=workers,
                make_form=self._tokenizer.form,
            )

    def _worth_workers(self) -> int:
        """Starting a process takes longer than encoding a chunk."""
        if self._total_bytes is None:
            return self._options.workers
        packed = any(source.kind != "plain" for source in self._sources)
        text_bytes = (self._total_bytes - self._tally.latest.done_bytes) * (_UNPACKED_TIMES if packed else 1)
        return -(-text_bytes // CHUNK_BYTES)

    def _chunks(self) -> Iterator[Chunk]:
        first, position = self._tally.latest.source, self._tally.latest.position
        for number, source in enumerate(self._sources[first:], start=first):
            before = position if number == first else start_of(source)
            done = partial(self._tally.read.__setitem__, number)
            for chunk, behind in read_chunks(source, self._options.read_keys, before, done):
                self._under_way.append((number, before, behind, len(chunk.content)))
                before = behind
                yield chunk

    def _add(self, encoded: Encoded) -> None:
        """Append a chunk's documents, count, and now and then record how far that is."""
        number, before, behind, num_bytes = self._under_way.popleft()
        self._tally.reach(number)
        self._outputs.add(number, before.lines, encoded)
        told_before, told = self._tally.latest.first_bad, self._quarantine(number, before, encoded)
        self._tally.add(encoded, behind, told, self._outputs.lengths)
        latest, options = self._tally.latest, self._options
        self._progress.add(latest.done_bytes, num_bytes, sum(tokens.size for tokens, _ in encoded.documents))
        if encoded.bad and options.max_bad_lines.is_lost(
            latest.all_bad_lines, self._tally.most_lines(options.read_keys)
        ):
            raise self._too_many_bad_lines()
        if told and not told_before:
            self._progress.clear()
            _LOGGER.warning("%s; bad lines go to %s", told[0], quarantine_path(options.run_prefix))
        if self._resumable and self._recorder.is_due():
            self._outputs.flush()
            self._recorder.record(self._journal, [self._outputs])

    def _quarantine(self, number: int, before: Position, encoded: Encoded) -> tuple[str, ...]:
        """Keep the bad lines; the first ones of the run as messages."""
        source, told = self._sources[number], self._tally.latest.first_bad
        origin = {} if not source.begin else {"from_row" if source.kind == "parquet" else "from_byte": source.begin}
        for bad in encoded.bad:
            line = before.lines + bad.place + 1
            self._outputs.quarantine.add(source.file, line, origin, bad)
            if len(told) < _TOLD_BAD_LINES:
                since = "".join(f" after {name.removeprefix('from_')} {at:,}" for name, at in origin.items())
                told = (*told, f"{_name(source.file)}, line {line}{since}: {bad.reason}")
        return told

    def _journal(self, *, complete: bool = False) -> Journal:
        return self._tally.journal(self._that_matter, complete=complete)

    def _too_many_bad_lines(self) -> TooManyBadLines:
        latest, path = self._tally.latest, quarantine_path(self._options.run_prefix)
        more = "" if latest.all_bad_lines <= len(latest.first_bad) else "; …"
        return TooManyBadLines(
            f"{'; '.join(latest.first_bad)}{more}; {self._options.line_rule}: {latest.all_bad_lines:,} of "
            f"{latest.lines:,} lines are bad, and --max-bad-lines {self._options.max_bad_lines.text} allows fewer; "
            f"they are in {path.name}.partial; mend them, or allow more"
        )

    def _finish(self) -> None:
        """Make the outputs whole, or raise if they cannot be."""
        self._tally.reach(len(self._sources))
        latest = self._tally.latest
        if self._options.max_bad_lines.is_exceeded(latest.all_bad_lines, latest.lines):
            raise self._too_many_bad_lines()
        for number, writer in enumerate(self._outputs.writers):
            if writer.num_documents == 0 and self._options.shard is None:
                raise DataError(
                    f"no line of {', '.join(_name(Path(name)) for name in self._options.inputs)} has any tokens under "
                    f"{self._key_of(number)!r}; nothing was written"
                )
        self._recorder.wait()  # it may be putting on the disk what is closed now
        for number, writer in enumerate(self._outputs.writers):
            write_partial_provenance(writer.prefix, self._provenance(number))
        self._outputs.flush()
        self._outputs.sync()
        self._outputs.leave()
        self._recorder.exists = True
        write_journal(self._journal_path, self._journal(complete=True))
        self._tell_end(latest)

    def _tell_end(self, latest: Snapshot) -> None:
        self._progress.clear()
        for writer in self._outputs.writers:
            _LOGGER.info(
                "wrote %s.{bin,idx,json}: %s documents, %s tokens (%s); %s texts had no tokens",
                writer.prefix,
                f"{writer.num_documents:,}",
                f"{writer.num_tokens:,}",
                writer.dtype.name,
                f"{latest.texts - writer.num_documents:,}",
            )
        if latest.all_bad_lines:
            _LOGGER.warning(
                "%s of %s lines were bad; they are in %s",
                f"{latest.all_bad_lines:,}",
                f"{latest.lines:,}",
                quarantine_path(self._options.run_prefix),
            )
        _LOGGER.info("%s", self._progress.summary())

    def _publish(self) -> list[Pair]:
        """Give the outputs their names."""
        publish(self._options.run_prefix, self._options.pair_prefixes)
        self._journal_path.unlink(missing_ok=True)
        pairs = []
        for prefix in self._options.pair_prefixes:
            provenance = read_provenance(prefix)
            if provenance is None:
                raise DataError(f"{provenance_path(prefix)} is gone: it was removed meanwhile; tokenize again")
            pairs.append(Pair(prefix, provenance.documents, provenance.tokens))
        return pairs

    def _stop(self, *, keep_quarantine: bool) -> None:
        """Keep what was done if anything was recorded before, else remove it."""
        with suppress(OSError):  # what was recorded last is still good
            self._recorder.wait()
        if not self._recorder.exists:
            with suppress(OSError):  # the first error is the one worth telling
                self._outputs.flush()
            self._outputs.remove(keep_quarantine=keep_quarantine)
            return
        with suppress(OSError):
            self._outputs.flush()
            self._outputs.sync()
            write_journal(self._journal_path, self._journal())
        with suppress(OSError):
            self._outputs.leave()
        _LOGGER.info("what was done is kept: the same command goes on with it")

    def _provenance(self, number: int) -> Provenance:
        options, writer = self._options, self._outputs.writers[number]
        names = ("prepend_bos", "special_tokens", "shard", *(["chat"] if options.chat is not None else []))
        return Provenance(
            tokenizer=self._tokenizer.files[0].name,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            vocabulary_size=self._tokenizer.vocab_size,
            added_tokens=self._tokenizer.added_tokens,
            eod_id=self._eod_id,
            append_eod=options.append_eod,
            json_key=self._key_of(number),
            dtype=writer.dtype.name,
            documents=writer.num_documents,
            tokens=writer.num_tokens,
            sources=self._tally.sources_of(number, self._outputs.gaps[number].ranges()),
            options={name: self._that_matter[name] for name in names} | {"max_bad_lines": options.max_bad_lines.text},
            checksums=self._outputs.finish(number),
        )

    def _key_of(self, number: int) -> str:
        """The keys of a pair's texts, in words."""
        options = self._options
        return options.json_keys[number] if options.chat is None else ", ".join(options.read_keys)


def _name(file: Path) -> str:
    return "standard input" if file == STANDARD_INPUT else str(file)


def _check_no_input_is_output(options: PreprocessOptions, sources: Sequence[Source]) -> None:
    outputs = {provenance_path(prefix).resolve() for prefix in options.pair_prefixes}
    outputs |= {quarantine_path(options.run_prefix).resolve()}
    if overwritten := [source.file for source in sources if source.file.resolve() in outputs]:
        raise ConfigError(f"{overwritten[0]} is an input and would be overwritten; choose another --output-prefix")


def _encoding(tokenizer: Tokenizer, options: PreprocessOptions) -> Encoding:
    eod_id = _eod_id(tokenizer, options)
    if options.prepend_bos and tokenizer.bos_id is None:
        raise ConfigError(f"--prepend-bos: {options.tokenizer} does not say which token begins a sentence")
    return Encoding(
        options.tokenizer,
        options.extra_tokens,
        options.json_keys,
        eod_id if options.append_eod else None,
        tokenizer.bos_id if options.prepend_bos else None,
        options.special_tokens,
        options.chat,
    )


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
