"""Where a run's adapters and the model under them come from, and what the two must have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.checkpoint.adapted import adapter_in, base_path, check_base, fingerprint, lora_of, open_adapter
from megatron.checkpoint.check import check_weights
from megatron.checkpoint.peft import StoredAdapter
from megatron.checkpoint.source import Source, open_source
from megatron.config.lora import LoraConfig
from megatron.config.run import RunConfig
from megatron.model.config import ModelConfig
from megatron.model.lora import Lora, find_targets, make_lora
from megatron.model.specs import canonical_shapes
from megatron.utils.errors import CheckpointError, ConfigError


def plan_lora(settings: LoraConfig, model: ModelConfig) -> Lora | None:
    """The adapters that a configuration asks for, None for none. Of `lora.init_from` the values are not read. Raises
    ConfigError or CheckpointError."""
    if not settings.active:
        return None
    if settings.init_from is None:
        return make_lora(settings, model)
    with open_adapter(settings.init_from) as stored:
        return take_lora(settings, stored, model)


def take_lora(settings: LoraConfig, stored: Source, model: ModelConfig) -> Lora:
    """The adapters of a folder. Raises ConfigError where the configuration states others, CheckpointError where a run
    cannot have them."""
    lora = lora_of(stored, model)
    wanted = {
        "rank": settings.rank or None,
        "alpha": settings.alpha,
        "rslora": settings.rslora,
        "targets": None if settings.targets is None else find_targets(settings.targets, model),
    }
    others = [
        f"lora.{name}={_shown(value)} but there it is {_shown(getattr(lora, name))}"
        for name, value in wanted.items()
        if value is not None and value != getattr(lora, name)
    ]
    if others:
        raise ConfigError(
            f"The configuration contradicts the adapters in {stored.folder}: {'; '.join(others)}. Leave these keys out "
            "to take the adapters as they are (lora.rank apart), or begin others with another checkpoint.save."
        )
    return lora


def _shown(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value).lower()


def check_kind(config: RunConfig, stored: Source) -> None:
    """Raise ConfigError where a checkpoint to be resumed has adapters and the run none, or the other way round."""
    if stored.adapter is not None and not config.lora.active:
        raise ConfigError(
            f"{stored.folder} holds adapters, and lora.rank=0: set lora.rank={stored.adapter.rank} to go on with them. "
            "To train all weights of the model that they make, give it as model.init_from with another "
            "checkpoint.save."
        )
    if stored.adapter is None and config.lora.active:
        raise ConfigError(
            f"{stored.folder} is a run without adapters, and the configuration asks for some: leave lora out to go on "
            "with it, or give it as model.init_from with another checkpoint.save to adapt its model."
        )


def open_base(stored: Source, folder: Path | None) -> Source:
    """The model under the adapters of a checkpoint to be resumed, in this folder, or where the run had it."""
    path = folder or adapter_in(stored).base
    if path is None:
        raise ConfigError(f"{stored.folder} does not say which model it adapts: name it as model.init_from")
    try:
        base = open_source(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"The model that {stored.folder} adapts cannot be opened: {error} Name it as model.init_from."
        ) from error
    check_weights(base, canonical_shapes(ModelConfig.from_huggingface(base.model_config)))
    check_base(base, stored)
    return base


def open_first(folder: Path, base: Source) -> Source:
    """The adapters that a new run begins with."""
    stored = open_adapter(folder)
    check_base(base, stored)
    return stored


def adapter_state(lora: Lora, base: Source, config: RunConfig) -> dict[str, Any]:
    """What a checkpoint says of its adapters."""
    path = base_path(config.model.init_from, base)
    return StoredAdapter(lora.rank, lora.alpha, lora.rslora, path, fingerprint(base)).to_state()
