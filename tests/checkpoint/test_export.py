"""What is written in Hugging Face's format is what vLLM and llama.cpp's converter can read, as far as their rules can
be checked without them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from megatron.checkpoint.convert import convert
from megatron.checkpoint.vocabulary import Extension
from megatron.model.config import ModelConfig
from megatron.model.specs import canonical_shapes
from tests.model.zoo import ZOO, tiny
from tests.tokenizer.conftest import train_sentencepiece

from .conftest import CONFIG

PIECES = 340
# The classes by which both choose what they build: vLLM's docs/models/supported_models.md, and the names given to
# `ModelBase.register` in llama.cpp's conversion scripts.
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "falcon": "FalconForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
}
_LLAMA = (
    r"model\.(embed_tokens|norm|layers\.\d+\.((input|post_attention)_layernorm|self_attn\.([qkvo]_proj|[qk]_norm)|"
    r"mlp\.(gate|up|down)_proj))\.(weight|bias)|lm_head\.weight"
)
# Tensors by the names in llama.cpp's gguf-py/gguf/tensor_mapping.py and in the `load_weights` of vLLM's models.
TENSORS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "falcon": r"transformer\.(word_embeddings|ln_f|h\.\d+\.(ln_attn|ln_mlp|input_layernorm|post_attention_layernorm|"
    r"self_attention\.(query_key_value|dense)|mlp\.dense_(h_to_4h|4h_to_h)))\.(weight|bias)|lm_head\.weight",
    "gpt2": r"transformer\.(wte|wpe|ln_f|h\.\d+\.(ln_1|ln_2|attn\.c_(attn|proj)|mlp\.c_(fc|proj)))\.(weight|bias)|"
    r"lm_head\.weight",
    "gpt_neox": r"gpt_neox\.(embed_in|final_layer_norm|layers\.\d+\.((input|post_attention)_layernorm|"
    r"attention\.(query_key_value|dense)|mlp\.dense_(h_to_4h|4h_to_h)))\.(weight|bias)|embed_out\.weight",
}
EMBEDDINGS = {"falcon": "transformer.word_embeddings", "gpt2": "transformer.wte", "gpt_neox": "gpt_neox.embed_in"}


def check(folder: Path) -> dict[str, Any]:
    """All rules; the content of `config.json`."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    tensors = read_tensors(folder)
    kind = config["model_type"]
    assert config["architectures"] == [CLASSES[kind]]
    assert all(re.fullmatch(TENSORS[kind], name) for name in tensors), sorted(tensors)
    # vLLM's VocabParallelEmbedding takes no other number of rows than `vocab_size`.
    embedding = tensors[EMBEDDINGS.get(kind, "model.embed_tokens") + ".weight"]
    head = {"embed_out.weight", "lm_head.weight"} & tensors.keys()
    assert {len(embedding), *(len(tensors[name]) for name in head)} == {config["vocab_size"]}
    assert bool(head) is not config["tie_word_embeddings"]
    # transformers 4 has `torch_dtype`, 5 `dtype`; vLLM takes it for the dtype to compute in.
    assert {f"torch.{config['dtype']}", f"torch.{config['torch_dtype']}"} == {str(embedding.dtype)}
    check_angles(config)
    check_shapes(kind, config, tensors)
    check_ids(folder, config)
    return config


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """llama.cpp's converter reads all `model*.safetensors`, and wants the index to list just what they hold."""
    files = sorted(folder.glob("model*.safetensors"))
    assert files == sorted(folder.glob("*.safetensors"))
    tensors = {name: (file.name, tensor) for file in files for name, tensor in load_file(file).items()}
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for name, (file, _) in tensors.items()}
    return {name: tensor for name, (_, tensor) in tensors.items()}


def check_angles(config: dict[str, Any]) -> None:
    """vLLM (`patch_rope_scaling_dict`) wants a `rope_type`, and none beside another `type`; llama.cpp's `TextModel`
    takes `rope_parameters` before `rope_scaling`, with `rope_theta` in it, and of YaRN the length before scaling."""
    if config["model_type"] == "gpt2" or config.get("alibi"):
        return
    angles, older = config["rope_parameters"], config["rope_scaling"] or {"type": "default"}
    kinds = {table[key] for table in (angles, older) for key in ("rope_type", "type") if key in table}
    assert len(kinds) == 1 and "rope_type" in angles
    assert angles["rope_theta"] == config.get("rope_theta", config.get("rotary_emb_base"))
    if angles["rope_type"] in ("yarn", "llama3"):
        assert angles["original_max_position_embeddings"] == older["original_max_position_embeddings"]
    assert all(angles[name] == older[name] for name in older.keys() - {"type", "rope_type"})


