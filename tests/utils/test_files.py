"""A file is whole or not there; a folder that cannot be written is noticed."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
import xxhash

from megatron.utils import files
from megatron.utils.errors import ConfigError


@pytest.mark.parametrize(("content", "expected"), [("né\n", "né\n".encode()), (b"\x00\xff", b"\x00\xff")])
def test_text_and_bytes_are_written_and_replaced(tmp_path: Path, content: str | bytes, expected: bytes) -> None:
    path = tmp_path / "state.json"
    files.write_atomically(path, "old and longer than the new one")
    files.write_atomically(path, content)
    assert path.read_bytes() == expected
    assert os.listdir(tmp_path) == ["state.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "state.json"
    files.write_atomically(path, "old")
    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_content_is_on_the_disk_before_the_name_and_the_name_before_returning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", record_fsync)
    monkeypatch.setattr(files.os, "replace", record_replace)
    files.write_atomically(tmp_path / "state.json", "new")
    assert done == ["file", "rename", "folder"]
    files.fsync_file(tmp_path / "state.json")
    assert done[3:] == ["file"]


def test_a_writable_folder_is_created_and_left_empty(tmp_path: Path) -> None:
    files.ensure_writable_folder(tmp_path / "a" / "b", "log.dir")
    files.ensure_writable_folder(tmp_path / "a" / "b", "log.dir")
    assert os.listdir(tmp_path / "a" / "b") == []


def test_a_folder_that_cannot_be_is_named_with_its_purpose_and_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError) as caught:
        files.ensure_writable_folder(tmp_path / "file" / "saves", "checkpoint.save")
    assert f"checkpoint.save: cannot write in the folder {tmp_path}/file/saves (Not a directory)" in str(caught.value)


def test_a_folder_on_a_file_system_without_writing_is_refused() -> None:
    # Also root cannot create files there, whatever the permission bits say.
    with pytest.raises(ConfigError, match=r"log\.dir: cannot write in the folder /proc/self"):
        files.ensure_writable_folder(Path("/proc/self"), "log.dir")


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"abc" * 100_000)
    assert files.sha256_file(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_checksum_is_xxh3_of_the_content_whatever_its_length(tmp_path: Path) -> None:
    path = tmp_path / "data"
    for content in (b"", b"abc" * 3_000_001):  # more than two of the blocks that are read
        path.write_bytes(content)
        assert files.checksum_file(path) == xxhash.xxh3_128_hexdigest(content)
