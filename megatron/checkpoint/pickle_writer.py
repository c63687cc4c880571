"""Writing what `read_pickle` reads: plain data and references to tensors, in protocol 2 as `torch.save` uses it."""

from __future__ import annotations

import struct
from typing import Any

import torch

from megatron.checkpoint.pickled import STORAGES, Instance, Name, StorageRef, TensorRef

_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}


def write_pickle(value: Any) -> bytes:
    """The pickle of a value; raises TypeError for what is no plain data."""
    parts = [b"\x80\x02"]
    _write(value, parts)
    return b"".join([*parts, b"."])


def _write(value: Any, parts: list[bytes]) -> None:
    kind = type(value)
    if value is None or kind is bool:
        parts.append({None: b"N", True: b"\x88", False: b"\x89"}[value])
    elif kind is int:
        parts.append(_integer(value))
    elif kind is float:
        parts.append(b"G" + struct.pack(">d", value))
    elif kind is str:
        text = value.encode("utf-8", "surrogatepass")
        parts.append(b"X" + struct.pack("<I", len(text)) + text)
    elif kind is dict:
        parts.append(b"}(")
        for key, item in value.items():
            _write(key, parts)
            _write(item, parts)
        parts.append(b"u")
    elif kind in (list, tuple):
        parts.append(b"](" if kind is list else b"(")
        for item in value:
            _write(item, parts)
        parts.append(b"e" if kind is list else b"t")
    else:
        _write_named(value, parts)


def _integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(data)) + data


def _write_named(value: Any, parts: list[bytes]) -> None:
    """What is made by a class or function that the reader of the pickle must know."""
    if isinstance(value, Name):
        parts.append(f"c{value.module}\n{value.name}\n".encode())
    elif isinstance(value, Instance):
        _write(value.name, parts)
        _write(value.arguments, parts)
        parts.append(b"\x81" if not value.arguments else b"R")
        if value.values:
            _write(value.values, parts)
            parts.append(b"b")
    elif isinstance(value, StorageRef):
        assert value.dtype is not None
        _write(("storage", Name("torch", _STORAGE_OF[value.dtype]), value.key, "cpu", value.numel), parts)
        parts.append(b"Q")
    elif isinstance(value, TensorRef):
        _write(Name("torch._utils", "_rebuild_tensor_v2"), parts)
        parts.append(b"(")
        for item in (value.storage, value.offset, value.shape, value.strides, False):
            _write(item, parts)
        _write(Name("collections", "OrderedDict"), parts)
        parts.append(b")RtR")
    elif isinstance(value, torch.dtype):
        _write(Name("torch", str(value).removeprefix("torch.")), parts)
    else:
        raise TypeError(f"{type(value)} is no plain data")
