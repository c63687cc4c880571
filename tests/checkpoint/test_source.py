"""Opening Hugging Face folders, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.checkpoint import check
from megatron.checkpoint.check import check_weights
from megatron.checkpoint.index import StoredPiece, collect_index
from megatron.checkpoint.source import open_source
from megatron.parallel.layout import Region
from megatron.utils.errors import CheckpointError

from .conftest import CONFIG, save

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A Hugging Face folder of two shards."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "generation_config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle beside safetensors is left alone")
    save_file({"a": torch.randn(4, 6), "b": torch.randn(3)}, folder / "one.safetensors")
    save_file({"c": torch.randn(2, 2).half()}, folder / "two.safetensors")
    _write_index(folder, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return folder


def _write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_sharded_folder(sharded: Path) -> None:
    source = open_source(sharded)
    assert (source.format, source.state, source.run_config, source.step) == ("huggingface", None, None, 0)
    assert source.shapes() == {"a": (4, 6), "b": (3,), "c": (2, 2)} and source.shapes("exp_avg") == {}
    assert not source.has_optimizer
    assert source.model_config == CONFIG
    assert [path.name for path in source.tokenizer_files] == ["tokenizer.model", "generation_config.json"]
    assert source.dtype("c") == torch.float16
    out = torch.empty(2, 3)
    source.read(Region("a", (4, 6), (1, 2), (2, 3)), out)
    assert torch.equal(out, load_file(sharded / "one.safetensors")["a"][1:3, 2:5])


def test_a_single_file(shared: Path) -> None:
    folder = shared / "data" / "stories260K-untied"
    expected = load_file(folder / "model.safetensors")
    with open_source(folder) as source:
        assert source.shapes() == {name: tuple(tensor.shape) for name, tensor in expected.items()}
        for name, shape in source.shapes().items():
            out = torch.empty(shape)
            source.read(Region.whole(name, shape), out)
            assert torch.equal(out, expected[name])


def _second_copy(folder: Path) -> None:
    save_file({"c": torch.ones(2, 2), "a": torch.ones(4, 6)}, folder / "two.safetensors")


FAULTS = {
    "missing shard": (lambda f: (f / "two.safetensors").unlink(), r"two\.safetensors of 2 shards missing"),
    "truncated shard": (lambda f: os.truncate(f / "two.safetensors", 70), r"two\.safetensors is truncated"),
    "duplicate": (_second_copy, r"a is both in one\.safetensors and in two\.safetensors"),
    "absent tensor": (
        lambda f: _write_index(f, dict.fromkeys("abx", "one.safetensors") | {"c": "two.safetensors"}),
        r"x is not in one\.safetensors",
    ),
    "unlisted tensor": (
        lambda f: _write_index(f, {"a": "one.safetensors", "c": "two.safetensors"}),
        r"b is in one\.safetensors but not in",
    ),
    "wrong file": (
        lambda f: _write_index(f, {"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"}),
        r"a should be in two\.safetensors but is in one\.safetensors",
    ),
    "outside": (lambda f: _write_index(f, {"a": "../one.safetensors"}), r"outside its folder \(\.\./one"),
    "absolute": (lambda f: _write_index(f, {"a": "/etc/passwd"}), r"outside its folder \(/etc/passwd"),
    "no map": (lambda f: _write_index(f, None), "not the index of a sharded model"),
    "empty map": (lambda f: _write_index(f, {}), "lists no tensors"),
    "no JSON": (lambda f: (f / INDEX).write_text("{"), "not the index of a sharded model"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json cannot be read \(No such file"),
    "config damaged": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "does not hold a JSON object"),
    "no weights but a damaged pickle": (
        lambda f: (f / INDEX).unlink(),
        r"pytorch_model\.bin is not read: ",
    ),
    "nothing": (
        lambda f: [(f / INDEX).unlink(), (f / "pytorch_model.bin").unlink()],
        r"looked for checkpoint\.json.*step_.*model\.safetensors and model\.safetensors\.index\.json",
    ),
    "not there": (lambda f: shutil.rmtree(f), "does not exist: give the folder"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_clearly(sharded: Path, fault: str) -> None:
    apply, message = FAULTS[fault]
    apply(sharded)
    with pytest.raises(CheckpointError, match=message):
        open_source(sharded)


def test_a_file_is_not_a_folder(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file: give the folder"):
        open_source(sharded / "one.safetensors")


def test_all_differences_to_the_model_are_told_together(sharded: Path) -> None:
    save_file({"c": torch.ones(2, 2).int()}, sharded / "two.safetensors")
    source = open_source(sharded)
    with pytest.raises(CheckpointError) as caught:
        check_weights(source, {"a": (6, 4), "c": (2, 2), "d": (1,)})
    for part in (
        "1 missing: d",
        "1 unexpected: b",
        "1 of another shape: a has shape [4, 6], config.json makes it [6, 4]",
        "1 not floating point: c (torch.int32)",
    ):
        assert part in str(caught.value)


def test_rotary_buffers_are_passed_over(sharded: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({name: torch.ones(2)}, sharded / "two.safetensors")
    _write_index(sharded, {"a": "one.safetensors", "b": "one.safetensors", name: "two.safetensors"})
    check_weights(open_source(sharded), {"a": (4, 6), "b": (3,)})


@pytest.mark.parametrize("equal", [True, False])
def test_the_head_of_a_tied_model_must_be_its_embedding(tmp_path: Path, monkeypatch, equal: bool) -> None:
    monkeypatch.setattr(check, "BLOCK_BYTES", 32)  # two rows
    embedding = torch.randn(6, 4)
    head = embedding.clone()
    head[5, 3] += 0 if equal else 1
    save_file({"model.embed_tokens.weight": embedding, "lm_head.weight": head}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    expected = {"model.embed_tokens.weight": (6, 4)}
    if equal:
        check_weights(open_source(tmp_path), expected)
    else:
        with pytest.raises(CheckpointError, match=r"1 unexpected: lm_head\.weight"):
            check_weights(open_source(tmp_path), expected)


def test_a_step_folder_is_checked_when_it_is_opened(saved: Path) -> None:
    os.truncate(saved / "step_0000002" / "weights-00000.safetensors", 9)
    with pytest.raises(CheckpointError, match=r"step_0000002 is incomplete: weights-00000\.safetensors \(has 9 bytes"):
        open_source(saved / "step_0000002")


def _replace_entry(folder: Path, name: str, old: str, new: str) -> None:
    """Change every occurrence in the line of a tensor's weights in checkpoint.json."""
    path = folder / "checkpoint.json"
    lines = path.read_text().splitlines()
    number = next(number for number, line in enumerate(lines) if name in line)
    assert old in lines[number]
    lines[number] = lines[number].replace(old, new)
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"start": [1]', '"start": [0]', "weights of x: two pieces overlap"),
        ('"size": [1]', '"size": [0]', "weights of x: the pieces hold 0 elements of 2"),
        ('"start": [1]', '"start": [2]', r"checkpoint\.json is damaged"),
        ("weights-00000", "../weights-00000", r"which is not listed"),
    ],
)
def test_pieces_that_are_no_whole(tmp_path: Path, old: str, new: str, message: str) -> None:
    save(tmp_path, {"weights": {"x": torch.ones(2)}}, cuts=1)
    _replace_entry(tmp_path / "step_0000001", '"x"', old, new)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / "step_0000001")


