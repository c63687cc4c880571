"""Pipeline schedules as data: for each stage the list of actions, in the order it runs them.

A stage holds one or more chunks of the model; chunk c of stage i is number c · stages + i in the order of the layers. A
schedule is a pure function of sizes. One engine executes any list (engine.py), `check_schedule` proves one complete and
free of deadlock (check.py), and `simulate` says how long it takes (simulate.py), both without starting a process.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron.config.parallel import ScheduleName


@dataclass(frozen=True)
class Forward:
    """Run the forward pass of one micro-batch through one chunk."""

    micro_batch: int
    chunk: int = 0


@dataclass(frozen=True)
class Backward:
    """Run the whole backward pass of one micro-batch through one chunk."""

    micro_batch: int
    chunk: int = 0


@dataclass(frozen=True)
class BackwardInput:
    """Run the part of a backward pass that gives the gradient of the chunk's input, which another stage waits for."""

    micro_batch: int
    chunk: int = 0


@dataclass(frozen=True)
class BackwardWeight:
    """Run the rest of a backward pass: the products that give the gradients of the weights."""

    micro_batch: int
    chunk: int = 0


Action = Forward | Backward | BackwardInput | BackwardWeight
Schedule = list[list[Action]]

LETTERS: dict[type, str] = {Forward: "F", Backward: "B", BackwardInput: "I", BackwardWeight: "W"}


def label(action: Action) -> str:
    """`F3`, or with a chunk above 0 `F3.1`."""
    chunk = f".{action.chunk}" if action.chunk else ""
    return f"{LETTERS[type(action)]}{action.micro_batch}{chunk}"


