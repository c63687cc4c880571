"""What the planner records of a rank is what the rank does: its tensors' memory and, to the byte, its messages."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.plan.memory import peak_memory
from megatron.plan.rank import RankRecord, run_rank
from megatron.train.build import make_plan
from tests.dist.pool import Pool, pools
from tests.plan import real
from tests.plan.settings import MODEL, config

__all__ = ["pools"]

RUNS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2-pp2": {"tensor": 2, "pipeline": 2},
    "tp2-pp2-plain": {"tensor": 2, "pipeline": 2, "sequence": False},
    "dp2-zero": {},
    "dp2-sharded": {"zero": 3},
    "pp2-chunks": {"pipeline": 2, "schedule": "interleaved", "chunks": 2},
    "pp2-zero-bubble": {"pipeline": 2, "schedule": "zero_bubble"},
    "tp2-full-recompute": {"tensor": 2, "recompute": "full"},
}
# One of the two for each layout, in turns; both in `make thorough`.
CASES = [
    (name, precision)
    for number, name in enumerate(RUNS)
    for precision in (("fp32", "bf16") if os.environ.get("THOROUGH") else (("fp32", "bf16")[number % 2],))
]
SIZES = {"one": 1, "tp2-pp2": 4, "tp2-pp2-plain": 4, "tp2-full-recompute": 2}


def planned(rank: int, world_size: int, settings: dict[str, Any]) -> RankRecord:
    """The rank on fake CPU tensors, which take the same branches as real ones."""
    run = config(**settings)
    plan = make_plan(run, MODEL, world_size)
    tensor_rank, _, _, stage = plan.grid.coordinates(rank)
    with FakeTensorMode():
        return run_rank(
            run,
            plan,
            MODEL,
            stage=stage,
            tensor_rank=tensor_rank,
            micro_batches=plan.micro_batches,
            device=torch.device("cpu"),
        )


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_memory_and_messages(name: str, precision: str, pools: Callable[[int], Pool]) -> None:
    settings, size = {**RUNS[name], "precision": precision}, SIZES.get(name, 2)
    found = pools(size).run(real.run, config(**settings), MODEL, size)
    for rank, figures in enumerate(found):
        if rank not in (0, size - 1) or (name.startswith("dp2") and rank > 0):
            continue  # tensor ranks are alike, and the planner plays the first data rank
        record = planned(rank, size, settings)
        messages = record.messages(record.second_step)
        assert figures["sent"] == [(message.kind, message.payload_bytes) for message in messages], f"rank {rank}"
        ratio = peak_memory(record.recording).total / figures["peak"]
        print(f"{name} {precision} rank {rank}: planned {ratio:.4f} of the {figures['peak']:,} bytes of the real run")
        assert 0.97 <= ratio <= 1.03
