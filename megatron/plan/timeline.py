"""Plays a recording on given hardware: the computation in its order, messages beside it, waits where they were."""

from __future__ import annotations

import collections

from megatron.plan.costs import Costs
from megatron.plan.operations import Operation
from megatron.plan.recorder import Message, Recording, Start, Wait


class Timeline:
    """A recording on hardware. Messages of one axis queue behind each other; those between stages cost nothing here,
    since when they arrive is the schedule's matter."""

    def __init__(self, recording: Recording, costs: Costs) -> None:
        self.recording = recording
        self.moments = [0.0]
        self._classes: list[tuple[str, float]] = []
        known: dict[Operation | Message, float] = {}
        free: dict[str, float] = collections.defaultdict(float)
        ends: dict[int, tuple[float, str]] = {}
        now = 0.0
        for index, event in enumerate(recording.events):
            kind, seconds = "", 0.0
            if isinstance(event, Operation):
                if event not in known:
                    known[event] = costs.operation_s(event)
                kind, seconds = class_of(event), known[event]
            elif isinstance(event, Start):
                message = event.message
                if message.kind in ("send", "receive"):
                    ends[index] = now, message.axis
                else:
                    if message not in known:
                        known[message] = costs.message_s(message)
                    free[message.axis] = max(now, free[message.axis]) + known[message]
                    ends[index] = free[message.axis], message.axis
            elif isinstance(event, Wait):
                end, axis = ends.get(event.started, (now, ""))
                kind, seconds = f"wait:{axis}", max(0.0, end - now)
            now += seconds
            self.moments.append(now)
            self._classes.append((kind, seconds))

    def seconds(self, start: int, stop: int) -> float:
        """Duration of the events start … stop − 1."""
        return self.moments[stop] - self.moments[start]

    def spending(self, start: int, stop: int) -> dict[str, float]:
        """Where the time of the events start … stop − 1 goes: `product`, `attention`, `memory` (what is bound by it),
        and waits as `wait:AXIS`."""
        seconds: dict[str, float] = collections.defaultdict(float)
        for kind, duration in self._classes[start:stop]:
            if duration > 0.0:
                seconds[kind] += duration
        return dict(seconds)


def class_of(operation: Operation) -> str:
    """What limits an operation: `attention`, `product`, or else `memory`."""
    if operation.attention:
        return "attention"
    return "product" if operation.flops > 0 else "memory"
