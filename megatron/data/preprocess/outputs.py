"""The files that a run writes: a pair and its gaps per key, and the quarantine. All of them go on together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.data.encode import Encoded
from megatron.data.indexed import IndexedWriter, Written, publish_pair
from megatron.data.preprocess.gaps import GapFile
from megatron.data.preprocess.quarantine import Quarantine, publish_quarantine
from megatron.data.provenance import Provenance, provenance_path, provenance_text
from megatron.utils.errors import DataError
from megatron.utils.files import fsync_folder, sha256_file, write_atomically

_ENDING = ".partial"


@dataclass(frozen=True)
class Lengths:
    """How long the outputs are."""

    pairs: tuple[Written, ...]
    gap_entries: tuple[int, ...]
    quarantine_bytes: int


class Outputs:
    """The outputs of a run with this prefix, begun or, if `lengths` are given, gone on with from there."""

    def __init__(
        self,
        run_prefix: str,
        pair_prefixes: Sequence[str],
        dtypes: Sequence[np.dtype],
        lengths: Lengths | None,
    ) -> None:
        self.writers: list[IndexedWriter] = []
        self.gaps: list[GapFile] = []
        try:
            with ExitStack() as stack:
                self._open(run_prefix, pair_prefixes, dtypes, lengths, stack)
                self._files = stack.pop_all()
        except (DataError, FileNotFoundError) as error:
            if lengths is None:
                raise
            raise DataError(f"the earlier run cannot be gone on with: {error}; add --restart to begin again") from error

    def _open(
        self,
        run_prefix: str,
        pair_prefixes: Sequence[str],
        dtypes: Sequence[np.dtype],
        lengths: Lengths | None,
        stack: ExitStack,
    ) -> None:
        pairs = [None] * len(pair_prefixes) if lengths is None else lengths.pairs
        entries = [0] * len(pair_prefixes) if lengths is None else lengths.gap_entries
        for prefix, dtype, written, kept in zip(pair_prefixes, dtypes, pairs, entries, strict=True):
            self.writers.append(IndexedWriter(prefix, dtype, ending=_ENDING, written=written))
            stack.callback(self.writers[-1].leave)
            self.gaps.append(GapFile(prefix, kept))
            stack.callback(self.gaps[-1].close)
        self.quarantine = Quarantine(quarantine_path(run_prefix), 0 if lengths is None else lengths.quarantine_bytes)
        stack.callback(self.quarantine.close)

    @property
    def lengths(self) -> Lengths:
        """What was added so far, which is in the files after `flush`."""
        return Lengths(
            tuple(writer.written for writer in self.writers),
            tuple(gaps.num_entries for gaps in self.gaps),
            self.quarantine.num_bytes,
        )

    def add(self, source: int, lines_before: int, encoded: Encoded) -> None:
        """Append the documents of a chunk, which begins after `lines_before` lines of a source, and note its gaps."""
        for writer, (tokens, sizes) in zip(self.writers, encoded.documents, strict=True):
            writer.add_documents(tokens, sizes)
        for gaps, places in zip(self.gaps, encoded.without_document, strict=True):
            gaps.add(source, places + lines_before + 1)

    def flush(self) -> None:
        """Hand what was added to the operating system."""
        for output in self._all():
            output.flush()

    def sync(self) -> None:
        """Have on the disk what was flushed. May be called from another thread."""
        for output in self._all():
            output.sync()

    def _all(self) -> list[IndexedWriter | GapFile | Quarantine]:
        return [*self.writers, *self.gaps, self.quarantine]

    def finish(self, number: int) -> dict[str, object]:
        """Complete a pair under its temporary names; its checksums."""
        writer = self.writers[number]
        writer.finish()
        num_bytes = writer.num_tokens * writer.dtype.itemsize
        return {
            "bin": [{"bytes": num_bytes, "sha256": writer.bin_sha256}],
            "idx": sha256_file(writer.partial_idx),
        }

    def leave(self) -> None:
        """Close the files as they are."""
        self._files.close()

    def remove(self, *, keep_quarantine: bool) -> None:
        """Remove what was written."""
        self.leave()
        paths = [path for writer in self.writers for path in (writer.partial_bin, writer.partial_idx)]
        paths += [_partial_provenance(writer.prefix) for writer in self.writers]
        paths += [gaps.path for gaps in self.gaps]
        for path in paths if keep_quarantine else [*paths, self.quarantine.partial]:
            path.unlink(missing_ok=True)


def quarantine_path(run_prefix: str) -> Path:
    """Where a run's bad lines are kept."""
    return Path(f"{run_prefix}.quarantine.jsonl")


def write_partial_provenance(prefix: str, provenance: Provenance) -> None:
    """Write a pair's `.json` under its temporary name."""
    write_atomically(_partial_provenance(prefix), provenance_text(provenance))


def publish(run_prefix: str, pair_prefixes: Sequence[str]) -> None:
    """Give all finished outputs their names. What is done already is passed over, so that it can be done again."""
    for prefix in pair_prefixes:
        partial_bin, partial_idx = (Path(f"{prefix}{suffix}{_ENDING}") for suffix in (".bin", ".idx"))
        if partial_bin.exists():
            provenance_path(prefix).unlink(missing_ok=True)  # it may describe the pair that is about to go
        publish_pair(prefix, partial_bin, partial_idx)
        if _partial_provenance(prefix).exists():
            _partial_provenance(prefix).replace(provenance_path(prefix))
        Path(f"{prefix}.lines{_ENDING}").unlink(missing_ok=True)
    path = quarantine_path(run_prefix)
    publish_quarantine(path, path.with_name(path.name + _ENDING))
    fsync_folder(path.parent)


def _partial_provenance(prefix: str) -> Path:
    path = provenance_path(prefix)
    return path.with_name(path.name + _ENDING)
