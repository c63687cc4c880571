"""Adapters: any grid gives their gradients and values of the one-rank model, and what they adapt stays as it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron.model.lora import adapter_of
from tests.dist.case import VARIATIONS, Case, Result, first_values, run_case
from tests.dist.compare import TOLERANCE, deviation
from tests.dist.covering import as_case, covering_array
from tests.dist.pool import Pool

CASES = [
    Case("tp2-pp2", tensor=2, pipeline=2, sequence=True, lora_rank=3, lora_targets=("k_proj", "o_proj", "up_proj")),
    Case("tp4-above-key-value-heads", tensor=4, lora_rank=2, recompute="selective"),
    Case("pp2-dp2-sharded", pipeline=2, data=2, zero=3, lora_rank=3, recompute="full", tied=True),
    Case("gpt2-tp2-sequence", tensor=2, sequence=True, family="gpt2", lora_rank=5),
    Case("pp2-zero-bubble", pipeline=2, schedule="zero_bubble", lora_rank=3, documents=True),
]
FAMILIES = [Case(f"{name}-tp2", tensor=2, sequence=True, family=name, lora_rank=3) for name in VARIATIONS]
THOROUGH = [
    Case("tp2-dp2-zero", tensor=2, data=2, zero=1, lora_rank=3, lora_targets=("v_proj", "down_proj")),
    Case("tp4-above-key-value-heads-sequence", tensor=4, sequence=True, lora_rank=2, recompute="full"),
    *(replace(case, varied=case.family == "llama-dynamic") for case in FAMILIES),
    *(replace(as_case(choice), lora_rank=3) for choice in covering_array()),
]


@pytest.mark.parametrize(
    "case", [*CASES, *(THOROUGH if os.environ.get("THOROUGH") else [])], ids=lambda case: str(case.name)
)
def test_adapters_on_a_grid_are_those_of_one_rank(case: Case, pools: Callable[[int], Pool]) -> None:
    reference = run_case(0, case.one_rank)
    results = pools(case.grid.world_size).run(run_case, case)
    for result in (reference, *results):
        check_what_is_trained(case, result)
    assert deviation(results, reference) <= TOLERANCE


def check_what_is_trained(case: Case, result: Result) -> None:
    """Adapters have gradients and nothing else has; what they adapt has the bits that it began with."""
    assert result.gradients and all(adapter_of(region.name) is not None for region, _ in result.gradients)
    first = first_values(case)
    frozen = [(region, values) for region, values in result.weights if adapter_of(region.name) is None]
    assert frozen
    for region, values in frozen:
        expected = torch.empty(region.size, dtype=torch.float64)
        first(region, expected)
        assert torch.equal(torch.from_numpy(values), expected), region
