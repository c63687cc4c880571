"""What makes a run resumable: `PREFIX.progress.json`, written atomically every ten seconds, and `PREFIX.lock`.

A journal says how far outputs and inputs go together. Everything it counts is on the disk before the journal is, so
after any kind of death the outputs are cut to the recorded lengths and the work goes on from the recorded position.
This module must not know how the work is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron.data.indexed import Written
from megatron.data.preprocess.inputs import Source
from megatron.data.preprocess.reading import Position
from megatron.utils.errors import ConfigError, DataError, ResourceError
from megatron.utils.files import write_atomically
from megatron.utils.logging import get_logger

_LOGGER = get_logger(__name__)
RECORD_EVERY_S = 10.0
_FORMAT = 1


@dataclass(frozen=True)
class Snapshot:
    """How far a run is: the position in the source under way, and all that was counted up to there.

    `documents` (per key) and `bad_lines` are of that source; `lines` (without blank ones), `texts`, `all_bad_lines` and
    `first_bad` of the whole run. `pairs`, `gap_entries` (per key) and `quarantine_bytes` are lengths of the outputs.
    """

    source: int
    position: Position
    documents: tuple[int, ...]
    bad_lines: int
    lines: int
    texts: int
    all_bad_lines: int
    first_bad: tuple[str, ...]
    pairs: tuple[Written, ...]
    gap_entries: tuple[int, ...]
    quarantine_bytes: int
    done_bytes: int


@dataclass(frozen=True)
class Journal:
    """What a run records: its options, the sources it has begun, and two snapshots.

    `latest` is the last one, `source_start` the one at the beginning of the source under way. `finished` are the
    records of the sources before that. If `complete`, all outputs are whole and only have to be given their names.
    """

    options: dict[str, Any]
    sources: list[Source]
    finished: list[dict[str, Any]]
    source_start: Snapshot
    latest: Snapshot
    complete: bool = False


def write_journal(path: Path, journal: Journal) -> None:
    """Record, atomically and durably."""
    write_atomically(path, json.dumps({"format": _FORMAT, **asdict(journal)}, default=str))


def read_journal(path: Path) -> Journal | None:
    """What was recorded, or None. Raises DataError for a file that is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != _FORMAT:
            raise ValueError("it has another format")
        sources = [Source(**source | {"file": Path(source["file"])}) for source in content.pop("sources")]
        source_start, latest = (_snapshot(content.pop(name)) for name in ("source_start", "latest"))
        return Journal(sources=sources, source_start=source_start, latest=latest, **content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a record of a run that can be continued ({type(error).__name__}: {error}); "
            "add --restart to begin again"
        ) from error


def _snapshot(content: dict[str, Any]) -> Snapshot:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    }
    fields["position"] = Position(**content["position"])
    fields["pairs"] = tuple(Written(**pair) for pair in content["pairs"])
    return Snapshot(**fields)


def choose_snapshot(journal: Journal, path: Path, options: dict[str, Any], sources: Sequence[Source]) -> Snapshot:
    """Where to go on: at the latest snapshot, or at the start of a file that was changed while it was read.

    Raises ConfigError, saying what differs, if the journal is of another command or of other inputs.
    """
    cure = "give the same command as before, or add --restart to drop what was done and begin again"
    changed = [name for name, value in options.items() if journal.options.get(name) != value]
    if changed:
        differences = ", ".join(f"{name} was {journal.options.get(name)!r}, is {options[name]!r}" for name in changed)
        raise ConfigError(f"{path} records a run with other options ({differences}); {cure}")
    current = journal.latest.source
    for number, before in enumerate(journal.sources[: current + 1]):
        now = sources[number] if number < len(sources) else None
        if now == before:
            continue
        if number == current and now is not None and (now.file, now.begin, now.end) == (before.file, 0, None):
            _LOGGER.info("%s has changed since it was read in part: it is read again from its beginning", now.file)
            return journal.source_start
        is_other = now is None or now.file != before.file
        what = f"{before.file} is now {now.file if now else 'missing'}" if is_other else f"{before.file} has changed"
        raise ConfigError(f"{path} records a run over other inputs (input {number + 1}: {what}); {cure}")
    return journal.latest


class Durable(Protocol):
    """An output that can be put on the disk."""

    def sync(self) -> None: ...


class Recorder:
    """Writes the journal behind the work, in a thread, since putting data on the disk may take long."""

    def __init__(self, path: Path, *, exists: bool) -> None:
        self._path = path
        self.exists = exists
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._due_s = time.monotonic() + RECORD_EVERY_S

    def is_due(self) -> bool:
        """Whether it is time to record, and the last time is over."""
        return time.monotonic() >= self._due_s and (self._thread is None or not self._thread.is_alive())

    def record(self, make: Callable[[], Journal], outputs: Sequence[Durable]) -> None:
        """Have the outputs on the disk, which were flushed, and then the journal. Raises OSError of the last time."""
        self.wait()
        self._thread = threading.Thread(target=self._record, args=(make(), outputs), daemon=True)
        self._thread.start()
        self._due_s = time.monotonic() + RECORD_EVERY_S

    def wait(self) -> None:
        """Until what was begun is recorded. Raises OSError if that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _record(self, journal: Journal, outputs: Sequence[Durable]) -> None:
        try:
            for output in outputs:
                output.sync()
            write_journal(self._path, journal)
            self.exists = True
        except BaseException as error:
            self._error = error


@contextlib.contextmanager
def only_run(prefix: str) -> Iterator[None]:
    """Keep other runs away from `prefix` meanwhile. Raises ResourceError if one is at work.

    The lock ends with the process, however it dies; the file that is left then says nothing.
    """
    path = Path(f"{prefix}.lock")
    descriptor = _lock(path)
    try:
        for left in path.parent.glob(f".{path.stem}.progress.json.*.tmp"):  # of a run that was killed
            left.unlink(missing_ok=True)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise ResourceError(
                f"--output-prefix: {path} cannot be made ({error.strerror or error}); choose another name or folder"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(descriptor, path):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise ResourceError(
                f"another run is writing {path.with_suffix('')}_*; wait for it, or choose another --output-prefix"
            ) from error
        except OSError as error:
            _LOGGER.warning("%s: this file system has no locks (%s): do not start two runs", path, error.strerror)
            return descriptor
        os.close(descriptor)  # it was removed by the run that ended just now


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
