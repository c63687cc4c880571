"""What a run starts from: its newest checkpoint, another one, a model's weights, or nothing; and what that model is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.checkpoint.check import check_weights
from megatron.checkpoint.hub import fetch_config, local_folder, local_folder_together
from megatron.checkpoint.huggingface import MODEL_CONFIG, read_config
from megatron.checkpoint.manager import newest_checkpoint, warn_ignored
from megatron.checkpoint.native import MANIFEST, step_of
from megatron.checkpoint.source import Source, open_source, open_stored
from megatron.config.model import ModelSettings
from megatron.config.run import RunConfig
from megatron.model.config import ModelConfig
from megatron.model.families import family_of
from megatron.model.lora import Lora, make_lora
from megatron.model.specs import canonical_shapes
from megatron.parallel.world import World
from megatron.train.adapters import check_kind, open_base, open_first, take_lora
from megatron.train.verify import describe_damage, find_damage, refuse_damage
from megatron.utils.errors import CheckpointError, ConfigError
from megatron.utils.hub import parse_address, spelling_hint
from megatron.utils.units import format_count

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")


@dataclass(frozen=True)
class Origin:
    """Where the weights come from (None: random), whether all training state comes along, and the model.

    `huggingface` is the content of the model's `config.json`, kept as it was found. With adapters (`lora`), the weights
    under them are those of `base`, and their own those of `adapters` (None: made).
    """

    source: Source | None
    resume: bool
    model: ModelConfig
    huggingface: dict[str, Any]
    lora: Lora | None = None
    base: Source | None = None
    adapters: Source | None = None

    @property
    def description(self) -> str:
        if self.source is None:
            return "random weights"
        what = f"{'all state' if self.resume else 'weights'} of"
        return f"{what} {' and '.join(str(source.folder) for source in self.sources)}"

    @property
    def sources(self) -> list[Source]:
        """All that is read, each once."""
        several = (self.source, self.base, self.adapters)
        return list({id(source): source for source in several if source is not None}.values())

    def close(self) -> None:
        """Close the files that are open."""
        for source in self.sources:
            source.close()


def describe_model(config: RunConfig) -> tuple[ModelConfig, str]:
    """The model that a configuration speaks of, and what to call it, without reading weights.

    Of a Hugging Face model its `config.json` is enough; where `model.init_from` names no folder here, what `model.*`
    states. Raises ConfigError as `find_origin`.
    """
    path = _path_of_model(config)
    if path is not None:
        return ModelConfig.from_huggingface(_model_config(path)), Path(path).name
    model = _from_settings(config.model).model
    return model, f"a model of {format_count(model.num_parameters)} parameters"


def shrunk_model(config: RunConfig) -> ModelConfig:
    """The model that a configuration speaks of, with what it states put in place of what its source has: for trying a
    smaller one. Raises ConfigError where nothing says what the model is."""
    path = _path_of_model(config)
    if path is None:
        return _from_settings(config.model).model
    return ModelConfig.from_huggingface({**_model_config(path), **_stated(config.model)})


def _path_of_model(config: RunConfig) -> str | None:
    """The folder here, or the address, of what a run starts from."""
    path = config.checkpoint.load or config.model.init_from
    return path if path is not None and (parse_address(path) or Path(path).exists()) else None


def _model_config(path: str) -> dict[str, Any]:
    """The content of `config.json` of a model or checkpoint, or of a folder that holds nothing else of a model."""
    repository = parse_address(path)
    content = None if repository is None else fetch_config(repository)
    if content is not None:
        return content
    folder = local_folder(path)
    alone = (folder / MODEL_CONFIG).is_file() and not (folder / MANIFEST).exists()
    if alone and not any(child.is_dir() or child.suffix in _WEIGHTS for child in folder.iterdir()):
        return read_config(folder)
    with open_source(folder) as source:
        return source.model_config


def find_origin(config: RunConfig, world: World) -> Origin:
    """Decide what the run starts from, alike on all ranks.

    In this order: the newest whole checkpoint in `checkpoint.save`; `checkpoint.load`; `model.init_from`; random
    weights. Raises ConfigError or CheckpointError where a folder is not what it should be or contradicts `model.*`.
    Checkpoints are read through once before: a damaged one in `checkpoint.save` is not whole, elsewhere it is an error.
    """
    newest = _newest(config, world)
    if newest is not None:
        base = _fetched(config, config.model.init_from, world)
        origin = world.agree(lambda: _resumed(newest, config, base))
        if origin.base is not None:
            _refuse_damaged(origin.base, world)
        return origin
    path = config.checkpoint.load or config.model.init_from
    if path is None:
        return world.agree(lambda: _random(config))
    resumes = config.checkpoint.load is not None
    folder = local_folder_together(path, world)
    other = _fetched(config, config.model.init_from if resumes else config.lora.init_from, world)
    origin = world.agree(lambda: _resumed(folder, config, other) if resumes else _new(folder, config, other))
    for source in origin.sources:
        _refuse_damaged(source, world, resumes and source is origin.source)
    return origin


def _fetched(config: RunConfig, path: str | None, world: World) -> Path | None:
    """The folder of what a run with adapters needs besides."""
    return None if path is None or not config.lora.active else local_folder_together(path, world)


def _refuse_damaged(source: Source, world: World, with_state: bool = False) -> None:
    """Raise CheckpointError where a file's content is not what was written; only checkpoints have checksums."""
    for part in source.parts:
        if part.manifest is not None:
            refuse_damage(part.folder, world, () if with_state else part.files("exp_avg", "exp_avg_sq"))


