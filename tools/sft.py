"""Meditron's `finetuning/sft.py`: tokenize, compute the steps, train; the same command again goes on with the run.

On several machines each runs it with its own --rank and one file system: the first tokenizes, the others wait for it.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file it sees only its own folder

import torch

from megatron.checkpoint.source import open_source
from megatron.data.instruction.pair import text_prefix
from megatron.data.provenance import read_provenance
from megatron.tokenizer import find_tokenizer
from megatron.utils.errors import ConfigError, MegatronError
from tools.megatron_llm_flags import Parser

GLOBAL_BATCH = 64
TOKENS = (
    "[bib_ref],[/bib_ref],[fig_ref],[/fig_ref],[bib],[/bib],[fig],[/fig],[table],[/table],[formula],[/formula],"
    "<|im_start|>,<|im_end|>"
)
# Of 7 and 13 billion parameters on one machine, of 70 on several.
_TENSOR = {7: 4, 13: 8, 70: 8}
_PORT = 6020
_POLL_S = 2.0
_HERE = Path(__file__).resolve().parent


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The flags of a command line."""
    parser = Parser("fine-tune on questions and answers, as Meditron was")
    parser.add_argument("--checkpoint", required=True, help="pmc, baseline or meditron; or any folder of a model")
    parser.add_argument("--size", type=int, default=7, choices=(7, 13, 70), help="billions of parameters")
    parser.add_argument("--checkpoints_dir", default="checkpoints", help="where CHECKPOINT-SIZEb is (default: here)")
    parser.add_argument("--run_name", required=True, help="names the folders of the run")
    parser.add_argument("--data", nargs="+", required=True, help="JSON-lines files")
    parser.add_argument("--val", nargs="+", default=[], help="JSON-lines files to validate on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seq", type=int, default=2048, help="most tokens of a conversation")
    parser.add_argument("--micro_batch", type=int, default=32)
    parser.add_argument("--loss_mask", type=float, default=0.0, help="weight of the loss of what is no answer")
    parser.add_argument("--save_interval", type=int, default=800)
    parser.add_argument("--tp", type=int, help="tensor ranks (default: 4 for 7B, else 8)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--rank", type=int, default=0, help="which of them this is")
    parser.add_argument("--addr", default="localhost", help="the first of them")
    parser.add_argument("--gpus", type=int, help="processes per machine (default: its GPUs, or tp x pp / nodes)")
    parser.add_argument("--id", help="of a Weights & Biases run, to go on with it")
    parser.add_argument("--intermediate_iter", type=int, help="step of CHECKPOINT to start from (default: the newest)")
    parser.add_argument("--question_key", default="prompt")
    parser.add_argument("--answer_key", default="gold")
    parser.add_argument("--system_key")
    parser.add_argument("--no_autoaccept_iters", action="store_true", help="ask before training")
    parser.add_argument("--save_checkpoint_dir", default="checkpoints", help="where RUN_NAME is saved")
    parser.add_argument("--tokenized_data_dir", default="tokenized", help="where the tokenized data go")
    return parser.read(words)


def main(words: Sequence[str]) -> int:
    """Tokenize, then become torchrun; the exit code where it does not come to that."""
    try:
        arguments = parse(words)
        checkpoint = find_checkpoint(arguments)
        prefixes = [_tokenize(arguments, checkpoint, part) for part in ("train", "val") if _files(arguments, part)]
        counts = [_documents(prefix) for prefix in prefixes]
        steps = steps_of(arguments.epochs, counts[0])
        command = training_command(arguments, checkpoint, prefixes, counts, steps)
    except MegatronError as error:
        sys.stderr.write(f"sft.py: error: {error}\n")
        return 2
    sys.stderr.write(f"{counts[0]} conversations x {arguments.epochs} epochs / {GLOBAL_BATCH}: {steps} steps\n")
    if not arguments.no_autoaccept_iters or input("train? [y/n] ").strip().lower() in ("y", "yes"):
        os.execv(sys.executable, command)
    return 1


def steps_of(epochs: int, conversations: int) -> int:
    """Meditron's number of steps: up to the next ten."""
    return 10 * math.ceil(epochs * conversations / GLOBAL_BATCH / 10)


def find_checkpoint(arguments: argparse.Namespace) -> Path:
    """The folder to start from."""
    named = Path(arguments.checkpoints_dir) / f"{arguments.checkpoint}-{arguments.size}b"
    found = next((path for path in (named, Path(arguments.checkpoint)) if path.is_dir()), None)
    if found is None:
        raise ConfigError(
            f"--checkpoint {arguments.checkpoint}: there is neither {named} nor such a folder; put the weights there, "
            "or name their folder"
        )
    return found


def _files(arguments: argparse.Namespace, part: str) -> list[str]:
    return list(arguments.data if part == "train" else arguments.val)


