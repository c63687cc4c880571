"""Builds the kernels of csrc/cuda for the host, plain or under a sanitizer, and with bugs planted on purpose."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
KERNELS = tuple(sorted(path.stem for path in (CSRC / "cuda").glob("*.cu")))


@dataclass(frozen=True)
class Flavour:
    """How to compile the kernels, and the emulation below them, which no sanitizer watches unless it must."""

    name: str
    kernel_flags: tuple[str, ...] = ()
    emulation_flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()
    preload: str = ""  # the sanitizer's library, which Python has to load first
    environment: tuple[tuple[str, str], ...] = ()


PLAIN = Flavour("plain")
# Shared arrays, heap blocks and misaligned vectors. Leaks are Python's; fibers are not what the first option expects.
ADDRESS = Flavour(
    "address",
    kernel_flags=("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"),
    link_flags=("-fsanitize=address,undefined",),
    preload="libasan.so",
    environment=(("ASAN_OPTIONS", "detect_stack_use_after_return=0:detect_leaks=0"),),
)
# With -g1 a report names the line.
THREAD = Flavour(
    "thread",
    kernel_flags=("-fsanitize=thread", "-g1"),
    emulation_flags=("-DEMULATION_TSAN",),
    link_flags=("-fsanitize=thread",),
    preload="libtsan.so",
    environment=(("TSAN_OPTIONS", "halt_on_error=1:exitcode=66:report_signal_unsafe=0"),),
)


@dataclass(frozen=True)
class Bug:
    """A change to the text of one source file that makes it wrong."""

    file: str  # below csrc/
    right: str
    wrong: str

    def plant(self, csrc: Path) -> None:
        """Changes the file below `csrc`; an assertion where the text is not there exactly once."""
        path = csrc / self.file
        text = path.read_text(encoding="utf-8")
        assert text.count(self.right) == 1, f"{self.file} has {text.count(self.right)} times: {self.right!r}"
        path.write_text(text.replace(self.right, self.wrong), encoding="utf-8")


def missing(flavour: Flavour = PLAIN) -> str:
    """Why this machine cannot build that flavour; empty where it can."""
    if shutil.which("g++") is None:
        return "needs g++, which is not there"
    if flavour.preload and not Path(runtime(flavour)).is_absolute():
        return f"needs {flavour.preload} of g++, which is not there"
    if flavour is THREAD and shutil.which("setarch") is None:
        return "needs setarch, which is not there"
    return ""


def runtime(flavour: Flavour) -> str:
    """Where the sanitizer's library is; the bare name where g++ has none."""
    return subprocess.check_output(["g++", f"-print-file-name={flavour.preload}"], text=True).strip()


def build(folder: Path, flavour: Flavour, bug: Bug | None = None, kernels: tuple[str, ...] = KERNELS) -> Path:
    """The shared library of `kernels`, with `bug` in a copy of their sources; all files go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    csrc = CSRC
    if bug is not None:
        csrc = folder / "csrc"
        shutil.copytree(CSRC, csrc)
        bug.plant(csrc)
    common = ["g++", "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", f"-I{HERE}"]
    objects = [folder / "emulation.o"]
    compile_one([*common, *flavour.emulation_flags, "-c", str(HERE / "emulation.cpp"), "-o", str(objects[0])])
    for kernel in kernels:
        objects.append(folder / f"{kernel}.o")
        source = str(csrc / "cuda" / f"{kernel}.cu")
        compile_one([*common, *flavour.kernel_flags, "-x", "c++", "-c", source, "-o", str(objects[-1])])
    library = folder / f"lib{flavour.name}.so"
    compile_one(["g++", "-shared", *flavour.link_flags, *map(str, objects), "-o", str(library)])
    return library


def compile_one(command: list[str]) -> None:
    """Runs the compiler; what it said is part of the error."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


def run_apart(library: Path, flavour: Flavour, kernels: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Runs the small cases of `kernels` in a Python of its own, with the sanitizer's library loaded first."""
    command = [sys.executable, "-m", "tests.cuda_host.apart", str(library), *kernels]
    if flavour is THREAD:  # its map of the address space does not bear all that is random about it
        command = ["setarch", "-R", *command]
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime(flavour),
        "OPENBLAS_NUM_THREADS": "1",
        **dict(flavour.environment),
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
