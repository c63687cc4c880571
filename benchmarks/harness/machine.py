"""The machine that a benchmark runs on: its description, its two peaks, and the memory of this process."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16")
# (rows, inner, columns): square or nearly so, within caches and beyond them.
_PRODUCTS = ((1024, 1024, 1024), (2048, 2048, 2048), (1024, 4096, 1024))


def describe_machine(cores: int) -> str:
    """One line: processor, cores in use, vector instructions, versions."""
    text = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    found = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    flags = set(found.group(1).split()) if found else set()
    return (
        f"{model.group(1) if model else platform.processor() or platform.machine()}, {cores} cores, "
        f"{' '.join(flag for flag in _FLAGS if flag in flags) or 'no vector flags known'}; torch {torch.__version__} "
        f"({torch.backends.cpu.get_cpu_capability()}), Python {platform.python_version()}"
    )


def product_flops_per_s(dtype: torch.dtype, budget_s: float) -> float:
    """FLOP/s of the fastest large `F.linear` with this process's threads, in `dtype` or float32, whichever is faster:
    a CPU without bf16 instructions multiplies bf16 many times slower.
    """
    tries = [(kind, shape) for kind in {dtype, torch.float32} for shape in _PRODUCTS]
    best = 0.0
    for kind, (rows, inner, columns) in tries:
        left, right = torch.randn(rows, inner).to(kind), torch.randn(columns, inner).to(kind)
        seconds = min(repeat(lambda left=left, right=right: F.linear(left, right), budget_s / len(tries)))
        best = max(best, 2.0 * rows * inner * columns / seconds)
    return best


class Bandwidth:
    """Passes over buffers much larger than caches, in bytes read and written per second as STREAM counts them.

    copy: b = a. triad: c = a + 3 b. update: b += 3 a. Copy and triad fetch what they overwrite, which is
    not counted; update has it already, so that its figure is also what stores past the caches reach.
    """

    def __init__(self, buffer_bytes: int, clock: Callable[[], float] = time.perf_counter) -> None:
        first, second, third = (torch.ones(buffer_bytes // 4) for _ in range(3))
        self._passes: dict[str, tuple[int, Callable[[], object]]] = {
            "copy": (2, lambda: second.copy_(first)),
            "triad": (3, lambda: torch.add(first, second, alpha=3.0, out=third)),
            "update": (3, lambda: second.add_(first, alpha=3.0)),
        }
        self._buffer_bytes, self._clock = buffer_bytes, clock

        self._turns = itertools.cycle(self._passes)
        self.best = dict.fromkeys(self._passes, 0.0)

    def measure(self) -> None:
        """One of the passes, each in its turn; `best` keeps the fastest of each."""
        name = next(self._turns)
        buffers, call = self._passes[name]
        begin = self._clock()
        call()
        self.best[name] = max(self.best[name], buffers * self._buffer_bytes / (self._clock() - begin))

    def measure_anew(self) -> None:
        """Forget, and measure each once."""
        self.best = dict.fromkeys(self._passes, 0.0)
        for _ in self._passes:
            self.measure()


def repeat(call: Callable[[], object], budget_s: float, most: int = 50) -> list[float]:
    """Seconds of calls one after the other, one at least after one that is not counted, until the budget is spent."""
    start = time.perf_counter()
    call()
    seconds: list[float] = []
    while not seconds or (len(seconds) < most and time.perf_counter() - start < budget_s):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds


def keep_freed_memory() -> None:
    """Let the allocator keep what is freed, so that no later call pays for fresh pages (glibc; else without effect)."""
    with contextlib.suppress(OSError, AttributeError):
        allocator = ctypes.CDLL(None)
        allocator.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped for itself
        allocator.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back


def resident_bytes() -> int:
    """Physical memory that this process holds now."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Start the high-water mark of this process anew, where the kernel allows it; else it also covers the start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The high-water mark of physical memory, since `reset_peak` where that works.

    It is what getrusage calls ru_maxrss, less that this also remembers the process that forked this one.
    """
    return _status("VmHWM")


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", _read("/proc/self/status"), re.MULTILINE)
    assert found is not None, f"/proc/self/status has no {key}"
    return int(found.group(1)) * 1024


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