def _newest(config: RunConfig, world: World) -> str | None:
    """The folder to resume from. Rank 0 alone looks, so that all ranks take the same one."""
    if config.checkpoint.save is None:
        return None
    save, before = Path(config.checkpoint.save), None
    while True:
        search = partial(newest_checkpoint, save, before)
        found = world.agree(search) if world.launch.rank == 0 else world.agree(lambda: None)
        newest = world.exchange("" if found is None else str(found))[0]
        if not newest:
            if before is not None:
                world.raise_together(_nothing_sound(save))
            return None
        damaged = find_damage(Path(newest), world)
        if not damaged:
            return newest
        if world.launch.rank == 0:
            warn_ignored(Path(newest), describe_damage(damaged))
        before = step_of(Path(newest).name)


def _nothing_sound(save: Path) -> CheckpointError:
    """A run whose checkpoints are all damaged must not begin anew without being told to."""
    return CheckpointError(
        f"checkpoint.save={save} holds checkpoints, but each of them is damaged, as the warnings say. Bring back a "
        "copy of one, or name another folder in checkpoint.save to begin anew."
    )


def _resumed(path: str | Path, config: RunConfig, base_folder: Path | None) -> Origin:
    """All state of a checkpoint; `base_folder` is where the model under its adapters lies (None: where it was)."""
    source = open_stored(path)
    if not (source.state and source.has_optimizer):
        raise CheckpointError(
            f"{path} holds weights but no training state; to start a new run from its weights, give it "
            "as model.init_from instead."
        )
    check_kind(config, source)
    if source.adapter is None:
        return Origin(source, True, _checked_model(source, config.model), source.model_config)
    base = open_base(source, base_folder)
    model = _agreed_model(source, config.model)
    return Origin(source, True, model, source.model_config, take_lora(config.lora, source, model), base, source)


def _new(path: str | Path, config: RunConfig, first: Path | None) -> Origin:
    """The weights of a model, at step 0; `first` is the folder of the adapters to begin with."""
    source = open_source(path)
    model = _checked_model(source, config.model)
    if not config.lora.active:
        return Origin(source, False, model, source.model_config)
    adapters = None if first is None else open_first(first, source)
    lora = make_lora(config.lora, model) if adapters is None else take_lora(config.lora, adapters, model)
    return Origin(source, False, model, source.model_config, lora, source, adapters)


def _checked_model(source: Source, settings: ModelSettings) -> ModelConfig:
    model = _agreed_model(source, settings)
    check_weights(source, canonical_shapes(model))
    return model


def _agreed_model(source: Source, settings: ModelSettings) -> ModelConfig:
    """The model of a source; raises ConfigError where the configuration states another."""
    model = ModelConfig.from_huggingface(source.model_config)
    contradictions = [
        f"model.{name}={wanted} but {source.folder} has {getattr(model, name)}"
        for name, wanted in model.contradictions(_stated(settings))
    ]
    if contradictions:
        raise ConfigError(
            f"The configuration contradicts the model it starts from: {'; '.join(contradictions)}. "
            "Leave these keys out to take the model as it is."
        )
    return model


def _random(config: RunConfig) -> Origin:
    """Random weights, which adapters are not for."""
    origin = _from_settings(config.model)
    if config.lora.active:
        raise ConfigError(
            "lora adapts the weights of a model, and there is none: name it as model.init_from (a Hugging Face folder "
            "or a checkpoint), or leave lora out to train random weights."
        )
    return origin


def _from_settings(settings: ModelSettings) -> Origin:
    stated = _stated(settings)
    missing = [f"model.{name}" for name in family_of(stated).required if name not in stated]
    if missing:
        raise ConfigError(
            f"There is no model: give model.init_from (a Hugging Face folder or a checkpoint), or for random weights "
            f"{', '.join(missing)}, or a preset such as --config tiny.{spelling_hint(settings.init_from or '')}"
        )
    model = ModelConfig.from_settings(stated)
    return Origin(None, False, model, model.to_huggingface())


def _stated(settings: ModelSettings) -> dict[str, Any]:
    """The architecture fields that the configuration states."""
    fields = dataclasses.asdict(settings)
    del fields["init_from"]
    return {name: value for name, value in fields.items() if value is not None}
