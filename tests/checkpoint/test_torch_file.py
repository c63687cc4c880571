"""Files of torch.save: read as torch does, and hostile ones refused without a thing being run."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import pickle
import random
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.checkpoint.pickled import Instance, read_pickle
from megatron.checkpoint.torch_file import TorchReader, is_damaged
from megatron.utils.errors import CheckpointError

BASE = torch.arange(60, dtype=torch.float32)
CONTENT = {
    "model": {"a.weight": torch.randn(5, 7), "t": torch.randn(4, 6).t(), "part": BASE[7:31].view(4, 6)[1:, 2:5]},
    "other": [torch.randn(3).bfloat16(), (torch.arange(4), torch.nn.Parameter(torch.ones(2, 2)))],
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "base": BASE,
    "words": {"step": 3, "rate": 0.5, "name": "x", "none": None, "flag": True, "big": 2**70, "size": torch.Size([2])},
    "ordered": collections.OrderedDict(k=torch.ones(2).half()),
}


def _check(path: Path) -> None:
    expected = {"model/a.weight": CONTENT["model"]["a.weight"], "model/t": CONTENT["model"]["t"]}
    expected |= {"model/part": CONTENT["model"]["part"], "other/0": CONTENT["other"][0], "base": BASE}
    expected |= {"other/1/0": CONTENT["other"][1][0], "other/1/1": CONTENT["other"][1][1].detach()}
    expected |= {"scalar": CONTENT["scalar"], "ordered/k": CONTENT["ordered"]["k"]}
    with TorchReader(path) as reader:
        assert reader.entries.keys() == expected.keys()
        assert reader.content["words"] == CONTENT["words"] | {"size": (2,)}
        for name, tensor in expected.items():
            out = torch.empty(tensor.shape, dtype=tensor.dtype)
            reader.read(name, None, out)
            assert torch.equal(out, tensor), name
        out = torch.empty(2, 2)
        reader.read("model/t", [slice(1, 4, 2), slice(2, 4)], out)
        assert torch.equal(out, CONTENT["model"]["t"][1:4:2, 2:4])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_every_tensor_is_read_as_torch_reads_it(tmp_path: Path, zipped: bool) -> None:
    torch.save(CONTENT, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    _check(tmp_path / "x.pt")
    assert not is_damaged(tmp_path / "x.pt")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(tmp_path: Path, protocol: int) -> None:
    torch.save(CONTENT, tmp_path / "x.pt", pickle_protocol=protocol)
    _check(tmp_path / "x.pt")


def test_what_surrounds_weights_is_kept_as_data(tmp_path: Path) -> None:
    content = {
        "args": argparse.Namespace(hidden=8, path=pathlib.PurePosixPath("a/b"), dtype=torch.bfloat16),
        "rng": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
        "device": torch.device("cpu"),
        "set": {1, 2},
        "bytes": b"\x00\xff",
    }
    torch.save(content, tmp_path / "x.pt")
    with TorchReader(tmp_path / "x.pt") as reader:
        arguments = reader.content["args"]
        assert isinstance(arguments, Instance) and str(arguments.name) == "argparse.Namespace"
        assert arguments.values["hidden"] == 8 and arguments.values["path"].arguments == ("a", "b")
        assert reader.content["bytes"] == b"\x00\xff" and sorted(reader.content["set"]) == [1, 2]


class _Calls:
    """Pickled, it is a call of a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class _State:
    """Pickled, it is an object that is given a state by a call."""

    def __reduce__(self):
        return collections.OrderedDict, (), {"x": 1}, None, iter([("k", _Calls(os.system, "touch PWNED"))])


