"""What a `config.json` may say, and what is refused because it would be another function."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig

from megatron.model.config import ModelConfig, spell_for_both
from megatron.model.specs import canonical_shapes
from megatron.utils.errors import ConfigError

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}

LLAMA_2 = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_huggingface({**BASE, **changes})


@pytest.mark.parametrize(
    ("size", "parameters"), [("7b", 6_738_415_616), ("13b", 13_015_864_320), ("70b", 68_976_648_192)]
)
def test_llama_2_has_the_published_number_of_parameters(size: str, parameters: int) -> None:
    config = read(**LLAMA_2[size], vocab_size=32000)
    assert config.num_parameters == parameters
    assert sum(math.prod(shape) for shape in canonical_shapes(config).values()) == parameters


def test_a_tied_embedding_counts_once() -> None:
    tied, untied = read(tie_word_embeddings=True), read()
    assert untied.num_parameters - tied.num_parameters == 100 * 48
    assert "lm_head.weight" not in canonical_shapes(tied)
    assert sum(math.prod(shape) for shape in canonical_shapes(tied).values()) == tied.num_parameters


def test_what_a_file_leaves_out_is_as_transformers_takes_it() -> None:
    mine, theirs = read(), LlamaConfig(**BASE)
    for name in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert mine.head_dim == theirs.head_dim == 8
    assert mine.rope_theta == theirs.rope_parameters["rope_theta"]
    assert mine.initializer_range == theirs.initializer_range


FULL = {
    "head_dim": 10,
    "num_key_value_heads": 2,
    "max_position_embeddings": 77,
    "rms_norm_eps": 3e-6,
    "tie_word_embeddings": True,
    "initializer_range": 0.013,
    "rope_theta": 12345.0,
}


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    config = read(**FULL)
    (tmp_path / "config.json").write_text(json.dumps(config.to_huggingface("bfloat16")))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, LlamaConfig)
    for name, value in FULL.items():
        found = theirs.rope_parameters[name] if name == "rope_theta" else getattr(theirs, name)
        assert found == value, name
    assert str(theirs.dtype).endswith("bfloat16")
    # and what transformers writes of it is read as the same model again
    assert ModelConfig.from_huggingface(theirs.to_dict()) == config
    assert ModelConfig.from_huggingface(config.to_huggingface()) == config


SCALED: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.5},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 33,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 33, "beta_fast": 20.0, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 33, "attention_factor": 1.25},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 33, "mscale": 0.7, "mscale_all_dim": 0.9},
]


@pytest.mark.parametrize("scaling", SCALED, ids=str)
def test_both_generations_read_a_scaling_that_is_written(tmp_path: Path, scaling: dict[str, Any]) -> None:
    config = read(**FULL, rope_parameters={**scaling, "rope_theta": 12345.0})
    written = config.to_huggingface()
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = AutoConfig.from_pretrained(tmp_path)
    kind = {name: value for name, value in theirs.rope_parameters.items() if name != "type"}
    assert kind == {**scaling, "rope_theta": 12345.0}
    assert ModelConfig.from_huggingface(theirs.to_dict()) == config
    older = {name: value for name, value in written.items() if name not in ("rope_parameters", "dtype")}
    newer = {name: value for name, value in written.items() if name not in ("rope_theta", "rope_scaling")}
    assert ModelConfig.from_huggingface(older) == ModelConfig.from_huggingface(newer) == config
    if scaling["rope_type"] in ("linear", "dynamic"):  # the first releases that scale accept these two keys alone
        assert written["rope_scaling"] == {"type": scaling["rope_type"], "factor": scaling["factor"]}
    other = {"rope_parameters": {**scaling, "rope_theta": 12345.0}}
    assert spell_for_both({**BASE, **other}, "float32")["rope_scaling"] == written["rope_scaling"]


def test_older_readers_find_the_older_spellings() -> None:
    written = read(**FULL).to_huggingface("float32")
    assert written["rope_theta"] == 12345.0 and written["rope_scaling"] is None and written["torch_dtype"] == "float32"
    without_new = {name: value for name, value in written.items() if name not in ("rope_parameters", "dtype")}
    assert ModelConfig.from_huggingface(without_new) == read(**FULL)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 500000, "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
        {},
    ],
    ids=str,
)
def test_the_rotary_base_is_found_where_transformers_finds_it(spelling: dict[str, Any]) -> None:
    theirs = LlamaConfig(**json.loads(json.dumps({**BASE, **spelling})))
    assert read(**spelling).rope_theta == theirs.rope_parameters["rope_theta"] == (5e5 if spelling else 1e4)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "mixtral"}, "model_type='mixtral'"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "no name of a model": ({"model_type": ["llama"]}, "model_type=['llama']"),
    "another scaling": ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "rope_scaling of type 'longrope'"),
    "scaling without its factor": (
        {"rope_scaling": {"type": "linear"}},
        "rope_scaling of type 'linear' without factor",
    ),
    "scaling without its bounds": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "rope_theta": 1e4}},
        "rope_parameters of type 'llama3' without high_freq_factor",
    ),
    "a scaling's bounds the wrong way round": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
        "high_freq_factor=1.0 (only above low_freq_factor=4.0)",
    ),
    "a word for a factor": ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "rope_scaling.factor='2'"),
    "a negative factor": ({"rope_scaling": {"type": "dynamic", "factor": -2.0}}, "rope_scaling.factor=-2.0"),
    "a part of another scaling": (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "short_factor": [1.0]}},
        "rope_scaling.short_factor=[1.0] (no part of type 'linear'",
    ),
    "two scalings": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        "contradicts itself: rope_scaling={'type': 'linear', 'factor': 2.0} but rope_parameters=",
    ),
    "two lengths before scaling": (
        {
            "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
            "original_max_position_embeddings": 32,
        },
        "original_max_position_embeddings=16 beside original_max_position_embeddings=32",
    ),
    "angles by kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        "rope_parameters by kinds of layers",
    ),
    "dynamic scaling of the smallest heads": (
        {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "head_dim=2 is too small for rope_scaling of type dynamic",
    ),
    "part of the head turned": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "two bases": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        "rope_parameters.rope_theta=500000.0",
    ),
    "two bases, the other in an older place": (
        {"rope_theta": 1e4, "rope_scaling": {"type": "default", "rope_theta": 5e5}},
        "rope_scaling.rope_theta=500000.0",
    ),
    "words for numbers": ({"hidden_size": "48", "rms_norm_eps": True}, "hidden_size='48', rms_norm_eps=True"),
    "a word for a truth": ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
    "a list for a table": ({"rope_scaling": [2.0]}, "rope_scaling=[2.0]"),
    "no sizes": ({"hidden_size": None, "vocab_size": None}, "lacks vocab_size, hidden_size"),
    "heads that do not divide": (
        {"num_attention_heads": 5},
        "hidden_size=48 is not divisible by num_attention_heads=5",
    ),
    "key/value heads that do not divide": ({"num_key_value_heads": 4}, "not divisible by num_key_value_heads=4"),
    "odd heads": ({"head_dim": 5}, "head_dim=5 is odd"),
    "nothing of it": ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be positive"),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_a_plain_llama_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**changes)
    assert words in str(caught.value)


def test_all_refusals_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read(hidden_act="relu", rope_scaling={"type": "longrope"}, quantization_config={"bits": 8})
    for words in ("relu", "longrope", "quantization_config"):
        assert words in str(caught.value)


def test_harmless_settings_are_no_reason_to_refuse() -> None:
    harmless = {
        "rope_scaling": {"rope_type": "default"},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "pretraining_tp": 2,
        "use_cache": False,
        "hidden_act": "silu",
        "unknown_to_us": 1,
    }
    assert read(**harmless) == read()


@pytest.mark.parametrize(
    ("vocab_size", "tensor", "padded"),
    [
        (32000, 1, 32000), (32000, 8, 32256), (32017, 1, 32064), (32017, 2, 32128), (32017, 4, 32256),
        (32019, 1, 32064), (32019, 4, 32256), (32019, 8, 32256),
    ],
)  # fmt: skip
def test_padded_vocabulary(vocab_size: int, tensor: int, padded: int) -> None:
    config = read(vocab_size=vocab_size)
    assert config.padded_vocab_size(tensor) == padded
    assert padded % tensor == 0
