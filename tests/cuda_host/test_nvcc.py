"""The real compiler on the real sources: they build for A100 and H100, in registers, with 16-byte loads and stores."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cuda_host.build import CSRC, KERNELS
from tests.cuda_host.device import UNSUPPORTED, signatures
from tests.cuda_host.numerics import FLOAT32, FLOAT64

pytestmark = pytest.mark.timeout(900)  # half a minute, but of compiling, which a busy machine makes minutes

ARCHITECTURES = ("80", "90")

# Per thread. Spilled registers cost memory traffic, which is all that these kernels are made of; with more than 128
# registers a block of 512 threads would not start.
SPILL_BYTES, REGISTERS = 0, 128

# Kernels that take packs of 16 bytes; those with one element each (…ILi1E…) are for what is not aligned.
WIDE = re.compile(r"Li[48]E|statistics_kernel|gradient_kernel|squared_norm_kernel")


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which("nvcc") or next(
        (found for home in homes if home and (found := shutil.which("nvcc", path=f"{home}/bin"))), None
    )


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = find_nvcc()
    if found is None:
        pytest.skip("needs nvcc, which is not there")
    return found


@pytest.fixture(scope="module")
def compiled(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of object files, and what ptxas said of them."""
    folder = tmp_path_factory.mktemp("nvcc")
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v", "-Werror", "all-warnings"]
    flags += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]

    def compile_one(kernel: str) -> str:
        command = [nvcc, *flags, "-c", str(CSRC / "cuda" / f"{kernel}.cu"), "-o", str(folder / f"{kernel}.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    with ThreadPoolExecutor(2) as pool:
        return folder, "".join(pool.map(compile_one, KERNELS))


def resources(said: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(kernel, architecture) → (bytes spilled, registers per thread), from the words of `ptxas -v`."""
    found = {}
    for part in re.split(r"Compiling entry function", said)[1:]:
        name, architecture = re.findall(r"'([^']+)'", part)[:2]
        spills = [int(number) for number in re.findall(r"(\d+) bytes spill", part)]
        registers = re.search(r"Used (\d+) registers", part)
        assert spills and registers, part
        found[name, architecture] = sum(spills), int(registers[1])
    return found


def test_kernels_stay_within_their_registers(compiled: tuple[Path, str]) -> None:
    found = resources(compiled[1])
    assert {architecture for _, architecture in found} == {f"sm_{number}" for number in ARCHITECTURES}
    too_much = {key: use for key, use in found.items() if use[0] > SPILL_BYTES or use[1] > REGISTERS}
    assert too_much == {}


def test_resources_are_read_as_ptxas_prints_them() -> None:
    said = (
        "ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z1kPf\n"
        "    72 bytes stack frame, 68 bytes spill stores, 64 bytes spill loads\n"
        "ptxas info    : Used 32 registers, used 1 barriers, 72 bytes cumulative stack size\n"
    )
    assert resources(said) == {("_Z1kPf", "sm_90"): (132, 32)}


@pytest.mark.parametrize("kernel", KERNELS)
def test_wide_kernels_load_and_store_16_bytes(nvcc: str, tmp_path: Path, kernel: str) -> None:
    """In PTX: four words at once, or two of eight bytes. The assembler leaves such accesses as they are."""
    target = tmp_path / "kernel.ptx"
    source = str(CSRC / "cuda" / f"{kernel}.cu")
    subprocess.run([nvcc, "-std=c++17", "-O3", "-ptx", "-arch=compute_80", source, "-o", str(target)], check=True)
    entries = [part for part in target.read_text().split(".entry ")[1:] if WIDE.search(part.split("(")[0])]
    assert entries
    for entry in entries:
        name = entry.split("(")[0]
        assert re.search(r"ld\.global(\.nc)?\.(v4\.\w32|v2\.\w64)", entry), name
        if not re.search("statistics_kernel|squared_norm", name):
            assert re.search(r"st\.global(\.wb)?\.(v4\.\w32|v2\.\w64)", entry), name


def test_one_library_links_and_loads_without_a_driver(compiled: tuple[Path, str], nvcc: str) -> None:
    """With CUDA's runtime inside, whatever release of it torch brings."""
    target = compiled[0] / "libmegatron_cuda.so"
    objects = [str(compiled[0] / f"{kernel}.o") for kernel in KERNELS]
    subprocess.run([nvcc, "-shared", "-cudart", "static", *objects, "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    for name, types in signatures().items():
        function = getattr(library, f"megatron_{name}")
        function.argtypes = types
        nothing = [0] * (len(types) - 2)
        assert function(FLOAT32.code, *nothing, None) == 0
        assert function(FLOAT64.code, *nothing, None) == UNSUPPORTED
