"""Builds the compiled kernels and the helpers of the data path; everything else about the package is in pyproject.toml.

The kernels include no header of torch, so an isolated build works as well and one build serves every release. What
cannot be built is left out with a warning: the package runs on its references then, and `megatron doctor` says why.
"""

from __future__ import annotations

import re
import shutil
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU = Extension(
    "megatron.kernels._cpu",
    sources=[f"csrc/cpu/{name}.cpp" for name in ("baseline", "avx2", "avx512", "dispatch")],
    depends=[*map(str, Path("csrc").rglob("*.h")), *map(str, Path("csrc").rglob("*.inc"))],
    # OpenMP is compiled for but not linked: at run time its functions are those that torch has loaded.
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",
        "-fopenmp",
        "-ffp-contract=off",  # every operation rounds as written; what is fused says so
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fno-thread-jumps",  # GCC would give each outcome of a clamp a path of its own, and blend them all in vectors
        "-fvisibility=hidden",
    ],
    optional=True,
)
CUDA = Extension(
    "megatron.kernels._cuda",
    sources=sorted(map(str, Path("csrc/cuda").glob("*.cu"))),
    depends=[*map(str, Path("csrc").rglob("*.h")), *map(str, Path("csrc/cuda").glob("*.cuh"))],
    optional=True,
)
DATA = Extension(
    "megatron.data._order",
    sources=["csrc/data/order.cpp"],
    extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"],
    optional=True,
)
ARCHITECTURES = ("80", "90")


class BuildKernels(build_ext):
    """Compiles .cu files with nvcc, which setuptools does not know."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name != CUDA.name:
            super().build_extension(ext)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in ARCHITECTURES]
        newest = f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}"
        flags = ["-std=c++17", "-O3", "--shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", *codes, newest]
        self.spawn([str(nvcc()), *flags, "-o", str(target), *ext.sources])


def nvcc() -> Path | None:
    """The CUDA compiler, on the path or where CUDA installs itself."""
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    return Path(found) if found else None


def torch_has_cuda() -> bool:
    """Whether the torch that is installed beside this package is a CUDA build; read, since it may not be importable."""
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        version = Path(folder) / "torch" / "version.py"
        if version.is_file():
            return re.search(r"^cuda\b[^=]*=\s*['\"]\d", version.read_text(), re.MULTILINE) is not None
    return False


setup(
    ext_modules=[CPU, DATA, *([CUDA] if nvcc() and torch_has_cuda() else [])],
    cmdclass={"build_ext": BuildKernels},
)
