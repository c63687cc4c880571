"""Families beside Llama: what their `config.json` may say, what is refused, and how large published models are."""

from __future__ import annotations

import json
import math
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GPT2Config, GPTNeoXConfig

from megatron.config.model import ModelSettings
from megatron.model.config import ModelConfig
from megatron.model.families import FAMILIES, dropout_notice
from megatron.model.initialize import initialize, standard_deviation
from megatron.model.specs import canonical_shapes
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import single_rank
from megatron.utils.errors import ConfigError

GPT2: dict[str, Any] = {"model_type": "gpt2", "vocab_size": 100, "n_embd": 48, "n_layer": 3, "n_head": 6}
NEOX: dict[str, Any] = {
    "model_type": "gpt_neox",
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "use_parallel_residual": False,
    "rotary_pct": 1.0,
}


FALCON = {
    "model_type": "falcon",
    "vocab_size": 100,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
QWEN = {**NEOX, "model_type": "qwen2", "num_key_value_heads": 2}


def gpt(heads: int, hidden: int, layers: int, vocabulary: int, positions: int, model_type: str = "gpt2") -> ModelConfig:
    return ModelConfig.from_settings(
        {
            "model_type": model_type,
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "max_position_embeddings": positions,
            "tie_word_embeddings": True,
        }
    )


# Narayanan et al., SC'21, Table 1: attention heads, hidden size, layers, parameters in billions.
TABLE_1 = [
    (24, 2304, 24, 1.7),
    (32, 3072, 30, 3.6),
    (32, 4096, 36, 7.5),
    (48, 6144, 40, 18.4),
    (64, 8192, 48, 39.1),
    (80, 10240, 60, 76.1),
    (96, 12288, 80, 145.6),
    (128, 16384, 96, 310.1),
    (128, 20480, 105, 529.6),
    (160, 25600, 128, 1008.0),
]


@pytest.mark.parametrize(("heads", "hidden", "layers", "billions"), TABLE_1)
def test_models_of_table_1_have_the_published_size(heads: int, hidden: int, layers: int, billions: float) -> None:
    config = gpt(heads, hidden, layers, 51200, 2048)
    assert config.num_parameters / 1e9 == pytest.approx(billions, abs=0.06)
    # the paper's formula is that of the layers with their biases and norms, without the last norm
    formula = 12 * layers * hidden**2 * (1 + 13 / (12 * hidden) + (51200 + 2048) / (12 * layers * hidden))
    assert config.num_parameters == pytest.approx(formula + 2 * hidden, abs=1e-9 * formula)


def test_gpt2_has_the_published_number_of_parameters() -> None:
    config = ModelConfig.from_huggingface(
        {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}
    )
    assert config.num_parameters == 124_439_808


LLAMA_3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def grouped(
    vocabulary: int, hidden: int, inner: int, layers: int, heads: int, key_value_heads: int, **others: Any
) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        **others,
    }


