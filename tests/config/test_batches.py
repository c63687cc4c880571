"""The ramp of the batch: what each step reads, against a run that counts step by step."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from megatron.config.batches import GlobalBatch, Ramp, batch_sizes, largest_batch

RAMPS = st.integers(1, 20) | st.lists(st.tuples(st.integers(1, 400), st.integers(1, 20)), min_size=1, max_size=4).map(
    lambda steps: tuple((sum(tokens for tokens, _ in steps[:at]), batch) for at, (_, batch) in enumerate(steps))
)


def counted(setting: GlobalBatch, sequence_length: int, steps: int, position: int = 0) -> list[int]:
    """Where the run is before each of so many steps and after the last, by the words of the setting."""
    stages = ((0, setting),) if isinstance(setting, int) else setting
    positions = [position]
    for _ in range(steps):
        tokens = positions[-1] * sequence_length
        positions.append(positions[-1] + [batch for first, batch in stages if first <= tokens][-1])
    return positions


@given(setting=RAMPS, sequence_length=st.integers(1, 9), steps=st.integers(0, 60), start=st.integers(0, 300))
def test_a_ramp_is_what_counting_step_by_step_gives(
    setting: GlobalBatch, sequence_length: int, steps: int, start: int
) -> None:
    ramp = Ramp.of(setting, sequence_length)
    for first in (0, start):
        positions = counted(setting, sequence_length, steps, first)
        assert [ramp.position_after(step, first) for step in range(steps + 1)] == positions
        assert [ramp.batch_at(position) for position in positions[:-1]] == [
            later - earlier for earlier, later in pairwise(positions)
        ]


@given(setting=RAMPS, sequence_length=st.integers(1, 9), samples=st.integers(0, 500))
def test_the_steps_that_samples_are_enough_for(setting: GlobalBatch, sequence_length: int, samples: int) -> None:
    ramp = Ramp.of(setting, sequence_length)
    steps = ramp.steps_within(samples)
    assert ramp.position_after(steps) <= samples < ramp.position_after(steps + 1)


def test_sizes() -> None:
    assert batch_sizes(7) == (7,)
    assert batch_sizes(((0, 4), (10, 8), (20, 4))) == (4, 8)
    assert largest_batch(((0, 4), (10, 8), (20, 4))) == 8
    assert Ramp.of(((0, 256), (10**9, 512)), 4096).stages == ((0, 256), (244_141, 512))
