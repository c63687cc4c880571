"""The emulated device: memory that ends where a tensor ends, and the functions of csrc/kernels.h."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.cuda_host.build import CSRC

Array = npt.NDArray[Any]

ORDERS = (0, 1, 2, 7)  # forwards, backwards, odd ones first, and a shuffle of that seed
UNSUPPORTED = -1

_C_TYPES = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "double": ctypes.c_double}


def signatures() -> dict[str, list[Any]]:
    """The parameter types of every function that csrc/kernels.h lists: a changed contract shows as a failed call."""
    text = (CSRC / "kernels.h").read_text(encoding="utf-8").replace("\\\n", "\n")
    found = {}
    for name, parameters in re.findall(r"X\((\w+),\s*\(([^)]+)\)", text):
        types = [parameter.rsplit(None, 1)[0].strip() for parameter in parameters.split(",")]
        found[name] = [ctypes.c_void_p if "*" in kind else _C_TYPES[kind] for kind in types]
    return found


class Device:
    """One built library. `order` is that in which warps and lanes run."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.signatures = signatures()
        self.library.emulation_allocate.restype = ctypes.c_void_p
        self.library.emulation_allocate.argtypes = [ctypes.c_size_t]
        self.library.emulation_free.argtypes = [ctypes.c_void_p]
        self.blocks: list[int] = []

    def order(self, kind: int) -> None:
        self.library.emulation_order(ctypes.c_uint(kind))

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike, offset: int = 0) -> Array:
        """An array full of NaN, `offset` elements past a 16-byte boundary, valid until `release`."""
        kind = np.dtype(dtype)
        count = int(np.prod(shape))
        self.blocks.append(self.library.emulation_allocate((offset + count) * kind.itemsize))
        start = self.blocks[-1] + offset * kind.itemsize
        array = np.frombuffer((ctypes.c_char * (count * kind.itemsize)).from_address(start), kind).reshape(shape)
        array.view(np.uint8)[...] = 0xFF
        return array

    def give(self, values: Array, offset: int = 0) -> Array:
        """A copy of `values` in the device's memory."""
        array = self.empty(values.shape, values.dtype, offset)
        array[...] = values
        return array

    def release(self) -> None:
        """Frees all arrays."""
        for block in self.blocks:
            self.library.emulation_free(block)
        self.blocks = []

    def code(self, name: str, *arguments: Array | float | None) -> int:
        """What the function returns; the stream is added here."""
        function = getattr(self.library, f"megatron_{name}")
        function.argtypes = self.signatures[name]
        assert len(arguments) + 1 == len(function.argtypes), name
        addresses = [value.ctypes.data if isinstance(value, np.ndarray) else value for value in arguments]
        return int(function(*addresses, None))

    def call(self, name: str, *arguments: Array | float | None) -> None:
        code = self.code(name, *arguments)
        assert code == 0, f"{name} returned {code}"
