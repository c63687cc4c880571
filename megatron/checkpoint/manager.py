"""A save folder over time: which checkpoint is the newest whole one, and which old ones may go.

The folders' names decide, not `latest`: that file is for people and scripts, and a crash may leave it behind. To go
back to an older checkpoint, move the newer ones away.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron.checkpoint.native import (
    MANIFEST,
    PARTIAL,
    POINTER,
    REMOVED,
    OtherVersionError,
    check_sizes,
    read_manifest,
    step_folder,
    step_of,
)
from megatron.utils.errors import CheckpointError
from megatron.utils.files import fsync_folder
from megatron.utils.logging import get_logger

_logger = get_logger(__name__)


def newest_checkpoint(save: Path, before: int | None = None) -> Path | None:
    """The whole checkpoint of the highest step in a save folder, or None.

    Every newer or unfinished folder that is passed over is named in a warning. Raises CheckpointError for a checkpoint
    of another version of this program: to continue from an older one instead would lose work silently.

    `before` continues a search: only earlier steps are looked at and warned about.
    """
    for folder in _leftovers(save) if before is None else []:
        _logger.warning(
            "%s is %s and is ignored; it may be deleted",
            folder,
            "a checkpoint whose writing was interrupted" if folder.name.endswith(PARTIAL) else "half removed",
        )
    newest = None
    for step, folder in reversed(_step_folders(save)):
        if before is not None and step >= before:
            continue
        problem = find_problem(folder)
        if problem is None:
            newest = folder
            break
        warn_ignored(folder, problem)
    pointer = read_pointer(save) if before is None else None
    if pointer is not None and not (save / pointer).is_dir():
        _logger.warning(
            "%s names %s, which is not there; %s",
            save / POINTER,
            pointer,
            f"continuing from {newest.name}" if newest else "there is no other checkpoint",
        )
    return newest


def warn_ignored(folder: Path, problem: str) -> None:
    """Say why a checkpoint is passed over."""
    _logger.warning("%s is ignored, since it is not a whole checkpoint: %s", folder, problem)


def whole_checkpoints(save: Path) -> list[tuple[int, Path]]:
    """Step and folder of every whole checkpoint, oldest first."""
    return [(step, folder) for step, folder in _step_folders(save) if find_problem(folder) is None]


def find_problem(folder: Path) -> str | None:
    """Why a step folder is not a whole checkpoint (None: it is one). Looks at names and sizes, not at content."""
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}"
    try:
        manifest = read_manifest(folder)
        check_sizes(folder, manifest)
    except OtherVersionError:
        raise
    except CheckpointError as error:
        return str(error)
    if manifest.step != step_of(folder.name):
        return f"it holds step {manifest.step}, not the one of its name"
    return None


def read_pointer(save: Path) -> str | None:
    """The folder name in `latest`, or None where there is no such file."""
    try:
        return (save / POINTER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def apply_retention(save: Path, keep_last: int | None, *, up_to: int | None = None) -> None:
    """Remove all but the newest `keep_last` whole checkpoints (None: remove none), and what crashes left half written
    or half removed: call it when no checkpoint is being written there.

    Those after step `up_to` are neither counted nor removed: a run that saves step 6 while there is a step 10 has
    passed that over as damaged, and must not give up sound ones for it.

    Call it from one rank. Folders that are not whole checkpoints of ours stay. Each is renamed before it is removed, so
    that a crash leaves nothing that looks like a checkpoint. Whatever goes wrong with a folder is only warned about: it
    is no reason to end a run.
    """
    assert keep_last is None or keep_last >= 1, keep_last
    try:
        if keep_last is not None:
            folders = [folder for step, folder in _step_folders(save) if up_to is None or step <= up_to]
            whole = [folder for folder in folders if _may_be_removed(folder)]
            for folder in whole[:-keep_last]:
                remove_checkpoint(folder)
        for folder in _leftovers(save):
            _remove_tree(folder)
    except OSError as error:
        _logger.warning("%s cannot be searched for old checkpoints (%s)", save, error.strerror or error)


def _may_be_removed(folder: Path) -> bool:
    """Whether it is a whole checkpoint of ours; where that cannot be told, it stays."""
    try:
        return find_problem(folder) is None
    except (OtherVersionError, OSError) as error:
        _logger.warning("%s is not counted by checkpoint.keep_last and stays: %s", folder, error)
        return False


def remove_checkpoint(folder: Path) -> None:
    """Make a checkpoint disappear at once, then free its space."""
    doomed = folder.with_name(folder.name + REMOVED)
    try:
        if doomed.exists():
            shutil.rmtree(doomed)
        folder.rename(doomed)
        fsync_folder(folder.parent)
    except OSError as error:
        _logger.warning("%s cannot be removed (%s)", folder, error.strerror or error)
        return
    _remove_tree(doomed)


def _remove_tree(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        _logger.warning("%s cannot be removed (%s)", folder, error.strerror or error)


def _step_folders(save: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that is named like a checkpoint, by step."""
    if not save.is_dir():
        return []
    found = [(step_of(folder.name), folder) for folder in save.iterdir() if folder.is_dir()]
    return sorted((step, folder) for step, folder in found if step is not None and folder.name == step_folder(step))


def _leftovers(save: Path) -> list[Path]:
    """Folders of ours that were being written or removed."""
    if not save.is_dir():
        return []
    return sorted(
        folder
        for folder in save.iterdir()
        for ending in (PARTIAL, REMOVED)
        if folder.name.endswith(ending) and step_of(folder.name.removesuffix(ending)) is not None
    )
