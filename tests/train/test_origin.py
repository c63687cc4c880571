"""What a run starts from, and which contradictions are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.checkpoint.source import open_source
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.model import ModelSettings
from megatron.config.run import RunConfig
from megatron.model.config import ModelConfig
from megatron.parallel.world import World
from megatron.train.origin import describe_model, find_origin, shrunk_model
from megatron.utils.errors import CheckpointError, ConfigError

from .conftest import MODEL


def test_random_weights_of_the_stated_shape(world: World) -> None:
    settings = ModelSettings(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, rope_theta=5e5
    )
    origin = find_origin(RunConfig(model=settings), world)
    assert origin.source is None and not origin.resume
    assert origin.model == ModelConfig(64, 24, 40, 2, 4, 4, 6, 4096, 1e-5, 5e5)
    assert origin.model == ModelConfig.from_huggingface(origin.huggingface)


def test_no_model_at_all_is_an_error_that_names_what_is_missing(world: World) -> None:
    with pytest.raises(ConfigError) as caught:
        find_origin(RunConfig(model=ModelSettings(hidden_size=24)), world)
    for words in ("model.init_from", "model.vocab_size", "model.num_hidden_layers", "--config tiny"):
        assert words in str(caught.value)
    assert "model.hidden_size" not in str(caught.value)


def test_a_model_folder_gives_weights_and_shape(world: World, huggingface_folder: Callable[..., Path]) -> None:
    folder = huggingface_folder()
    origin = find_origin(RunConfig(model=ModelSettings(init_from=str(folder), num_hidden_layers=2)), world)
    assert origin.model == MODEL and not origin.resume
    assert origin.source is not None and origin.source.folder == folder


def test_what_contradicts_the_source_is_refused(world: World, huggingface_folder: Callable[..., Path]) -> None:
    settings = ModelSettings(init_from=str(huggingface_folder()), num_hidden_layers=3, hidden_size=24, rope_theta=5e5)
    with pytest.raises(ConfigError) as caught:
        find_origin(RunConfig(model=settings), world)
    assert "model.num_hidden_layers=3 but" in str(caught.value) and "has 2" in str(caught.value)
    assert "model.rope_theta=500000.0 but" in str(caught.value)
    assert "hidden_size" not in str(caught.value)


def test_weights_alone_cannot_be_resumed(world: World, huggingface_folder: Callable[..., Path]) -> None:
    load = CheckpointConfig(load=str(huggingface_folder()))
    with pytest.raises(CheckpointError, match=r"model\.init_from"):
        find_origin(RunConfig(checkpoint=load), world)


def test_a_damaged_shape_is_named(world: World, huggingface_folder: Callable[..., Path]) -> None:
    folder = huggingface_folder()
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"intermediate_size": 40', '"intermediate_size": 48'))
    with pytest.raises(CheckpointError, match=r"gate_proj|mlp"):
        find_origin(RunConfig(model=ModelSettings(init_from=str(folder))), world)


def test_a_model_is_described_by_its_config_alone(tmp_path: Path) -> None:
    """Any family can be planned without its weights; to train from such a folder is an error."""
    content = {"model_type": "mistral", "sliding_window": 8, "num_key_value_heads": 2, "vocab_size": 64}
    content |= {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = RunConfig(model=ModelSettings(init_from=str(tmp_path)))
    assert describe_model(config)[0] == shrunk_model(config) == ModelConfig.from_huggingface(content)
    shrunk = shrunk_model(RunConfig(model=ModelSettings(init_from=str(tmp_path), num_hidden_layers=1)))
    assert (shrunk.num_hidden_layers, shrunk.sliding_window) == (1, 8)
    with pytest.raises(CheckpointError, match="neither a model nor a checkpoint"):
        open_source(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        describe_model(config)
