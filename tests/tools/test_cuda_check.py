"""The parts of `make cuda-check` that need no CUDA build of torch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron.kernels.rms_norm
from tools import cuda_check
from tools.cuda_check import SameDevice, architectures, check_library, fake_step


class Library:
    """A library that has all kernels but those named."""

    def __init__(self, path: Path, *missing: str) -> None:
        self.path, self.missing = path, missing

    def kernel(self, name: str, signature: str) -> Any:
        if name in self.missing:
            raise AttributeError(name)
        return None


@pytest.mark.parametrize("dtype", cuda_check.DTYPES)
def test_the_fake_step_runs(dtype: torch.dtype) -> None:
    fake_step(torch.device("cpu"), dtype)


def test_a_tensor_on_another_device_is_an_error() -> None:
    hidden, weight = torch.ones(2, 4, device="meta"), torch.ones(4)
    with SameDevice():
        megatron.kernels.rms_norm.rms_norm(hidden, weight.to("meta"), 1e-5)
        with pytest.raises(RuntimeError, match=r"rms_norm\.default was given tensors on cpu, meta"):
            megatron.kernels.rms_norm.rms_norm(hidden, weight, 1e-5)


def test_a_mistake_that_is_not_noticed_is_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    """On the CPU, putting something on the CPU is no mistake: both must be reported as missed."""
    problems = cuda_check.check_fake_steps(torch.device("cpu"))
    assert problems == [
        "a planted mistake, rotary_tables_on_the_cpu, was not noticed",
        "a planted mistake, update_count_on_the_cpu, was not noticed",
    ]
    assert "stay on the device" in capsys.readouterr().out


def test_what_a_library_lacks_is_named(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc, which is not there")
    source, built = tmp_path / "empty.cu", tmp_path / "empty.so"
    source.write_text("__global__ void nothing() {}\n")
    flags = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_80,code=compute_80"]
    subprocess.run([nvcc, "--shared", "-Xcompiler", "-fPIC", *flags, "-o", built, source], check=True)
    assert architectures(Library(built)) == ["sm_80"]  # type: ignore[arg-type]
    assert check_library(Library(built, "swiglu")) == [  # type: ignore[arg-type]
        "empty.so has no kernel megatron_swiglu",
        "empty.so has no code for sm_90",
    ]


def test_without_a_cuda_build_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda_check.main() == 2
    assert "is no CUDA build: run `make cuda-check`" in capsys.readouterr().out
