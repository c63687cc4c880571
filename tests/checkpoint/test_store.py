"""Saving on some ranks and reading on others."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron.checkpoint import manager, native, safetensors_file, store
from megatron.checkpoint.source import open_source
from megatron.parallel.layout import Region
from megatron.utils.errors import CheckpointError

from .conftest import CONFIG, partition, random_tensors, save


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    ranks=st.integers(1, 5),
    cuts=st.integers(0, 12),
    other_cuts=st.integers(0, 12),
)
def test_any_partition_reads_any_other(tmp_path_factory, seed: int, ranks: int, cuts: int, other_cuts: int) -> None:
    root, chance = tmp_path_factory.mktemp("save"), random.Random(seed)
    tensors = random_tensors(seed)
    assert save(root, tensors, step=7, ranks=ranks, cuts=cuts, chance=chance) == [None] * ranks
    with open_source(root) as source:
        assert source.shapes("master") == {name: tuple(tensor.shape) for name, tensor in tensors["master"].items()}
        for kind, named in tensors.items():
            for name, tensor in named.items():
                assert source.dtype(name, kind) == tensor.dtype
                out = torch.full_like(tensor, float("nan"))
                for region in partition(Region.whole(name, tuple(tensor.shape)), other_cuts, chance):
                    source.read(region, out[region.slices], kind)
                assert torch.equal(out, tensor)


def test_what_is_saved_beside_the_tensors(tmp_path: Path, tensors) -> None:
    tokenizer = tmp_path / "tok512.model"
    tokenizer.write_bytes(b"pieces")
    save(tmp_path, tensors, step=100, ranks=2, carried=native.read_carried([tokenizer]), state={"consumed_tokens": 5})
    assert (tmp_path / "latest").read_text() == "step_0000100\n"
    assert not list(tmp_path.glob("*.partial"))
    source = open_source(tmp_path)
    assert (source.folder, source.format) == (tmp_path / "step_0000100", "native")
    assert source.state == {"step": 100, "consumed_tokens": 5} and source.step == 100
    assert source.model_config == CONFIG
    assert source.run_config == {"train": {"steps": 5}}
    assert source.tokenizer_files == [source.folder / "tokenizer.model"]  # found by its usual name
    assert source.tokenizer_files[0].read_bytes() == b"pieces"
    assert source.has_optimizer


def test_of_files_to_carry_that_get_one_name_the_first_is_taken(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("tok512.model", "tokenizer.model", "LICENSE")]
    for file in files:
        file.write_text(file.name)
    assert native.read_carried(files) == {"tokenizer.model": b"tok512.model", "LICENSE": b"LICENSE"}


def test_a_file_to_carry_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.model cannot be read \(No such file"):
        native.read_carried([tmp_path / "gone.model"])


def test_whole_tensors_have_their_plain_names_and_the_library_reads_them(tmp_path: Path, tensors) -> None:
    save(tmp_path, {"weights": tensors["weights"]})
    assert not open_source(tmp_path).has_optimizer
    loaded = load_file(tmp_path / "step_0000001" / "weights-00000.safetensors")
    assert loaded.keys() == tensors["weights"].keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors["weights"].items())


def test_rectangles_have_names_that_say_where_they_belong(tmp_path: Path, tensors) -> None:
    save(tmp_path, {"weights": tensors["weights"]}, cuts=3, chance=random.Random(2))
    keys = load_file(tmp_path / "step_0000001" / "weights-00000.safetensors")
    for key, tensor in keys.items():
        name, _, extent = key.partition("[")
        slices = [slice(*map(int, part.split(":"))) for part in extent.rstrip("]").split(",")] if extent else [...]
        assert torch.equal(tensor, tensors["weights"][name][tuple(slices)]), key
    assert any("[" in key for key in keys)


def test_the_reader_opens_only_the_files_it_needs(tmp_path: Path, tensors) -> None:
    save(tmp_path, tensors, ranks=4, cuts=9, chance=random.Random(5))
    (piece, *others) = open_source(tmp_path).index["weights"]["lm_head.weight"].pieces
    assert others
    for file in tmp_path.glob("step_*/*.safetensors"):
        if file.name != piece.file:  # of the right size, but nothing that could be read
            file.write_bytes(bytes(file.stat().st_size))
    out = torch.empty(piece.region.size, dtype=torch.bfloat16)
    open_source(tmp_path).read(piece.region, out)
    assert torch.equal(out, tensors["weights"]["lm_head.weight"][piece.region.slices])


def test_few_files_are_open_at_a_time(tmp_path: Path, tensors, monkeypatch) -> None:
    from megatron.checkpoint import source as source_module

    save(tmp_path, tensors, ranks=5, cuts=12)
    monkeypatch.setattr(source_module, "_OPEN_FILES", 2)
    before = len(os.listdir("/proc/self/fd"))
    source = open_source(tmp_path)
    for _ in range(2):
        for name, tensor in tensors["weights"].items():
            out = torch.empty_like(tensor)
            source.read(Region.whole(name, tuple(tensor.shape)), out)
            assert torch.equal(out, tensor)
            assert len(os.listdir("/proc/self/fd")) <= before + 2
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_reading_casts_and_fills_strided_views(tmp_path: Path, tensors) -> None:
    save(tmp_path, tensors, cuts=4, ranks=2)
    weight = tensors["weights"]["lm_head.weight"]
    out = torch.zeros(9, 11, dtype=torch.float64)
    open_source(tmp_path).read(Region.whole("lm_head.weight", (11, 9)), out.t())
    assert torch.equal(out.t(), weight.double())


def test_what_is_not_there_is_named(tmp_path: Path, tensors) -> None:
    save(tmp_path, tensors)
    source = open_source(tmp_path)
    for region, kind, message in [
        (Region.whole("model.other.weight", (8,)), "weights", "has no weights of model.other.weight"),
        (Region.whole("model.norm.weight", (8,)), "exp_avg_sq", "holds no exp_avg_sq at all"),
        (Region.whole("model.norm.weight", (9,)), "weights", r"has shape \[8\], not \[9\]"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            source.read(region, torch.empty(region.size), kind)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    for seed in (1, 2):
        assert save(tmp_path, random_tensors(seed), ranks=2, cuts=seed) == [None, None]
    name, tensor = next(iter(random_tensors(2)["weights"].items()))
    out = torch.empty_like(tensor)
    open_source(tmp_path).read(Region.whole(name, tuple(tensor.shape)), out)
    assert torch.equal(out, tensor)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000001"]


@pytest.mark.parametrize("failing_rank", [0, 2])
def test_one_rank_with_a_full_disk_fails_all_alike(tmp_path: Path, tensors, monkeypatch, failing_rank: int) -> None:
    save(tmp_path, tensors, step=1)
    genuine = safetensors_file.SafetensorsWriter._append

    def append(writer, data):
        if writer.path.name == f"optimizer-master-{failing_rank:05d}.safetensors":
            raise safetensors_file.cannot_write(writer.path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 10)
        genuine(writer, data)

    monkeypatch.setattr(safetensors_file.SafetensorsWriter, "_append", append)
    errors = save(tmp_path, tensors, step=2, ranks=3, cuts=9)
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert f"step_0000002 was not saved: rank {failing_rank}: " in str(errors[0])
    assert "No space left on device" in str(errors[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000001"]
    assert manager.newest_checkpoint(tmp_path) == tmp_path / "step_0000001"


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, tensors, monkeypatch) -> None:
    events = []
    fsync, rename = os.fsync, Path.rename

    def recording_fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def recording_rename(path, target):
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    assert save(tmp_path / "save", tensors, ranks=2, cuts=3, carried={"tokenizer.model": b"pieces"}) == [None, None]
    before, after = events[: events.index("rename")], events[events.index("rename") :]
    synced = {re.sub(r"/\.([^/]+)\.\w{8}\.tmp$", r"/\1", path) for path in before}  # atomic writes have temporary names
    partial = str(tmp_path / "save" / "step_0000001.partial")
    written = {path.name for path in (tmp_path / "save" / "step_0000001").iterdir()}
    assert len(written) >= 8
    assert {partial, *(f"{partial}/{name}" for name in written)} <= synced
    assert str(tmp_path / "save") in after


def test_too_little_room_is_told_before_writing(tmp_path: Path, tensors, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 9_000, 1_000))
    monkeypatch.setattr(store, "SafetensorsWriter", None)  # nothing may be written
    errors = save(tmp_path, tensors, ranks=2)
    assert len({str(error) for error in errors}) == 1
    assert "1000 B left, 2.0 KiB are needed" in str(errors[0])


def test_a_bug_on_one_rank_keeps_its_error_and_frees_the_others(tmp_path: Path, tensors, monkeypatch) -> None:
    def broken(kind, rank):
        if rank == 1:
            raise ZeroDivisionError("a bug")
        return native.kind_file(kind, rank)

    monkeypatch.setattr(store, "kind_file", broken)
    first, second = save(tmp_path, tensors, ranks=2, cuts=6)
    assert isinstance(second, ZeroDivisionError)
    assert isinstance(first, CheckpointError) and "ZeroDivisionError('a bug')" in str(first)
    assert list(tmp_path.iterdir()) == []


def test_only_rank_0_parses_what_the_others_wrote(tmp_path: Path, tensors, monkeypatch) -> None:
    """Of a large run that is hundreds of megabytes."""
    genuine, parsed = store.json.loads, []

    def recording(text):
        found = genuine(text)
        if isinstance(found, dict) and "tensors" in found:
            parsed.append(threading.current_thread().name)
        return found

    monkeypatch.setattr(store.json, "loads", recording)
    assert save(tmp_path, tensors, ranks=3, cuts=6) == [None] * 3
    assert len(parsed) == 3 and len(set(parsed)) == 1


def test_an_element_written_by_nobody_is_noticed(tmp_path: Path, tensors, monkeypatch) -> None:
    genuine = store._write_rank

    def forgetful(partial, rank, listed, total):
        record = genuine(partial, rank, listed, total)
        return {**record, "tensors": record["tensors"][1:]} if rank == 1 else record

    monkeypatch.setattr(store, "_write_rank", forgetful)
    first, second = save(tmp_path, tensors, ranks=2, cuts=6)
    assert isinstance(first, AssertionError) and "did not write every element once" in str(first)
    assert isinstance(second, CheckpointError)
    assert list(tmp_path.iterdir()) == []


PHASES = ["_prepare", "_write_rank", "_describe", "_publish"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_in_any_phase_leaves_the_older_checkpoint(tmp_path: Path, tensors, monkeypatch, caplog, phase) -> None:
    """The process dies right after each phase's work, but before the next: nothing cleans up."""
    save(tmp_path, tensors, step=1, ranks=2, cuts=3)
    genuine = getattr(store, phase)

    class Killed(BaseException):
        pass

    def dying(*arguments):
        if phase == "_publish":  # just before the rename
            raise Killed
        genuine(*arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(store, phase, dying)
        patch.setattr(store.shutil, "rmtree", lambda *a, **k: None)  # a killed process does not clean up
        with pytest.raises(Killed):
            store.save_checkpoint(
                tmp_path / "step_0000002",
                rank=0,
                exchange=lambda text: [text],
                tensors={kind: [(Region.whole(n, tuple(t.shape)), t) for n, t in named.items()]
                         for kind, named in tensors.items()},
                state={"step": 2},
                model_config=CONFIG,
                run_config_yaml="{}",
                carried={},
            )  # fmt: skip
    assert manager.newest_checkpoint(tmp_path) == tmp_path / "step_0000001"
    assert "step_0000002.partial is a checkpoint whose writing was interrupted" in caplog.text
    assert save(tmp_path, tensors, step=2, ranks=2) == [None, None]  # and the leftover does not disturb
    assert manager.newest_checkpoint(tmp_path) == tmp_path / "step_0000002"
    assert not (tmp_path / "step_0000002.partial").exists()


def test_a_flipped_byte_in_any_file_is_found(saved: Path) -> None:
    folder = saved / "step_0000003"
    manifest = native.read_manifest(folder)
    assert dict.fromkeys(manifest.files, False) == dict(native.find_damaged(folder, manifest))
    assert set(manifest.files) | {"checkpoint.json"} == {path.name for path in folder.iterdir()}
    for name in manifest.files:
        content = (folder / name).read_bytes()
        middle = len(content) // 2
        (folder / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        assert [file for file, damaged in native.find_damaged(folder, manifest) if damaged] == [name]
        (folder / name).write_bytes(content)
