"""From `--input` to the sources of a run: files, folders, patterns, standard input; and a shard's part of them."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.data.preprocess.archives import Kind, import_pyarrow, kind_of_file, require_library, require_no_tar
from megatron.utils.errors import ConfigError, DataError
from megatron.utils.logging import get_logger

_LOGGER = get_logger(__name__)

STANDARD_INPUT = Path("-")
_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_PACKED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
_ARCHIVE_SUFFIXES = (".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar", ".lz4")  # not read
_MOST_NAMES = 5  # in a message
_SCAN_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """What is read of one input: all of it, or the lines `begin … end` of a shard.

    `begin` and `end` count bytes of a plain file (both at line breaks) or rows of a parquet file; end None: to its end.
    `num_bytes` and `modified_ns` are the file's; -1 for a stream, which can be read once only.
    """

    file: Path
    kind: Kind
    num_bytes: int
    modified_ns: int
    begin: int = 0
    end: int | None = None

    @property
    def is_stream(self) -> bool:
        return self.num_bytes < 0


@dataclass(frozen=True)
class Shard:
    """The part `index` (from 0) of `count`."""

    index: int
    count: int

    @property
    def label(self) -> str:
        """`shard-00003-of-00016`: names in the order of the parts, for a folder of parts that is merged."""
        return f"shard-{self.index:05d}-of-{self.count:05d}"


def parse_shard(text: str) -> Shard:
    """`3/16`: the fourth of 16 parts. Raises ConfigError for anything else."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise ConfigError(f"--shard {text}: give I/N, as in --shard 0/16 for the first of 16 parts")
    if not int(index) < int(count):
        raise ConfigError(
            f"--shard {text}: the parts of {count} are 0/{count} to {max(0, int(count) - 1)}/{count}, counted from 0"
        )
    return Shard(int(index), int(count))


def find_sources(words: Sequence[str | Path]) -> list[Source]:
    """The sources that `--input` names, in order; those of a folder or a pattern sorted by name.

    Raises DataError for what is not there, ConfigError for a file named twice or a library that is missing.
    """
    if "" in words:
        raise ConfigError("--input: one of the names is empty; give files, folders or patterns of them")
    files, missing = [], []
    for word in words:
        try:
            found, problem = _expand(Path(word))
        except OSError as error:
            found, problem = [], f"{word} ({error.strerror or error})"
        files += found
        missing += [problem] if problem else []
    if missing:
        raise DataError(f"--input: {', '.join(missing)}; give JSON-lines or parquet files, folders or patterns of them")
    _check_each_is_given_once(files)
    sources = [_source(file) for file in files]
    for kind in {source.kind for source in sources}:
        require_library(kind)
    for source in sources:  # now, not hours later when it is that one's turn
        if source.kind != "parquet" and not source.is_stream:
            require_no_tar(source.file)
    return sources


def _expand(path: Path) -> tuple[list[Path], str]:
    """(the files that an argument names, what is wrong with it)."""
    if path == STANDARD_INPUT or path.is_file() or path.is_fifo():
        return [path], ""
    if path.is_dir():
        found, problem = _of_folder(path)
        return found, problem or (
            "" if found else f"{path} (no {', '.join(_TEXT_SUFFIXES)} files in it, packed or not)"
        )
    if path.exists():
        return [], f"{path} (not a file)"
    if not glob.has_magic(str(path)):
        return [], f"{path} (not there)"
    return _of_pattern(path)


def _of_pattern(pattern: Path) -> tuple[list[Path], str]:
    """The files that match, and the inputs of the folders that match: as if the shell had named them. Each once, though
    `**` matches a folder and its files."""
    found: set[Path] = set()
    without: list[str] = []
    for match in map(Path, glob.glob(str(pattern), recursive=True)):
        inputs, problem = _of_folder(match) if match.is_dir() else ([match], _unless_file(match))
        if problem:
            return [], problem
        found.update(inputs)
        without += [] if inputs else [str(match)]
    if found and without:
        _LOGGER.warning("%s matches folders without input files: %s", pattern, _listed(sorted(without)))
    return sorted(found, key=str), "" if found else f"{pattern} (no file matches)"


