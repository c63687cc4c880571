"""The logic of `make gpu-check`, run on the CPU: what is wrong must be said, whatever is wrong."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.kernels import native, varlen
from megatron.kernels.varlen import segments_of
from tests.kernels.flash import flash_backward, flash_forward
from tools.gpu_check import __main__ as program
from tools.gpu_check import operations, steps

CPU = torch.device("cpu")
SIZES = program.Sizes(size=128, copy_bytes=2**20, model=steps.SMALL, length=64)
needs_kernels = pytest.mark.skipif(native.find("cpu")[0] is None, reason="needs the compiled kernels")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The least that is timed, and one thread: these arrays are too small for more."""
    timed = operations.seconds
    for module in (operations, steps):
        monkeypatch.setattr(module, "seconds", lambda call, device, **_: timed(call, device, rounds=1, calls=1))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main([]) == 2
    assert capsys.readouterr().out.startswith("no GPU here: ")


@needs_kernels
def test_a_whole_check_writes_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.check(CPU, tmp_path / "report.json", SIZES) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    kernels = {row["operation"] for row in report["operations"]}
    assert len(kernels) == 11 and len(report["operations"]) == 22
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in report["operations"])
    assert [row["precision"] for row in report["steps"]] == ["bf16", "fp32", "fp64"]
    assert all(row["host_syncs"] == 0 and row["tokens_per_s"] > 0 for row in report["measured_steps"])
    assert report["problems"] == [] and "runs on cpu" in report["adapters"]["apex"]
    assert "Please send us" in capsys.readouterr().out


def test_without_kernels_it_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(native._in_use)
    monkeypatch.setattr(native, "find", lambda kind: (None, "they were not built"))
    try:
        assert program.check(CPU, tmp_path / "report.json", SIZES) == 1
    finally:
        native._in_use.update(before)
    assert json.loads((tmp_path / "report.json").read_text())["problems"] == ["no compiled kernels for cpu"]


def some_operation(name: str = "swiglu") -> operations.Operation:
    return next(one for one in operations.operations(CPU, torch.float32, 128) if one.name == name)


@needs_kernels
def test_wrong_numbers_are_a_problem() -> None:
    right = some_operation()
    assert operations.check(right, 1e9)["problem"] is None
    wrong = dataclasses.replace(right, native=lambda gate_up: right.native(gate_up) * 1.0001)
    assert operations.check(wrong, 1e9)["problem"] == "farther from float64 than the reference"
    nothing = dataclasses.replace(right, native=lambda gate_up: None)
    assert operations.check(nothing, 1e9)["problem"] == "no compiled kernel took it"


@needs_kernels
def test_wrong_numbers_in_place_are_a_problem() -> None:
    right = some_operation("adamw")

    def forgets_the_moments(*inputs: Any) -> Any:
        kept = inputs[2].clone()
        done = right.native(*inputs)
        inputs[2].copy_(kept)
        return done

    assert operations.check(right, 1e9)["problem"] is None
    wrong = dataclasses.replace(right, native=forgets_the_moments)
    assert operations.check(wrong, 1e9)["problem"] == "farther from float64 than the reference"


def test_bytes_are_counted_once_each() -> None:
    swiglu = some_operation()
    assert swiglu.bytes_moved() == (128 * 128 + 128 * 64) * 4


def test_a_step_with_wrong_numbers_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    run = steps._run

    def wrong(device: torch.device, dtype: torch.dtype) -> Any:
        outcome = run(device, dtype)
        return dataclasses.replace(outcome, loss=outcome.loss * 1.01) if dtype is torch.float32 else outcome

    monkeypatch.setattr(steps, "_run", wrong)
    assert steps.check_step(CPU, "fp32")["problem"].startswith("loss is ")
    assert steps.check_step(CPU, "fp64")["problem"] is None


def test_a_check_that_fails_does_not_end_the_others() -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    assert program.attempt(fail) == {"problem": "RuntimeError: CUDA error: an illegal memory access"}


def test_host_syncs_are_counted_by_torchs_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with steps.counted_syncs(torch.device("cuda")) as syncs:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert len(syncs) == 1 and syncs[0].startswith(__file__)
    assert modes == ["warn", "default"]


def test_attention_within_documents_is_checked_against_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU alone; here with a stand-in for the library, right and wrong."""

    def random(*shape: int, seed: int = 1) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    forward, backward = varlen.varlen_attention, varlen.varlen_attention_backward
    monkeypatch.setattr(varlen, "varlen_attention", functools.partial(forward, forward=flash_forward))
    monkeypatch.setattr(varlen, "varlen_attention_backward", functools.partial(backward, backward=flash_backward))
    rows = [operations.check(operation, 1e9) for operation in operations.within_documents(random, 50, CPU)]
    assert [row["problem"] for row in rows] == [None] * 4, rows
    monkeypatch.setattr(
        varlen, "segments_of", lambda start, stop, *rest: segments_of(torch.zeros_like(start), stop, *rest)
    )
    rows = [operations.check(operation, 1e9) for operation in operations.within_documents(random, 50, CPU)]
    assert all(row["problem"] == "farther from float64 than the reference" for row in rows), rows
