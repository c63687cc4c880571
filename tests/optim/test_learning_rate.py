"""Learning-rate schedules, by values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.optimizer import OptimizerConfig
from megatron.optim.learning_rate import learning_rate

STYLES = ("constant", "linear", "cosine", "inverse_square_root", "wsd")


def rates(steps: int, decay_steps: int, **settings: Any) -> list[float]:
    """The rates of the first steps with peak 1 and floor 0.1."""
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, **settings)
    return [learning_rate(config, step, decay_steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize("style", STYLES)
def test_warm_up_starts_at_zero_and_reaches_the_peak_after_its_last_step(style: str) -> None:
    found = rates(6, 100, decay_style=style, warmup_steps=5)
    assert found == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("style", STYLES)
def test_without_warm_up_the_first_step_has_the_peak(style: str) -> None:
    assert rates(1, 100, decay_style=style) == [1.0]


def test_constant() -> None:
    assert rates(12, 4, decay_style="constant", warmup_steps=2) == [0.0, 0.5] + [1.0] * 10


def test_linear_reaches_the_floor_at_the_horizon_and_stays() -> None:
    found = rates(14, 12, decay_style="linear", warmup_steps=2)
    assert found[2:12] == pytest.approx([1.0 - 0.09 * k for k in range(10)])
    assert found[12:] == [0.1, 0.1]


def test_cosine() -> None:
    found = rates(12, 10, decay_style="cosine", warmup_steps=2)
    assert found[2] == 1.0
    assert found[4] == pytest.approx(0.1 + 0.9 * (2 + math.sqrt(2)) / 4)  # a quarter of the way
    assert found[6] == pytest.approx(0.55)  # half
    assert found[8] == pytest.approx(0.1 + 0.9 * (2 - math.sqrt(2)) / 4)
    assert found[10:] == [0.1, 0.1]


def test_inverse_square_root_falls_to_the_floor_and_is_there_beyond_the_horizon() -> None:
    found = rates(2000, 1000, decay_style="inverse_square_root", warmup_steps=4)
    assert found[4] == 1.0 and found[16] == pytest.approx(0.5) and found[36] == pytest.approx(1 / 3)
    assert found[399] > 0.1 and found[401:] == [0.1] * len(found[401:])
    short = rates(40, 20, decay_style="inverse_square_root", warmup_steps=4)
    assert short[:21] == found[:21] and short[20] > 0.4 and short[21:] == [0.1] * 19
    unwarmed = rates(10, 20, decay_style="inverse_square_root")
    assert unwarmed[:2] == [1.0, 1.0] and unwarmed[4] == 0.5 and unwarmed[9] == pytest.approx(1 / 3)


def test_wsd_is_flat_then_falls_in_a_straight_line() -> None:
    found = rates(22, 20, decay_style="wsd", warmup_steps=3, decay_fraction=0.25)
    assert found[3:16] == [1.0] * 13
    assert found[16:20] == pytest.approx([0.82, 0.64, 0.46, 0.28])
    assert found[20:] == [0.1, 0.1]


def test_wsd_may_be_all_decay() -> None:
    linear = rates(14, 12, decay_style="linear", warmup_steps=2)
    assert rates(14, 12, decay_style="wsd", warmup_steps=2, decay_fraction=1.0) == pytest.approx(linear)


@given(
    style=st.sampled_from(STYLES),
    warmup=st.integers(0, 20),
    beyond=st.integers(1, 60),
    fraction=st.floats(0.01, 1.0),
    floor=st.floats(0.0, 1.0),
)
def test_every_schedule_rises_then_falls_between_its_limits(
    style: str, warmup: int, beyond: int, fraction: float, floor: float
) -> None:
    config = OptimizerConfig(
        learning_rate=1.0, min_learning_rate=floor, warmup_steps=warmup, decay_style=style, decay_fraction=fraction
    )
    horizon = warmup + beyond
    found = [learning_rate(config, step, horizon) for step in range(1, horizon + 10)]
    assert found[: warmup + 1] == sorted(found[: warmup + 1]) and found[warmup] == 1.0
    after = found[warmup:]
    assert after == sorted(after, reverse=True) and min(after) >= floor - 1e-12
    if style in ("linear", "cosine", "wsd"):
        assert after[beyond:] == [floor] * len(after[beyond:]) and (floor == 1.0 or after[beyond - 1] > floor)