def _tokenize(arguments: argparse.Namespace, checkpoint: Path, part: str) -> Path:
    """The prefix of the tokenized files of a part, made where it is not there or older than its files."""
    prefix = Path(arguments.tokenized_data_dir) / f"{arguments.run_name}-{part}"
    files = _files(arguments, part)
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        raise ConfigError(f"there is no {', '.join(missing)}")
    if arguments.rank > 0:
        sys.stderr.write(f"waiting for the first machine to tokenize {part}\n")
        while not _is_done(prefix, files):
            time.sleep(_POLL_S)
        return prefix
    if _is_done(prefix, files):
        sys.stderr.write(f"{prefix} is there already\n")
        return prefix
    for path in prefix.parent.glob(f"{prefix.name}-*"):  # of older files
        path.unlink()
    words = [
        *(sys.executable, str(_HERE / "preprocess_instruct_data.py"), "--input", *files, f"--output_prefix={prefix}"),
        *("--tokenizer_type=SentencePieceTokenizer", f"--vocab_file={_vocabulary(checkpoint)}"),
        *("--vocab_extra_ids_list", TOKENS, f"--question_key={arguments.question_key}"),
        f"--answer_key={arguments.answer_key}",
        *([f"--system_key={arguments.system_key}"] if arguments.system_key else []),
    ]
    if subprocess.run(words, check=False).returncode:
        raise ConfigError(f"{', '.join(files)} could not be tokenized, as said above")
    return prefix


def _is_done(prefix: Path, files: Sequence[str]) -> bool:
    """Whether a tokenized pair is whole (its record is written last) and not older than what it was made of."""
    record = Path(f"{text_prefix(str(prefix))}.json")
    return record.is_file() and record.stat().st_mtime >= max(Path(file).stat().st_mtime for file in files)


def _vocabulary(checkpoint: Path) -> Path:
    """The tokenizer of the folder, or of the checkpoint in it."""
    with open_source(checkpoint) as source:
        folder = source.tokenizer_folder
    found = find_tokenizer(checkpoint) or find_tokenizer(folder)
    if found is None:
        raise ConfigError(f"{checkpoint} has no tokenizer.model: put it there")
    return found


def _documents(prefix: Path) -> int:
    provenance = read_provenance(text_prefix(str(prefix)))
    if provenance is None or provenance.documents == 0:
        raise ConfigError(f"{prefix} holds no conversations")
    return provenance.documents


def training_command(
    arguments: argparse.Namespace, checkpoint: Path, prefixes: Sequence[Path], counts: Sequence[int], steps: int
) -> list[str]:
    """The command line of the training, as Meditron's finetune.sh has it with --instruct."""
    tensor = arguments.tp or _TENSOR[arguments.size]
    gpus = arguments.gpus or torch.cuda.device_count() or max(1, tensor * arguments.pp // arguments.nodes)
    validation = [] if len(prefixes) == 1 else [
        *("--valid_data_path", str(prefixes[1]), "--eval_interval", "100"),
        *("--eval_iters", str(math.ceil(counts[1] / GLOBAL_BATCH)), "--metrics", "all"),
    ]  # fmt: skip
    return [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={gpus}", f"--nnodes={arguments.nodes}"),
        *(f"--node_rank={arguments.rank}", f"--master_addr={arguments.addr}", f"--master_port={_PORT}"),
        str(_HERE / "finetune.py"),
        *("--tensor_model_parallel_size", str(tensor), "--pipeline_model_parallel_size", str(arguments.pp)),
        *("--load", str(checkpoint), "--finetune", "--use_checkpoint_args"),
        *([] if arguments.intermediate_iter is None else ["--load_iters", str(arguments.intermediate_iter)]),
        *("--save", str(Path(arguments.save_checkpoint_dir) / arguments.run_name)),
        *("--save_interval", str(arguments.save_interval), "--train_data_path", str(prefixes[0]), *validation),
        *("--tokenizer_type", "SentencePieceTokenizer", f"--vocab_file={_vocabulary(checkpoint)}"),
        *("--vocab_extra_ids_list", TOKENS, "--data_type", "instruction", "--variable_seq_lengths"),
        *("--scalar_loss_mask", str(arguments.loss_mask), "--seq_length", str(arguments.seq), "--bf16"),
        *("--global_batch_size", str(GLOBAL_BATCH), "--micro_batch_size", str(arguments.micro_batch)),
        *("--train_iters", str(steps), "--lr", "2e-5", "--min_lr", "2e-6", "--lr_decay_style", "cosine"),
        *("--lr_warmup_fraction", "0.1", "--weight_decay", "0.1", "--adam_beta1", "0.9", "--adam_beta2", "0.95"),
        *("--adam_eps", "1e-5", "--hidden_dropout", "0.0", "--attention_dropout", "0.0", "--log_interval", "1"),
        *("--sequence_parallel", "--recompute_granularity", "selective", "--use_flash_attn"),
        *([] if arguments.id is None else ["--wandb_logger", "--wandb_id", arguments.id]),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
