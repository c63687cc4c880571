"""Files that are whole or not there: atomic writes, durable folders, checksums.

It must not know what the files hold.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

import xxhash

from megatron.utils.errors import ConfigError

_BLOCK_BYTES = 2**22


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that readers see whole or not at all, and that survives a power cut once this returns.

    The content (text becomes UTF-8) goes to a temporary file in the same folder, which is flushed to the disk and then
    renamed over `path`. Raises OSError as the file system does; the old file, if any, is then untouched.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one worth telling
            temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def open_to_read(path: Path) -> int:
    """The descriptor of a file. Raises OSError, also for what is no file: a pipe would be waited for without end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file")
    return descriptor


def parse_json(content: str | bytes | bytearray, **options: Any) -> Any:
    """What a JSON text of a stranger says. Raises ValueError for one that is none, or too deep to be read."""
    try:
        return json.loads(content, **options)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def is_plain_name(name: str) -> bool:
    """Whether this names a file of the folder in which it stands, and can be one's name."""
    try:
        length = len(os.fsencode(name))
    except UnicodeEncodeError:
        return False
    return Path(name).name == name and name not in ("", ".", "..") and "\0" not in name and length < 256


def fsync_file(path: Path) -> None:
    """Have the content of a file that was written and closed on the disk."""
    _fsync(path, os.O_RDONLY)


def fsync_folder(path: Path) -> None:
    """Have a folder's list of names (after a creation or a rename) on the disk."""
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


def ensure_writable_folder(path: Path, purpose: str) -> None:
    """Create a folder, with its parents, and show that files can be written there.

    `purpose` names it for the user (`checkpoint.save`, `log.dir`). Raises ConfigError with the path, the reason and the
    cure. Permission bits lie for root and for network file systems, so a file is in fact written and removed.
    """
    probe = path / f".writable.{secrets.token_hex(4)}.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{purpose}: cannot write in the folder {path} ({error.strerror or error}); "
            "name a folder that this user can create and write"
        ) from error


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def new_checksum() -> xxhash.xxh3_128:
    """A checksum of content that large files are held to: XXH3, 128 bits, at the speed of memory.

    SHA-256, which guards against intent as well, takes longer than the disk does on processors without instructions
    for it, and a checkpoint is read through at each start.
    """
    return xxhash.xxh3_128()


def checksum_file(path: Path) -> str:
    """The `new_checksum` of a file's content, as 32 hexadecimal digits (those that `xxh128sum` prints)."""
    checksum, buffer = new_checksum(), bytearray(_BLOCK_BYTES)
    with open(path, "rb", buffering=0) as file, memoryview(buffer) as view:
        while count := file.readinto(buffer):
            checksum.update(view[:count])
    return checksum.hexdigest()


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
