"""ZeRO-1 on two data ranks: what each keeps and writes of the optimizer, in bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .material import Material, words
from .program import Program


def state_bytes(
    program: Program, material: Material, folder: Path, zero: int, precision: str
) -> tuple[float, list[int]]:
    """(KiB that rank 0 says it holds, bytes of state that each rank wrote) of a run of one step."""
    settings = {
        "model.init_from": material.model,
        "data.train": material.data,
        "data.sequence_length": 32,
        "parallel.zero": zero,
        "train.steps": 1,
        "train.global_batch": 2,
        "train.precision": precision,
        "checkpoint.save": folder,
    }
    said = re.search(
        r"optimizer state ([\d.]+) ([KM])iB on rank 0", program.run(["train", *words(settings)], ranks=2).errors
    )
    assert said is not None
    written = [0, 0]
    for path in (folder / "step_0000001").glob("optimizer-*.safetensors"):
        content = path.read_bytes()
        written[int(path.stem[-5:])] += len(content) - 8 - int.from_bytes(content[:8], "little")
    return float(said[1]) * {"K": 1, "M": 1024}[said[2]], written


@pytest.mark.parametrize(("precision", "bytes_each"), [("fp32", 8), ("bf16", 12)])
def test_zero_1_halves_what_each_of_two_ranks_holds(
    program: Program, random_llama: Material, tmp_path: Path, precision: str, bytes_each: int
) -> None:
    said, written = {}, {}
    for zero in (0, 1):
        said[zero], written[zero] = state_bytes(program, random_llama, tmp_path / f"zero{zero}", zero, precision)
    print(f"state of one rank: {said[0]} KiB, under ZeRO-1 {said[1]} KiB; written: {written}")
    assert said[1] == pytest.approx(said[0] / 2, rel=0.05)  # said to a tenth
    whole = written[0][0]
    assert written[0] == [whole, 0], "without sharding all ranks hold the same, and the first writes it"
    assert whole / bytes_each == 259 * 48 + 4 * (2 * 48 * 64 + 2 * 48 * 32 + 3 * 48 * 88 + 2 * 48) + 48
    assert sum(written[1]) == whole, "together they hold all of it, once"
    # The vocabulary's padding, which is held but not written, is not shared evenly.
    assert max(written[1]) <= 0.56 * whole
