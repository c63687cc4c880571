"""Megatron-LLM's `tools/checkpoint_util.py`: its flags, carried out by `megatron convert`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file it sees only its own folder

from megatron.checkpoint.megatron_llm import MegatronFolder, find_megatron, states_vocabulary
from megatron.tokenizer import load_tokenizer
from megatron.utils.errors import ConfigError
from megatron.utils.logging import get_logger
from tools.finetune import checkpoint_of_step
from tools.megatron_llm_flags import Parser, run_tool
from tools.weights import read_model

_logger = get_logger("megatron.checkpoint_util")

_MODELS = ("GPT", "BERT", "falcon", "llama", "llama2", "codellama", "mistral")


def words_of_verb(words: Sequence[str]) -> list[str]:
    """The words of `megatron convert` that mean the same."""
    parser = Parser("cut a checkpoint for another grid of tensor ranks and pipeline stages")
    parser.add_argument("--model_type", required=True, choices=_MODELS, help="the checkpoint's own counts")
    parser.add_argument("--loader", default="megatron", choices=["megatron"])
    parser.add_argument("--saver", default="megatron", choices=["megatron"])
    parser.add_argument("--load_dir", required=True, help="checkpoint of Megatron-LLM or of a run of ours")
    parser.add_argument("--save_dir", required=True, help="folder to write")
    parser.add_argument("--target_tensor_parallel_size", type=int, metavar="N", help="tensor ranks (default: as it is)")
    parser.add_argument("--target_pipeline_parallel_size", type=int, metavar="N", help="stages (default: as it is)")
    parser.add_argument("--true_vocab_size", type=int, metavar="N", help="tokens without padding")
    parser.add_argument("--vocab_file", help="tokenizer, whose tokens are counted for --true_vocab_size")
    parser.add_argument("--bf16", action="store_true", help="cast the weights to bf16")
    parser.add_argument("--load_iters", type=int, metavar="N", help="step (default: the newest); 0: the release")
    parser.add_argument("--megatron_path", help="accepted, without effect: nothing of Megatron-LLM is imported")
    parser.add_argument("--max_queue_size", type=int, default=50, help="accepted, without effect: there is no queue")
    parser.add_argument("--no_checking", action="store_true", help="accepted, without effect: sizes are always checked")
    arguments = parser.read(words)
    if arguments.model_type == "BERT":
        raise ConfigError("--model_type BERT: models here predict the next token, and no masked ones")
    source = Path(arguments.load_dir)
    source = source if arguments.load_iters is None else checkpoint_of_step(source, arguments.load_iters)
    found = find_megatron(source) if source.is_dir() else None
    vocabulary = _vocabulary(source, found, arguments.true_vocab_size, arguments.vocab_file)
    grid = (1, 1) if found is None else found.grid
    tensor = arguments.target_tensor_parallel_size or grid[0]
    pipeline = arguments.target_pipeline_parallel_size or grid[1]
    return [
        "convert",
        str(source),
        arguments.save_dir,
        *("--to", "megatron-llm", "--tensor", str(tensor), "--pipeline", str(pipeline)),
        *(["--dtype", "bf16"] if arguments.bf16 else []),
        *vocabulary,
    ]


def _vocabulary(source: Path, found: MegatronFolder | None, stated: int | None, vocabulary: str | None) -> list[str]:
    """What makes the vocabulary as large as is stated, as words of the verb.

    Rows are added as Megatron-LLM's resharder does, as copies of the last. They are left out where nothing says that
    they are tokens: of a checkpoint of theirs, which knows its padded size alone.
    """
    model = read_model(source)
    if stated is None and vocabulary is not None:
        stated = max(load_tokenizer(vocabulary).vocab_size, model.vocab_size)
    if stated is None or stated == model.vocab_size:
        return []
    if stated > model.vocab_size:
        return ["--vocab-size", str(stated), "--initialize", "copy"]
    if found is None or states_vocabulary(found):
        raise ConfigError(
            f"--true_vocab_size {stated}, but {source} holds {model.vocab_size} tokens without padding, and the last "
            f"{model.vocab_size - stated} would be lost. Leave it out to keep them, or cut the model on purpose: "
            f"megatron convert {source} FOLDER --vocab-size {stated}"
        )
    return ["--vocab-size", str(stated)]


if __name__ == "__main__":
    sys.exit(run_tool(words_of_verb))
