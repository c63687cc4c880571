"""The text of a file, compressed or not, as a stream that knows how much of the file it has taken.

What a file is, its first bytes say, not its name. Archives of several members (`cat a.gz b.gz`) are read through; one
that is damaged, cut short or followed by something else is an error, and so is one of several files (tar, zip). This
module must not know what a line is.
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from megatron.utils.errors import ConfigError, DataError, ResourceError
from megatron.utils.units import format_bytes

Kind = Literal["plain", "gzip", "bzip2", "xz", "zstandard", "parquet"]

_MAGIC: dict[Kind, tuple[bytes, ...]] = {
    "gzip": (b"\x1f\x8b",),
    "bzip2": (b"BZh",),
    "xz": (b"\xfd7zXZ\x00",),
    "zstandard": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + low]) + b"\x2a\x4d\x18" for low in range(16))),
    "parquet": (b"PAR1",),
}
_UNREADABLE = {
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "a zip archive",
    b"\x04\x22\x4d\x18": "an lz4 archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
}
_HEAD_BYTES = 6
_BLOCK_BYTES = 1 << 16
_ZSTANDARD_BYTES = 1 << 12  # a frame gives back a few ten thousand times as much at most, and it comes at once
_ZSTANDARD_WINDOW = 1 << 31  # what `zstd --long=31` needs, of memory too once so much text has come


def kind_of(head: bytes, name: str) -> Kind:
    """What a file is by its first bytes. Raises DataError for an archive that is not read."""
    for kind, beginnings in _MAGIC.items():
        if head.startswith(beginnings):
            return kind
    for beginning, what in _UNREADABLE.items():
        if head.startswith(beginning):
            raise DataError(
                f"{name} is {what}, which is not read; unpack it, or pack it again as .gz, .zst, .bz2 or .xz"
            )
    return "plain"


def kind_of_file(file: Path) -> Kind:
    """What a file is. Raises DataError if it cannot be read."""
    try:
        with open(file, "rb", buffering=0) as stream:
            return kind_of(stream.read(_HEAD_BYTES) or b"", str(file))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error


class TarArchive(DataError):
    """A tar archive, packed or not, where text should be."""


def require_no_tar(file: Path) -> None:
    """Raise TarArchive for one. Whatever else may be wrong with a file, reading it says."""
    try:
        with open(file, "rb", buffering=0) as stream:
            TextStream(stream, str(file)).read(1)
    except TarArchive:
        raise
    except (DataError, ResourceError, OSError):
        return


def _is_tar(begin: bytes) -> bool:
    """Whether what begins so is a tar archive: the checksum of its first header says so, whatever its dialect."""
    try:
        tarfile.TarInfo.frombuf(begin[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def require_library(kind: Kind) -> None:
    """Raise ConfigError, naming the package, where what reads such files is not installed."""
    if kind == "zstandard":
        _zstandard_engine()
    elif kind == "parquet":
        import_pyarrow()


def import_pyarrow() -> Any:
    """`pyarrow` with `pyarrow.parquet`, or ConfigError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"parquet files need the package pyarrow, which cannot be imported ({error}); pip install pyarrow"
        ) from error
    return pyarrow


class TextStream:
    """The decompressed bytes of a file from `begin` on, up to `end` (None: all of it).

    `begin` and `end` are positions in a plain file. `raw_bytes` were taken from the file and are in `sha256`.
    """

    def __init__(self, file: BinaryIO, name: str, begin: int = 0, end: int | None = None) -> None:
        self._file, self._name = file, name
        self._left = None if end is None else end - begin
        self._sha256 = hashlib.sha256()
        self.raw_bytes = 0
        self._head = b""
        self._text = b""  # that was looked at before it is asked for
        self._is_begun = bool(begin)
        if begin:
            file.seek(begin)
            kind: Kind = "plain"
        else:
            self._head = self._read_file(_HEAD_BYTES)
            kind = kind_of(self._head, name)
        if kind == "parquet":
            raise DataError(f"{name} holds parquet, which is read from its end; give it as a file")
        self._members = None if kind == "plain" else _Members(self._read_raw, kind)

    def read(self, size: int) -> bytes:
        """Up to `size` bytes of text; none at the end. Raises DataError if they cannot be read or unpacked or are a tar
        archive's, ResourceError where that takes too much memory."""
        if not self._is_begun:
            self._look_at_begin()
        if self._text:
            block, self._text = self._text[:size], self._text[size:]
            return block
        return self._read_text(size)

    def _look_at_begin(self) -> None:
        self._is_begun = True
        while len(self._text) < tarfile.BLOCKSIZE:
            block = self._read_text(tarfile.BLOCKSIZE - len(self._text))
            if not block:
                return
            self._text += block
        if _is_tar(self._text):
            raise TarArchive(
                f"{self._name} is a tar archive, whose files are not told apart; unpack it and name the folder"
            )

    def _read_text(self, size: int) -> bytes:
        if self._members is None:
            return self._read_raw(size)
        try:
            return self._members.read(size)
        except _TooLarge as error:
            raise ResourceError(f"{self._name} {error}") from error
        except _Damaged as error:
            raise DataError(
                f"{self._name} is damaged or cut short near byte {self.raw_bytes:,} of the file ({error}); copy or "
                "make it again"
            ) from error

    def skip(self, size: int) -> None:
        """Pass over `size` bytes of text, which must be there."""
        while size:
            block = self.read(min(size, _BLOCK_BYTES * 16))
            if not block:
                raise DataError(f"{self._name} is shorter than when the work began; start it again with --restart")
            size -= len(block)

    @property
    def sha256(self) -> str:
        """Of the bytes taken from the file."""
        return self._sha256.hexdigest()

    def _read_raw(self, size: int) -> bytes:
        block = self._head or self._read_file(size)
        self._head = b""
        self.raw_bytes += len(block)
        self._sha256.update(block)
        return block

    def _read_file(self, size: int) -> bytes:
        if self._left is not None:
            size = min(size, self._left)
        try:
            block = self._file.read(size) or b""
        except OSError as error:
            raise DataError(f"{self._name} cannot be read: {error.strerror or error}") from error
        if self._left is not None:
            self._left -= len(block)
        return block


