"""Schedules are complete, cannot hang, and keep no more alive than they promise; wrong ones are noticed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.parallel.pipeline.partition import describe_partition, layers_of_stage
from megatron.parallel.pipeline.schedule import (
    Backward,
    Forward,
    check_schedule,
    forward_only,
    live_micro_batches,
    one_forward_one_backward,
)


@given(st.integers(1, 16), st.integers(1, 64))
def test_one_forward_one_backward(stages: int, micro_batches: int) -> None:
    plan = one_forward_one_backward(stages, micro_batches)
    check_schedule(plan, micro_batches)
    assert [live_micro_batches(actions) for actions in plan] == [
        min(micro_batches, stages - stage) for stage in range(stages)
    ]


@given(st.integers(1, 16), st.integers(1, 64))
def test_forward_only(stages: int, micro_batches: int) -> None:
    check_schedule(forward_only(stages, micro_batches), micro_batches, backward=False)


def test_the_checker_notices_an_action_left_out() -> None:
    plan = one_forward_one_backward(2, 3)
    del plan[1][-1]
    with pytest.raises(AssertionError, match="stage 1"):
        check_schedule(plan, 3)


def test_the_checker_notices_a_backward_before_its_forward() -> None:
    with pytest.raises(AssertionError, match="stage 0"):
        check_schedule([[Backward(0), Forward(0)]], 1)


def test_the_checker_notices_different_message_orders() -> None:
    plan = forward_only(2, 2)
    plan[1].reverse()
    with pytest.raises(AssertionError, match="different orders"):
        check_schedule(plan, 2, backward=False)


def test_the_checker_notices_a_deadlock() -> None:
    """The first stage wants a gradient before it sends what the second needs to begin."""
    first = [Forward(0), Backward(0), Forward(1), Backward(1)]
    second = [Forward(0), Forward(1), Backward(0), Backward(1)]
    with pytest.raises(AssertionError, match="deadlock"):
        check_schedule([first, second], 2)


@given(st.integers(1, 100), st.integers(1, 16))
def test_partition_is_even_and_complete(layers: int, stages: int) -> None:
    parts = [layers_of_stage(layers, stages, stage) for stage in range(stages)]
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert describe_partition(5, 2) == "3 + 2"
