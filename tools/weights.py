"""What the tools for weights share: finding models on the Hugging Face hub, and tokenizers to go with them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.checkpoint.hub import fetch_model
from megatron.checkpoint.huggingface import MODEL_CONFIG, config_text, read_config
from megatron.checkpoint.source import open_source
from megatron.checkpoint.special_ids import complete_ids, write_generation
from megatron.checkpoint.targets import limit_for
from megatron.model.config import ModelConfig
from megatron.model.specs import canonical_shapes
from megatron.tokenizer import load_tokenizer
from megatron.utils.errors import ConfigError
from megatron.utils.files import write_atomically
from megatron.utils.hub import named

_IDS = ("bos", "eos", "pad")  # special tokens that config.json gives the ids of


def read_model(folder: str | Path) -> ModelConfig:
    """The model that a folder of any format holds."""
    with open_source(folder) as source:
        return ModelConfig.from_huggingface(source.model_config)


def bytes_for_files(folder: str | Path, files: int) -> int:
    """The size of shards under which a model makes at most so many files."""
    with open_source(folder) as source:
        shapes = canonical_shapes(ModelConfig.from_huggingface(source.model_config))
        return limit_for([math.prod(shape) * source.dtype(name).itemsize for name, shape in shapes.items()], files)


def find_on_hub(name: str, cache: str | None = None) -> str:
    """The folder of a model of Hugging Face's hub, fetched where it is not in the cache yet.

    Raises as `fetch_model`.
    """
    try:
        return str(fetch_model(named(name), cache))
    except ConfigError as error:
        raise ConfigError(f"{name} is neither a folder here nor to be had from the hub: {error}") from error


def check_fits(path: Path, extra_tokens: Sequence[str], model: ModelConfig) -> None:
    """Raise ConfigError for a tokenizer that has more tokens than the model."""
    size = load_tokenizer(path, extra_tokens).vocab_size
    if size > model.vocab_size:
        raise ConfigError(
            f"the tokenizer {path} with {len(extra_tokens)} added tokens has {size} tokens, the model "
            f"{model.vocab_size}: name the tokens that it was trained with"
        )


def write_tokenizer(folder: Path, path: Path, extra_tokens: Sequence[str], special: Mapping[str, str]) -> None:
    """Put a tokenizer with its added tokens, and the names and ids of special ones, into a folder of Hugging Face's."""
    tokenizer = load_tokenizer(path, extra_tokens)
    for file in tokenizer.files:
        shutil.copyfile(file, folder / file.name)
    added = {token: tokenizer.token_id(token) for token in tokenizer.added_tokens}
    if added:
        write_atomically(folder / "added_tokens.json", json.dumps(added, indent=2, ensure_ascii=False) + "\n")
    unknown = [token for token in special.values() if tokenizer.token_id(token) is None]
    if unknown:
        raise ConfigError(f"--override_special_tokens names {', '.join(unknown)}, which {path} does not have")
    if special:
        names = {f"{name}_token": token for name, token in special.items()}
        write_atomically(folder / "special_tokens_map.json", json.dumps(names, indent=2, ensure_ascii=False) + "\n")
    chosen = {f"{name}_token_id": tokenizer.token_id(token) for name, token in special.items() if name in _IDS}
    config = complete_ids({**read_config(folder), **chosen}, folder)
    write_atomically(folder / MODEL_CONFIG, config_text(config))
    write_generation(folder, config, anew=True)