class _Damaged(Exception):
    """Why an archive cannot be unpacked."""


class _TooLarge(Exception):
    """Why there is too little memory to unpack an archive."""


class _Engine(Protocol):
    """Unpacks one member of an archive."""

    eof: bool

    def step(self, data: bytes, limit: int) -> tuple[bytes, bytes]:
        """(text of about `limit` bytes at most, what it did not take of the data)."""
        ...


class _Members:
    """The members of an archive, one after the other."""

    def __init__(self, read_raw: Callable[[int], bytes], kind: Kind) -> None:
        self._read_raw, self._kind = read_raw, kind
        self._make = _ENGINES[kind]
        self._data = b""
        self._raw_ended = False
        self._engine: _Engine | None = None
        self._errors: tuple[type[Exception], ...] = (
            MemoryError, zlib.error, lzma.LZMAError, OSError, ValueError, EOFError,
        )  # fmt: skip
        if kind == "zstandard":
            self._errors += _zstandard_errors()

    def read(self, size: int) -> bytes:
        while True:
            if not self._data and not self._raw_ended:
                self._data = self._read_raw(_BLOCK_BYTES)
                self._raw_ended = not self._data
            if self._engine is None and not self._begin_member():
                return b""
            assert self._engine is not None
            try:
                text, self._data = self._engine.step(self._data, size)
            except self._errors as error:
                if isinstance(error, MemoryError) or "memory" in str(error):
                    raise _TooLarge(
                        "needs more memory to be unpacked than there is, or a larger window than the "
                        f"{format_bytes(_ZSTANDARD_WINDOW)} of zstd --long=31 ({error}); pack it again with less"
                    ) from error
                raise _Damaged(str(error)) from error
            if self._engine.eof:
                self._engine = None
            elif not text and self._raw_ended:
                raise _Damaged(f"the {self._kind} data end in the middle")
            if text:
                return text

    def _begin_member(self) -> bool:
        """Start on what follows a member: another one, or nothing but padding."""
        self._data = self._data.lstrip(b"\x00")
        while len(self._data) < _HEAD_BYTES and not self._raw_ended:
            more = self._read_raw(_BLOCK_BYTES)
            self._raw_ended = not more
            self._data = (self._data + more).lstrip(b"\x00")
        if not self._data:
            return False
        if not self._data.startswith(_MAGIC[self._kind]):
            raise _Damaged(f"what follows the {self._kind} data is not {self._kind}: {self._data[:8]!r}")
        self._engine = self._make()
        return True


class _Gzip:
    def __init__(self) -> None:
        self._engine = zlib.decompressobj(wbits=31)  # with the checks of gzip's length and CRC
        self.eof = False

    def step(self, data: bytes, limit: int) -> tuple[bytes, bytes]:
        text = self._engine.decompress(data, limit)
        self.eof = self._engine.eof
        return text, self._engine.unused_data if self.eof else self._engine.unconsumed_tail


class _Buffered:
    """An engine of the standard library that keeps what it has not unpacked yet: bzip2, xz, newer Pythons' zstd."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.eof = False

    def step(self, data: bytes, limit: int) -> tuple[bytes, bytes]:
        if self._engine.needs_input:
            text, rest = self._engine.decompress(data, limit), b""
        else:
            text, rest = self._engine.decompress(b"", limit), data
        self.eof = self._engine.eof
        return text, self._engine.unused_data + rest if self.eof else rest


class _Zstandard:
    """The package `zstandard`, whose engine gives all it can at once: so it gets little at once."""

    def __init__(self, module: Any) -> None:
        self._engine = module.ZstdDecompressor(max_window_size=_ZSTANDARD_WINDOW).decompressobj()
        self.eof = False

    def step(self, data: bytes, limit: int) -> tuple[bytes, bytes]:
        text = self._engine.decompress(data[:_ZSTANDARD_BYTES])
        self.eof = self._engine.eof
        return text, (self._engine.unused_data if self.eof else b"") + data[_ZSTANDARD_BYTES:]


def _zstandard_module() -> tuple[Any, bool]:
    """(the module, whether it is the standard library's)."""
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # Python 3.14

        return zstd, True
    except ImportError:
        try:
            import zstandard
        except ImportError as error:
            raise ConfigError(
                f".zst files need the package zstandard, which cannot be imported ({error}); pip install zstandard"
            ) from error
        return zstandard, False


def _zstandard_engine() -> _Engine:
    module, standard = _zstandard_module()
    if not standard:
        return _Zstandard(module)
    return _Buffered(module.ZstdDecompressor(options={module.DecompressionParameter.window_log_max: 31}))


def _zstandard_errors() -> tuple[type[Exception], ...]:
    return (_zstandard_module()[0].ZstdError,)


_ENGINES: dict[Kind, Callable[[], _Engine]] = {
    "gzip": _Gzip,
    "bzip2": lambda: _Buffered(bz2.BZ2Decompressor()),
    "xz": lambda: _Buffered(lzma.LZMADecompressor(format=lzma.FORMAT_XZ)),
    "zstandard": _zstandard_engine,
}
