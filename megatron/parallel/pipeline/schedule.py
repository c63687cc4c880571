"""Pipeline schedules as data: for each stage the list of actions, in the order it runs them.

A schedule is a pure function of sizes. The engine executes any list; `check_schedule` proves one complete and free of
deadlock without starting a process.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Forward:
    """Run the forward pass of one micro-batch."""

    micro_batch: int


@dataclass(frozen=True)
class Backward:
    """Run the backward pass of one micro-batch."""

    micro_batch: int


Action = Forward | Backward
Schedule = list[list[Action]]


def one_forward_one_backward(stages: int, micro_batches: int) -> Schedule:
    """1F1B (Narayanan et al., SC'21): stage i keeps at most min(micro_batches, stages − i) micro-batches alive."""
    plan: Schedule = []
    for stage in range(stages):
        warmup = min(stages - stage - 1, micro_batches)
        forwards: list[Action] = [Forward(number) for number in range(micro_batches)]
        backwards: list[Action] = [Backward(number) for number in range(micro_batches)]
        steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
        plan.append(forwards[:warmup] + steady + backwards[micro_batches - warmup :])
    return plan


def forward_only(stages: int, micro_batches: int) -> Schedule:
    """Every micro-batch forward, none backward: evaluation."""
    return [[Forward(number) for number in range(micro_batches)] for _ in range(stages)]


def live_micro_batches(actions: list[Action]) -> int:
    """The most micro-batches whose activations a stage holds at once."""
    live = peak = 0
    for action in actions:
        live += 1 if isinstance(action, Forward) else -1
        peak = max(peak, live)
    return peak


def check_schedule(plan: Schedule, micro_batches: int, *, backward: bool = True) -> None:
    """Assert that a plan is complete and cannot hang, however late messages are taken.

    Sends are simulated as unbuffered: each waits for its receiver, and a stage may have one send under way in each
    direction. Between neighbours there is one message order in each direction, alike on both sides.
    """
    for stage, actions in enumerate(plan):
        expected: set[Action] = {Forward(number) for number in range(micro_batches)}
        expected |= {Backward(number) for number in range(micro_batches)} if backward else set()
        assert len(actions) == len(expected) and set(actions) == expected, (
            f"stage {stage} does not run each action once"
        )
        place = {action: at for at, action in enumerate(actions)}
        for number in range(micro_batches if backward else 0):
            assert place[Forward(number)] < place[Backward(number)], f"stage {stage}: {number} goes back first"
    for kind in (Forward, Backward):
        orders = {tuple(a.micro_batch for a in actions if isinstance(a, kind)) for actions in plan}
        assert len(orders) <= 1, f"neighbouring stages send and receive {kind.__name__} messages in different orders"
    _simulate(plan)


def _simulate(plan: Schedule) -> None:
    """Run the plan with rendezvous sends; assert that every stage comes to its end."""
    at = [0] * len(plan)
    # (sender, receiver) → the message under way there; its receiver takes it when its next action needs it
    under_way: dict[tuple[int, int], Action] = {}
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(plan):
            if at[stage] == len(actions):
                continue
            action = actions[at[stage]]
            source, target = (stage - 1, stage + 1) if isinstance(action, Forward) else (stage + 1, stage - 1)
            ready = source not in range(len(plan)) or under_way.get((source, stage)) == action
            sendable = target not in range(len(plan)) or (stage, target) not in under_way
            if ready and sendable:
                under_way.pop((source, stage), None)
                if target in range(len(plan)):
                    under_way[(stage, target)] = action
                at[stage] += 1
                moved = True
    stuck = {stage: actions[at[stage]] for stage, actions in enumerate(plan) if at[stage] < len(actions)}
    assert not stuck and not under_way, f"deadlock: stages wait at {stuck}, messages never taken: {under_way}"
