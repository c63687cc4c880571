"""How long a schedule takes, given how long each action takes: the step, the bubble and the whole timeline."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from megatron.parallel.pipeline.schedule import (
    Action,
    Channel,
    Schedule,
    incoming,
    live_micro_batches,
    outgoing,
    passed_on,
)


class Bar(NamedTuple):
    """One action of a stage, from `start` to `stop` in seconds after the step began."""

    stage: int
    action: Action
    start: float
    stop: float


@dataclass(frozen=True)
class Simulation:
    """The bars of each stage, in the order in which it runs them."""

    bars: list[list[Bar]]

    @property
    def step_s(self) -> float:
        """Seconds until the last stage has done its last action."""
        return max(bars[-1].stop for bars in self.bars)

    def busy_s(self, stage: int) -> float:
        """Seconds in which a stage works."""
        return sum(bar.stop - bar.start for bar in self.bars[stage])

    def peak_live(self, stage: int) -> int:
        """The most micro-batches of which a stage holds activations at once, each chunk counted by itself."""
        return live_micro_batches([bar.action for bar in self.bars[stage]])

    @property
    def bubble(self) -> float:
        """The time in which stages wait, as a share of the time in which they work (the field's "bubble fraction":
        (stages − 1) / micro-batches for 1F1B)."""
        busy = sum(self.busy_s(stage) for stage in range(len(self.bars)))
        return self.step_s * len(self.bars) / busy - 1.0


def simulate(
    plan: Schedule,
    seconds: Callable[[int, Action], float],
    transfer_s: Callable[[Channel], float] = lambda _: 0.0,
    chunks: int = 1,
) -> Simulation:
    """Run a plan that `check_schedule` accepts. `seconds` is the duration of a stage's action; `transfer_s` that of a
    message, which goes on beside the work of both stages, one message of a channel after the other."""
    stages = len(plan)
    bars: list[list[Bar]] = [[] for _ in plan]
    arrives: list[dict[Action, float]] = [{} for _ in plan]
    wire_free: dict[Channel, float] = collections.defaultdict(float)
    hopeful = collections.deque(range(stages))
    while hopeful:
        stage = hopeful.popleft()
        clock = bars[stage][-1].stop if bars[stage] else 0.0
        for action in itertools.islice(plan[stage], len(bars[stage]), None):
            begin = clock
            if incoming(action, stage, stages, chunks) is not None:
                arrival = arrives[stage].pop(action, None)
                if arrival is None:
                    break
                begin = max(begin, arrival)
            clock = begin + seconds(stage, action)
            bars[stage].append(Bar(stage, action, begin, clock))
            target = outgoing(action, stage, stages, chunks)
            if target is not None:
                arrival = wire_free[target] = max(clock, wire_free[target]) + transfer_s(target)
                arrives[target.receiver][passed_on(action, stage, stages)] = arrival
                if target.receiver not in hopeful:
                    hopeful.append(target.receiver)
    assert [*map(len, bars)] == [*map(len, plan)], "the plan hangs: check it first"
    return Simulation(bars)
