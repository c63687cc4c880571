"""Meta's folders, against transformers' rule for them; and Hugging Face's pickles."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron.checkpoint.convert import convert
from megatron.checkpoint.meta import _inner_rule
from megatron.checkpoint.source import open_source
from megatron.parallel.layout import Region
from megatron.utils.errors import CheckpointError, ConfigError

from .conftest import CONFIG
from .test_convert import random_weights, same, write_model

HEADS, KEY_HEADS, HIDDEN, LAYERS = 4, 2, 16, 3
COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
ROWS = ("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "output.weight")
NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "output": "lm_head",
}


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """transformers' rule from Meta's order of rows to its own."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def meta_weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = {"tok_embeddings.weight": (40, HIDDEN), "norm.weight": (HIDDEN,), "output.weight": (40, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"layers.{layer}."
        shapes |= {
            f"{prefix}attention.wq.weight": (HIDDEN, HIDDEN),
            f"{prefix}attention.wk.weight": (HIDDEN // 2, HIDDEN),
            f"{prefix}attention.wv.weight": (HIDDEN // 2, HIDDEN),
            f"{prefix}attention.wo.weight": (HIDDEN, HIDDEN),
            f"{prefix}feed_forward.w1.weight": (24, HIDDEN),
            f"{prefix}feed_forward.w2.weight": (HIDDEN, 24),
            f"{prefix}feed_forward.w3.weight": (24, HIDDEN),
            f"{prefix}attention_norm.weight": (HIDDEN,),
            f"{prefix}ffn_norm.weight": (HIDDEN,),
        }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def transformers_rule(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = {}
    for name, tensor in weights.items():
        if "wq." in name or "wk." in name:
            tensor = permuted(tensor, HEADS if "wq." in name else KEY_HEADS)
        stem = name.removesuffix(".weight")
        number, _, rest = stem.removeprefix("layers.").partition(".")
        canonical = (
            f"model.layers.{number}.{NAMES[rest]}" if stem.startswith("layers.") else NAMES.get(stem, "model.norm")
        )
        result[f"{canonical}.weight"] = tensor.contiguous()
    return result


def write_meta(folder: Path, weights: dict[str, torch.Tensor], shards: int, embedding_dim: int = 1, **params) -> Path:
    folder.mkdir()
    for number in range(shards):
        part = {"rope.freqs": torch.ones(2)}
        for name, tensor in weights.items():
            dim = 0 if name.endswith(ROWS) else 1 if name.endswith(COLUMNS) else None
            dim = embedding_dim if name.startswith("tok_embeddings") else dim
            part[name] = tensor if dim is None else tensor.chunk(shards, dim)[number].clone()
        torch.save(part, folder / f"consolidated.{number:02d}.pth")
    stated = {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KEY_HEADS, "norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps({**stated, "vocab_size": -1, "multiple_of": 8, **params}))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    return folder


@pytest.mark.parametrize(("shards", "embedding_dim"), [(1, 1), (2, 1), (2, 0)])
def test_meta_to_hugging_face_is_transformers_rule(tmp_path: Path, shards: int, embedding_dim: int) -> None:
    weights = meta_weights()
    folder = write_meta(tmp_path / "meta", weights, shards, embedding_dim)
    done = convert(folder, tmp_path / "hf", to="huggingface")
    assert done.tensors == 30
    assert same(load_file(tmp_path / "hf" / "model.safetensors"), transformers_rule(weights))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    expected = {"vocab_size": 40, "intermediate_size": 24, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "dtype": "bfloat16"}
    assert expected.items() <= config.items() and config["max_position_embeddings"] == 4096
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == b"pieces"


def test_any_rectangle_of_a_meta_folder(tmp_path: Path) -> None:
    weights = meta_weights()
    expected = transformers_rule(weights)
    with open_source(write_meta(tmp_path / "meta", weights, 2)) as source:
        assert (source.format, source.step, source.state) == ("meta", 0, None)
        for name, tensor in expected.items():
            size = tuple(max(1, extent - 3) for extent in tensor.shape)
            start = tuple(extent - taken - 1 for extent, taken in zip(tensor.shape, size, strict=True))
            region = Region(name, tuple(tensor.shape), start, size)
            out = torch.zeros([2 * extent for extent in size])[tuple(slice(None, None, 2) for _ in size)]
            source.read(region, out)
            assert torch.equal(out, tensor[region.slices].float()), name


def test_code_llama_and_llama_3(tmp_path: Path) -> None:
    code = write_meta(tmp_path / "code", meta_weights(), 1, rope_theta=1e6)
    with open_source(code) as source:
        assert source.model_config["rope_theta"] == 1e6 and source.model_config["max_position_embeddings"] == 16384
    three = write_meta(tmp_path / "three", meta_weights(), 1, rope_theta=5e5, use_scaled_rope=True)
    with open_source(three) as source:
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        assert source.model_config["rope_scaling"] == {**scaling, "original_max_position_embeddings": 8192}


FAULTS = {
    "missing shard": (lambda f: (f / "consolidated.00.pth").unlink(), "is incomplete: it holds consolidated.01.pth"),
    "truncated": (lambda f: os.truncate(f / "consolidated.01.pth", 5000), "is not a whole file of torch.save"),
    "params": (lambda f: (f / "params.json").write_text("{}"), "do not describe a Llama"),
    "no JSON": (lambda f: (f / "params.json").write_text("{"), "cannot be read"),
    "heads": (lambda f: _params(f, n_heads=5), "heads must divide"),
    "head size": (lambda f: _params(f, n_heads=1), "no whole heads of 16 rows"),
    "odd tensor": (lambda f: _change(f, lambda w: {**w, "x": torch.ones(1)}), "hold different tensors"),
    "shapes": (lambda f: _change(f, lambda w: {**w, "output.weight": torch.ones(20, 15)}), "do not make whole tensors"),
}


def _params(folder: Path, **changes) -> None:
    path = folder / "params.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _change(folder: Path, change) -> None:
    path = folder / "consolidated.01.pth"
    torch.save(change(torch.load(path, weights_only=True)), path)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_clearly(tmp_path: Path, fault: str) -> None:
    apply, message = FAULTS[fault]
    folder = write_meta(tmp_path / "meta", meta_weights(), 2)
    apply(folder)
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


def test_a_flipped_bit_is_not_converted(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "meta", meta_weights(), 1)
    path = folder / "consolidated.00.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"consolidated\.00\.pth is damaged: its checksum is not the one within it"
    ):
        convert(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


def _write_pickles(folder: Path, shards: list[dict[str, torch.Tensor]], weight_map: dict[str, str] | None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for number, shard in enumerate(shards):
        single = "pytorch_model.bin"
        torch.save(shard, folder / (single if weight_map is None else f"part-{number}.bin"))
    if weight_map is not None:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("sharded", [False, True])
def test_hugging_face_pickles_are_read(tmp_path: Path, sharded: bool) -> None:
    weights = random_weights(CONFIG)
    names = sorted(weights)
    shards = [{name: weights[name] for name in part} for part in ((names[:9], names[9:]) if sharded else (names,))]
    weight_map = {name: f"part-{number}.bin" for number, shard in enumerate(shards) for name in shard}
    folder = _write_pickles(tmp_path / "bin", shards, weight_map if sharded else None)
    convert(folder, tmp_path / "hf", to="huggingface")
    assert same(load_file(tmp_path / "hf" / "model.safetensors"), weights)


def test_of_a_model_that_is_there_twice_the_safetensors_are_read(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", CONFIG, random_weights(CONFIG))
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    with open_source(folder) as source:
        assert source.weight_files == ["model.safetensors"]


class _Hostile:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


@pytest.mark.parametrize("kind", ["payload", "path", "duplicate"])
def test_hostile_folders_of_pickles(tmp_path: Path, monkeypatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    weights = random_weights(CONFIG)
    if kind == "payload":
        folder = _write_pickles(tmp_path / "bin", [{**weights, "x": _Hostile()}], None)  # type: ignore[dict-item]
    elif kind == "path":
        folder = _write_pickles(tmp_path / "bin", [weights], dict.fromkeys(weights, "../../etc/passwd"))
    else:
        folder = _write_pickles(
            tmp_path / "bin", [weights, weights], dict.fromkeys(weights, "part-0.bin") | {"x": "part-1.bin"}
        )
    message = {"payload": "it names", "path": r"outside its folder \(\.\./\.\./etc/passwd", "duplicate": "is both in"}
    with pytest.raises(CheckpointError, match=message[kind]):
        convert(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize(("shards", "embedding_dim"), [(1, 1), (2, 1)])
def test_what_is_written_is_what_meta_has(tmp_path: Path, shards: int, embedding_dim: int) -> None:
    weights = meta_weights()
    expected = write_meta(tmp_path / "expected", weights, shards, embedding_dim)
    convert(expected, tmp_path / "hf", to="huggingface")
    convert(tmp_path / "hf", tmp_path / "meta", to="meta", tensor=shards)
    for path in sorted(expected.glob("*.pth")):
        wanted = torch.load(path, weights_only=True)
        del wanted["rope.freqs"]
        assert same(torch.load(tmp_path / "meta" / path.name, weights_only=True, mmap=True), wanted)
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert {"dim": 16, "n_heads": 4, "n_kv_heads": 2, "n_layers": 3, "vocab_size": 40}.items() <= params.items()
    inner = int(params.get("ffn_dim_multiplier", 1) * int(8 * params["dim"] / 3))
    assert params["multiple_of"] * -(-inner // params["multiple_of"]) == 24
    convert(tmp_path / "meta", tmp_path / "native", tensor=2)
    convert(tmp_path / "native", tmp_path / "back")
    assert same(load_file(tmp_path / "back" / "model.safetensors"), transformers_rule(weights))


def test_scaling_survives_meta_and_what_it_lacks_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "bias", {**CONFIG, "mlp_bias": True}, random_weights({**CONFIG, "mlp_bias": True}))
    with pytest.raises(ConfigError, match="mlp_bias=True"):
        convert(folder, tmp_path / "out", to="meta")
    with pytest.raises(ConfigError, match="num_key_value_heads=2 is not divisible by 4"):
        convert(write_meta(tmp_path / "meta", meta_weights(), 1), tmp_path / "out", to="meta", tensor=4)
    assert not (tmp_path / "out").exists()
    sizes = [(4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016), (8192, 28672), (4096, 14336), (64, 172)]
    for hidden, inner in sizes:
        multiple_of, multiplier = _inner_rule(hidden, inner)
        size = int(2 * 4 * hidden / 3) if multiplier is None else int(multiplier * int(2 * 4 * hidden / 3))
        assert multiple_of * ((size + multiple_of - 1) // multiple_of) == inner
