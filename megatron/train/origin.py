"""What a run starts from: its newest checkpoint, another one, a model's weights, or nothing; and what that model is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.check import check_weights
from megatron.checkpoint.manager import newest_checkpoint
from megatron.checkpoint.source import Source, open_source
from megatron.config.model import ModelSettings
from megatron.config.run import RunConfig
from megatron.model.config import ModelConfig
from megatron.model.specs import canonical_shapes
from megatron.parallel.world import World
from megatron.utils.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Origin:
    """Where the weights come from (None: random), whether all training state comes along, and the model.

    `huggingface` is the content of the model's `config.json`, kept as it was found.
    """

    source: Source | None
    resume: bool
    model: ModelConfig
    huggingface: dict[str, Any]

    @property
    def description(self) -> str:
        if self.source is None:
            return "random weights"
        return f"{'all state' if self.resume else 'weights'} of {self.source.folder}"


def find_origin(config: RunConfig, world: World) -> Origin:
    """Decide what the run starts from, alike on all ranks.

    In this order: the newest whole checkpoint in `checkpoint.save`; `checkpoint.load`; `model.init_from`; random
    weights. Raises ConfigError or CheckpointError where a folder is not what it should be or contradicts `model.*`.
    """
    newest = _newest(config, world)
    if newest is not None:
        return world.agree(lambda: _from_source(newest, config.model, resume=True))
    if config.checkpoint.load is not None:
        load = config.checkpoint.load
        return world.agree(lambda: _from_source(load, config.model, resume=True))
    if config.model.init_from is not None:
        init_from = config.model.init_from
        return world.agree(lambda: _from_source(init_from, config.model, resume=False))
    return world.agree(lambda: _from_settings(config.model))


def _newest(config: RunConfig, world: World) -> str | None:
    """The folder to resume from. Rank 0 alone looks, so that all ranks take the same one."""
    if config.checkpoint.save is None:
        return None
    save = Path(config.checkpoint.save)
    found = world.agree(lambda: newest_checkpoint(save) if world.launch.rank == 0 else None)
    return world.exchange("" if found is None else str(found))[0] or None


def _from_source(path: str, settings: ModelSettings, *, resume: bool) -> Origin:
    source = open_source(path)
    if resume and not (source.state and source.has_optimizer):
        raise CheckpointError(
            f"{path} holds weights but no training state; to start a new run from its weights, give it "
            "as model.init_from instead."
        )
    model = ModelConfig.from_huggingface(source.model_config)
    contradictions = [
        f"model.{name}={wanted} but {source.folder} has {getattr(model, name)}"
        for name, wanted in _stated(settings).items()
        if getattr(model, name) != wanted
    ]
    if contradictions:
        raise ConfigError(
            f"The configuration contradicts the model it starts from: {'; '.join(contradictions)}. "
            "Leave these keys out to take the model as it is."
        )
    check_weights(source, canonical_shapes(model))
    return Origin(source, resume, model, source.model_config)


def _from_settings(settings: ModelSettings) -> Origin:
    stated = _stated(settings)
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [f"model.{name}" for name in required if name not in stated]
    if missing:
        raise ConfigError(
            f"There is no model: give model.init_from (a Hugging Face folder or a checkpoint), or for random weights "
            f"{', '.join(missing)}, or a preset such as --config tiny."
        )
    model = ModelConfig.from_huggingface({"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, **stated})
    return Origin(None, False, model, model.to_huggingface())


def _stated(settings: ModelSettings) -> dict[str, Any]:
    """The architecture fields that the configuration states."""
    fields = dataclasses.asdict(settings)
    del fields["init_from"]
    return {name: value for name, value in fields.items() if value is not None}
