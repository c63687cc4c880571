"""The split string against the words of both Megatrons, and the values known of each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.split import split_bounds
from megatron.utils.errors import ConfigError

DEFAULT = "969, 30, 1"


@pytest.mark.parametrize(
    ("sequences", "llm", "core"),
    [
        (49, (0, 48, 49, 49), (0, 47, 49, 49)),
        (12345, (0, 11963, 12333, 12345), (0, 11962, 12333, 12345)),
        (10, (0, 10, 10, 10), (0, 10, 10, 10)),
        (100, (0, 97, 100, 100), (0, 97, 100, 100)),
        (1000, (0, 969, 999, 1000), (0, 969, 999, 1000)),
    ],
)
def test_known_values(sequences: int, llm: tuple[int, ...], core: tuple[int, ...]) -> None:
    assert split_bounds(DEFAULT, sequences, "megatron-llm") == llm
    assert split_bounds(DEFAULT, sequences, "megatron-core") == core


def test_the_two_differ_as_often_as_was_counted() -> None:
    differ = [
        n for n in range(1, 4000)
        if split_bounds(DEFAULT, n, "megatron-llm") != split_bounds(DEFAULT, n, "megatron-core")
    ]  # fmt: skip
    assert len(differ) == 972


@given(
    shares=st.lists(st.integers(0, 100), min_size=1, max_size=3).filter(sum),
    sequences=st.integers(0, 500),
    rounding=st.sampled_from(["megatron-llm", "megatron-core"]),
)
def test_every_sequence_is_in_one_part(shares: list[int], sequences: int, rounding: str) -> None:
    bounds = split_bounds(",".join(map(str, shares)), sequences, rounding)
    assert bounds[0] == 0 and bounds[3] == sequences
    assert list(bounds) == sorted(bounds)


def test_spellings() -> None:
    assert split_bounds("90/5/5", 200, "megatron-llm") == (0, 180, 190, 200)
    assert split_bounds("90/5/5", 200, "megatron-core") == (0, 180, 190, 200)
    assert split_bounds("7", 9, "megatron-llm") == split_bounds("7", 9, "megatron-core") == (0, 9, 9, 9)
    assert split_bounds("1,1,1,97", 9, "megatron-llm") == (0, 3, 6, 9), "Megatron-LLM takes no notice of a fourth"


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "-1,2", "nan,1", "1;2"])
def test_what_is_no_split_is_refused(split: str) -> None:
    with pytest.raises(ConfigError, match="is not a split"):
        split_bounds(split, 100, "megatron-llm")


def test_core_refuses_a_fourth_share() -> None:
    with pytest.raises(ConfigError, match="is not a split"):
        split_bounds("1,1,1,97", 100, "megatron-core")
