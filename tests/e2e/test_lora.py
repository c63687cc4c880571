"""Adapters from the command line: trained on two processes, gone on with on one, evaluated with their model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .material import Material, read_metrics, words
from .program import Program


def test_a_run_on_two_ranks_goes_on_on_one(program: Program, random_llama: Material, tmp_path: Path) -> None:
    settings = {
        "model.init_from": random_llama.model,
        "lora.rank": 4,
        "lora.alpha": 8,
        "lora.targets": "[q_proj, v_proj, gate_proj, down_proj]",
        "data.train": random_llama.data,
        "data.sequence_length": 32,
        "optimizer.learning_rate": 1e-2,
        "train.steps": 6,
        "train.global_batch": 4,
        "train.micro_batch": 2,
        "train.precision": "fp32",
        "checkpoint.save": tmp_path / "save",
        "checkpoint.interval": 3,
        "log.dir": tmp_path / "log",
        "log.interval": 1,
    }
    told = program.run(["train", *words({**settings, "parallel.tensor": 2})], 2)
    assert "adapters: " in told.errors and "rank 4, alpha 8, on self_attn.q_proj" in told.errors
    whole = read_metrics(tmp_path / "log")
    assert whole[-1]["loss"] < whole[0]["loss"]

    shutil.copytree(tmp_path / "save" / "step_0000003", tmp_path / "one" / "step_0000003")
    again = {**settings, "checkpoint.save": tmp_path / "one", "log.dir": tmp_path / "other-log"}
    program.run(["train", *words(again)])
    for line, other in zip(whole[3:], read_metrics(tmp_path / "other-log"), strict=True):
        assert line["step"] == other["step"]
        assert other["loss"] == pytest.approx(line["loss"], rel=2e-6)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)

    measured = program.run(["evaluate", "--load", tmp_path / "save", "--data", random_llama.data])
    assert abs(json.loads(measured.output)["loss"] - whole[-1]["loss"]) < 0.5
