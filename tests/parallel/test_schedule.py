"""Schedules are complete, cannot hang, take the time and keep alive what theory says; wrong ones are noticed."""

from __future__ import annotations

import itertools
import time
import xml.etree.ElementTree as ElementTree
from typing import get_args

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
    one_forward_one_backward,
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
    simulation = simulate(plan, lambda _, action: SECONDS[type(action)])
    assert [simulation.peak_live(stage) for stage in range(stages)] == bound[name]


def test_all_small_sizes() -> None:
    for stages, micro_batches in itertools.product(range(1, 6), range(1, 9)):
        for name in get_args(ScheduleName):
            if name != "interleaved":
                check_schedule(make_schedule(name, stages, micro_batches), micro_batches)
        for chunks in range(1, 5 if stages > 1 else 2):
            evaluation = forward_only(stages, micro_batches, chunks)
            check_schedule(evaluation, micro_batches, chunks=chunks, backward=False)
            if chunks > 1 and micro_batches % stages == 0:
                plan = make_schedule("interleaved", stages, micro_batches, chunks)
                check_schedule(plan, micro_batches, chunks=chunks)


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


def test_the_simulator_is_fast_enough_to_search_with() -> None:
    plan = interleaved_one_forward_one_backward(16, 512, 4)
    begin = time.process_time()
    simulation = simulate(plan, lambda _, action: SECONDS[type(action)], lambda _: 0.01, chunks=4)
    assert time.process_time() - begin < 3.0  # 0.4 s where nothing else runs
    assert simulation.step_s > 512 * 4 * (SECONDS[Forward] + SECONDS[Backward])


def test_a_late_stage_makes_the_others_wait() -> None:
    """Stages of different speed: the step is the slow stage's work, and its filling and draining."""
    result = simulate(one_forward_one_backward(2, 3), lambda stage, _: 1.0 + stage)
    assert result.step_s == pytest.approx(1.0 + 3 * (2.0 + 2.0) + 1.0)
    assert [result.busy_s(stage) for stage in range(2)] == [6.0, 12.0]


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


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 5), st.sampled_from(get_args(ScheduleName)), st.data())
def test_the_checker_notices_whatever_is_broken(stages: int, name: ScheduleName, data: st.DataObject) -> None:
    """One action of one stage lost, doubled, or exchanged with another whose message goes the same way."""
    chunks = 2 if name == "interleaved" else 1
    plan = make_schedule(name, stages, 2 * stages, chunks)
    actions = plan[data.draw(st.integers(0, stages - 1))]
    at = data.draw(st.integers(0, len(actions) - 1))
    fault = data.draw(st.sampled_from(["lost", "doubled", "exchanged"]))
    if fault == "lost":
        del actions[at]
    elif fault == "doubled":
        actions.insert(at, actions[at])
    else:
        forwards = [place for place, action in enumerate(actions) if isinstance(action, Forward)]
        one, other = data.draw(st.lists(st.sampled_from(forwards), min_size=2, max_size=2, unique=True))
        actions[one], actions[other] = actions[other], actions[one]
    with pytest.raises(AssertionError):
        check_schedule(plan, 2 * stages, chunks=chunks)


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


def test_the_checker_notices_a_deadlock_of_communicators_that_run_in_order() -> None:
    """With fewer micro-batches in a group than stages, a stage asks for what comes round the ring before it sends what
    must go round it: harmless over gloo, the end over NCCL."""
    order: list[Action] = [Forward(0), Forward(1), Forward(0, 1), Forward(1, 1)]
    check_schedule([order] * 2, 2, chunks=2, backward=False)
    with pytest.raises(AssertionError, match="deadlock"):
        check_schedule([order] * 4, 2, chunks=2, backward=False)


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
