"""Which rectangles are a whole tensor, and which of them a region meets."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.checkpoint.index import StoredPiece, StoredTensor, collect_index
from megatron.parallel.layout import Piece, Region, ShardSpec

from .conftest import partition


def _pieces(regions: list[Region]) -> list[StoredPiece]:
    return [StoredPiece(region, torch.float32, "file", str(number)) for number, region in enumerate(regions)]


def _problems(regions: list[Region]) -> list[str]:
    return collect_index(("weights", piece) for piece in _pieces(regions))[1]


def _moved(region: Region, chance: random.Random) -> Region:
    """Anywhere in the tensor, often where it was."""
    return replace(
        region,
        start=tuple(
            chance.choice((start, chance.randint(0, whole - size)))
            for start, size, whole in zip(region.start, region.size, region.shape, strict=True)
        ),
    )


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**32),
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple),
    cuts=st.integers(0, 12),
    moves=st.integers(0, 3),
)
def test_an_overlap_is_found_exactly_where_two_of_all_pairs_meet(
    seed: int, shape: tuple[int, ...], cuts: int, moves: int
) -> None:
    chance = random.Random(seed)
    regions = partition(Region.whole("w", shape), cuts, chance)
    for _ in range(moves):  # keeps the number of elements, so that only the overlap tells
        number = chance.randrange(len(regions))
        regions[number] = _moved(regions[number], chance)
    meet = any(one.intersect(other) is not None for one, other in itertools.combinations(regions, 2))
    assert _problems(regions) == (["weights of w: two pieces overlap"] if meet else [])


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_pieces_that_hold_the_right_number_of_elements_several_times(copies: int) -> None:
    quarters = [Region("w", (4, 4), start, (2, 2)) for start in ((0, 0), (0, 2), (2, 0), (2, 2))]
    assert _problems(quarters[:1] * copies + quarters[copies:]) == ["weights of w: two pieces overlap"]


def test_empty_pieces_are_no_overlap() -> None:
    assert _problems([Region.whole("w", (4, 2)), Region("w", (4, 2), (1, 1), (0, 1))]) == []
    assert _problems([Region.whole("w", (0, 2)), Region.whole("w", (0, 2))]) == []


@given(seed=st.integers(0, 2**32), shape=st.lists(st.integers(1, 9), max_size=2).map(tuple), cuts=st.integers(0, 20))
def test_every_piece_that_a_region_meets_is_near_it(seed: int, shape: tuple[int, ...], cuts: int) -> None:
    chance = random.Random(seed)
    whole = Region.whole("w", shape)
    stored = _stored(partition(whole, cuts if shape else 0, chance))
    for region in partition(whole, 6 if shape else 0, chance):
        near = Counter(piece.key for piece in stored.pieces_near(region))
        meeting = {piece.key for piece in stored.pieces if piece.region.intersect(region) is not None}
        assert meeting <= near.keys() and set(near.values()) == {1}


def test_few_of_the_pieces_of_a_large_run_are_near_a_region() -> None:
    shape, ranks = (512, 96), 100
    spec = ShardSpec(shape, (Piece(Region.whole("w", shape), (0, 0)),))
    bounds = [rank * spec.numel // ranks for rank in range(ranks + 1)]
    flat = torch.empty(spec.numel)
    stored = _stored(
        [
            region
            for start, stop in itertools.pairwise(bounds)
            for region, _ in spec.flat_regions(flat[start:stop], start)
        ]
    )
    assert len(stored.pieces) > 200
    assert len(stored.pieces_near(Region("w", shape, (200, 0), (5, 96)))) < 10


def _stored(regions: list[Region]) -> StoredTensor:
    index, problems = collect_index(("weights", piece) for piece in _pieces(regions))
    assert not problems
    return index["weights"]["w"]
