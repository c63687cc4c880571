"""Megatron-LLM's command lines for the tools beside this file: how flags are spelled, what its tokenizer flags mean.

Flags are long and never abbreviated, `_` and `-` mean the same in them, and the last of two counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron.__main__ import main as run_verb
from megatron.config.megatron_llm.table import raise_problems, unknown_flag
from megatron.tokenizer import gpt2, load_tokenizer, local_tokenizer, read_extra_tokens
from megatron.utils.errors import ConfigError, MegatronError

_SENTENCE_PIECE, _GPT2, _FALCON = "SentencePieceTokenizer", "GPT2BPETokenizer", "FalconTokenizer"
_BERT = ("BertWordPieceLowerCase", "BertWordPieceCase")
_NEW_TOKENS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>")
_FALCON_NAME = "tiiuae/falcon-40b"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The flags of a command line. Raises ConfigError for what is unknown."""
        spelled = [_as_underscores(word) for word in words]
        names = [word.partition("=")[0].removeprefix("--") for word in spelled if word.startswith("--")]
        known = {option.removeprefix("--") for option in self._option_string_actions}
        raise_problems([unknown_flag(name, sorted(known)) for name in names if name not in known])
        return self.parse_args(spelled)


def _as_underscores(word: str) -> str:
    """`--json-keys=a-b` as `--json_keys=a-b`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def run_tool(
    words_of_verb: Callable[[Sequence[str]], list[str]], finish: Callable[[Sequence[str]], None] | None = None
) -> int:
    """Run the `megatron` verb that the command line of this process means; the exit code.

    `words_of_verb` makes its words of this tool's; `finish` is given these after it went well.
    """
    code = run_verb(sys.argv[1:], words_of_verb)
    if code or finish is None:
        return code
    try:
        finish(sys.argv[1:])
    except (MegatronError, OSError) as error:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {error}\n")
        return 2
    return 0


def add_tokenizer_flags(parser: argparse.ArgumentParser) -> None:
    """`--tokenizer_type` and what belongs to it."""
    parser.add_argument("--tokenizer_type", required=True, choices=[_SENTENCE_PIECE, _GPT2, _FALCON, *_BERT])
    parser.add_argument("--vocab_file", help="SentencePiece model; GPT-2's vocabulary; a folder with a tokenizer.json")
    parser.add_argument("--merge_file", help="GPT-2's merges")
    parser.add_argument("--vocab_extra_ids", type=int, default=0, metavar="N", help="add <extra_id_0> and so on")
    parser.add_argument("--vocab_extra_ids_list", metavar="A,B", help="tokens to add")
    parser.add_argument("--no_new_tokens", action="store_true", help="do not add <CLS> <SEP> <EOD> <MASK> <PAD>")


def add_writing_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the output and of the work."""
    parser.add_argument("--output_prefix", required=True, help="what the names of the outputs begin with")
    parser.add_argument("--dataset_impl", default="mmap", choices=["mmap", "lazy", "cached"])
    parser.add_argument("--workers", type=int, help="processes (default: the usable CPUs)")
    parser.add_argument("--chunk_size", type=int, help="accepted, without effect: texts are divided by bytes")
    parser.add_argument("--log_interval", type=int, default=100, help="accepted, without effect: told every 10 s")
    parser.add_argument("--lang", default="english", help="accepted: it matters for sentence splitting only")


