"""Planned against published step times: one set of efficiencies for each GPU, no run far off.

`python -m tools.fit_hardware GPU` prints all runs, and how far each is off when the figures are fitted without it. Here
are those that are quick to record.
"""

from __future__ import annotations

import statistics

import pytest

from megatron.plan.estimate import price, record
from megatron.plan.hardware import load_gpu, load_interconnect
from megatron.plan.published import Row, published
from megatron.plan.result import Result

QUICK = (
    "SC'21 1.7B",
    "SC'21 7.5B",
    "Meditron-70B",
    "Llama-2-13B",
    "H100 7.1B",
    "H100 16B",
)


def plan(row: Row) -> Result:
    run = record(row.config, row.model, row.gpus, both_ends=False)
    return price(run, load_gpu(row.gpu), load_interconnect(row.interconnect), row.name)


@pytest.fixture(scope="module")
def planned() -> list[tuple[Row, Result]]:
    rows = [row for row in published() if row.name in QUICK]
    assert len(rows) == len(QUICK)
    return [(row, plan(row)) for row in rows]


def test_step_times(planned: list[tuple[Row, Result]]) -> None:
    errors = {row.name: result.step_s / row.step_s - 1.0 for row, result in planned}
    for name, error in errors.items():
        print(f"{name}: {error:+.1%}")
    assert statistics.median(map(abs, errors.values())) <= 0.06
    assert max(map(abs, errors.values())) <= 0.15


def test_what_ran_fits(planned: list[tuple[Row, Result]]) -> None:
    for row, result in planned:
        print(f"{row.name}: {result.fullest.peak_bytes / 1e9:.1f} GB on stage {result.fullest.stage}")
        assert result.fits, row.name
