"""Every preset loads, fits the grid it is meant for, and describes the model it is named after."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from megatron.config.load import load_config
from megatron.config.model import ModelSettings
from megatron.config.presets import preset_names
from megatron.config.validate import validate_grid
from megatron.model.config import ModelConfig

WORLD_SIZES = {
    "llama2-7b": (2, 8, 64),
    "llama2-13b": (4, 8, 64),
    "llama2-70b": (32, 128),
    "meditron-7b": (64,),
    "meditron-70b": (128,),
    "tiny": (1, 2, 4),
    "gpt2": (1, 8, 64),
    "gpt3-175b": (64, 1536),
    "llama3-8b": (2, 8),
    "llama3-70b": (32, 128),
    "codellama-7b": (2, 8),
    "mistral-7b": (2, 8),
    "qwen2.5-7b": (2, 8),
    "qwen3-8b": (2, 8),
    "falcon-40b": (16, 64),
}

PARAMETERS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "meditron-7b": 6_738_415_616 + 2 * 17 * 4096,
    "meditron-70b": 68_976_648_192 + 2 * 17 * 8192,
}


# As the released weights count, a tied embedding once.
RELEASED = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "codellama-7b": 6_738_546_688,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "falcon-40b": 41_303_293_952,
}
GPT_PARAMETERS = {"gpt2": 124_439_808, "gpt3-175b": 174_604_259_328}


def gpt_parameters(model: ModelSettings) -> int:
    """The number of weights of a GPT of this shape, counted by hand."""
    assert model.model_type == "gpt2" and model.tie_word_embeddings is True
    assert model.vocab_size and model.hidden_size and model.num_hidden_layers and model.max_position_embeddings
    assert model.intermediate_size == 4 * model.hidden_size
    hidden = model.hidden_size
    block = 12 * hidden**2 + (3 + 1 + 4 + 1) * hidden + 2 * 2 * hidden  # matrices, biases, two norms
    return (model.vocab_size + model.max_position_embeddings) * hidden + model.num_hidden_layers * block + 2 * hidden


def parameters(model: ModelSettings) -> int:
    """The number of weights of a Llama of this shape, counted by hand."""
    assert model.vocab_size and model.hidden_size and model.intermediate_size and model.num_hidden_layers
    assert model.num_attention_heads and model.num_key_value_heads and model.tie_word_embeddings is False
    key_value = model.hidden_size // model.num_attention_heads * model.num_key_value_heads
    attention = 2 * model.hidden_size * (model.hidden_size + key_value)
    block = attention + 3 * model.hidden_size * model.intermediate_size + 2 * model.hidden_size
    return 2 * model.vocab_size * model.hidden_size + model.num_hidden_layers * block + model.hidden_size


def test_all_presets_are_tested() -> None:
    assert preset_names() == sorted(WORLD_SIZES)


@pytest.mark.parametrize("name", sorted(WORLD_SIZES))
def test_a_preset_fits_its_grids(name: str) -> None:
    config = load_config(name, ["--data.train", "corpus"])
    for world_size in WORLD_SIZES[name]:
        validate_grid(config, world_size)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_a_preset_has_the_published_size(name: str) -> None:
    assert parameters(load_config(name).model) == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_a_preset_of_another_family_has_the_size_of_the_released_weights(name: str) -> None:
    stated = {key: value for key, value in asdict(load_config(name).model).items() if value is not None}
    assert ModelConfig.from_settings(stated).num_parameters == RELEASED[name]


@pytest.mark.parametrize("name", sorted(GPT_PARAMETERS))
def test_a_gpt_preset_has_the_published_size(name: str) -> None:
    assert gpt_parameters(load_config(name).model) == GPT_PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(GPT_PARAMETERS))
def test_gpt_presets_read_the_published_numbers_of_tokens(name: str) -> None:
    config = load_config(name)
    assert config.data.sequence_length is not None and config.optimizer.decay_steps is not None
    tokens = config.train.global_batch * config.data.sequence_length
    for steps, published in (
        (config.optimizer.warmup_steps, 375e6),
        (config.optimizer.decay_steps, 260e9),
        (config.train.steps, 300e9),
    ):
        assert abs(steps * tokens - published) <= tokens


@pytest.mark.parametrize(("name", "tokens"), [("meditron-7b", 3_276_800), ("meditron-70b", 2_097_152)])
def test_meditron_reads_the_published_number_of_tokens(name: str, tokens: int) -> None:
    config = load_config(name)
    assert config.data.sequence_length is not None
    assert config.train.global_batch * config.data.sequence_length == tokens
    # The run ends after one of the two epochs that the schedule is made for.
    assert config.optimizer.decay_steps == pytest.approx(2 * 46.7e9 / tokens, abs=1.5)
    assert config.train.steps * tokens == pytest.approx(46.7e9, rel=0.04)


def test_a_short_try_of_a_preset_needs_no_other_change() -> None:
    for name in preset_names():
        load_config(name, ["--train.steps", "5"])