def test_files_outside_a_checkpoint_are_not_opened(tmp_path: Path) -> None:
    save(tmp_path, {"weights": {"x": torch.ones(2)}})
    folder = tmp_path / "step_0000001"
    shutil.move(folder / "weights-00000.safetensors", tmp_path)
    path = folder / "checkpoint.json"
    path.write_text(path.read_text().replace("weights-00000", "../weights-00000"))
    with pytest.raises(CheckpointError, match="is not a plain file name"):
        open_source(folder)


def test_ranks_that_disagree_about_a_shape_are_noticed() -> None:
    shapes = [((0,), (2,), (4,)), ((2,), (2,), (5,))]
    pieces = [StoredPiece(Region("x", shape, start, size), torch.float32, "f", "k") for start, size, shape in shapes]
    _, problems = collect_index(("weights", piece) for piece in pieces)
    assert problems == ["weights of x: pieces of different shapes [(4,), (5,)]"]


@pytest.mark.parametrize(("old", "new"), [('"BF16"', '"F16"'), ('"key": "model.norm', '"key": "model.nork')])
def test_a_file_of_another_save_is_noticed(tmp_path: Path, tensors, old: str, new: str) -> None:
    save(tmp_path, tensors)
    folder = tmp_path / "step_0000001"
    _replace_entry(folder, '"model.norm.weight"', old, new)
    with pytest.raises(CheckpointError, match=r"does not hold model\.nor"):
        open_source(folder).read(Region.whole("model.norm.weight", (8,)), torch.empty(8))