HOSTILE = {
    "os.system": lambda: _Calls(os.system, "touch PWNED"),
    "subprocess": lambda: _Calls(subprocess.check_output, ["touch", "PWNED"]),
    "eval": lambda: _Calls(eval, "open('PWNED', 'w')"),
    "exec": lambda: _Calls(exec, "open('PWNED', 'w')"),
    "getattr": lambda: _Calls(getattr, "x", "upper"),
    "open": lambda: _Calls(open, "PWNED", "w"),
    "import": lambda: _Calls(__import__, "os"),
    "within": lambda: {"a": torch.ones(2), "list": [1, (_Calls(os.system, "touch PWNED"),)]},
    "in items": _State,
    "torch's own": lambda: _Calls(torch.load, "PWNED"),
    "partial": lambda: _Calls(__import__("functools").partial, os.system, "touch PWNED"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path: Path, monkeypatch, kind: str, zipped: bool) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(HOSTILE[kind](), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"x\.pt is not read: it names .* might do anything"):
        TorchReader(tmp_path / "x.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch PWNED'\ntR.",
        b"(S'touch PWNED'\nios\nsystem\n.",  # INST
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x04\x8c\x02os\x94\x8c\x0bos.system\x94\x93.",
        b"(cargparse\nNamespace\n(dS'f'\ncos\nsystem\nsb.",
        b"\x80\x02]q\x00h\x00a.",  # a list that holds itself is no danger, but no weights either
        b"\x80\x02cargparse\nNamespace\nN\x85R(.",
        b"\x80\x02.",
        b"\x80\x02X\x05\x00\x00\x00ab.",
        b"\x80\x02}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.",  # a key that occurs twice
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nK\x01R.",
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ\x94.",
        b"\x80\x02K\x01(\x80",
    ],
)
def test_programs_by_hand(tmp_path: Path, monkeypatch, program: bytes) -> None:
    """Whatever the opcodes say, it is an error or plain data."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", program)
        archive.writestr("x/version", "3")
    with pytest.raises(CheckpointError), TorchReader(tmp_path / "x.pt") as reader:
        assert not reader.entries
        raise CheckpointError("only data")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_nested_containers_without_end_are_refused_soon(tmp_path: Path) -> None:
    content: list = [1]
    for _ in range(40):
        content = [content] * 10
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="hold more than 1,000,000 items"):
        TorchReader(tmp_path / "x.pt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_every_truncation_is_noticed(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.randn(40, 7), "b": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"x\.pt"):
            TorchReader(path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.randn(40, 7), "b": torch.ones(3)}, path)
    whole = path.read_bytes()
    with TorchReader(path) as reader:
        entry = reader.entries["a"]
    for position in range(entry.offset, entry.offset + entry.size_bytes, 97):
        content = bytearray(whole)
        content[position] ^= 1
        path.write_bytes(content)
        assert is_damaged(path)
    at = whole.index(b"_rebuild_tensor_v2") + 3
    content = bytearray(whole)
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checksum of x/data\.pkl is wrong"):
        TorchReader(path)


def _with_storage(path: Path, size: int) -> None:
    """Change the declared extent of a tensor to one that its storage does not have."""
    torch.save({"a": torch.zeros(4, 7)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {record.filename: archive.read(record) for record in archive.infolist()}
    pickled = next(name for name in parts if name.endswith("data.pkl"))
    parts[pickled] = parts[pickled].replace(b"K\x04K\x07\x86", bytes([ord("K"), size, ord("K"), 7, 0x86]))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    _with_storage(tmp_path / "x.pt", 4)
    TorchReader(tmp_path / "x.pt").close()
    _with_storage(tmp_path / "x.pt", 5)
    with pytest.raises(CheckpointError, match=r"a tensor of shape \(5, 7\)"):
        TorchReader(tmp_path / "x.pt")


def test_a_repeated_element_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(5)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="one element repeated"):
        TorchReader(tmp_path / "x.pt")


def test_random_bytes_never_crash_the_reader() -> None:
    chance = random.Random(5)
    seed = pickle.dumps({"a": [1, (2, "x")], "b": {"c": b"yz"}}, protocol=2)
    for _ in range(3000):
        program = bytearray(seed)
        for _ in range(chance.randrange(1, 4)):
            program[chance.randrange(len(program))] = chance.randrange(256)
        try:
            read_pickle(bytes(program))
        except CheckpointError:
            continue
