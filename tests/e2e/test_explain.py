"""`megatron dataset explain` says what the trainer was given: every rank, every step, every token."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.__main__ import main
from megatron.data.indexed import IndexedReader

from .material import Material, read_metrics, words, write_pair
from .program import Program

LENGTH, STEPS = 16, 6
RAMP = [[0, 4], [160, 8], [700, 4]]
BATCHES = [4, 4, 4, 8, 8, 8]  # from samples 0, 4, 8, 12, 20 and 28 on

GRIDS = {
    "tp 2 x dp 2, stable": {"parallel.tensor": 2, "data.order": "stable"},
    "pp 2 x dp 2, Megatron's": {"parallel.pipeline": 2, "data.order": "megatron", "train.micro_batch": 2},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two small pairs whose tokens tell where they are from."""
    folder = tmp_path_factory.mktemp("pairs")
    generator = np.random.default_rng(5)
    for name, count in (("large", 60), ("small", 9)):
        write_pair(folder / name, (generator.integers(0, 259, size) for size in generator.integers(0, 50, count)))
    return [str(folder / "large"), str(folder / "small")]


def settings(material: Material, pairs: list[str], folder: Path) -> dict[str, Any]:
    large, small = pairs
    blends = [
        {"from_tokens": 0, "blend": [[0.7, large], [0.3, small]]},
        {"from_tokens": 300, "blend": [[0.2, large], [0.8, small]]},
    ]
    return {
        "model.init_from": material.model,
        "data.train": json.dumps(blends),
        "data.sequence_length": LENGTH,
        "train.global_batch": json.dumps(RAMP),
        "train.steps": STEPS,
        "train.precision": "fp32",
        "checkpoint.save": folder / "save",
        "log.dir": folder / "log",
        "log.interval": 1,
    }


def explained(capsys: pytest.CaptureFixture[str], run: list[str], step: int, rank: int) -> dict[str, Any]:
    capsys.readouterr()
    # How many processes there were is read off the checkpoint.
    assert main(["dataset", "explain", "--json", "--step", str(step), "--rank", str(rank), *run]) == 0
    return json.loads(capsys.readouterr().out)


def tokens_of(row: dict[str, Any]) -> list[int]:
    """What the excerpts say, read from the pair."""
    reader = IndexedReader(row["prefix"])
    found: list[int] = []
    for excerpt in row["excerpts"]:
        assert reader.document_index[excerpt["document"]] <= excerpt["sequence"]
        assert excerpt["sequence"] < reader.document_index[excerpt["document"] + 1]
        found += reader.read(excerpt["sequence"]).tolist()[excerpt["start"] : excerpt["stop"]]
    return found


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_every_sample_of_four_processes(
    program: Program,
    random_llama: Material,
    pairs: list[str],
    grid: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = {**settings(random_llama, pairs, tmp_path), **grid}
    run = words(values)
    first = 1
    if values["data.order"] == "stable":  # begin alone, go on with four
        program.run(["train", *words({**values, "parallel.tensor": 1, "train.steps": 2})])
        first = 3
    program.run(["train", *run], ranks=4, record=tmp_path / "given")
    samples: list[int] = []
    for rank in range(4):
        given = [json.loads(line) for line in (tmp_path / f"given-{rank}").read_text().splitlines()]
        assert [line["step"] for line in given] == list(range(first, STEPS + 1))
        for line in given:
            told = explained(capsys, run, line["step"], rank)
            assert [row["sha256"] for row in told["rows"]] == line["rows"]
            assert told["global_batch"] == BATCHES[line["step"] - 1] == 2 * len(told["rows"])
            for row in told["rows"]:
                tokens = tokens_of(row)
                content = np.array([tokens[:-1], tokens[1:]], dtype="<i8").tobytes()
                assert hashlib.sha256(content).hexdigest() == row["sha256"], "the excerpts are what was fed"
            samples += [row["sample"] for row in told["rows"]]
    rest = range(sum(BATCHES[: first - 1]), sum(BATCHES))
    assert sorted(samples) == sorted([*rest, *rest]), "two ranks read each sample, none is left out"

    capsys.readouterr()
    assert main(["dataset", "ledger", "--json", *run]) == 0
    accounts = json.loads(capsys.readouterr().out)
    assert accounts["samples"] == sum(BATCHES)
    last = read_metrics(tmp_path / "log")[-1]
    assert last["consumed_tokens"] == sum(BATCHES) * LENGTH
    for account in accounts["sources"]:
        name = Path(account["prefix"]).name
        assert (last[f"tokens/{name}"], last[f"epochs/{name}"]) == (account["tokens"], account["epochs"])
    assert sum(account["tokens"] for account in accounts["sources"]) == last["consumed_tokens"]


def test_what_cannot_be_explained_says_why(
    random_llama: Material, pairs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = words(settings(random_llama, pairs, tmp_path))
    for extra, hint in (
        (["--step", "1"], "say it with --processes"),
        (["--step", "1", "--processes", "4", "--rank", "4"], "there is no rank 4 of 4 processes; use 0 to 3"),
        (["--step", "0", "--processes", "1"], "there is no step 0"),
    ):
        assert main(["dataset", "explain", *extra, *run]) == 2
        assert hint in capsys.readouterr().err
    assert main(["dataset", "explain", "--step", "5", "--processes", "2", "--rank", "1", *run]) == 0
    text = capsys.readouterr().out
    assert "step 5, rank 1 (data rank 1 of 2): its samples among the 8 from number 20 on" in text
    assert "micro-batch 0, row 0: sample 21 = number" in text and "document" in text
