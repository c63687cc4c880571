"""The one module that answers for the device: which it is, its peaks, its memory, its seeds.

Nothing else below `train` asks `torch.cuda` directly, so that the same program runs on the CPU and on fake tensors.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron.utils.environment import request_deterministic_products
from megatron.utils.errors import ConfigError, ResourceError

# Dense bf16 peaks of the data sheets, in FLOP/s; more specific names first.
_PEAK_FLOPS_BF16 = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H200", 989.4e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
)


# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def local_device(local_rank: int) -> torch.device:
    """The device of the process with this local rank: its GPU where there are any, else the CPU.

    Raises ConfigError where there are fewer GPUs than processes.
    """
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; start as many "
                "processes (torchrun --nproc-per-node), or none of the GPUs with CUDA_VISIBLE_DEVICES= to use the CPU."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def communication_backend(device: torch.device) -> str:
    """The `torch.distributed` backend for tensors on `device`."""
    return "nccl" if device.type == "cuda" else "gloo"


def peak_flops_per_s(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense matrix-product peak of one device, or None where it is not known (a CPU, another GPU, another dtype)."""
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAK_FLOPS_BF16 if known in name), None)


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """That of a GPU, as (8, 0) for an A100; None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks of threads a GPU runs side by side."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@contextmanager
def explain_out_of_memory(device: torch.device, rank: int, cure: str) -> Iterator[None]:
    """Turn running out of memory, on a GPU or the host, into one ResourceError with the figures and the cure."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        text = f"rank {rank} ran out of memory on {device}: {_memory_report(device, error)}. {cure}"
        raise ResourceError(text) from error


def _memory_report(device: torch.device, error: RuntimeError) -> str:
    """Memory figures of the device for an error message."""
    if device.type != "cuda":
        return str(error).splitlines()[0].partition("DefaultCPUAllocator: ")[2].rstrip(".")
    gib = 2**30
    free, total = torch.cuda.mem_get_info(device)
    return (
        f"{torch.cuda.memory_allocated(device) / gib:.1f} GiB allocated (peak "
        f"{torch.cuda.max_memory_allocated(device) / gib:.1f}), {torch.cuda.memory_reserved(device) / gib:.1f} GiB "
        f"reserved, {free / gib:.1f} of {total / gib:.1f} GiB free"
    )


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed torch's generators; with `deterministic`, refuse operations whose result may differ between runs."""
    torch.manual_seed(seed)
    if deterministic:
        request_deterministic_products()
    torch.use_deterministic_algorithms(deterministic)


def current_stream(device: torch.device) -> int | None:
    """The address of the stream that work on `device` goes to; None where there are no streams."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for matrix products of bfloat16."""
    text = Path("/proc/cpuinfo").read_text()
    return re.search(r"^(?:flags|Features)\s*:.*\b(?:avx512_bf16|amx_bf16|bf16)\b", text, re.MULTILINE) is not None


def keep_freed_memory(device: torch.device) -> None:
    """Let the C library keep large blocks that the CPU frees, for the next step, instead of returning them.

    A returned block costs a page fault for every four kilobytes when it is asked for again.
    """
    if device.type == "cpu":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):  # glibc
            library.mallopt(_M_MMAP_MAX, 0)
            library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def memory_in_use(device: torch.device) -> dict[str, int] | None:
    """Bytes that torch holds of the device's memory, and the most it held; None where there are no figures."""
    if device.type != "cuda":
        return None
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "max allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "max reserved": torch.cuda.max_memory_reserved(device),
    }


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it (a CPU always has)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