def falcon(vocabulary: int, hidden: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": "falcon", **sizes, **others}


# What their config.json files say, and how many parameters their weight files hold, a tied embedding once.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-3.1-8B": (
        grouped(128256, 4096, 14336, 32, 32, 8, rope_theta=5e5, rope_scaling=LLAMA_3_SCALING), 8_030_261_248
    ),
    "Llama-3.2-1B": (
        grouped(128256, 2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True,
                rope_scaling={**LLAMA_3_SCALING, "factor": 32.0}), 1_235_814_400
    ),
    "CodeLlama-34b": (grouped(32000, 8192, 22016, 48, 64, 8, rope_theta=1e6), 33_743_970_304),
    "Mistral-7B-v0.1": (
        grouped(32000, 4096, 14336, 32, 32, 8, model_type="mistral", sliding_window=4096), 7_241_732_096
    ),
    "Qwen2.5-0.5B": (
        grouped(151936, 896, 4864, 24, 14, 2, model_type="qwen2", tie_word_embeddings=True, sliding_window=32768,
                use_sliding_window=False, max_window_layers=24), 494_032_768
    ),
    "Qwen2.5-7B": (grouped(152064, 3584, 18944, 28, 28, 4, model_type="qwen2"), 7_615_616_512),
    "Qwen3-0.6B": (
        grouped(151936, 1024, 3072, 28, 16, 8, model_type="qwen3", head_dim=128, tie_word_embeddings=True), 596_049_920
    ),
    "Qwen3-8B": (grouped(151936, 4096, 12288, 36, 32, 8, model_type="qwen3", head_dim=128), 8_190_735_360),
    "falcon-7b": (falcon(65024, 4544, 32, 71, multi_query=True, parallel_attn=True), 6_921_720_704),
    "falcon-40b": (falcon(65024, 8192, 60, 128, num_kv_heads=8, new_decoder_architecture=True), 41_303_293_952),
    "falcon-rw-1b": (
        falcon(50304, 2048, 24, 32, alibi=True, bias=True, multi_query=False, parallel_attn=False), 1_311_625_216
    ),
    "pythia-6.9b": (
        {**NEOX, "vocab_size": 50432, "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32,
         "num_attention_heads": 32, "rotary_pct": 0.25, "use_parallel_residual": True}, 6_857_302_016
    ),
    "gpt-neox-20b": (
        {**NEOX, "vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44,
         "num_attention_heads": 64, "rotary_pct": 0.25, "use_parallel_residual": True, "hidden_act": "gelu_fast"},
        20_554_567_680,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "parameters"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_models_have_the_published_number_of_parameters(config: dict[str, Any], parameters: int) -> None:
    model = ModelConfig.from_huggingface(config)
    assert model.num_parameters == parameters
    assert sum(math.prod(shape) for shape in canonical_shapes(model).values()) == parameters


@pytest.mark.parametrize(
    "config", [GPT2, {**GPT2, "tie_word_embeddings": False}, NEOX, {**NEOX, "attention_bias": False}]
)
def test_parameters_are_those_of_the_weights(config: dict[str, Any]) -> None:
    model = ModelConfig.from_huggingface(config)
    assert model.num_parameters == sum(math.prod(shape) for shape in canonical_shapes(model).values())


@pytest.mark.parametrize(("base", "theirs"), [(GPT2, GPT2Config), (NEOX, GPTNeoXConfig)])
def test_what_a_file_leaves_out_is_as_transformers_takes_it(base: dict[str, Any], theirs: type) -> None:
    mine, reference = ModelConfig.from_huggingface(base), theirs(**base)
    assert mine.tie_word_embeddings == reference.tie_word_embeddings
    assert mine.initializer_range == reference.initializer_range
    assert mine.max_position_embeddings == reference.max_position_embeddings
    assert mine.layer_norm_eps == (reference.layer_norm_epsilon if base is GPT2 else reference.layer_norm_eps)
    assert mine.hidden_act == (reference.activation_function if base is GPT2 else reference.hidden_act)
    if base is NEOX:
        assert mine.rope_theta == reference.rope_parameters["rope_theta"]


@pytest.mark.parametrize("model_type", sorted(FAMILIES.keys() - {"gpt2"}))
def test_everything_that_a_file_leaves_out_is_as_transformers_takes_it(model_type: str) -> None:
    sizes = {"hidden_size": 128, "num_hidden_layers": 30, "num_attention_heads": 32, "vocab_size": 100}
    sizes |= {} if model_type == "falcon" else {"intermediate_size": 80}
    theirs = AutoConfig.for_model(model_type, **sizes)
    assert ModelConfig.from_huggingface({"model_type": model_type, **sizes}) == ModelConfig.from_huggingface(
        theirs.to_dict()
    )


_DECODER = {
    "intermediate_size": 90,
    "num_key_value_heads": 2,
    "max_position_embeddings": 77,
    "rms_norm_eps": 3e-6,
    "tie_word_embeddings": True,
    "rope_theta": 12345.0,
    "initializer_range": 0.013,
}
CHANGES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "intermediate_size": 90,
        "max_position_embeddings": 77,
        "layer_norm_eps": 3e-6,
        "tie_word_embeddings": False,
        "hidden_act": "gelu",
        "initializer_range": 0.013,
    },
    "gpt_neox": {
        "intermediate_size": 90,
        "max_position_embeddings": 77,
        "layer_norm_eps": 3e-6,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_new",
        "rope_theta": 12345.0,
        "initializer_range": 0.013,
    },
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": {**_DECODER, "head_dim": 10},
    "falcon": {
        "intermediate_size": 90,
        "num_key_value_heads": 2,
        "max_position_embeddings": 77,
        "layer_norm_eps": 3e-6,
        "tie_word_embeddings": False,
        "hidden_act": "gelu_new",
        "rope_theta": 12345.0,
        "initializer_range": 0.013,
    },
}


