"""Single safetensors files, against the safetensors library."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron.checkpoint import strided
from megatron.checkpoint.safetensors_file import DTYPES, SafetensorsReader, SafetensorsWriter
from megatron.utils.errors import CheckpointError


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, dtype in DTYPES.items():
        shape = (5, 7)
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (35 * dtype.itemsize,), generator=generator)
        tensors[name] = raw.to(torch.uint8).view(dtype).reshape(shape)
    tensors["vector"] = torch.arange(11.0)
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty(0, 4)
    tensors["größe"] = torch.randn(2, 3, 4, generator=generator)
    return tensors


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits (NaNs too)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> tuple[int, str]:
    plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, plan, {"format": "pt"}) as writer:
        for name in writer.order:
            writer.write(name, tensors[name])
        return writer.close()


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = _tensors()
    size_bytes, digest = _write(tmp_path / "a.safetensors", tensors)
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(_same(loaded[name], tensor) for name, tensor in tensors.items())
    content = (tmp_path / "a.safetensors").read_bytes()
    assert (len(content), xxhash.xxh3_128(content).hexdigest()) == (size_bytes, digest)


def test_the_caller_may_reuse_its_memory(tmp_path: Path) -> None:
    """Hashing runs beside writing and is slower: it must have ended as well."""
    rows = torch.ones(16 * 2**20, dtype=torch.bfloat16)
    with SafetensorsWriter(tmp_path / "a.safetensors", {"x": (rows.dtype, tuple(rows.shape))}) as writer:
        writer.write("x", rows)
        rows.zero_()
        _, digest = writer.close()
    assert digest == xxhash.xxh3_128((tmp_path / "a.safetensors").read_bytes()).hexdigest()


def test_tensors_are_aligned_to_their_elements(tmp_path: Path) -> None:
    _write(tmp_path / "a.safetensors", _tensors())
    with SafetensorsReader(tmp_path / "a.safetensors") as reader:
        assert all(entry.offset % entry.dtype.itemsize == 0 for entry in reader.entries.values())


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = _tensors()
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    with SafetensorsReader(tmp_path / "a.safetensors") as reader:
        assert reader.metadata == {"format": "pt"}
        for name, tensor in tensors.items():
            out = torch.zeros_like(tensor)
            reader.read(name, None, out)
            assert _same(out, tensor), name


@pytest.mark.parametrize("gap", [0, 2**14], ids=["each row", "through"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_rectangle_into_any_strides(tmp_path_factory, gap: int, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    path = tmp_path_factory.mktemp("rectangles") / "a.safetensors"
    save_file({"before": torch.ones(3), "x": whole}, path)
    starts = [data.draw(st.integers(0, extent)) for extent in shape]
    slices = tuple(slice(a, data.draw(st.integers(a, extent))) for a, extent in zip(starts, shape, strict=True))
    expected = whole[slices].to(torch.float64)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    out = torch.full([2 * extent for extent in expected.shape], -1, dtype=dtype)
    view = out[tuple(slice(0, None, 2) for _ in shape)] if data.draw(st.booleans()) else torch.empty_like(whole[slices])
    with pytest.MonkeyPatch.context() as patch, SafetensorsReader(path) as reader:
        patch.setattr(strided, "_GAP_BYTES", gap)
        patch.setattr(strided, "BLOCK_BYTES", data.draw(st.sampled_from([4, 64, 2**20])))
        reader.read("x", slices, view)
    assert torch.equal(view.to(torch.float64), expected)
    if view.dim() and view.numel() and view.data_ptr() == out.data_ptr():
        assert (out < 0).sum() == out.numel() - view.numel()  # nothing beside the view was touched


def test_columns_are_read_without_the_rest_of_long_rows(tmp_path: Path, monkeypatch) -> None:
    whole = torch.randn(64, 65536)
    save_file({"x": whole}, tmp_path / "a.safetensors")
    read_bytes = 0
    genuine = os.preadv

    def counting(descriptor, buffers, offset):
        nonlocal read_bytes
        read_bytes += sum(len(buffer) for buffer in buffers)
        return genuine(descriptor, buffers, offset)

    with SafetensorsReader(tmp_path / "a.safetensors") as reader:
        monkeypatch.setattr(os, "preadv", counting)
        out = torch.empty(64, 4096)
        reader.read("x", (slice(0, 64), slice(4096, 8192)), out)
    assert torch.equal(out, whole[:, 4096:8192])
    assert read_bytes == out.numel() * 4


def test_rows_can_come_in_blocks_and_views(tmp_path: Path) -> None:
    whole = torch.randn(10, 6).to(torch.bfloat16)
    with SafetensorsWriter(tmp_path / "a.safetensors", {"x": (torch.bfloat16, (10, 6))}) as writer:
        for block in whole.t().contiguous().t().split(3):
            writer.write("x", block)
        writer.close()
    assert _same(load_file(tmp_path / "a.safetensors")["x"], whole)


def test_an_unfinished_file_is_not_closed_as_whole(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "a.safetensors", {"x": (torch.float32, (4, 4))}) as writer:
        writer.write("x", torch.ones(3, 4))
        with pytest.raises(AssertionError, match="bytes written"):
            writer.close()
        with pytest.raises(AssertionError):
            writer.write("x", torch.ones(2, 4))


def _damage(path: Path, edit) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(edit(header) or header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


DAMAGES = {
    "truncated": (
        lambda path: os.truncate(path, path.stat().st_size - 1),
        r"truncated: it has 143 bytes, its header promises 144",
    ),
    "too long": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "too long"),
    "no header": (lambda path: os.truncate(path, 3), "3 bytes"),
    "half a header": (lambda path: os.truncate(path, 30), "header alone takes"),
    "not safetensors": (lambda path: path.write_bytes(b"\x80\x02PK" * 10), "not a safetensors file"),
    "not JSON": (lambda path: path.write_bytes((4).to_bytes(8, "little") + b"{{{{"), "header is damaged"),
    "a list": (lambda path: path.write_bytes((4).to_bytes(8, "little") + b"[1] "), "header is damaged"),
    "unknown dtype": (lambda path: _damage(path, lambda h: h["x"].update(dtype="F3")), "dtype F3"),
    "negative shape": (lambda path: _damage(path, lambda h: h["x"].update(shape=[-2, -2])), "has the shape"),
    "wrong length": (lambda path: _damage(path, lambda h: h["x"].update(shape=[2, 3])), "needs 24 bytes, not 16"),
    "overlap": (lambda path: _damage(path, lambda h: h["y"].update(data_offsets=[8, 16])), "begins at byte"),
    "twice": (
        lambda path: path.write_bytes((14).to_bytes(8, "little") + b'{"x":1,"x":2} '),
        "x occurs twice",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.safetensors"
    plan = {"x": (torch.float32, (2, 2)), "y": (torch.float32, (2,))}
    with SafetensorsWriter(path, plan) as writer:
        writer.write("x", torch.ones(2, 2))
        writer.write("y", torch.ones(2))
        writer.close()
    apply, message = DAMAGES[damage]
    apply(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsReader(path)
    assert str(path) in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(1000)}, path)
    with SafetensorsReader(path) as reader:
        os.truncate(path, 500)
        with pytest.raises(CheckpointError, match="truncated meanwhile"):
            reader.read("x", None, torch.empty(1000))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        SafetensorsReader(tmp_path / "a.safetensors")


def test_a_full_disk_is_told_with_what_is_needed(tmp_path: Path, monkeypatch) -> None:
    genuine = os.write
    room = 5000

    def limited(descriptor, data):
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = genuine(descriptor, data[:room])
        room -= written
        return written

    monkeypatch.setattr(os, "write", limited)
    with pytest.raises(CheckpointError, match=r"No space left on device.*needs 8,\d+ bytes: make room"):
        _write(tmp_path / "a.safetensors", {"x": torch.ones(2000)})
