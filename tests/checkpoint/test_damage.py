"""Damage in files of every format: a conversion is one clear error that leaves nothing, or whole."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron.__main__ import main
from megatron.checkpoint.convert import convert
from megatron.model.config import ModelConfig
from megatron.model.specs import canonical_shapes

from .conftest import CONFIG

LLAMA = {**CONFIG, "num_hidden_layers": 1, "torch_dtype": "bfloat16", "eos_token_id": 2}
GRIDS = {"native": {"tensor": 2}, "meta": {"tensor": 2}, "megatron-llm": {"tensor": 2}, "huggingface": {}}
FORMATS = [*GRIDS, "shards", "pickle", "pickle shards"]
ALL = bool(os.environ.get("THOROUGH"))
ROUNDS = 300 if ALL else 6
CHECKED = (".pth", ".pt", ".bin")  # archives with checksums


def write(folder: Path, kind: str) -> Path:
    """A small model in one of the formats."""
    base = folder / "base"
    base.mkdir()
    shapes = canonical_shapes(ModelConfig.from_huggingface(LLAMA))
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    (base / "config.json").write_text(json.dumps(LLAMA))
    if kind == "pickle":
        torch.save(weights, base / "pytorch_model.bin")
    elif kind == "pickle shards":
        weight_map = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(weights)}
        for file in set(weight_map.values()):
            torch.save({name: weights[name] for name in weights if weight_map[name] == file}, base / file)
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(weights, base / "model.safetensors", {"format": "pt"})
        if kind == "shards":
            convert(base, folder / kind, to="huggingface", file_bytes=3000)
            return folder / kind
        if kind != "huggingface":
            convert(base, folder / kind, to=kind, **GRIDS[kind])
            return folder / kind
    return base


@pytest.fixture
def outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    """Converts a folder; returns what was said of it, "" where the result is whole."""

    def run(source: Path) -> str:
        code = main(["convert", str(source), str(tmp_path / "to"), "--to", "hf"])
        said = capsys.readouterr().err
        left = sorted(path.name for path in tmp_path.glob("to*"))
        if code == 0:
            assert left == ["to"]
            shutil.rmtree(tmp_path / "to")
            return ""
        assert (code, left) == (2, []) and said.count("error: ") == 1 and "Traceback" not in said, said
        return said

    return run


def changed(source: Path, folder: Path, file: Path, content: bytes | None) -> Path:
    """A copy of a folder in which one file has another content, or is missing."""
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(source, folder)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    return folder


def files_of(source: Path) -> list[Path]:
    return sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_was_cut_or_is_missing(tmp_path: Path, kind: str, outcome: Callable[[Path], str]) -> None:
    source = write(tmp_path, kind)
    assert outcome(source) == ""
    for file in files_of(source):
        content = (source / file).read_bytes()
        for length in sorted({0, len(content) // 2, len(content.rstrip()) - 1}):
            assert outcome(changed(source, tmp_path / "bad", file, content[:length])), (file, length)
        is_lost = outcome(changed(source, tmp_path / "bad", file, None))
        assert is_lost or file.name in ("config.json", "generation_config.json"), file


@pytest.mark.parametrize("kind", FORMATS if ALL else [*GRIDS, "pickle"])
def test_bits_that_were_flipped(tmp_path: Path, kind: str, outcome: Callable[[Path], str]) -> None:
    """Of checkpoints of ours and of archives of pickles, any in a tensor is noticed; of safetensors, those in front."""
    source, chance = write(tmp_path, kind), random.Random(kind)
    for number in range(ROUNDS):
        file = chance.choice(files_of(source))
        content = bytearray((source / file).read_bytes())
        inside = number % 2 and file.suffix in (*CHECKED, ".safetensors")
        at = chance.randrange(len(content) // 2 if inside else 0, len(content))
        content[at] ^= 1 << chance.randrange(8)
        said = outcome(changed(source, tmp_path / "bad", file, bytes(content)))
        if inside and (kind == "native" or file.suffix in CHECKED) and not said:
            assert is_padding(source / file, at), (file, at)


def is_padding(path: Path, at: int) -> bool:
    """Whether a byte of an archive is in no part of it: between parts, or of the table of contents."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            with archive.open(part) as stream:
                begin = stream._orig_compress_start  # type: ignore[attr-defined]
            if begin <= at < begin + part.file_size:
                return False
    return True


def test_what_a_stranger_may_put_in_the_place_of_a_file(tmp_path: Path, outcome: Callable[[Path], str]) -> None:
    source = write(tmp_path, "shards")
    index, bad = Path("model.safetensors.index.json"), tmp_path / "bad"
    content = json.loads((source / index).read_text())
    first, shard = next(iter(content["weight_map"].items()))
    for target in ("../../etc/passwd", "/etc/passwd", ".", "a\0b", "x" * 5000, "/dev/zero", "\ud800", "config.json"):
        text = json.dumps({"weight_map": {**content["weight_map"], first: target}})
        assert outcome(changed(source, bad, index, text.encode())), target
    for text in ("[" * 100_000, '{"weight_map": []}', '{"weight_map": {"a": 1e999}}'):
        assert outcome(changed(source, bad, index, text.encode())), text[:9]
    said = outcome(changed(source, bad, Path(shard), (90_000).to_bytes(8, "little") + b"[" * 90_000))
    assert "nested too deeply" in said
    changed(source, bad, Path(shard), None)
    os.mkfifo(bad / shard)
    assert "it is no file" in outcome(bad)
    (bad / shard).unlink()
    (bad / shard).symlink_to("/dev/zero")
    assert "it is no file" in outcome(bad)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is more than 100,000"),
        ({"vocab_size": 2**70}, "wrong kind: vocab_size="),
        ({"vocab_size": 2**40}, "is more than 2,147,483,647"),
        ({"num_hidden_layers": 1.5}, "wrong kind: num_hidden_layers=1.5"),
        ({"rope_theta": float("inf")}, "wrong kind: rope_theta=inf"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rotary base that is no positive number"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "only a positive number"),
        ({"rms_norm_eps": float("nan")}, "wrong kind: rms_norm_eps=nan"),
    ],
)
def test_numbers_that_no_model_has(
    tmp_path: Path, outcome: Callable[[Path], str], change: dict[str, object], said: str
) -> None:
    source = write(tmp_path, "huggingface")
    (source / "config.json").write_text(json.dumps({**LLAMA, **change}))
    assert said in outcome(source)


def test_a_dtype_that_is_none_is_not_carried(tmp_path: Path) -> None:
    source = write(tmp_path, "huggingface")
    (source / "config.json").write_text(json.dumps({**LLAMA, "torch_dtype": "float3"}))
    convert(source, tmp_path / "to", to="huggingface")
    assert json.loads((tmp_path / "to/config.json").read_text())["torch_dtype"] == "bfloat16"
