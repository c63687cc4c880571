"""Every two features together equal one rank: a covering array of pairs, in float64."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.dist.case import run_case
from tests.dist.compare import TOLERANCE, deviation
from tests.dist.covering import FEATURES, LARGEST_WORLD, all_pairs, as_case, covering_array, pairs_of
from tests.dist.pool import Pool
from tests.dist.test_equivalence import SETTINGS, one_rank

# The seed of which the greedy search finds the fewest runs, of the first dozen.
ARRAY = covering_array(seed=8)
# All of it takes minutes: `make thorough` runs it, `make test` every third run.
EVERY = 1 if os.environ.get("THOROUGH") else 3


def test_the_array_covers_every_pair() -> None:
    met = set().union(*(pairs_of(choice) for choice in ARRAY))
    assert met == all_pairs()
    assert len(ARRAY) <= 26 < len(all_pairs())
    assert all(set(choice) == set(FEATURES) and as_case(choice).grid.world_size <= LARGEST_WORLD for choice in ARRAY)


@pytest.mark.parametrize("number", range(0, len(ARRAY), EVERY), ids=lambda number: as_case(ARRAY[number]).name)
def test_features_together_equal_one_rank(number: int, pools: Callable[[int], Pool]) -> None:
    case = as_case(ARRAY[number])
    strict, backend = list(SETTINGS.values())[number % len(SETTINGS)]  # in turns
    results = pools(case.grid.world_size).run(run_case, case, strict, None, backend)
    assert deviation(results, one_rank(case.one_rank)) <= TOLERANCE
