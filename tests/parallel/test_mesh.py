"""Grid arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.parallel.mesh import Grid, describe, key_value_copies, single_rank
from megatron.utils.errors import ConfigError

grids = st.builds(Grid, *[st.integers(1, 4)] * 4)


@given(grids)
def test_coordinates_and_ranks_are_inverse(grid: Grid) -> None:
    ranks = [grid.rank(*grid.coordinates(rank)) for rank in range(grid.world_size)]
    assert ranks == list(range(grid.world_size))


def test_tensor_is_fastest_and_pipeline_slowest() -> None:
    grid = Grid(tensor=2, context=2, data=3, pipeline=2)
    assert grid.groups("tensor")[0] == (0, 1)
    assert grid.groups("context")[0] == (0, 2)
    assert grid.groups("data")[0] == (0, 4, 8)
    assert grid.groups("context", "data")[0] == (0, 2, 4, 6, 8, 10)
    assert grid.groups("pipeline")[0] == (0, 12)


@given(grids, st.sets(st.sampled_from(["tensor", "context", "data", "pipeline"])))
def test_groups_partition_the_world(grid: Grid, along: set[str]) -> None:
    groups = grid.groups(*along)
    assert sorted(rank for group in groups for rank in group) == list(range(grid.world_size))
    assert len({len(group) for group in groups}) == 1


@given(grids, st.sampled_from([1, 2, 4, 8]), st.data())
def test_axes_agree_with_each_other(grid: Grid, heads: int, data: st.DataObject) -> None:
    if grid.tensor % heads and heads % grid.tensor:
        return
    rank = data.draw(st.integers(0, grid.world_size - 1))
    among = grid.data * grid.context
    shard = data.draw(st.sampled_from([size for size in range(1, among + 1) if among % size == 0]))
    context = describe(grid, rank, num_key_value_heads=heads, shard=shard)
    for axis in (
        context.tp,
        context.cp,
        context.pp,
        context.data,
        context.grad,
        context.shard,
        context.replica,
        context.loss,
        context.kv,
        context.world,
    ):
        assert axis.ranks[axis.rank] == rank and len(axis.ranks) == axis.size
    assert context.tp.size * context.cp.size * context.pp.size * context.data.size == grid.world_size
    assert context.grad.size == grid.context * grid.data
    assert context.shard.size == shard and context.shard.size * context.replica.size == context.grad.size
    assert set(context.shard.ranks) & set(context.replica.ranks) == {rank}
    assert context.grad.rank == context.replica.rank * shard + context.shard.rank, "shards are neighbours"
    assert context.loss.size * grid.tensor == grid.world_size
    assert context.cp.ranks == context.ring_even.ranks == context.ring_odd.ranks
    assert context.model.size == grid.tensor * grid.pipeline
    assert context.kv.size == max(1, grid.tensor // heads)
    first_or_last = context.pp.rank in (0, grid.pipeline - 1)
    assert context.embed.size == (2 if grid.pipeline > 1 and first_or_last else 1)


def test_sequence_parallelism_needs_tensor_ranks() -> None:
    assert not describe(Grid(), 0, sequence=True).sequence
    assert describe(Grid(tensor=2), 0, sequence=True).sequence
    assert single_rank().world.size == 1


def test_impossible_worlds_say_what_is_possible() -> None:
    with pytest.raises(ConfigError, match="multiple of 4"):
        Grid.of_world(6, tensor=2, pipeline=2)
    with pytest.raises(ConfigError, match=r"tensor=2 x context=3 x pipeline=1 = 6"):
        Grid.of_world(4, tensor=2, pipeline=1, context=3)
    with pytest.raises(ConfigError, match=r"num_key_value_heads=3.*use 1, 3"):
        key_value_copies(2, 3)
