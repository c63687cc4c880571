"""What is said of devices that are not there: their peaks, and memory that has run out."""

from __future__ import annotations

import pytest
import torch

from megatron.utils.device import explain_out_of_memory, peak_flops_per_s
from megatron.utils.errors import ResourceError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 3)
CURE = "Lower train.micro_batch."


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_known_by_name_and_for_bf16_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None
) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: asked.append(device) or name)
    assert peak_flops_per_s(GPU, torch.bfloat16) == peak
    assert asked == [GPU]
    assert peak_flops_per_s(GPU, torch.float32) is None and peak_flops_per_s(GPU, torch.float64) is None
    assert peak_flops_per_s(CPU, torch.bfloat16) is None


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 80 GiB, almost full."""
    gib = 2**30
    figures = {
        "mem_get_info": (int(0.5 * gib), 80 * gib),
        "memory_allocated": 70 * gib,
        "max_memory_allocated": 75 * gib,
        "memory_reserved": 78 * gib,
    }
    for name, figure in figures.items():

        def answer(device: torch.device, figure: object = figure) -> object:
            assert device == GPU
            return figure

        monkeypatch.setattr(torch.cuda, name, answer)


@pytest.mark.usefixtures("memory")
def test_a_full_gpu_is_explained_with_its_figures_and_the_cure() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(ResourceError) as caught, explain_out_of_memory(GPU, 11, CURE):
        raise error
    text = str(caught.value)
    for words in (
        "rank 11 ran out of memory on cuda:3",
        "70.0 GiB allocated (peak 75.0)",
        "78.0 GiB reserved",
        "0.5 of 80.0 GiB free",
    ):
        assert words in text
    assert text.endswith(CURE)
    assert caught.value.__cause__ is error
    assert caught.value.met_by == "process"


def test_a_full_host_is_explained_with_what_was_asked_for() -> None:
    with pytest.raises(ResourceError) as caught, explain_out_of_memory(CPU, 2, CURE):
        torch.empty(2**58, dtype=torch.uint8)
    text = str(caught.value)
    assert text.startswith("rank 2 ran out of memory on cpu: ") and text.endswith(f". {CURE}")
    assert str(2**58) in text and "\n" not in text
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("other")])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_other_errors_are_left_as_they_are(error: Exception, device: torch.device) -> None:
    with pytest.raises(type(error)) as caught, explain_out_of_memory(device, 0, CURE):
        raise error
    assert caught.value is error
