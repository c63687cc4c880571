"""Schedules are complete, cannot hang, take the time and keep alive what theory says; wrong ones are noticed."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.parallel import ScheduleName
from megatron.parallel.pipeline.check import check_schedule
from megatron.parallel.pipeline.partition import cut, describe_partition, parts_of_stage
from megatron.parallel.pipeline.picture import to_svg, to_text
from megatron.parallel.pipeline.schedule import (
    Action,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Schedule,
    forward_only,
    interleaved_one_forward_one_backward,
    label,
    live_micro_batches,
    make_schedule,
    zero_bubble_h1,
)
from megatron.parallel.pipeline.simulate import simulate

# Seconds of each part of a layer's work, all different, so that no two formulas agree by chance.
SECONDS = {Forward: 1.0, Backward: 2.25, BackwardInput: 1.25, BackwardWeight: 1.0}


def bubble(plan: Schedule, chunks: int = 1) -> float:
    return simulate(plan, lambda _, action: SECONDS[type(action)] / chunks, chunks=chunks).bubble


@given(st.integers(1, 16), st.integers(1, 64), st.sampled_from(["1f1b", "gpipe", "zero_bubble"]))
def test_schedules_of_one_chunk(stages: int, micro_batches: int, name: ScheduleName) -> None:
    plan = make_schedule(name, stages, micro_batches)
    check_schedule(plan, micro_batches)
    bound = {
        "1f1b": [min(micro_batches, stages - stage) for stage in range(stages)],
        "gpipe": [micro_batches] * stages,
        "zero_bubble": [min(micro_batches, stages)] * stages,
    }
    assert [live_micro_batches(actions) for actions in plan] == bound[name]


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 16), st.integers(2, 4), st.data())
def test_interleaved_schedules(stages: int, chunks: int, data: st.DataObject) -> None:
    micro_batches = stages * data.draw(st.integers(1, 64 // stages))
    plan = interleaved_one_forward_one_backward(stages, micro_batches, chunks)
    check_schedule(plan, micro_batches, chunks=chunks)
    everything = micro_batches * chunks
    assert [live_micro_batches(actions) for actions in plan] == [
        min(everything, 2 * (stages - stage - 1) + (chunks - 1) * stages + 1) for stage in range(stages)
    ]
    assert bubble(plan, chunks) == pytest.approx((stages - 1) / (chunks * micro_batches))


@given(st.integers(1, 16), st.integers(1, 64))
def test_bubbles_are_those_of_the_papers(stages: int, micro_batches: int) -> None:
    plain = (stages - 1) / micro_batches
    assert bubble(make_schedule("1f1b", stages, micro_batches)) == pytest.approx(plain)
    assert bubble(make_schedule("gpipe", stages, micro_batches)) == pytest.approx(plain)
    if micro_batches >= stages:
        idle = (stages - 1) * (SECONDS[Forward] + SECONDS[BackwardInput] - SECONDS[BackwardWeight])
        busy = micro_batches * (SECONDS[Forward] + SECONDS[BackwardInput] + SECONDS[BackwardWeight])
        assert bubble(zero_bubble_h1(stages, micro_batches)) == pytest.approx(idle / busy)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 16), st.integers(1, 64), st.integers(1, 4))
def test_forward_only(stages: int, micro_batches: int, chunks: int) -> None:
    chunks = chunks if stages > 1 else 1
    check_schedule(forward_only(stages, micro_batches, chunks), micro_batches, chunks=chunks, backward=False)


def test_messages_take_time_beside_the_work() -> None:
    """Two stages, one micro-batch: 1 + transfer + 1 + 2.25 + transfer + 2.25 seconds."""
    result = simulate(make_schedule("1f1b", 2, 1), lambda _, action: SECONDS[type(action)], lambda _: 0.5)
    assert result.step_s == pytest.approx(7.5)
    assert result.busy_s(0) == pytest.approx(3.25)


def test_the_checker_notices_an_action_left_out() -> None:
    plan = make_schedule("1f1b", 2, 3)
    del plan[1][-1]
    with pytest.raises(AssertionError, match="stage 1"):
        check_schedule(plan, 3)


def test_the_checker_notices_a_weight_gradient_left_out() -> None:
    plan = zero_bubble_h1(2, 3)
    plan[1].remove(BackwardWeight(1))
    with pytest.raises(AssertionError, match="missing \\['W1'\\]"):
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
    first: list[Action] = [Forward(0), Backward(0), Forward(1), Backward(1)]
    second: list[Action] = [Forward(0), Forward(1), Backward(0), Backward(1)]
    with pytest.raises(AssertionError, match="deadlock"):
        check_schedule([first, second], 2)


def test_the_checker_notices_a_deadlock_around_the_ring() -> None:
    """The first stage waits for the gradient of its second chunk before it sends what the other needs before that."""
    forwards: list[Action] = [Forward(0), Forward(0, 1), Forward(1), Forward(1, 1)]
    backwards: list[Action] = [Backward(0, 1), Backward(1, 1), Backward(0), Backward(1)]
    first = forwards[:2] + backwards[:1] + forwards[2:] + backwards[1:]
    with pytest.raises(AssertionError, match="deadlock"):
        check_schedule([first, forwards + backwards], 2, chunks=2)


@given(st.integers(1, 100), st.integers(1, 16))
def test_even_partition(layers: int, parts: int) -> None:
    found = [part.layers for part in cut(layers, parts)]
    assert [layer for part in found for layer in part] == list(range(layers))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert describe_partition(cut(5, 2)) == "3 + 2"


@given(st.integers(1, 16), st.integers(0, 60), st.floats(0.0, 9.0))
def test_balanced_partition_has_the_smallest_largest_part(parts: int, more: int, head_cost: float) -> None:
    layers = parts + more
    costs = [len(part.layers) + (head_cost if part.last else 0.0) for part in cut(layers, parts, "balanced", head_cost)]
    least = min(
        max([last + head_cost] + ([-(-(layers - last) // (parts - 1))] if parts > 1 else []))
        for last in range(1, layers - parts + 2)
        if parts > 1 or last == layers
    )
    assert max(costs) == pytest.approx(least)


def test_chunks_go_round_the_stages() -> None:
    parts = cut(7, 4, (1, 2, 3, 1))
    first, second = (parts_of_stage(parts, 2, stage) for stage in range(2))
    assert [list(part.layers) for part in first] == [[0], [3, 4, 5]]
    assert [list(part.layers) for part in second] == [[1, 2], [6]]
    assert first[0].first and second[1].last and not (first[1].first or first[1].last)


def test_pictures_show_every_action() -> None:
    result = simulate(zero_bubble_h1(3, 4), lambda _, action: SECONDS[type(action)])
    text, svg = to_text(result, 0.25), ElementTree.fromstring(to_svg(result))
    for bars in result.bars:
        for bar in bars:
            assert label(bar.action) in text
    assert text.count("W3") == 3 and len(text.splitlines()) == 3
    titles = [element.text or "" for element in svg.iter() if element.tag.endswith("title")]
    assert len(titles) == 3 * 12 and sum(title.startswith("I2:") for title in titles) == 3