def check_shapes(kind: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """The reshapes of queries, keys and values in llama.cpp's conversion scripts, by the keys that these look at."""
    if kind == "falcon":
        heads, groups, hidden = config["num_attention_heads"], config.get("num_kv_heads") or 1, config["hidden_size"]
        weight = tensors["transformer.h.0.self_attention.query_key_value.weight"]
        assert len(weight) == groups * (heads // groups + 2) * (hidden // heads)
        assert config["layer_norm_epsilon"] > 0
    elif kind == "gpt2":
        assert config["n_ctx"] == len(tensors["transformer.wpe.weight"])
        assert {"n_embd", "n_head", "n_layer", "layer_norm_epsilon"} <= config.keys()
    elif kind == "gpt_neox":
        weight = tensors["gpt_neox.layers.0.attention.query_key_value.weight"]
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        weight.reshape(heads, 3, hidden // heads, hidden)
        wanted = {"rotary_pct", "use_parallel_residual", "layer_norm_eps", "max_position_embeddings"}
        assert {*wanted, "intermediate_size"} <= config.keys()
    else:
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            weight = tensors[f"model.layers.0.self_attn.{name}_proj.weight"]
            assert weight.shape == (config[heads] * size, config["hidden_size"])
        assert config["rms_norm_eps"] > 0


def check_ids(folder: Path, config: dict[str, Any]) -> None:
    """gguf's SpecialVocab raises for an id below 0 and leaves out one past the vocabulary; vLLM ends a text where
    `generation_config.json` says."""
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text()) if path.exists() else {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        stated = config.get(key)
        ids = [] if stated is None else stated if isinstance(stated, list) else [stated]
        assert all(0 <= identity < config["vocab_size"] for identity in ids)
        assert generation.get(key) == stated
    if generation:
        GenerationConfig.from_pretrained(folder)


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
SOME = ["llama, scaled angles", "qwen3, heads of another size", "falcon, 7B", "gpt_neox, Pythia"]


@pytest.mark.parametrize("name", ["gpt2", *(ZOO if os.environ.get("THOROUGH") else SOME)])
def test_an_export_of_each_family(name: str, tmp_path: Path) -> None:
    """From what transformers saves now, which says less than older readers look for."""
    kind, fields = ("gpt2", GPT2) if name == "gpt2" else ZOO[name]
    tiny(kind, fields).save_pretrained(tmp_path / "model")
    (tmp_path / "model/generation_config.json").unlink(missing_ok=True)
    convert(tmp_path / "model", tmp_path / "native", dtype=torch.bfloat16)
    convert(tmp_path / "native", tmp_path / "export", file_bytes=20_000)
    check(tmp_path / "export")


def write_model(folder: Path, **changed: object) -> Path:
    config = {**CONFIG, "vocab_size": PIECES, "rms_norm_eps": 1e-5, **changed}
    folder.mkdir()
    shapes = canonical_shapes(ModelConfig.from_huggingface(config))
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    (folder / "tokenizer.model").write_bytes(train_sentencepiece())
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("stated", "written"),
    [
        ({}, (1, 2, None)),
        ({"architectures": None, "pad_token_id": -1}, (1, 2, None)),
        ({"bos_token_id": 70, "eos_token_id": 300}, (1, 2, None)),  # pieces of text
        ({"eos_token_id": [2, 5000], "pad_token_id": 340}, (1, 2, None)),  # past the vocabulary
        ({"eos_token_id": [1, 2], "pad_token_id": 0, "architectures": ["LlamaModel"]}, (1, [1, 2], 0)),
    ],
)
def test_ids_are_those_of_tokens(tmp_path: Path, stated: dict[str, object], written: tuple[object, ...]) -> None:
    model = write_model(tmp_path / "model", **stated)
    convert(model, tmp_path / "export", to="huggingface")
    config = check(tmp_path / "export")
    assert tuple(config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")) == written


def test_from_metas_files_with_added_tokens(tmp_path: Path) -> None:
    """Nothing but a `tokenizer.model` to begin with. llama.cpp's SentencePieceVocab wants the ids of added tokens to
    follow those of the pieces without a gap."""
    convert(write_model(tmp_path / "model"), tmp_path / "meta", to="meta")
    assert {path.name for path in (tmp_path / "meta").iterdir()} == {
        "consolidated.00.pth",
        "params.json",
        "tokenizer.model",
    }
    convert(
        tmp_path / "meta", tmp_path / "export", to="huggingface", extension=Extension(("<A>", "<B>"), size=PIECES + 8)
    )
    config = check(tmp_path / "export")
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (PIECES + 8, 1, 2)
    added = json.loads((tmp_path / "export/added_tokens.json").read_text())
    assert sorted(added.values()) == [PIECES, PIECES + 1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, PIECES + 2)


def test_a_generation_config_is_carried_as_it_is(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    content = '{"temperature": 0.6, "eos_token_id": [2, 5]}'
    (model / "generation_config.json").write_text(content)
    convert(model, tmp_path / "export", to="huggingface")
    assert (tmp_path / "export/generation_config.json").read_text() == content
