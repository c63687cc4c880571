"""Which files of a repository make a model of any format, and the folder they are in once they have been fetched.

It must not know how they come here: that is `megatron.utils.hub`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron.checkpoint.huggingface import (
    MODEL_CONFIG,
    PICKLE,
    PICKLE_INDEX,
    SHARD_INDEX,
    SINGLE,
    read_config,
    read_weight_map,
)
from megatron.checkpoint.megatron_llm import LATEST, newest_folder
from megatron.checkpoint.meta import PARAMS, is_meta_file
from megatron.checkpoint.native import CARRIED_FILES, MANIFEST, RUN_CONFIG, read_manifest
from megatron.checkpoint.peft import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS
from megatron.parallel.world import World
from megatron.utils import hub
from megatron.utils.errors import CheckpointError, ConfigError
from megatron.utils.hub import Repository

# What says which other files there are comes first; see `hub.fetch` for why the order matters.
_SMALL = (
    *(MODEL_CONFIG, MANIFEST, RUN_CONFIG, SHARD_INDEX, PICKLE_INDEX, ADAPTER_CONFIG, PARAMS, LATEST),
    *reversed(CARRIED_FILES),
)
_WEIGHTS = (SINGLE, "model-*-of-*.safetensors", SHARD_INDEX)  # those that an upload replaces


def local_folder(path: str | Path) -> Path:
    """The folder that a path names: it itself, or of an `hf://` address the one in the cache, once all is there.

    Raises ConfigError, CheckpointError and ResourceError.
    """
    repository = hub.parse_address(path)
    return Path(path) if repository is None else fetch_model(repository)


def local_folder_together(path: str, world: World) -> Path:
    """As `local_folder`, for all processes of a run, which call it together: one on each machine downloads."""
    repository = hub.parse_address(path)
    if repository is None:
        return Path(path)
    folder = Path(world.once_per_machine(lambda: str(fetch_model(repository))))
    commits = sorted(set(world.exchange(folder.name)))
    if len(commits) > 1:
        failure = ConfigError(
            f"{repository} is another commit on some machines than on others ({', '.join(commits)}): name the one to "
            f"use, hf://{repository.name}@COMMIT"
        )
        world.raise_together(failure)
    return folder


def fetch_model(repository: Repository, cache: str | None = None) -> Path:
    """The folder in the cache with the files that make a model; raises as `local_folder`."""
    return hub.fetch(repository, _SMALL, lambda sizes, folder: weight_files(sizes, folder, str(repository)), cache)


def fetch_config(repository: Repository) -> dict[str, object] | None:
    """The content of a repository's `config.json`, without its weights; None where it has none."""
    folder = hub.fetch(repository, _SMALL)
    return read_config(folder) if (folder / MODEL_CONFIG).is_file() else None


def upload_model(folder: Path, repository: Repository, token: str | None = None, private: bool | None = None) -> str:
    """Upload of a folder in Hugging Face's or PEFT's format what belongs to the model; the address in the web.

    The safetensors of another model in the repository are removed, unless it is adapters that come.
    """
    present = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    names = [name for name in (*_SMALL, "README.md") if name in present] + weight_files(present, folder, str(folder))
    replaces = _WEIGHTS if SINGLE in names or SHARD_INDEX in names else ()
    return hub.upload(folder, repository, names, replaces=replaces, token=token, private=private)


def weight_files(names: Mapping[str, int], folder: Path, title: str) -> list[str]:
    """The files with weights among those of a repository, in one format where it has several: as `open_source` looks.

    `folder` has the small ones already. Raises CheckpointError where there are none, or not all.
    """
    if MANIFEST in names:
        files = list(read_manifest(folder).files)
    elif SINGLE in names:
        files = [SINGLE]
    elif SHARD_INDEX in names:
        files = list(read_weight_map(folder / SHARD_INDEX).values())
    elif PICKLE in names:
        files = [PICKLE]
    elif PICKLE_INDEX in names:
        files = list(read_weight_map(folder / PICKLE_INDEX).values())
    elif ADAPTER_CONFIG in names:
        files = [ADAPTER_PICKLE if ADAPTER_PICKLE in names and ADAPTER_WEIGHTS not in names else ADAPTER_WEIGHTS]
    elif PARAMS in names:
        files = [name for name in names if is_meta_file(name)]
    elif LATEST in names:
        place = newest_folder(folder)
        files = [name for name in names if name.startswith(f"{place}/")]
    else:
        files = []
    files = sorted(set(files))
    absent = [name for name in files if name not in names]
    if absent:
        raise CheckpointError(
            f"{title} is incomplete: {absent[0]} is missing, and {len(absent) - 1} more of {len(files)}"
        )
    if not files:
        others = ", ".join(sorted(names)[:8]) or "no file"
        raise CheckpointError(
            f"{title} has no weights that are read here: looked for {SINGLE}, {SHARD_INDEX}, {PICKLE}, {PICKLE_INDEX}, "
            f"{MANIFEST}, {ADAPTER_CONFIG}, {PARAMS} with consolidated.00.pth, {LATEST}; found {others}"
        )
    return files
