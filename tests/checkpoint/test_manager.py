"""Which checkpoint of a save folder is taken, and which are removed."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from megatron.checkpoint import manager
from megatron.checkpoint.native import VERSION
from megatron.checkpoint.source import open_source
from megatron.utils.errors import CheckpointError

from .conftest import save


def _edit_manifest(folder: Path, **changes) -> None:
    path = folder / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGES = {
    "missing file": (lambda folder: (folder / "weights-00000.safetensors").unlink(), "00000.safetensors (No such"),
    "truncated file": (
        lambda folder: os.truncate(folder / "optimizer-master-00001.safetensors", 10),
        "optimizer-master-00001.safetensors (has 10 bytes, was written with ",
    ),
    "no checkpoint.json": (lambda folder: (folder / "checkpoint.json").unlink(), "has no checkpoint.json"),
    "half of it": (lambda folder: os.truncate(folder / "checkpoint.json", 100), "cannot be read"),
    "empty": (lambda folder: (folder / "checkpoint.json").write_text("{}"), "is not the index of a checkpoint"),
    "no tensors": (lambda folder: _edit_manifest(folder, tensors=None), "is damaged"),
    "another step": (lambda folder: _edit_manifest(folder, step=9), "holds step 9"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_named_once_and_passed_over(saved: Path, caplog, damage: str) -> None:
    apply, message = DAMAGES[damage]
    apply(saved / "step_0000003")
    assert manager.newest_checkpoint(saved) == saved / "step_0000002"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "step_0000003 is ignored" in caplog.text and message in caplog.text
    assert open_source(saved).step == 2


def test_a_whole_folder_gives_no_warning(saved: Path, caplog) -> None:
    assert manager.newest_checkpoint(saved) == saved / "step_0000003"
    assert not caplog.records


def test_steps_are_compared_as_numbers(saved: Path, tensors) -> None:
    save(saved, tensors, step=12_345_678)
    save(saved, tensors, step=9_999_999)
    assert manager.newest_checkpoint(saved) == saved / "step_12345678"


def test_a_pointer_to_nothing_is_a_warning(saved: Path, caplog) -> None:
    (saved / "latest").write_text("step_0000099\n")
    assert manager.newest_checkpoint(saved) == saved / "step_0000003"
    assert "names step_0000099, which is not there; continuing from step_0000003" in caplog.text


def test_a_pointer_left_behind_by_a_crash_does_not_matter(saved: Path, caplog) -> None:
    (saved / "latest").write_text("step_0000002\n")
    assert manager.newest_checkpoint(saved) == saved / "step_0000003"
    assert not caplog.records


def test_an_empty_or_absent_folder_has_none(tmp_path: Path) -> None:
    assert manager.newest_checkpoint(tmp_path) is None
    assert manager.newest_checkpoint(tmp_path / "absent") is None


def test_only_damaged_ones_is_an_error_to_open(saved: Path) -> None:
    for folder in saved.glob("step_*"):
        (folder / "checkpoint.json").unlink()
    assert manager.newest_checkpoint(saved) is None
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        open_source(saved)


def test_another_version_is_an_error_and_not_passed_over(saved: Path) -> None:
    _edit_manifest(saved / "step_0000003", version=VERSION + 1)
    with pytest.raises(CheckpointError, match=rf"step_0000003 has version {VERSION + 1} .* reads {VERSION}"):
        manager.newest_checkpoint(saved)


@pytest.mark.parametrize(("keep_last", "left"), [(None, [1, 2, 3]), (5, [1, 2, 3]), (2, [2, 3]), (1, [3])])
def test_retention_keeps_the_newest(saved: Path, keep_last: int | None, left: list[int]) -> None:
    (saved / "notes").mkdir()
    manager.apply_retention(saved, keep_last)
    assert [step for step, _ in manager.whole_checkpoints(saved)] == left
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "notes"] + [f"step_000000{n}" for n in left]


def test_retention_neither_counts_nor_removes_what_comes_after_the_step_just_saved(saved: Path) -> None:
    """It was passed over as damaged, which retention, looking at sizes only, would not see."""
    manager.apply_retention(saved, 1, up_to=2)
    assert [step for step, _ in manager.whole_checkpoints(saved)] == [2, 3]


def test_a_search_can_be_continued_before_a_step(saved: Path, caplog) -> None:
    (saved / "step_0000002" / "checkpoint.json").unlink()
    (saved / "step_0000004.partial").mkdir()
    assert manager.newest_checkpoint(saved, before=3) == saved / "step_0000001"
    assert ["step_0000002 is ignored" in record.getMessage() for record in caplog.records] == [True]
    assert manager.newest_checkpoint(saved, before=1) is None


@pytest.mark.parametrize("keep_last", [None, 3])
def test_what_an_interrupted_save_left_is_removed(saved: Path, keep_last: int | None) -> None:
    kept = ["notes.partial", "step_0000007.1a2b.partial"]  # not a save's
    for name in ("step_0000004.partial", "step_0000005.removed", *kept):
        (saved / name).mkdir()
        (saved / name / "file").touch()
    manager.apply_retention(saved, keep_last)
    assert sorted(path.name for path in saved.iterdir()) == sorted(
        ["latest", "step_0000001", "step_0000002", "step_0000003", *kept]
    )


def test_retention_counts_only_whole_ones_and_leaves_the_others(saved: Path) -> None:
    (saved / "step_0000003" / "config.json").unlink()
    manager.apply_retention(saved, 1)
    assert [step for step, _ in manager.whole_checkpoints(saved)] == [2]
    assert (saved / "step_0000003").is_dir() and not (saved / "step_0000001").exists()


def test_a_crash_while_removing_leaves_nothing_that_looks_whole(saved: Path, monkeypatch, caplog) -> None:
    def dying(path, *arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", dying)
        manager.apply_retention(saved, 2)
    assert sorted(path.name for path in saved.glob("step_*")) == [
        "step_0000001.removed",
        "step_0000002",
        "step_0000003",
    ]
    assert manager.newest_checkpoint(saved) == saved / "step_0000003"
    assert "step_0000001.removed is half removed and is ignored" in caplog.text
    manager.apply_retention(saved, 2)
    assert not (saved / "step_0000001.removed").exists()


def test_retention_leaves_a_checkpoint_of_another_version_with_a_warning(saved: Path, caplog) -> None:
    _edit_manifest(saved / "step_0000001", version=VERSION + 1)
    manager.apply_retention(saved, 1)
    assert sorted(path.name for path in saved.glob("step_*")) == ["step_0000001", "step_0000003"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "step_0000001 is not counted by checkpoint.keep_last and stays" in caplog.text
    assert f"has version {VERSION + 1}" in caplog.text


def test_retention_leaves_a_checkpoint_that_cannot_be_looked_at(saved: Path, monkeypatch, caplog) -> None:
    genuine = manager.find_problem

    def stale(folder):
        if folder.name == "step_0000002":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(folder))
        return genuine(folder)

    monkeypatch.setattr(manager, "find_problem", stale)
    manager.apply_retention(saved, 1)
    assert sorted(path.name for path in saved.glob("step_*")) == ["step_0000002", "step_0000003"]
    assert "step_0000002 is not counted by checkpoint.keep_last and stays" in caplog.text
    assert "Stale file handle" in caplog.text


def test_a_save_folder_that_cannot_be_listed_is_only_a_warning(saved: Path, monkeypatch, caplog) -> None:
    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refused)
    manager.apply_retention(saved, 1)
    assert f"{saved} cannot be searched for old checkpoints (Permission denied)" in caplog.text


def test_a_folder_that_cannot_be_removed_is_only_a_warning(saved: Path, monkeypatch, caplog) -> None:
    def refused(path, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refused)
    manager.apply_retention(saved, 2)
    assert "step_0000001 cannot be removed (Permission denied)" in caplog.text
