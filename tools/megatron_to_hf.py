"""Megatron-LLM's `weights_conversion/megatron_to_hf.py`: its flags, carried out by `megatron convert`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file it sees only its own folder

from megatron.utils.errors import ConfigError
from tools.megatron_llm_flags import Parser, choose_tokenizer, run_tool
from tools.weights import bytes_for_files, check_fits, read_model, write_tokenizer

_SPECIAL = ("bos", "cls", "eos", "mask", "pad", "sep", "unk")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The flags of a command line."""
    parser = Parser("write a checkpoint in Hugging Face's format")
    parser.add_argument("--input_dir", required=True, help="checkpoint of Megatron-LLM or of a run of ours")
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--num_output_shards", type=int, metavar="N", help="files at most (default: by size)")
    parser.add_argument("--model", choices=("llama", "llama2", "codellama", "mistral", "falcon"), help="family")
    parser.add_argument("--cache_dir", help="Hugging Face cache or folder, for the tokenizer")
    parser.add_argument("--vocab_file", help="tokenizer (default: the checkpoint's)")
    parser.add_argument("--vocab_extra_ids_list", metavar="A,B", help="tokens that were added to it")
    parser.add_argument("--override_special_tokens", nargs="*", default=[], metavar="KEY=TOKEN")
    return parser.read(words)


def words_of_verb(words: Sequence[str]) -> list[str]:
    """The words of `megatron convert` that mean the same."""
    arguments = parse(words)
    model = read_model(arguments.input_dir)
    family = "llama" if arguments.model in ("llama2", "codellama") else arguments.model
    if family not in (None, model.model_type):
        raise ConfigError(f"--model {arguments.model}: {arguments.input_dir} holds a model of {model.model_type}")
    files = arguments.num_output_shards
    if files is not None and files < 1:
        raise ConfigError(f"--num_output_shards {files} must be at least 1")
    special = _special(arguments)
    path = _vocabulary(arguments)
    if path is not None:
        check_fits(path, _extra(arguments, path), model)
    elif special or arguments.vocab_extra_ids_list:
        raise ConfigError("--vocab_extra_ids_list, --override_special_tokens: give --vocab_file, whose they are")
    shards = [] if files is None else ["--max-shard-size", str(bytes_for_files(arguments.input_dir, files))]
    return ["convert", arguments.input_dir, arguments.output_dir, "--to", "hf", *shards]


def finish(words: Sequence[str]) -> None:
    """Put the tokenizer that was named beside the weights."""
    arguments = parse(words)
    path = _vocabulary(arguments)
    if path is not None:
        write_tokenizer(Path(arguments.output_dir), path, _extra(arguments, path), _special(arguments))


def _vocabulary(arguments: argparse.Namespace) -> Path | None:
    if arguments.vocab_file is not None:
        return Path(arguments.vocab_file)
    if arguments.cache_dir is None:
        return None
    return Path(arguments.cache_dir) / "tokenizer.model" if _is_folder(arguments.cache_dir) else None


def _is_folder(cache: str) -> bool:
    return (Path(cache) / "tokenizer.model").is_file()


def _extra(arguments: argparse.Namespace, path: Path) -> tuple[str, ...]:
    """The tokens that Megatron-LLM adds, which is what its converter takes for granted; none where none are named."""
    if arguments.vocab_extra_ids_list is None:
        return ()
    chosen = choose_tokenizer(
        argparse.Namespace(
            tokenizer_type="SentencePieceTokenizer", vocab_file=str(path), merge_file=None, vocab_extra_ids=0,
            vocab_extra_ids_list=arguments.vocab_extra_ids_list, no_new_tokens=False,
        )
    )  # fmt: skip
    return chosen.extra_tokens


def _special(arguments: argparse.Namespace) -> dict[str, str]:
    pairs = [text.partition("=") for text in arguments.override_special_tokens]
    wrong = [f"{name}{equals}{token}" for name, equals, token in pairs if name not in _SPECIAL or not token]
    if wrong:
        raise ConfigError(f"--override_special_tokens {' '.join(wrong)}: give key=token, keys {', '.join(_SPECIAL)}")
    return {name: token for name, _, token in pairs}


if __name__ == "__main__":
    sys.exit(run_tool(words_of_verb, finish))
