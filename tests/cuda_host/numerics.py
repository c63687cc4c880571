"""The number types of the kernels in numpy, and how near to float64 a result has to be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.cuda_host.device import Array

# Of the terms that make a value; float32 has 6e-8. And what may be lost where float32 has no normal numbers left.
RELATIVE, ABSOLUTE = 1e-6, 1e-36


@dataclass(frozen=True)
class Kind:
    """A dtype of kernels.h: its number there, and numpy's type for its bits."""

    name: str
    code: int
    storage: type

    def encode(self, values: Array) -> Array:
        """Rounded to nearest, ties to even; by way of float32."""
        single = np.ascontiguousarray(values, np.float32)
        if self.storage is np.float32:
            return single
        bits = single.view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(single), np.uint16(0x7FC0), rounded)

    def decode(self, stored: Array) -> Array:
        """As float64."""
        if self.storage is np.float32:
            return stored.astype(np.float64)
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    def rounding(self, values: Array) -> Array:
        """The most by which rounding to this kind moves values that come as float32."""
        if self.storage is np.float32:
            return np.zeros_like(values)
        with np.errstate(all="ignore"):
            exponent = np.floor(np.log2(np.maximum(np.abs(values), 2.0**-126)))
        return np.exp2(np.where(np.isfinite(exponent), exponent, 0.0) - 8)  # half of the last of 8 bits


FLOAT32 = Kind("float32", 0, np.float32)
BFLOAT16 = Kind("bfloat16", 1, np.uint16)
FLOAT64 = Kind("float64", 2, np.float64)
KINDS = (FLOAT32, BFLOAT16)


def assert_close(
    what: str, stored: Array, kind: Kind, reference: Array, terms: Array | None = None, relative: float = RELATIVE
) -> None:
    """`stored` is the reference rounded to its kind, but for float32's arithmetic on `terms` (default |reference|)."""
    got = kind.decode(stored)
    with np.errstate(all="ignore"):
        bound = relative * np.abs(reference if terms is None else terms) + ABSOLUTE
        bound = bound + kind.rounding(np.abs(reference) + bound)
        wrong = ~(np.abs(got - reference) <= bound)
    finite = np.isfinite(reference)
    same = np.where(np.isnan(reference), np.isnan(got), got == reference)
    wrong = np.where(finite, wrong, ~same)
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what} {kind.name}: {wrong.sum()} of {wrong.size} differ, first at {first}: "
            f"{got[first]!r} for {reference[first]!r}"
        )
