"""Megatron-LLM's folders, built here from whole weights by its rules and read back; and the way back to its users."""

from __future__ import annotations

import argparse
import enum
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.checkpoint.convert import convert
from megatron.checkpoint.source import open_source
from megatron.model.config import ModelConfig
from megatron.utils.errors import CheckpointError, ConfigError

from .conftest import CONFIG
from .test_convert import GPT2, random_weights, read_all, same, write_model

LLAMA = {**CONFIG, "vocab_size": 40, "num_hidden_layers": 4, "torch_dtype": "bfloat16"}
HEADS, KEY_HEADS, HEAD, HIDDEN, INNER, PADDED = 4, 2, 4, 16, 24, 256


class PositionEmbeddingType(enum.Enum):
    rotary = 1


PositionEmbeddingType.__module__ = "megatron.model.enums"


def interleaved(weight: torch.Tensor) -> torch.Tensor:
    """Half-split rows of whole heads as pairs, which is what Megatron-LLM's own converter does."""
    heads = weight.view(-1, 2, HEAD // 2, *weight.shape[1:])
    return heads.transpose(1, 2).reshape(weight.shape)


def query_key_value(weights: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    q, k, v = (weights[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv")
    q, k = interleaved(q), interleaved(k)
    per, rows = HEADS // KEY_HEADS, []
    for group in range(KEY_HEADS):
        rows.append(q[group * per * HEAD : (group + 1) * per * HEAD])
        rows += [k[group * HEAD : (group + 1) * HEAD], v[group * HEAD : (group + 1) * HEAD]]
    return torch.cat(rows)


def rank_layer(weights: dict[str, torch.Tensor], layer: int, rank: int, size: int) -> dict[str, torch.Tensor]:
    """Keys without the number of the layer."""
    get = lambda name: weights[f"model.layers.{layer}.{name}.weight"]  # noqa: E731
    up, gate = get("mlp.up_proj").chunk(size)[rank], get("mlp.gate_proj").chunk(size)[rank]
    return {
        "input_layernorm.weight": get("input_layernorm"),
        "ATTENTION.query_key_value.weight": query_key_value(weights, layer).chunk(size)[rank],
        "ATTENTION.dense.weight": get("self_attn.o_proj").chunk(size, 1)[rank],
        "post_attention_layernorm.weight": get("post_attention_layernorm"),
        "mlp.dense_h_to_4h.weight": torch.cat([up, gate]),
        "mlp.dense_4h_to_h.weight": get("mlp.down_proj").chunk(size, 1)[rank],
    }


def padded(weight: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    return torch.cat([weight, weight[-1:].expand(PADDED - len(weight), -1)]).chunk(size)[rank]


def chunk_state(weights, dialect: str, rank: int, size: int, layers: range, *, first: bool, last: bool) -> dict:
    encoder, attention = ("encoder", "self_attention") if dialect == "trainer" else ("transformer", "attention")
    flat = {}
    for number, layer in enumerate(layers):
        for key, tensor in rank_layer(weights, layer, rank, size).items():
            flat[f"layers.{number}.{key.replace('ATTENTION', attention)}"] = tensor.clone()
    language: dict = {encoder: flat}
    if last:
        flat["final_layernorm.weight"] = weights["model.norm.weight"]
        language["lm_head"] = padded(weights["lm_head.weight"], rank, size).clone()
    if first:
        words = padded(weights["model.embed_tokens.weight"], rank, size).clone()
        nested = {"word_embeddings": {"weight": words}}
        language["embedding"] = nested if dialect == "trainer" else {"word_embeddings.weight": words}
    return {"language_model": language}


def write_megatron(
    folder: Path, weights, *, dialect="trainer", tensor=1, pipeline=1, virtual=1, iteration: int | None = 100, **changes
) -> Path:
    """A checkpoint as a run leaves it; `iteration` None: a release."""
    arguments = {
        "num_layers": LLAMA["num_hidden_layers"],
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_attention_heads_kv": KEY_HEADS,
        "ffn_hidden_size": INNER,
        "parallel_attn": False,
        "glu_activation": "swiglu",
        "use_rms_norm": True,
        "tie_embed_logits": False,
        "padded_vocab_size": PADDED,
        "max_position_embeddings": 64,
        "seq_length": 64,
        "layernorm_epsilon": 1e-6,
        "rope_theta": 5e5,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "params_dtype": torch.bfloat16,
        "position_embedding_type": PositionEmbeddingType.rotary,
        "data_path": [Path("/data/x")],
        "consumed_train_samples": 7,
        **changes,
    }
    step = LLAMA["num_hidden_layers"] // (pipeline * virtual)
    for stage in range(pipeline):
        for rank in range(tensor):
            content = {"args": argparse.Namespace(**arguments), "checkpoint_version": 3.0, "iteration": iteration}
            for chunk in range(virtual):
                number = chunk * pipeline + stage
                layers = range(number * step, (number + 1) * step)
                ends = {"first": number == 0, "last": number == pipeline * virtual - 1}
                state = chunk_state(weights, dialect, rank, tensor, layers, **ends)
                content["model" if virtual == 1 else f"model{chunk}"] = state
            content["rng_state"] = [{"np_rng_state": np.random.get_state(), "torch_rng_state": torch.get_rng_state()}]
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
            place = folder / ("release" if iteration is None else f"iter_{iteration:07d}") / name
            place.mkdir(parents=True)
            torch.save(content, place / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("release" if iteration is None else str(iteration))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    return folder


@pytest.fixture
def enums(monkeypatch) -> None:
    """Megatron-LLM's module of enums, which pickling looks for."""
    module = types.ModuleType("megatron.model.enums")
    module.PositionEmbeddingType = PositionEmbeddingType  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.model.enums", module)


pytestmark = pytest.mark.usefixtures("enums")

GRIDS = [
    {"dialect": "converter", "iteration": None},
    {},
    {"tensor": 2},
    {"pipeline": 2, "iteration": None},
    {"tensor": 2, "pipeline": 4, "iteration": 12345678},
    {"tensor": 2, "pipeline": 2, "virtual": 2},
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_dialect_and_grid_gives_the_weights(tmp_path: Path, grid: dict) -> None:
    weights = random_weights(LLAMA)
    folder = write_megatron(tmp_path / "mega", weights, **grid, true_vocab_size=40)
    convert(folder, tmp_path / "hf", to="huggingface")
    assert same(read_all(tmp_path / "hf"), weights)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {"rope_theta": 5e5, "rms_norm_eps": 1e-6, "vocab_size": 40, "dtype": "bfloat16"}.items() <= config.items()
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == b"pieces"


def test_without_a_true_size_the_vocabulary_is_the_padded_one(tmp_path: Path) -> None:
    weights = random_weights(LLAMA)
    convert(write_megatron(tmp_path / "mega", weights, tensor=2), tmp_path / "hf", to="huggingface")
    head = read_all(tmp_path / "hf")["lm_head.weight"]
    assert head.shape == (PADDED, HIDDEN) and torch.equal(head[40:], head[39:40].expand(PADDED - 40, -1))


def test_a_config_beside_the_checkpoint_says_what_the_arguments_have_lost(tmp_path: Path) -> None:
    folder = write_megatron(tmp_path / "mega", random_weights(LLAMA), layernorm_epsilon=1e-5, rope_theta=1e4)
    (folder / "config.json").write_text(json.dumps({**LLAMA, "rope_theta": 7e5}))
    for path in (folder, folder / "iter_0000100"):
        with open_source(path) as source:
            assert source.model_config["rope_theta"] == 7e5 and source.shapes()["lm_head.weight"] == (40, 16)


WRITTEN = [(1, 1), (2, 1), (2, 4), (1, 2)]


@pytest.mark.parametrize(("tensor", "pipeline"), WRITTEN)
def test_what_is_written_is_what_megatron_llm_has(tmp_path: Path, tensor: int, pipeline: int) -> None:
    """File by file and bit by bit the tensors of its own layout, loaded by torch itself."""
    weights = random_weights(LLAMA)
    model = write_model(tmp_path / "model", {**LLAMA, "rope_theta": 5e5}, weights)
    done = convert(model, tmp_path / "mega", to="megatron-llm", tensor=tensor, pipeline=pipeline)
    assert done.files == tensor * pipeline
    expected = write_megatron(tmp_path / "expected", weights, tensor=tensor, pipeline=pipeline, iteration=None)
    paths = sorted(path.relative_to(expected) for path in expected.rglob("*.pt"))
    assert paths == sorted(path.relative_to(tmp_path / "mega") for path in (tmp_path / "mega").rglob("*.pt"))
    for path in paths:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(tmp_path / "mega" / path, weights_only=True, mmap=True)
        found = _flat(content["model"])
        wanted = _flat(torch.load(expected / path, weights_only=False)["model"])
        for name in wanted:
            if "lm_head" in name or "word_embeddings" in name:  # padded for 128 per rank
                wanted[name] = wanted[name] if tensor == 2 else wanted[name][:128]
        assert same(found, wanted)
        arguments = content["args"]
        assert (arguments.padded_vocab_size, arguments.rope_theta) == (128 * tensor, 5e5)
        assert (content["iteration"], content["checkpoint_version"]) == ("release", 3.0)
    assert (tmp_path / "mega" / "latest_checkpointed_iteration.txt").read_text() == "release"
    convert(tmp_path / "mega", tmp_path / "back", to="huggingface")
    assert same(read_all(tmp_path / "back"), weights)
    convert(tmp_path / "mega", tmp_path / "again", to="megatron-llm", tensor=2)
    convert(tmp_path / "again", tmp_path / "native", tensor=2, pipeline=2)
    convert(tmp_path / "native", tmp_path / "last")
    assert same(read_all(tmp_path / "last"), weights)


def _flat(tree: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return flat


@pytest.mark.parametrize("tied", [True, False])
def test_gpt_with_learned_positions_and_biases(tmp_path: Path, tied: bool) -> None:
    config = {**GPT2, "n_layer": 4, "tie_word_embeddings": tied}
    weights = random_weights(config)
    model = write_model(tmp_path / "model", config, weights)
    convert(model, tmp_path / "mega", to="megatron-llm", tensor=2, pipeline=2)
    rank = torch.load(tmp_path / "mega/release/mp_rank_01_000/model_optim_rng.pt", weights_only=False)["model"]
    encoder = rank["language_model"]["encoder"]
    assert torch.equal(
        encoder["layers.0.mlp.dense_h_to_4h.weight"], weights["transformer.h.0.mlp.c_fc.weight"].t()[32:]
    )
    assert torch.equal(encoder["layers.0.mlp.dense_h_to_4h.bias"], weights["transformer.h.0.mlp.c_fc.bias"][32:])
    last = torch.load(tmp_path / "mega/release/mp_rank_00_001/model_optim_rng.pt", weights_only=False)["model"]
    assert ("word_embeddings_for_head" in last) is tied and ("lm_head" in last["language_model"]) is not tied
    for name in ("config.json", None):
        if name is None:
            (tmp_path / "mega" / "config.json").unlink()  # the arguments alone
        back = tmp_path / f"back-{name}"
        convert(tmp_path / "mega", back, to="huggingface")
        assert same(read_all(back), weights)


FAULTS = {
    "missing rank": (lambda f: (f / "mp_rank_01_001/model_optim_rng.pt").unlink(), "mp_rank_01_001 of 4 missing"),
    "missing ranks": (
        lambda f: [(f / f"mp_rank_01_00{n}/model_optim_rng.pt").unlink() for n in (0, 1)],
        "say 2 tensor",
    ),
    "truncated": (
        lambda f: os.truncate(f / "mp_rank_01_001/model_optim_rng.pt", 4000),
        "not a whole file of torch.save",
    ),
    "no iteration": (
        lambda f: (f.parent / "latest_checkpointed_iteration.txt").write_text("7"),
        "iter_0000007, which holds no",
    ),
    "nonsense": (lambda f: (f.parent / "latest_checkpointed_iteration.txt").write_text("../x"), "neither an iteration"),
    "old": (lambda f: _rewrite(f, checkpoint_version=1.0), "checkpoint_version 1.0: before 2"),
    "no args": (lambda f: _rewrite(f, args=None), "it holds no args"),
    "more": (lambda f: _rewrite(f, extra=torch.ones(2)), "extra is unexpected"),
    "shape": (lambda f: _rewrite(f, shape=True), "input_layernorm.weight has shape"),
}


def _rewrite(folder: Path, *, extra=None, shape=False, **changes) -> None:
    path = folder / "mp_rank_00_000/model_optim_rng.pt"
    content = {**torch.load(path, weights_only=False), **changes}
    encoder = content["model"]["language_model"]["encoder"]
    if extra is not None:
        encoder["extra"] = extra
    if shape:
        encoder["layers.0.input_layernorm.weight"] = torch.ones(15)
    torch.save(content, path)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_clearly(tmp_path: Path, fault: str) -> None:
    apply, message = FAULTS[fault]
    folder = write_megatron(tmp_path / "mega", random_weights(LLAMA), tensor=2, pipeline=2)
    apply(folder / "iter_0000100")
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mega"]


def test_what_megatron_llm_cannot_compute_or_cut_is_refused(tmp_path: Path) -> None:
    weights = random_weights({**LLAMA, "attention_bias": True})
    model = write_model(tmp_path / "model", {**LLAMA, "attention_bias": True}, weights)
    with pytest.raises(ConfigError, match="biases in some layers only"):
        convert(model, tmp_path / "out", to="megatron-llm")
    pythia = {"model_type": "gpt_neox", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
              "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
    model = write_model(tmp_path / "pythia", pythia, random_weights(pythia))
    with pytest.raises(ConfigError, match=r"partial_rotary_factor=0\.25; parallel layers"):
        convert(model, tmp_path / "out", to="megatron-llm")
    model = write_model(tmp_path / "other", LLAMA, random_weights(LLAMA))
    with pytest.raises(ConfigError, match=r"num_key_value_heads=2 is not divisible by 4.*not divisible by 3 stages"):
        convert(model, tmp_path / "out", to="megatron-llm", tensor=4, pipeline=3)
    assert not (tmp_path / "out").exists()


FALCON = {
    "model_type": "falcon",
    "vocab_size": 40,
    "hidden_size": 16,
    "ffn_hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "new_decoder_architecture": True,
    "parallel_attn": True,
    "multi_query": False,
    "alibi": False,
    "bias": False,
}
OTHERS = {
    "falcon 40B": (FALCON, 2),
    "falcon 11B": ({**FALCON, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False}, 2),
    "falcon 7B": ({**FALCON, "new_decoder_architecture": False, "multi_query": True, "num_kv_heads": None}, 1),
    "mistral": ({**LLAMA, "model_type": "mistral", "sliding_window": 32, "architectures": ["MistralForCausalLM"]}, 2),
    "linear scaling": ({**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_there_and_back(tmp_path: Path, name: str) -> None:
    """With `config.json`, and by the arguments alone."""
    config, tensor = OTHERS[name]
    weights = random_weights(config)
    model = write_model(tmp_path / "model", config, weights)
    convert(model, tmp_path / "mega", to="megatron-llm", tensor=tensor, pipeline=2)
    encoder = torch.load(
        tmp_path / f"mega/release/mp_rank_{tensor - 1:02d}_000/model_optim_rng.pt", weights_only=False
    )["model"]["language_model"]["encoder"]
    if name == "falcon 40B":
        assert torch.equal(encoder["layers.1.mlp_layernorm.bias"], weights["transformer.h.1.ln_mlp.bias"])
        fused = weights["transformer.h.1.self_attention.query_key_value.weight"][16:]  # the second group: 2 q, k, v
        expected = torch.cat([interleaved(fused[:12]), fused[12:]])
        assert torch.equal(encoder["layers.1.self_attention.query_key_value.weight"], expected)
    for alone in (False, True):
        if alone:
            (tmp_path / "mega" / "config.json").unlink()
        with open_source(tmp_path / "mega") as source, open_source(model) as original:
            found = ModelConfig.from_huggingface(source.model_config)
            assert found == ModelConfig.from_huggingface(original.model_config)
        convert(tmp_path / "mega", tmp_path / f"back{alone}", to="huggingface")
        assert same(read_all(tmp_path / f"back{alone}"), weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rotary scaling of type 'dynamic'"),
        ({"model_type": "qwen3", "head_dim": 4}, "model_type='qwen3'"),
        ({"head_dim": 8}, "head_dim=8"),
    ],
)
def test_other_functions_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    config = {**LLAMA, **changes}
    model = write_model(tmp_path / "model", config, random_weights(config))
    with pytest.raises(ConfigError, match=message):
        convert(model, tmp_path / "out", to="megatron-llm")
