"""Which tokens begin, end and pad a text, as an exported folder says it to those who generate from it.

transformers, vLLM and llama.cpp's converter look into `config.json` and `generation_config.json`. What neither says
they take from the model's class, and that need not be what this model's tokenizer has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from megatron.tokenizer.load import named_token, read_json
from megatron.utils.errors import DataError
from megatron.utils.files import write_atomically
from megatron.utils.logging import get_logger

GENERATION = "generation_config.json"

_NAMES = ("bos", "eos", "pad")
_logger = get_logger(__name__)


def complete_ids(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A `config.json` whose `…_token_id` are tokens of the tokenizer in the folder, if there is one.

    What it says stays, unless that cannot be: an id outside the vocabulary, or of a piece of text where the tokenizer
    has a token for it.
    """
    tokenizer = _open(folder)
    completed = dict(config)
    for name in _NAMES:
        key, stated, found = f"{name}_token_id", config.get(f"{name}_token_id"), _of_tokenizer(name, folder, tokenizer)
        if stated is not None and not _can_be(stated, name, int(config["vocab_size"]), tokenizer, found):
            completed[key] = found
            _logger.warning("config.json says %s=%s, which no token for that has: %s is written", key, stated, found)
        elif stated is None and found is not None:
            completed[key] = found
    return completed


def write_generation(folder: Path, config: Mapping[str, Any], *, anew: bool = False) -> None:
    """Write `generation_config.json` with the ids of a `config.json`, where there is none; with `anew` into the one
    that is there as well (raises DataError where that cannot be read)."""
    path = folder / GENERATION
    if path.exists() and not anew:
        return
    held = read_json(path)
    ids = {f"{name}_token_id": config.get(f"{name}_token_id") for name in _NAMES}
    content = {**held, **{key: identity for key, identity in ids.items() if identity is not None}}
    if content:
        write_atomically(path, json.dumps(content, indent=2) + "\n")


def _open(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder; None where there is none that can be read here, which is no reason to lose weights."""
    try:
        file = find_tokenizer(folder)
        return None if file is None else load_tokenizer(file)
    except DataError as error:
        _logger.warning("the tokenizer is carried along unread, and a tokenizer.json may be missing: %s", error)
        return None


def _of_tokenizer(name: str, folder: Path, tokenizer: Tokenizer | None) -> int | None:
    if tokenizer is None:
        return None
    named = named_token(folder, f"{name}_token")
    identity = None if named is None else tokenizer.token_id(named)
    own = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": None}
    return own[name] if identity is None else identity


def _can_be(stated: object, name: str, vocabulary: int, tokenizer: Tokenizer | None, found: int | None) -> bool:
    """`stated` is an id or, for the end, a list of them. Anything may pad."""
    ids = stated if isinstance(stated, list) else [stated]
    if not all(isinstance(identity, int) and 0 <= identity < vocabulary for identity in ids):
        return False
    if tokenizer is None or found is None or name == "pad":
        return True
    return all(identity in tokenizer.special_ids for identity in ids)
