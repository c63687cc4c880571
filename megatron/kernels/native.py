"""The compiled kernels of csrc/: loading them, calling them, and saying why they are not there.

They are plain C functions on addresses (csrc/kernels.h), so one build serves every release of torch. Which device types
have theirs in use is the only state here; without them every operation runs its reference.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Literal

import torch

from megatron.utils.device import current_stream
from megatron.utils.errors import ConfigError

Backend = Literal["auto", "native", "reference"]

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_UNSUPPORTED = -1
_ARGUMENT_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
_FOLDER = Path(__file__).parent


class Library:
    """One shared library of kernels, for tensors of one device type."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file is missing or does not load on this machine."""
        _share_openmp_of_torch()
        self.path = path
        self._library = ctypes.CDLL(str(path))

    def kernel(self, name: str, signature: str) -> Callable[..., int]:
        """The C function, which takes the dtype's code, arguments as `signature` says, and a stream."""
        function = getattr(self._library, f"megatron_{name}")
        function.argtypes = [ctypes.c_int, *(_ARGUMENT_TYPES[letter] for letter in signature), ctypes.c_void_p]
        function.restype = ctypes.c_int
        return function

    def instruction_set(self) -> str:
        """Which instructions the CPU kernels use on this machine."""
        function = self._library.megatron_isa
        function.restype = ctypes.c_char_p
        return function().decode()

    def use_instruction_set(self, name: str) -> bool:
        """Use another instruction set from now on; False where this machine lacks it."""
        function = self._library.megatron_use_isa
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_bool
        return function(name.encode())


_in_use: dict[str, Library] = {}


class Kernel:
    """A compiled kernel by name. `signature` has a letter per argument: p tensor or None, i whole number, d real."""

    def __init__(self, name: str, signature: str) -> None:
        self.name, self.signature = name, signature
        self._functions: dict[str, tuple[Library, Callable[..., int]]] = {}

    def __call__(self, like: torch.Tensor, *arguments: torch.Tensor | float | None) -> bool:
        """Run on contiguous tensors of `like`'s dtype and device; False, and nothing done, where there is none."""
        device_type, code = like.device.type, _DTYPE_CODES.get(like.dtype)
        library = _in_use.get(device_type)
        if library is None or code is None:
            return False
        known = self._functions.get(device_type)
        if known is None or known[0] is not library:
            known = self._functions[device_type] = (library, library.kernel(self.name, self.signature))
        words = [argument.data_ptr() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        status = known[1](code, *words, current_stream(like.device))
        if status not in (0, _UNSUPPORTED):
            raise RuntimeError(f"the kernel {self.name} failed to start: CUDA error {status}")
        return status == 0


def select(backend: Backend, device_type: str) -> str:
    """Use compiled kernels or references from now on, for all tensors; returns one clause that says which and why.

    Raises ConfigError where `native` is asked for and there is none for `device_type`.
    """
    _in_use.clear()
    if backend == "reference":
        return "reference kernels, as kernels.backend says"
    reasons = {}
    for kind in ("cpu", "cuda"):
        library, reasons[kind] = find(kind)
        if library is not None:
            _in_use[kind] = library
    if device_type in _in_use:
        return f"native kernels ({reasons[device_type]})"
    if backend == "native":
        raise ConfigError(
            f"kernels.backend=native, but there are no compiled kernels for {device_type}: {reasons[device_type]}; "
            "use kernels.backend=auto, or see `megatron doctor`"
        )
    return f"reference kernels, slower: {reasons[device_type]}; see `megatron doctor`"


def in_use(device_type: str) -> bool:
    """Whether tensors of this device type meet compiled kernels."""
    return device_type in _in_use


def find(device_type: str) -> tuple[Library | None, str]:
    """(the library for a device type, its instruction set), or (None, why there is none)."""
    paths = [_FOLDER / f"_{device_type}{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None, "they were not built when this was installed"
    try:
        library = Library(path)
    except OSError as error:
        return None, f"{path.name} does not load: {error}"
    return library, library.instruction_set() if device_type == "cpu" else "CUDA"


def _share_openmp_of_torch() -> None:
    """Let the kernels find the OpenMP runtime that torch uses: a second one would fight it for the cores."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        found = re.search(r"/\S*/lib(?:gomp|iomp5|omp)[^/]*\.so[^/]*$", line)
        if found:
            ctypes.CDLL(found[0], mode=ctypes.RTLD_GLOBAL)
            return


select("auto", "cpu")