def _of_folder(folder: Path) -> tuple[list[Path], str]:
    """(the inputs in a folder, sorted by name; what is wrong with one of them)."""
    files = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".") and not file.is_dir()]
    archives = [file.name for file in files if _is_archive(file.name)]
    if archives:
        _LOGGER.warning("%s: passed over archives, which are not read: %s; unpack them", folder, _listed(archives))
    found = [file for file in files if _is_input(file)]
    return found, next(filter(None, map(_unless_file, found)), "")


def _unless_file(path: Path) -> str:
    """What is wrong with an input that is no file, such as a link to what is gone."""
    return "" if path.is_file() else f"{path} ({'not a file' if path.exists() else 'a link to what is not there'})"


def _is_input(file: Path) -> bool:
    """Whether a file of a folder is by its name one to read: neither of another kind nor what this program writes."""
    name = file.name
    stem = _unpacked(name)
    if name.endswith((".quarantine.jsonl", ".progress.json")) or file.with_suffix(".idx").exists():
        return False
    return not _is_archive(name) and (stem != name or stem.endswith(_TEXT_SUFFIXES))


def _is_archive(name: str) -> bool:
    return name.endswith(_ARCHIVE_SUFFIXES) or _unpacked(name).endswith(".tar")


def _unpacked(name: str) -> str:
    return name.removesuffix(next((suffix for suffix in _PACKED_SUFFIXES if name.endswith(suffix)), ""))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMES]) + (
        f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    )


def _check_each_is_given_once(files: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for file in files:
        resolved = file if file == STANDARD_INPUT else file.resolve()
        if (first := seen.setdefault(resolved, file)) is not file:
            raise ConfigError(
                f"--input names the same file twice ({first} and {file}); name it once, and repeat it by its weight in "
                "a blend if that is meant"
            )


def _source(file: Path) -> Source:
    if file == STANDARD_INPUT or file.is_fifo():
        return Source(file, "plain", -1, -1)  # what it is shows when it is read
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    assert stat.S_ISREG(status.st_mode)
    if status.st_size == 0:
        _LOGGER.warning("%s is empty", file)
    return Source(file, kind_of_file(file), status.st_size, status.st_mtime_ns)


def take_shard(sources: Sequence[Source], shard: Shard) -> list[Source]:
    """A shard's part of the sources. The parts in order are all the lines in order, each once.

    The inputs laid end to end are cut at equal numbers of bytes: plain files at the next line break, parquet files at
    the row that lies there; a compressed file, which can be read from its beginning only, belongs to the part that its
    middle lies in. Raises ConfigError for streams.
    """
    if any(source.is_stream for source in sources):
        raise ConfigError("--shard needs files; what is piped in can be read only once, so it cannot be divided")
    total = sum(source.num_bytes for source in sources)
    low, high = total * shard.index // shard.count, total * (shard.index + 1) // shard.count
    taken, at = [], 0
    for source in sources:
        part = _part(source, low - at, high - at)
        taken += [part] if part else []
        at += source.num_bytes
    packed = [source for source in sources if source.kind not in ("plain", "parquet")]
    if any(source.num_bytes * shard.count > 2 * total for source in packed):
        _LOGGER.warning("shards are uneven: a compressed file cannot be divided, and some are larger than a shard")
    return taken


def _part(source: Source, low: int, high: int) -> Source | None:
    """What lies between two positions in bytes, which may be outside of the file."""
    low, high = max(0, low), min(high, source.num_bytes)
    if source.kind not in ("plain", "parquet"):
        return source if low <= source.num_bytes // 2 < high else None
    if low >= high:
        return None
    if (low, high) == (0, source.num_bytes):
        return source
    if source.kind == "plain":
        begin, end = _line_start(source.file, low), _line_start(source.file, high)
    else:
        rows = import_pyarrow().parquet.read_metadata(source.file).num_rows
        begin, end = -(-low * rows // source.num_bytes), -(-high * rows // source.num_bytes)
    if begin == end:
        return None
    return Source(source.file, source.kind, source.num_bytes, source.modified_ns, begin, end)


def _line_start(file: Path, at: int) -> int:
    """The first byte, at `at` or later, with which a line starts; the file's length where there is none."""
    if at == 0:
        return 0
    with open(file, "rb", buffering=0) as stream:
        position = stream.seek(at - 1)
        while block := stream.read(_SCAN_BYTES):
            found = block.find(b"\n")
            if found >= 0:
                return position + found + 1
            position += len(block)
        return os.fstat(stream.fileno()).st_size
