"""Process groups: two contexts in one process, and what the ranks tell each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron.parallel.collectives import all_reduce
from megatron.parallel.communicator import new_communicator
from megatron.parallel.mesh import Axis, Grid, connect
from megatron.parallel.world import World
from megatron.utils.environment import Launch
from megatron.utils.errors import DataError
from tests.dist.pool import Pool


def _two_contexts(rank: int) -> tuple[float, float]:
    tensor, data = connect(Grid(tensor=2), rank), connect(Grid(data=2), rank)
    one, two = torch.tensor(float(rank)), torch.tensor(10.0 * rank)
    all_reduce(one, tensor.tp)
    all_reduce(two, data.replica)
    assert tensor.grad.size == data.tp.size == 1
    return one.item(), two.item()


def test_two_contexts_live_in_one_process(pools: Callable[[int], Pool]) -> None:
    assert pools(2).run(_two_contexts) == [(1.0, 10.0)] * 2


def _world(rank: int) -> World:
    ranks = (0, 1)
    control = Axis("control", rank, 2, ranks, new_communicator(ranks, 60.0, "gloo"))
    return World(Launch(rank, 2, rank, 2), torch.device("cpu"), control)


def _talk(rank: int) -> tuple[list[str], list[str], int, str, str]:
    world = _world(rank)
    said = world.exchange("äh" * rank)
    empty = world.exchange("")
    loudest = world.vote(rank + 1).result()

    def fail_on_the_second() -> None:
        if rank == 1:
            raise DataError("the second rank's file is gone")

    with pytest.raises(DataError) as caught:
        world.agree(fail_on_the_second)
    assert world.agree(lambda: rank) == rank
    return said, empty, loudest, str(caught.value), caught.value.met_by


def test_ranks_exchange_vote_and_agree(pools: Callable[[int], Pool]) -> None:
    expected = (["", "äh"], ["", ""], 2, "the second rank's file is gone", "world")
    assert pools(2).run(_talk) == [expected] * 2
