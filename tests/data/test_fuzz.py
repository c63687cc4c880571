"""Damaged inputs: an error of ours or a correct read, never anything else."""

from __future__ import annotations

from pathlib import Path

from .fuzzing import Fuzzer, fuzz


def test_damaged_inputs_give_errors_or_what_is_there(tmp_path: Path) -> None:
    kinds = len(Fuzzer(tmp_path).checks())
    outcomes = fuzz(tmp_path, 220 * kinds, seed=7)
    assert sum(outcomes.values()) == 220 * kinds
    seen = {outcome.partition(":")[0] for outcome in outcomes if outcome.endswith("error")}
    assert len(seen) >= kinds - 1  # every kind of file can be damaged beyond reading, but JSON lines go line by line
