"""Pools of worker processes joined by gloo, kept between tests, since starting them costs most of a test's time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from megatron.verify.pool import Pool, WorkerError

__all__ = ["Pool", "WorkerError", "pools"]


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], Pool]]:
    """The pool of a size; made when first asked for, closed at the end of the session."""
    made: dict[int, Pool] = {}
    yield lambda size: made.setdefault(size, Pool(size))
    for pool in made.values():
        pool.close()
