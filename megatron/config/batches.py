"""How many sequences each step reads, as a function of how many samples the steps before it have read.

Nothing else is asked, so one position in the order of samples says which step comes next, however the run came there.
Standard library only.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

# Sequences per step, or pairs (from so many tokens on, sequences per step), the first from 0.
GlobalBatch = int | tuple[tuple[int, int], ...]


def batch_sizes(setting: GlobalBatch) -> tuple[int, ...]:
    """The different sizes that a batch has in the course of the run, in the order in which they come first."""
    return (setting,) if isinstance(setting, int) else tuple(dict.fromkeys(batch for _, batch in setting))


def largest_batch(setting: GlobalBatch) -> int:
    """The largest size that a batch has in the course of the run."""
    return max(batch_sizes(setting))


@dataclass(frozen=True)
class Ramp:
    """`stages`: (first sample, sequences per step), ascending, the first from sample 0.

    A step that begins at sample p reads as many sequences as the last stage that begins at or before p says.
    """

    stages: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, setting: GlobalBatch, sequence_length: int) -> Ramp:
        """The ramp that `train.global_batch` asks for: a stage begins with the first sample whose predecessors hold its
        number of tokens."""
        if isinstance(setting, int):
            return cls(((0, setting),))
        return cls(tuple((-(-tokens // sequence_length), batch) for tokens, batch in setting))

    def batch_at(self, position: int) -> int:
        """Sequences of the step that begins at sample `position`."""
        return next(batch for first, batch in reversed(self.stages) if first <= position)

    def position_after(self, steps: int, position: int = 0) -> int:
        """Where the run is `steps` steps after it was at sample `position`."""
        for at, (_, batch) in enumerate(self.stages):
            last = at + 1 == len(self.stages)
            if last or position < self.stages[at + 1][0]:
                taken = steps if last else min(steps, -(-(self.stages[at + 1][0] - position) // batch))
                position, steps = position + taken * batch, steps - taken
        return position

    def steps_within(self, samples: int) -> int:
        """How many whole steps from the beginning of the run `samples` samples are enough for."""
        return bisect_right(range(samples + 1), samples, key=self.position_after) - 1  # no step reads nothing
