"""Activations and their gradients travel behind the computation: asked for one action ahead, sent without waiting."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import pytest
import torch

from megatron.config.parallel import ScheduleName
from megatron.parallel.mesh import Axis, ParallelContext, single_rank
from megatron.parallel.pipeline.engine import Activations, run_stage
from megatron.parallel.pipeline.schedule import Backward, Forward, label, make_schedule
from megatron.parallel.weight_gradient import LaterProducts

STAGES, MICRO_BATCHES = 3, 5


@dataclass
class Sent:
    name: str
    events: list[str]

    def wait(self) -> None:
        self.events.append(f"wait {self.name}")


class Neighbours:
    """Both neighbours of the middle stage, in one direction; messages are counted from 0."""

    def __init__(self, letter: str, events: list[str]) -> None:
        self.letter, self.events, self.counts = letter, events, {"send": 0, "receive": 0}

    def send(self, tensor: torch.Tensor, peer: int) -> Sent:
        return self._start("send")

    def receive(self, tensor: torch.Tensor, peer: int) -> Sent:
        tensor.fill_(1.0)
        return self._start("receive")

    def _start(self, kind: str) -> Sent:
        name = f"{kind} {self.letter}{self.counts[kind]}"
        self.counts[kind] += 1
        self.events.append(f"start {name}")
        return Sent(name, self.events)


def middle_stage(events: list[str]) -> ParallelContext:
    axes = {
        name: Axis(name, 1, STAGES, tuple(range(STAGES)), Neighbours(letter, events))
        for name, letter in (("forward", "F"), ("backward", "B"))
    }
    return dataclasses.replace(single_rank(), pp=Axis("pp", 1, STAGES, tuple(range(STAGES))), **axes)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zero_bubble"])
def test_messages_travel_behind_the_computation(schedule: ScheduleName) -> None:
    events, later = list[str](), LaterProducts()
    actions = make_schedule(schedule, STAGES, MICRO_BATCHES)[1]

    def stage(micro_batch: int, chunk: int, hidden: torch.Tensor | None) -> torch.Tensor:
        assert hidden is not None
        events.append(f"F{micro_batch}")
        output = 2.0 * hidden
        output.register_hook(lambda _: go_back(micro_batch))
        return output

    def go_back(micro_batch: int) -> None:
        events.append(f"B{micro_batch}")
        later.keep(lambda: events.append(f"W{micro_batch}"))  # where the schedule puts it off

    activations = Activations([(4, 1, 2)] * MICRO_BATCHES, torch.float64, torch.device("cpu"))
    run_stage(actions, stage, middle_stage(events), activations, later=later)
    done = [label(action).replace("I", "B") for action in actions]
    assert [event for event in events if event[0] in "FBW"] == done
    for before, action in itertools.pairwise(done):
        if action.startswith("W"):
            continue
        assert events.index(f"start receive {action}") < events.index(before), f"{action} is asked for late: {events}"
        assert events.index(f"wait receive {action}") > events.index(before), f"{before} waits for what it needs not"
    for kind in (Forward, Backward):
        letter = kind.__name__[0]
        for number in range(MICRO_BATCHES):
            start, end = events.index(f"start send {letter}{number}"), events.index(f"wait send {letter}{number}")
            after = done.index(f"{letter}{number}") + 1
            assert start > events.index(f"{letter}{number}")
            if after < len(done):
                assert events.index(done[after]) < end or done[after][0] == letter, "the next action waits for a send"
