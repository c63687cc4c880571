"""Finding and opening a tokenizer: a file, or a folder with its added tokens beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.tokenizer import gpt2
from megatron.tokenizer.backends import HuggingFaceBackend, SentencePieceBackend
from megatron.tokenizer.forms import Form
from megatron.tokenizer.tokenizer import Backend, Tokenizer
from megatron.utils.errors import ConfigError, DataError
from megatron.utils.files import parse_json
from megatron.utils.hub import fetch, parse_address, spelling_hint

MODEL = "tokenizer.model"
JSON = "tokenizer.json"
CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"
# Of a model on the hub; the file that makes it a tokenizer comes last, when the others are there.
_ON_HUB = ("chat_template.jinja", ADDED, _SPECIAL, CONFIG, "merges.txt", "vocab.json", JSON, MODEL)
_QUOTES = "'\"“”‘’"


def find_tokenizer(folder: str | Path) -> Path | None:
    """The tokenizer file of a folder: `tokenizer.model` before `tokenizer.json` before GPT-2's `vocab.json` with
    `merges.txt`; or None. Raises DataError for several vocabularies.
    """
    named = (path for name in (MODEL, JSON) if (path := Path(folder) / name).is_file())
    return next(named, None) or gpt2.find_vocabulary(Path(folder))


def load_tokenizer(path: str | Path, extra_tokens: Sequence[str] = (), form: Form | None = None) -> Tokenizer:
    """Open a SentencePiece model, a `tokenizer.json`, or GPT-2's `vocab.json` with `merges.txt` beside it; or the one
    in a folder.

    An `hf://` address is fetched. Added tokens that the files beside it name keep their ids; `extra_tokens` follow, in
    order, except those that are pieces already, which keep their id. Both become their id where they occur in a text.
    `form` is what its `form()` gave in another process. Raises DataError for a file that is missing or damaged,
    ConfigError for an empty or repeated extra token.
    """
    file = _resolve(local_tokenizer(path))
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    folder = file.parent
    backend, added = _open(file, content)
    pieces = backend.pieces()
    literals = backend.literals()
    sentence_tokens = _sentence_tokens(folder)
    literals.update({token: identity for token, identity in added.items() if token not in sentence_tokens})
    literal_ids = added | backend.controls()
    known = {piece: identity for identity, piece in pieces.items()} | added
    next_id = max(known.values(), default=-1) + 1
    _check_extra(extra_tokens)
    for token in extra_tokens:
        if token not in known:
            known[token] = added[token] = next_id
            next_id += 1
        literals.setdefault(token, known[token])
        literal_ids.setdefault(token, known[token])
    return Tokenizer(backend, added=added, literals=literals, literal_ids=literal_ids, files=_files(file), form=form)


def local_tokenizer(path: str | Path) -> Path:
    """The path itself, or of an `hf://` address the folder in the cache, once the tokenizer's files are there.

    Raises ConfigError and ResourceError.
    """
    repository = parse_address(path)
    return Path(path) if repository is None else fetch(repository, _ON_HUB)


def read_extra_tokens(argument: str) -> list[str]:
    """The tokens of `--extra-tokens`: a file with one a line, or a list with commas between. Spaces are kept."""
    path = Path(argument)
    if path.is_file():
        try:
            tokens = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as a list of tokens: {error}") from error
        return [token for token in tokens if token]
    tokens = argument.split(",")
    quoted = [token for token in (tokens[0], tokens[-1]) if token[:1] in _QUOTES or token[-1:] in _QUOTES]
    if quoted and all(quoted):
        raise ConfigError(
            f"--extra-tokens has quotes within its tokens ({' '.join(quoted)}): the shell did not remove them; "
            "quote the list once, or give a file with one token a line"
        )
    return tokens


def _resolve(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise DataError(
            f"there is no tokenizer at {path}; give a {MODEL}, a {JSON}, or a folder that holds one."
            f"{spelling_hint(path)}"
        )
    found = find_tokenizer(path)
    if found is None:
        raise DataError(
            f"the folder {path} holds neither {MODEL} nor {JSON}, nor vocab.json with merges.txt; "
            "name the tokenizer's file"
        )
    return found


def _files(file: Path) -> list[Path]:
    """A tokenizer's file and those beside it that belong to it."""
    beside = [gpt2.find_merges(file), *(file.parent / name for name in (MODEL, JSON, CONFIG, _SPECIAL, ADDED))]
    return [file, *(other for other in beside if other is not None and other != file and other.is_file())]


def _open(file: Path, content: bytes) -> tuple[Backend, dict[str, int]]:
    """The backend of a file, told by its content, and the added tokens beside it that it does not know."""
    folder = file.parent
    if content.lstrip()[:1] == b"{":
        bos, eos = (named_token(folder, name) for name in ("bos_token", "eos_token"))
        if merges := gpt2.find_merges(file):
            content = gpt2.combine(file, content, merges)
            bos, eos = bos or gpt2.END_OF_TEXT, eos or gpt2.END_OF_TEXT
        elif file.stem.endswith("vocab"):
            raise DataError(
                f"{file} is a vocabulary alone; its merges are looked for in {gpt2.merges_of(file).name} beside it"
            )
        return HuggingFaceBackend(file, content, bos=bos, eos=eos), {}
    backend = SentencePieceBackend(file, content)
    return backend, _added_tokens(folder, backend.pieces())


def _added_tokens(folder: Path, pieces: dict[int, str]) -> dict[str, int]:
    """Tokens that the files of a Hugging Face folder append to its `tokenizer.model`, in the order of their ids."""
    declared: dict[int, str] = {}
    added = read_json(folder / ADDED)
    decoder = read_json(folder / CONFIG).get("added_tokens_decoder", {})
    try:
        declared.update({int(identity): token for token, identity in added.items()})
        declared.update({int(identity): _text(token) for identity, token in decoder.items()})
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise DataError(f"the added tokens in {folder} ({ADDED}, {CONFIG}) are damaged: {error}") from error
    return {token: identity for identity, token in sorted(declared.items()) if identity not in pieces}


def _sentence_tokens(folder: Path) -> set[str | None]:
    return {named_token(folder, "bos_token"), named_token(folder, "eos_token")}


def named_token(folder: Path, name: str) -> str | None:
    """The token that the files beside a tokenizer give a name such as `pad_token`."""
    for file in (CONFIG, _SPECIAL):
        token = read_json(folder / file).get(name)
        if token is not None:
            return _text(token)
    return None


def _text(token: Any) -> str:
    """A token as the JSON files write it: a string, or an object with its content."""
    return str(token["content"] if isinstance(token, dict) else token)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, an empty one where there is no file. Raises DataError."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} does not hold a JSON object")
    return content


def _check_extra(tokens: Sequence[str]) -> None:
    if "" in tokens:
        raise ConfigError(f"--extra-tokens {','.join(tokens)!r} has an empty token; remove the comma too many")
    for token in tokens:
        if any("\ud800" <= character <= "\udfff" for character in token):
            raise ConfigError(f"--extra-tokens has {token!r}, which is not UTF-8")
    counts = Counter(tokens)
    repeated = sorted({token for token in tokens if counts[token] > 1})
    if repeated:
        raise ConfigError(f"--extra-tokens names {', '.join(repeated)} more than once; name each token once")
