"""Numbers as people read them: bytes, counts, durations. Pure functions of numbers."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def format_bytes(count: float) -> str:
    """Bytes in binary units with at most one decimal: `512 B`, `1.5 GiB`."""
    size, unit = _scale(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), decimals=1)
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def parse_bytes(text: str) -> int | None:
    """The bytes of a size as people write it (`5GB`, `1.5 GiB`, `4096`); None where it is none, or nothing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.strip().upper())
    return int(float(match[1]) * _UNITS[match[2] or ""]) or None if match else None


def format_count(count: float) -> str:
    """A count in three figures with a decimal prefix: `950`, `45.6 k`, `1.23 M`, `6.74 G`, `2.00 T`."""
    size, unit = _scale(count, 1000, ("", "k", "M", "G", "T", "P"), decimals=0)
    if not unit:
        return f"{size:.0f}" if float(size).is_integer() else f"{size:.3g}"
    digits = next((digits for digits in (2, 1) if round(abs(size), digits) < 10 ** (3 - digits)), 0)
    return f"{size:.{digits}f} {unit}"


def format_duration(seconds: float) -> str:
    """A duration in its two largest units: `0.25 s`, `42 s`, `3 min 07 s`, `1 h 02 min`, `2 d 05 h`."""
    if seconds < 9.95:
        return f"{seconds:.2g} s" if seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def _scale(count: float, base: int, units: tuple[str, ...], decimals: int) -> tuple[float, str]:
    """The number and the largest unit in which it is at least one once rounded."""
    size, unit = count, units[0]
    for unit in units:
        # Rounded, since 1023.96 MiB would otherwise be printed as 1024.0 MiB.
        if round(abs(size), decimals) < base or unit == units[-1]:
            break
        size /= base
    return size, unit