def check_writing_flags(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for what is not written any more."""
    if arguments.dataset_impl != "mmap":
        raise ConfigError(
            f"--dataset_impl {arguments.dataset_impl}: only mmap is written; the older two are no longer read by anyone"
        )


@dataclass(frozen=True)
class TokenizerChoice:
    """What the tokenizer flags mean: the tokenizer's file, the tokens to add in order, the end-of-document token."""

    path: Path
    extra_tokens: tuple[str, ...]
    eod_token: str | None

    def words(self, end_of_document: bool) -> list[str]:
        """As words of `megatron preprocess`, with the end-of-document token where documents get it. Control tokens that
        are written out in a text become their ids."""
        words = ["--tokenizer", str(self.path), "--special-tokens", "ids"]
        words += ["--extra-tokens", ",".join(self.extra_tokens)] if self.extra_tokens else []
        return words + (["--eod-token", self.eod_token] if self.eod_token and end_of_document else [])


def choose_tokenizer(arguments: argparse.Namespace) -> TokenizerChoice:
    """The tokenizer of Megatron-LLM's flags. Raises ConfigError or DataError for one that cannot be."""
    kind = arguments.tokenizer_type
    if kind in _BERT:
        raise ConfigError(
            f"--tokenizer_type {kind}: BERT's tokenizers are for masked language models, which are not here"
        )
    added = _added_tokens(arguments)
    if kind == _GPT2:
        return TokenizerChoice(_gpt2_files(arguments, added), (), gpt2.END_OF_TEXT)
    if kind == _FALCON:
        path = Path(arguments.vocab_file) if arguments.vocab_file else _falcon_tokenizer()
        return TokenizerChoice(path, () if arguments.no_new_tokens else added, gpt2.END_OF_TEXT)
    if not arguments.vocab_file:
        raise ConfigError(f"--tokenizer_type {kind} needs --vocab_file, the path of a tokenizer.model")
    path = Path(arguments.vocab_file)
    tokenizer = load_tokenizer(path)
    new = [*_NEW_TOKENS, _pad_piece(tokenizer.files[0])]
    if arguments.no_new_tokens:  # those that are pieces already are special all the same
        new = [token for token in new if tokenizer.token_id(token) is not None]
    eod = None if arguments.no_new_tokens else "<EOD>"
    return TokenizerChoice(path, tuple(dict.fromkeys([*new, *added])), eod)


def _pad_piece(model: Path) -> str:
    """The piece that a SentencePiece model pads with, or the one that is added for it."""
    import sentencepiece

    if model.suffix == ".json":
        return "<PAD>"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    identity = processor.pad_id()
    return processor.id_to_piece(identity) if identity >= 0 else "<PAD>"


def _added_tokens(arguments: argparse.Namespace) -> tuple[str, ...]:
    if arguments.vocab_extra_ids < 0:
        raise ConfigError(f"--vocab_extra_ids {arguments.vocab_extra_ids} is not a number of tokens")
    numbered = [f"<extra_id_{number}>" for number in range(arguments.vocab_extra_ids)]
    listed = read_extra_tokens(arguments.vocab_extra_ids_list) if arguments.vocab_extra_ids_list else []
    return (*numbered, *listed)


def _gpt2_files(arguments: argparse.Namespace, added: Sequence[str]) -> Path:
    if not arguments.vocab_file or not arguments.merge_file:
        raise ConfigError(f"--tokenizer_type {_GPT2} needs --vocab_file and --merge_file")
    if added:
        raise ConfigError(f"--tokenizer_type {_GPT2} takes no added tokens; leave out --vocab_extra_ids and its list")
    vocabulary, merges = Path(arguments.vocab_file), Path(arguments.merge_file)
    if gpt2.merges_of(vocabulary).absolute() != merges.absolute() or not vocabulary.stem.endswith("vocab"):
        raise ConfigError(
            f"--merge_file {merges} is not where it belongs to {vocabulary}: name the two vocab.json and "
            "merges.txt, or X-vocab.json and X-merges.txt, in one folder"
        )
    return vocabulary


def _falcon_tokenizer() -> Path:
    """The folder of Falcon's tokenizer, fetched from the Hugging Face hub where it is not in the cache."""
    try:
        return local_tokenizer(f"hf://{_FALCON_NAME}")
    except ConfigError as error:
        raise ConfigError(f"--tokenizer_type {_FALCON}: {error}. Or name a tokenizer.json with --vocab_file") from error
