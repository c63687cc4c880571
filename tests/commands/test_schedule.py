"""`megatron schedule`: the picture, its figures, and errors whose cure works. The guide's pictures are its own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron.__main__ import main

GUIDE = Path(__file__).parents[2] / "docs/pipeline.md"
COMMANDS = re.findall(r"^megatron (schedule .*--svg docs/.*)$", GUIDE.read_text(), re.MULTILINE)


def test_a_schedule_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "--schedule", "zero_bubble", "--stages", "2", "--micro-batches", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "stage 0  F0 F1 ···I0 W0 I1 W1 ",
        "stage 1  ···F0 I0 F1 I1 W0 W1 ",
        "step 7 s; bubble 16.7% of the work; micro-batches alive on each stage: 2, 2",
    ]


@pytest.mark.parametrize(
    ("wrong", "hint", "cure"),
    [
        (["--stages", "0"], "--stages 0 must be at least 1", ["--stages", "1"]),
        (["--chunks", "2"], "is for --schedule interleaved", ["--schedule", "interleaved"]),
        (["--schedule", "interleaved"], "use --chunks 2", ["--chunks", "2"]),
        (
            ["--schedule", "interleaved", "--chunks", "2", "--micro-batches", "7"],
            "use 4 or 8",
            ["--micro-batches", "8"],
        ),
        (["--seconds", "1", "0", "1"], "each must be above 0", ["--seconds", "1", "0.5", "1"]),
    ],
)
def test_wrong_sizes(wrong: list[str], hint: str, cure: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", *wrong]) == 2
    assert hint in capsys.readouterr().err
    assert main(["schedule", *wrong, *cure]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_the_pictures_of_the_guide_are_what_the_program_makes(command: str, tmp_path: Path) -> None:
    *words, picture = shlex.split(command)
    assert main([*words, str(tmp_path / "made.svg")]) == 0
    assert (tmp_path / "made.svg").read_text() == (GUIDE.parents[1] / picture).read_text()


def test_the_guide_shows_every_schedule() -> None:
    assert len(COMMANDS) == 4
