"""What a run has counted: how far it is in its sources, and what each of them gave. It must not know of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron.data.encode import Encoded
from megatron.data.preprocess.inputs import Source
from megatron.data.preprocess.journal import Journal, Snapshot
from megatron.data.preprocess.outputs import Lengths
from megatron.data.preprocess.reading import Position, ReadSource, start_of


class Tally:
    """Counts of the run so far (`latest`), of the run when the source under way began (`source_start`), and records of
    the sources before (`finished`).

    `read` is filled by whoever reads: what was read of a source, once that is at its end.
    """

    def __init__(self, sources: Sequence[Source], pairs: int, lengths: Lengths) -> None:
        self._sources = sources
        position = start_of(sources[0]) if sources else Position(0, 0, 0)
        self.latest = Snapshot(0, position, (0,) * pairs, 0, 0, 0, 0, (), done_bytes=0, **vars(lengths))
        self.source_start = self.latest
        self.finished: list[dict[str, Any]] = []
        self.read: dict[int, ReadSource] = {}

    def go_on(self, journal: Journal, begin: Snapshot) -> None:
        """Take up the counts of an earlier run at one of its snapshots."""
        self.latest, self.source_start = begin, journal.source_start
        self.finished = journal.finished[: begin.source]

    def reach(self, number: int) -> None:
        """Go over to a source, which comes after the one under way; past the last one, all are finished."""
        while self.latest.source < number:
            self._finish_source()

    def add(self, encoded: Encoded, behind: Position, first_bad: tuple[str, ...], lengths: Lengths) -> None:
        """Count a chunk of the source under way, which ends at `behind`; the outputs are now so long."""
        latest, bad = self.latest, len(encoded.bad)
        counted = zip(latest.documents, encoded.documents, strict=True)
        self.latest = replace(
            latest,
            position=behind,
            documents=tuple(count + len(sizes) for count, (_, sizes) in counted),
            bad_lines=latest.bad_lines + bad,
            lines=latest.lines + encoded.num_texts + bad,
            texts=latest.texts + encoded.num_texts,
            all_bad_lines=latest.all_bad_lines + bad,
            first_bad=first_bad,
            done_bytes=latest.done_bytes + behind.raw_bytes - latest.position.raw_bytes,
            **vars(lengths),
        )

    def _finish_source(self) -> None:
        latest, number = self.latest, self.latest.source
        source, read = self._sources[number], self.read.pop(number)
        self.finished.append(
            {
                "file": str(source.file),
                "bytes": read.num_bytes,
                "sha256": read.sha256,
                **({"begin": source.begin} if source.begin else {}),
                "documents": list(latest.documents),
                "lines": latest.position.lines,
                "bad_lines": latest.bad_lines,
            }
        )
        left = self._sources[number + 1 :]
        self.latest = replace(
            latest,
            source=number + 1,
            position=start_of(left[0]) if left else Position(0, 0, 0),
            documents=(0,) * len(latest.documents),
            bad_lines=0,
            done_bytes=latest.done_bytes + length(source, source.begin) - latest.position.raw_bytes,
        )
        self.source_start = self.latest

    def journal(self, options: dict[str, Any], *, complete: bool = False) -> Journal:
        """What is to be recorded of the run."""
        begun = list(self._sources[: self.latest.source + 1])
        return Journal(options, begun, list(self.finished), self.source_start, self.latest, complete)

    def most_lines(self, keys: Sequence[str]) -> int | None:
        """The most lines that the run can have, those to come being as short as can be; None: unknown."""
        left = self._sources[self.latest.source :]
        if any(source.kind != "plain" or source.is_stream for source in left):
            return None
        left_bytes = length(left[0], self.latest.position.offset)
        left_bytes += sum(length(source, source.begin) for source in left[1:])
        shortest = len("{}\n") + sum(len(f'"{key}":"",'.encode()) for key in keys) - len(",")
        return self.latest.lines + left_bytes // shortest + 1

    def sources_of(self, pair: int, gaps: dict[int, str]) -> list[dict[str, Any]]:
        """The finished sources as a pair's `.json` has them; `gaps` are their lines that gave it no document."""
        return [
            {**record, "documents": record["documents"][pair], "lines_without_document": gaps.get(number, "")}
            for number, record in enumerate(self.finished)
        ]


def length(source: Source, begin: int) -> int:
    """Bytes of a source's file from `begin` on; of a parquet file's part, of the whole file."""
    if source.kind == "plain":
        return (source.num_bytes if source.end is None else source.end) - begin
    return source.num_bytes
