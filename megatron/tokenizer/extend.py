"""Adding tokens to the tokenizer of a model folder: the files that name them, for every program that reads the folder.

Tokens are special: no library normalizes, splits or merges them. It must not know weights.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.tokenizer import gpt2
from megatron.tokenizer.load import ADDED, CONFIG, JSON, MODEL, find_tokenizer, load_tokenizer, read_json
from megatron.tokenizer.tokenizer import Tokenizer
from megatron.utils.errors import ConfigError, DataError

Files = dict[str, bytes]  # name in the folder -> content

_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def extend_tokenizer(folder: Path, tokens: Sequence[str]) -> tuple[Tokenizer, Tokenizer, Files]:
    """The tokenizer of a folder, the same with `tokens` added, and the files to put in place of the folder's own.

    New tokens get the ids after the last one, in order; those that are pieces or were added before keep theirs. Where
    a folder holds a `tokenizer.model` and a `tokenizer.json`, both learn of them. Raises ConfigError or DataError.
    """
    file = find_tokenizer(folder)
    if file is None:
        raise ConfigError(
            f"--extra-tokens: {folder} has no tokenizer to add them to; copy its {MODEL} (or {JSON}) into that folder"
        )
    before, after = load_tokenizer(file), load_tokenizer(file, tokens)
    added = {token: _id(after, token) for token in after.added_tokens}
    files: Files = {}
    if file.name == MODEL or (folder / ADDED).is_file():
        files[ADDED] = _text({**read_json(folder / ADDED), **added})
    settings = read_json(folder / CONFIG)
    if (folder / JSON).is_file():
        files[JSON] = _text(_with_added(read_json(folder / JSON), added))
    elif file.name != MODEL:
        files[JSON] = _text(_with_added(_from_gpt2(file), added))
        if before.eos_id is not None:
            settings = {"bos_token": gpt2.END_OF_TEXT, "eos_token": gpt2.END_OF_TEXT, **settings}
    if settings:
        decoder = {str(identity): {"content": token, **_PLAIN} for token, identity in added.items()}
        known = settings.get("added_tokens_decoder") or {}
        files[CONFIG] = _text({**settings, "added_tokens_decoder": {**known, **_unknown(decoder, known)}})
    _check(folder, files, after)
    return before, after, files


def _from_gpt2(vocabulary: Path) -> dict[str, Any]:
    """GPT-2's two files as a `tokenizer.json`: they have no place for added tokens."""
    merges = gpt2.find_merges(vocabulary)
    assert merges is not None, vocabulary  # it was opened with them
    content: dict[str, Any] = json.loads(gpt2.combine(vocabulary, vocabulary.read_bytes(), merges))
    return content


def _with_added(content: dict[str, Any], added: Mapping[str, int]) -> dict[str, Any]:
    """A `tokenizer.json` with tokens added, but for those that it names."""
    known = list(content.get("added_tokens") or [])
    named = {token["content"] for token in known}
    new = [
        {"id": identity, "content": token, **_PLAIN}
        for token, identity in sorted(added.items(), key=lambda pair: pair[1])
        if token not in named
    ]
    return {**content, "added_tokens": [*known, *new]}


def _unknown(entries: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return {identity: entry for identity, entry in entries.items() if identity not in known}


def _check(folder: Path, files: Files, expected: Tokenizer) -> None:
    """Open what will be there by each of its files: raises DataError where one gives another id for a token."""
    with tempfile.TemporaryDirectory() as name:
        for path in (folder / known for known in (MODEL, JSON, CONFIG, ADDED) if (folder / known).is_file()):
            (Path(name) / path.name).symlink_to(path.absolute())
        for file, content in files.items():
            (Path(name) / file).unlink(missing_ok=True)
            (Path(name) / file).write_bytes(content)
        for path in (Path(name) / known for known in (MODEL, JSON) if (Path(name) / known).is_file()):
            found = load_tokenizer(path)
            differ = [token for token in expected.added_tokens if found.token_id(token) != expected.token_id(token)]
            if differ:
                raise DataError(
                    f"{folder / path.name} gives {differ[0]!r} the id {found.token_id(differ[0])}, and "
                    f"{find_tokenizer(folder)} {expected.token_id(differ[0])}: the tokenizer's files in the folder do "
                    "not agree with each other; remove the one that is wrong"
                )


def _id(tokenizer: Tokenizer, token: str) -> int:
    identity = tokenizer.token_id(token)
    assert identity is not None, token
    return identity


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
