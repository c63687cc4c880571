"""How long a schedule takes, given how long each action takes: the step, the bubble and the whole timeline."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass

from megatron.parallel.pipeline.schedule import Action, Channel, Schedule, incoming, outgoing, passed_on


@dataclass(frozen=True)
class Bar:
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
    stages, at = len(plan), [0] * len(plan)
    bars: list[list[Bar]] = [[] for _ in plan]
    arrives: dict[tuple[int, Action], float] = {}
    wire_free: dict[Channel, float] = collections.defaultdict(float)
    hopeful = collections.deque(range(stages))
    while hopeful:
        stage = hopeful.popleft()
        while at[stage] < len(plan[stage]):
            action = plan[stage][at[stage]]
            begin = bars[stage][-1].stop if bars[stage] else 0.0
            if incoming(action, stage, stages, chunks) is not None:
                if (stage, action) not in arrives:
                    break
                begin = max(begin, arrives.pop((stage, action)))
            end = begin + seconds(stage, action)
            bars[stage].append(Bar(stage, action, begin, end))
            target = outgoing(action, stage, stages, chunks)
            if target is not None:
                wire_free[target] = max(end, wire_free[target]) + transfer_s(target)
                arrives[target.receiver, passed_on(action, stage, stages)] = wire_free[target]
                hopeful.append(target.receiver)
            at[stage] += 1
    assert all(done == len(actions) for done, actions in zip(at, plan, strict=True)), "the plan hangs: check it first"
    return Simulation(bars)