@pytest.mark.parametrize("model_type", CHANGES)
def test_transformers_reads_what_is_written(tmp_path: Path, model_type: str) -> None:
    sizes = {"vocab_size": 100, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}
    config = ModelConfig.from_settings({"model_type": model_type, **sizes, **CHANGES[model_type]})
    for name, value in {**sizes, **CHANGES[model_type]}.items():
        assert getattr(config, name) == value, name
    written = config.to_huggingface("bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == model_type and str(theirs.dtype).endswith("bfloat16")
    assert ModelConfig.from_huggingface(theirs.to_dict()) == config
    assert ModelConfig.from_huggingface(written) == config
    assert dropout_notice(theirs.to_dict()) is None
    # what an older transformers writes has not the newer spellings
    older = {name: value for name, value in written.items() if name not in ("rope_parameters", "dtype")}
    assert ModelConfig.from_huggingface(older) == config


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another activation": ({**GPT2, "activation_function": "relu"}, "activation_function='relu'"),
    "scores by layer": ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    "unscaled scores": ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights=False"),
    "cross-attention": ({**GPT2, "add_cross_attention": True}, "add_cross_attention=True"),
    "no sizes": ({**GPT2, "n_embd": None, "n_layer": None}, "lacks n_embd, n_layer"),
    "heads that do not divide": ({**GPT2, "n_head": 5}, "n_embd=48 is not divisible by n_head=5"),
    "words for numbers": ({**GPT2, "n_embd": "48"}, "n_embd='48'"),
    "nothing of the head turned": ({**NEOX, "rotary_pct": 0.1}, "partial_rotary_factor=0.1 turns 0 of head_dim=8"),
    "more than the head turned": ({**NEOX, "rotary_pct": 1.5}, "partial_rotary_factor=1.5 turns 12 of head_dim=8"),
    "new Falcon, one after the other": (
        {**FALCON, "new_decoder_architecture": True, "parallel_attn": False},
        "parallel_attn=false with new_decoder_architecture=true",
    ),
    "two norms of an old Falcon": ({**FALCON, "num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2 (only 1"),
    "three norms": (
        {**FALCON, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 3},
        "num_ln_in_parallel_attn=3 (only 1",
    ),
    "few keys of an old Falcon": (
        {**FALCON, "multi_query": False, "num_kv_heads": 2},
        "num_kv_heads=2 with multi_query=false (only num_attention_heads=6)",
    ),
    "a part of a Falcon's head turned": (
        {**FALCON, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5",
    ),
    "a Falcon's activation": ({**FALCON, "activation": "relu"}, "activation='relu'"),
    "layers of another kind": (
        {**QWEN, "layer_types": ["chunked_attention"] * 3},
        "layer_types=['chunked_attention', 'chunked_attention', 'chunked_attention']",
    ),
    "kinds of fewer layers": ({**QWEN, "layer_types": ["full_attention"]}, "for each of 3 layers"),
    "sliding layers without a window": (
        {**QWEN, "layer_types": ["sliding_attention"] * 3, "use_sliding_window": False},
        "layer_types with sliding_attention but no window",
    ),
    "an empty window": ({**QWEN, "model_type": "mistral", "sliding_window": 0}, "sliding_window=0 must be positive"),
    "kinds of Mistral's layers": (
        {**QWEN, "model_type": "mistral", "layer_types": ["full_attention"] * 3},
        "layer_types",
    ),
    "another scaling": ({**NEOX, "rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling of type 'su'"),
    "two bases": (
        {**NEOX, "rotary_emb_base": 1e4, "rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0}},
        "rotary_emb_base=10000.0",
    ),
    "quantized": ({**NEOX, "quantization_config": {"bits": 4}}, "quantization_config"),
}


@pytest.mark.parametrize(("config", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_other_functions_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_huggingface(config)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"model_type": "gpt2", "rope_theta": 1e4, "rms_norm_eps": 1e-5}, ("model.rope_theta", "model.rms_norm_eps")),
        ({"model_type": "gpt2", "num_key_value_heads": 2}, ("model.num_key_value_heads=2 (would be 6)",)),
        ({"model_type": "gpt_neox", "head_dim": 16}, ("model.head_dim=16 (would be 8)",)),
        ({"layer_norm_eps": 1e-5}, ("model.layer_norm_eps=1e-05 (would be None)", "model_type=llama")),
    ],
    ids=str,
)
def test_settings_that_a_family_has_no_use_for_are_refused(stated: dict[str, Any], words: tuple[str, ...]) -> None:
    sizes = {"vocab_size": 100, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_settings({**sizes, "num_attention_heads": 6, **stated})
    for word in words:
        assert word in str(caught.value)


def test_the_settings_know_every_family() -> None:
    hint = typing.get_type_hints(ModelSettings)["model_type"]
    literal = next(part for part in typing.get_args(hint) if part is not type(None))
    assert set(typing.get_args(literal)) == set(FAMILIES)


def test_dropout_loads_with_a_notice() -> None:
    assert dropout_notice({**GPT2, "resid_pdrop": 0.0, "attn_pdrop": 0.0}) == (
        "config.json asks for dropout (embd_pdrop=0.1): training runs without"
    )
    assert dropout_notice({"model_type": "llama"}) is None
    stated = dropout_notice({"model_type": "llama", "attention_dropout": 0.2})
    assert stated is not None and "attention_dropout=0.2" in stated
    assert dropout_notice(GPT2Config(vocab_size=100).to_dict()) is not None


def test_longer_sequences_than_learned_positions_are_an_error_with_a_cure() -> None:
    config = gpt(2, 16, 1, 40, 8)
    model = Transformer(config, single_rank())
    initialize(model, config, 1)
    assert model(torch.zeros(1, 8, dtype=torch.long)).isfinite().all()
    with pytest.raises(ConfigError, match=r"9 tokens is above .*max_position_embeddings=8.*use 8 or fewer"):
        model(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
def test_initial_values_by_kind_of_weight(model_type: str) -> None:
    config = gpt(2, 16, 2, 40, 8, model_type)
    small = config.initializer_range / 2
    kinds = {name: standard_deviation(name, config) for name in canonical_shapes(config)}
    assert {deviation for name, deviation in kinds.items() if name.endswith("bias")} == {0.0}
    assert sum(deviation is None for deviation in kinds.values()) == 2 * 2 + 1
    assert sum(deviation == small for deviation in kinds.values()) == 2 * 2
    model = Transformer(config, single_rank())
    initialize(model, config, 1)
    for parameter in model.parameters():
        for region, view in parameter.spec.regions(parameter.detach()):
            deviation = kinds[region.name]
            if not deviation:
                assert (view == (1.0 if deviation is None else 0.0)).all(), region
            else:
                assert view.std().item() == pytest.approx(deviation, rel=0.4), region
