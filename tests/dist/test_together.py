"""Work that one process of each machine does for the others there: fetching a model from the hub."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.hub import local_folder_together
from megatron.parallel.communicator import new_communicator
from megatron.parallel.mesh import Axis
from megatron.parallel.world import World
from megatron.utils.environment import Launch
from megatron.utils.errors import ConfigError
from tests.dist.pool import Pool
from tests.stand_in_hub import Hub, redirect_client, running_hub

NAME = "Some/Model-7b"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as running:
        running.revisions[NAME] = {"main": {"config.json": b"{}", "model.safetensors": b"weights"}}
        yield running


def _world(rank: int, machines: int) -> World:
    launch = Launch(rank, 2, rank if machines == 1 else 0, 2 // machines)
    return World(launch, torch.device("cpu"), Axis("control", rank, 2, (0, 1), new_communicator((0, 1), 60.0, "gloo")))


def _fetch(rank: int, port: int, home: str, machines: int) -> tuple[str, str]:
    """In a process of its own, with a cache for each machine: what it is given, or the error."""
    with pytest.MonkeyPatch.context() as patch:
        redirect_client(patch, Hub(port=port), Path(home) / (str(rank) if machines == 2 else ""))
        try:
            return str(local_folder_together(f"hf://{NAME}", _world(rank, machines))), ""
        except ConfigError as error:
            return error.met_by, str(error)


@pytest.mark.parametrize("machines", [1, 2])
def test_one_process_of_each_machine_downloads(
    hub: Hub, tmp_path: Path, pools: Callable[[int], Pool], machines: int
) -> None:
    folders = pools(2).run(_fetch, hub.port, str(tmp_path), machines)
    assert len({folder for folder, _ in folders}) == machines
    assert all((Path(folder) / "model.safetensors").read_bytes() == b"weights" for folder, _ in folders)
    assert sum(path.startswith("/api/models/") for _, path, _ in hub.asked) == machines, "nor do the others ask"
    assert sorted(hub.fetched()) == ["config.json"] * machines + ["model.safetensors"] * machines
    shutil.rmtree(tmp_path)
    hub.gated.add(NAME)
    ended = pools(2).run(_fetch, hub.port, str(tmp_path), machines)
    assert len(set(ended)) == 1 and ended[0][0] == "world" and "is gated" in ended[0][1]


def test_machines_that_have_different_commits_are_told(hub: Hub, tmp_path: Path, pools: Callable[[int], Pool]) -> None:
    (folder, _), _ = pools(2).run(_fetch, hub.port, str(tmp_path), 2)
    Path(folder).rename(Path(folder).with_name("f" * 40))
    next((tmp_path / "0/hub").glob("*/refs/main")).write_text("f" * 40)
    hub.closed = True  # so that each machine takes what its cache has
    ended = pools(2).run(_fetch, hub.port, str(tmp_path), 2)
    said = f"is another commit on some machines than on others ({Path(folder).name}, fff"
    assert all(kind == "world" and said in error for kind, error in ended)
