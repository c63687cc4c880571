"""Numbers read well, also where rounding carries into the next unit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.utils.units import format_bytes, format_count, format_duration, parse_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (1023.94 * 2**20, "1023.9 MiB"),
        (1023.96 * 2**20, "1.0 GiB"),
        (5 * 2**60, "5120.0 PiB"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (1.5, "1.5"),
        (950, "950"),
        (999.7, "1.00 k"),
        (45_600, "45.6 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (9_994_000, "9.99 M"),
        (9_996_000, "10.0 M"),
        (6_738_415_616, "6.74 G"),
        (2e12, "2.00 T"),
    ],
)
def test_counts(count: float, text: str) -> None:
    assert format_count(count) == text


@given(st.floats(1, 1e17))
def test_counts_keep_three_figures(count: float) -> None:
    number, _, unit = format_count(count).partition(" ")
    assert float(number) < 1000
    scale = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}[unit]
    assert float(number) * scale == pytest.approx(count, rel=0.0051)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.25, "0.25 s"),
        (0.999, "1.0 s"),
        (5, "5.0 s"),
        (9.97, "10 s"),
        (42, "42 s"),
        (59.7, "1 min 00 s"),
        (187, "3 min 07 s"),
        (3599.7, "1 h 00 min"),
        (3720, "1 h 02 min"),
        (86_399, "1 d 00 h"),
        (190_800, "2 d 05 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4096", 4096),
        ("5GB", 5 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("200mb", 200 * 10**6),
        ("7k", 7000),
        *((text, None) for text in ("0", "", "GB", "-1GB", "1e3", "5 GBit", "5PB", "1.GB")),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, count: int | None) -> None:
    assert parse_bytes(text) == count