def make_schedule(name: ScheduleName, stages: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """The schedule of this name."""
    if name == "interleaved":
        return interleaved_one_forward_one_backward(stages, micro_batches, chunks)
    assert chunks == 1, f"{name} has one chunk for each stage"
    functions = {"1f1b": one_forward_one_backward, "gpipe": gpipe, "zero_bubble": zero_bubble_h1}
    return functions[name](stages, micro_batches)


def gpipe(stages: int, micro_batches: int) -> Schedule:
    """All forward passes, then all backward passes (Huang et al., 2019): every micro-batch is alive at once."""
    forwards: list[Action] = [Forward(number) for number in range(micro_batches)]
    backwards: list[Action] = [Backward(number) for number in range(micro_batches)]
    return [forwards + backwards for _ in range(stages)]


def one_forward_one_backward(stages: int, micro_batches: int) -> Schedule:
    """1F1B (Narayanan et al., SC'21): stage i keeps at most min(micro_batches, stages − i) micro-batches alive."""
    plan: Schedule = []
    for stage in range(stages):
        forwards: list[Action] = [Forward(number) for number in range(micro_batches)]
        backwards: list[Action] = [Backward(number) for number in range(micro_batches)]
        plan.append(_alternate(forwards, backwards, min(stages - stage - 1, micro_batches)))
    return plan


def interleaved_one_forward_one_backward(stages: int, micro_batches: int, chunks: int) -> Schedule:
    """1F1B over several chunks of each stage (Narayanan et al., SC'21, section 2.2): a bubble smaller by `chunks`.

    Micro-batches go through the chunks in groups of as many as there are stages, so their number must be a multiple.
    """
    assert micro_batches % stages == 0, (micro_batches, stages)
    order = [
        (group * stages + number, chunk)
        for group in range(micro_batches // stages)
        for chunk in range(chunks)
        for number in range(stages)
    ]
    forwards: list[Action] = [Forward(number, chunk) for number, chunk in order]
    backwards: list[Action] = [Backward(number, chunks - 1 - chunk) for number, chunk in order]
    # Each stage begins two steps of the pipeline after the one below it would have it, so that gradients meet no gap.
    warmups = [2 * (stages - stage - 1) + (chunks - 1) * stages for stage in range(stages)]
    return [_alternate(forwards, backwards, min(warmup, len(order))) for warmup in warmups]


def zero_bubble_h1(stages: int, micro_batches: int) -> Schedule:
    """ZB-H1 (Qi et al., 2024): weight gradients fill the gaps of 1F1B, with as much memory as its first stage needs.

    Stage i runs the weight part of a micro-batch i micro-batches late: what is left over fills the end of the step.
    """
    plan: Schedule = []
    for stage, actions in enumerate(one_forward_one_backward(stages, micro_batches)):
        late: list[Action] = []
        for action in actions:
            if isinstance(action, Forward):
                late.append(action)
                continue
            late.append(BackwardInput(action.micro_batch))
            if action.micro_batch >= stage:
                late.append(BackwardWeight(action.micro_batch - stage))
        late += [BackwardWeight(number) for number in range(max(0, micro_batches - stage), micro_batches)]
        plan.append(late)
    return plan


def forward_only(stages: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """Every micro-batch forward through every chunk, none backward: evaluation."""
    group_size = 1 if micro_batches % stages else stages
    groups = [range(start, start + group_size) for start in range(0, micro_batches, group_size)]
    order = [(number, chunk) for group in groups for chunk in range(chunks) for number in group]
    return [[Forward(number, chunk) for number, chunk in order] for _ in range(stages)]


def live_micro_batches(actions: list[Action]) -> int:
    """The most micro-batches of which a stage holds anything at once, each chunk counted by itself."""
    live = peak = 0
    for action in actions:
        if isinstance(action, Forward):
            live += 1
        elif isinstance(action, (Backward, BackwardWeight)):
            live -= 1
        peak = max(peak, live)
    return peak


class Channel(NamedTuple):
    """Messages of one direction between two stages. `wraps` tells those that close the ring, from the last stage's
    chunk to the first one's next (backward: the other way round): they have a communicator of their own, since two
    stages alone would else send in both directions over one."""

    forward: bool
    wraps: bool
    sender: int
    receiver: int


def incoming(action: Action, stage: int, stages: int, chunks: int) -> Channel | None:
    """From where an action gets what it works on; None at the ends of the model, and for weight gradients."""
    if isinstance(action, BackwardWeight):
        return None
    if isinstance(action, Forward):
        return _forward_channel(stage - 1, action.chunk - (stage == 0), stages, chunks)
    return _backward_channel(stage, action.chunk, stages, chunks)


def outgoing(action: Action, stage: int, stages: int, chunks: int) -> Channel | None:
    """Where to an action sends its result; None at the ends of the model, and for weight gradients."""
    if isinstance(action, BackwardWeight):
        return None
    if isinstance(action, Forward):
        return _forward_channel(stage, action.chunk, stages, chunks)
    return _backward_channel(stage - 1, action.chunk - (stage == 0), stages, chunks)


def passed_on(action: Action, stage: int, stages: int) -> Action:
    """The action of the receiving stage that an action's message is for."""
    if isinstance(action, Forward):
        return Forward(action.micro_batch, action.chunk + (stage == stages - 1))
    return type(action)(action.micro_batch, action.chunk - (stage == 0))


def next_to_ask(actions: Sequence[Action], at: int) -> Action | None:
    """The action whose message to ask for before action `at` works: the one that follows, unless it works on the same
    micro-batch. What that one needs comes of what this one sends, and a communicator that runs its operations in order
    would wait for it first, for ever."""
    if at + 1 == len(actions):
        return None
    action, following = actions[at], actions[at + 1]
    return None if action.micro_batch == following.micro_batch else following


@functools.cache
def _forward_channel(sender: int, chunk: int, stages: int, chunks: int) -> Channel | None:
    """The channel on which the chunk of `sender` (−1: the last stage) sends its activations."""
    sender %= stages
    last = sender == stages - 1
    if chunk < 0 or (last and chunk == chunks - 1):
        return None
    return Channel(True, last, sender, (sender + 1) % stages)


@functools.cache
def _backward_channel(receiver: int, chunk: int, stages: int, chunks: int) -> Channel | None:
    """The channel on which the chunk of `receiver` (−1: the last stage) gets the gradient of its activations."""
    forward = _forward_channel(receiver, chunk, stages, chunks)
    return None if forward is None else Channel(False, forward.wraps, forward.receiver, forward.sender)


def _alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """`warmup` forward actions, then one of each in turns, then the backward actions that are left."""
    pairs = zip(forwards[warmup:], backwards, strict=False)
    steady = [action for pair in pairs for action in pair]
    return forwards[:warmup] + steady + backwards[len(forwards) - warmup :]
