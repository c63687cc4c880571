"""What this machine has for fast kernels, what is in use, and what to do about the rest: `megatron doctor`.

Libraries of others are imported in processes of their own: one that crashes there is a finding, not the end.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from megatron.kernels import native
from megatron.kernels.vendor import apex, flash_attention
from megatron.utils.device import compute_capability, cpu_multiplies_bfloat16
from megatron.utils.environment import wished_compiler
from megatron.utils.units import format_bytes

_REINSTALL = "install this package again (pip install --no-build-isolation -e .)"
_IMPORT_TIMEOUT_S = 60.0
_COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class Fact:
    """`good` is None where there is nothing to be had: no cure is needed then."""

    name: str
    good: bool | None
    text: str
    cure: str | None = None


@dataclass(frozen=True)
class Probe:
    """A library: its modules (one suffices to look further), a program that imports it and prints its version."""

    name: str
    modules: tuple[str, ...]
    program: str
    cure: str


PROBES = (
    Probe(
        "flash-attn",
        ("flash_attn",),
        "import flash_attn; from flash_attn import flash_attn_func; print(flash_attn.__version__)",
        flash_attention.CURE,
    ),
    Probe(
        "NVIDIA apex",
        ("apex", "amp_C", apex.MODULE),
        f"import torch; from apex.normalization import FusedRMSNorm; import amp_C, {apex.MODULE}; "
        f"{apex.MODULE}.{apex.FUNCTION}; print('with fused weight gradients')",
        apex.CURE,
    ),
    Probe(
        "Transformer Engine",
        ("transformer_engine",),
        "import transformer_engine.pytorch; print(transformer_engine.__version__)",
        "nothing here uses it yet: kernels.fp8 is refused",
    ),
)


def diagnose() -> list[Fact]:
    """All facts, in the order in which one depends on the other."""
    with ThreadPoolExecutor() as pool:
        libraries = pool.map(examine, PROBES)  # while the rest is found out
        facts = [*_software(), *_devices(), *_compilers(), *_kernels()]
        return [*facts, *libraries]


def _software() -> Iterator[Fact]:
    yield Fact("Python", True, platform.python_version())
    yield Fact("torch", True, torch.__version__)
    cuda = torch.version.cuda
    if cuda is None:
        yield Fact(
            "torch's CUDA", False, "none: a CPU build", "for GPUs install a CUDA build of torch, see pytorch.org"
        )
    else:
        yield Fact("torch's CUDA", True, cuda)
    if cuda is not None and torch.distributed.is_nccl_available():
        yield Fact("NCCL", True, ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Fact("NCCL", None if cuda is None else False, "none; processes talk by gloo", None)


def _devices() -> Iterator[Fact]:
    model = "bf16 products are native" if cpu_multiplies_bfloat16() else "no instructions for bf16 products"
    cure = "use train.precision=fp32: bf16 is computed in float32 here, from widened copies"
    yield Fact("CPU", cpu_multiplies_bfloat16(), model, None if cpu_multiplies_bfloat16() else cure)
    if torch.version.cuda is None:
        yield Fact("GPUs", None, "none that this torch could use")
    elif not torch.cuda.is_available():
        yield Fact(
            "GPUs", False, f"none: {_why_no_gpu()}", "check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"
        )
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(device)
        major, minor = compute_capability(device) or (0, 0)
        text = f"{properties.name}, {format_bytes(properties.total_memory)}, compute capability {major}.{minor}"
        old = (major, minor) < (8, 0)
        yield Fact(f"GPU {index}", not old, text, "the CUDA kernels are built for 8.0 and newer" if old else None)


def _why_no_gpu() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "the driver shows no device"


def _compilers() -> Iterator[Fact]:
    wished = wished_compiler()
    found = next((path for name in ((wished,) if wished else _COMPILERS) if (path := shutil.which(name))), None)
    if found is None:
        what = f"CXX={wished} is not there" if wished else f"none of {', '.join(_COMPILERS)}"
        yield Fact("C++ compiler", False, what, f"install one (Debian: apt-get install g++), then {_REINSTALL}")
    else:
        yield Fact("C++ compiler", True, _first_line([found, "--version"]))
    nvcc = find_nvcc()
    if nvcc is not None:
        yield Fact("nvcc", True, _last_line([nvcc, "--version"]))
    else:
        needed = torch.version.cuda is not None
        cure = f"install the CUDA toolkit {torch.version.cuda}, then {_REINSTALL}"
        yield Fact(
            "nvcc", False if needed else None, "none on the path or in /usr/local/cuda", cure if needed else None
        )


def find_nvcc() -> str | None:
    """The CUDA compiler, where the build looks for it."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _kernels() -> Iterator[Fact]:
    library, reason = native.find("cpu")
    if library is None:
        yield Fact("CPU kernels", False, f"references instead: {reason}", f"with a C++ compiler at hand {_REINSTALL}")
    else:
        yield Fact("CPU kernels", True, f"compiled, running {reason}")
    library, reason = native.find("cuda")
    if library is not None:
        yield Fact("CUDA kernels", True, "compiled for compute capability 8.0 and newer")
    elif torch.version.cuda is None:
        yield Fact("CUDA kernels", None, "none: they are built only beside a CUDA build of torch")
    else:
        lacking = "" if find_nvcc() else "with nvcc on the path "
        yield Fact("CUDA kernels", False, f"references instead: {reason}", f"{lacking}{_REINSTALL}")


def examine(probe: Probe) -> Fact:
    """Whether a library is there and can be imported, found out in another process."""
    if all(importlib.util.find_spec(module) is None for module in probe.modules):
        return Fact(probe.name, None, "not installed; optional")
    command = [sys.executable, "-c", probe.program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Fact(probe.name, False, f"importing it took more than {_IMPORT_TIMEOUT_S:.0f} s", probe.cure)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return Fact(probe.name, False, f"importing it crashes Python ({name})", probe.cure)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or ["no message"]
    if done.returncode:
        return Fact(probe.name, False, f"does not load: {lines[-1]}", probe.cure)
    return Fact(probe.name, True, lines[-1])


def _first_line(command: list[str]) -> str:
    return (_output(command) or ["does not run"])[0]


def _last_line(command: list[str]) -> str:
    return (_output(command) or ["does not run"])[-1]


def _output(command: list[str]) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines()
