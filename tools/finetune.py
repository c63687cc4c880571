"""Megatron-LLM's `finetune.py`: its flags, carried out by `megatron train` (and `megatron evaluate`), under torchrun.

What each flag means here is listed in docs/megatron_llm.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file it sees only its own folder

from megatron.config.megatron_llm.table import read_flags
from megatron.config.megatron_llm.translate import Facts, Translation, translate
from megatron.config.values import show
from megatron.utils.environment import read_launch, set_for_libraries
from megatron.utils.errors import CheckpointError, ConfigError
from megatron.utils.logging import get_logger
from tools.megatron_llm_flags import TokenizerChoice, choose_tokenizer, run_tool

_logger = get_logger("megatron.finetune")


def words_of_verb(words: Sequence[str]) -> list[str]:
    """The words of `megatron train` that mean the same."""
    flags = read_flags(words)
    tokenizer = _tokenizer(flags)
    facts = gather_facts(flags, tokenizer)
    done = translate(flags, facts)
    if tokenizer is not None:
        done.notices += _compare_with_data(tokenizer, flags)
    if facts.load is not None and facts.holds == "weights" and "finetune" not in flags and not facts.save_has_run:
        done.notices.append(f"{facts.load} holds weights and no state of a run: training starts at step 0")
    for notice in done.notices:
        _logger.info("%s", notice)
    set_for_libraries(done.environment)
    if "eval_only" in flags:
        return _words_of_evaluate(flags, facts, done)
    given = {dotted: value for dotted, value in done.keys.items() if value is not None}
    return ["train", *(f"--{dotted}={json.dumps(value)}" for dotted, value in given.items())]


def gather_facts(flags: Mapping[str, Any], tokenizer: TokenizerChoice | None) -> Facts:
    """What the translation needs to know of files. Raises CheckpointError where --load is none."""
    from megatron.checkpoint.manager import whole_checkpoints

    facts = Facts(world_size=read_launch().world_size)
    if tokenizer is not None:
        facts = dataclasses.replace(facts, tokenizer=str(tokenizer.path), **_count_tokens(tokenizer))
    save = flags.get("save")
    if save is not None and Path(save).is_dir() and whole_checkpoints(Path(save)):
        facts = dataclasses.replace(facts, save_has_run=True)
    if "load" in flags:
        facts = dataclasses.replace(facts, **_loaded(flags["load"], flags.get("load_iters")))
    return facts


def _loaded(load: str, step: int | None) -> dict[str, Any]:
    from megatron.checkpoint.source import open_source
    from megatron.model.config import ModelConfig

    folder = load if step is None else str(checkpoint_of_step(Path(load), step))
    with open_source(folder) as source:
        model = ModelConfig.from_huggingface(source.model_config)
        holds_run = bool(source.state) and source.has_optimizer
        return {
            "load": folder,
            "holds": "run" if holds_run else "weights",
            "model": {**source.model_config, **dataclasses.asdict(model)},
            "schedule": (source.run_config or {}).get("optimizer"),
        }


def checkpoint_of_step(folder: Path, step: int) -> Path:
    """The checkpoint of a step in a folder of ours or of Megatron-LLM, where 0 is its release."""
    from megatron.checkpoint.native import step_folder

    names = [step_folder(step), f"iter_{step:07d}", *(["release"] if step == 0 else [])]
    found = next((folder / name for name in names if (folder / name).is_dir()), None)
    if found is None:
        raise CheckpointError(f"--load_iters {step}: {folder} holds none of {', '.join(names)}")
    return found


def _tokenizer(flags: Mapping[str, Any]) -> TokenizerChoice | None:
    """What the tokenizer's flags mean; None where the checkpoint's tokenizer is all there is."""
    file = flags.get("vocab_file", flags.get("tokenizer_model"))
    kind = flags.get("tokenizer_type", "GPT2BPETokenizer" if "merge_file" in flags else "SentencePieceTokenizer")
    if kind.startswith("Bert") or (file is None and kind != "FalconTokenizer"):
        return None  # the translation refuses the first, the second is the checkpoint's
    return choose_tokenizer(
        argparse.Namespace(
            tokenizer_type=kind,
            vocab_file=file,
            merge_file=flags.get("merge_file"),
            vocab_extra_ids=flags.get("vocab_extra_ids", 0),
            vocab_extra_ids_list=flags.get("vocab_extra_ids_list"),
            no_new_tokens=flags.get("no_new_tokens", False),
        )
    )


def _count_tokens(choice: TokenizerChoice) -> dict[str, int | None]:
    """The size of the vocabulary, and the token that pads when nothing is added for it: the end of a sentence."""
    from megatron.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(choice.path, choice.extra_tokens)
    return {"vocabulary": tokenizer.vocab_size, "pad_token": tokenizer.eos_id}


def _compare_with_data(choice: TokenizerChoice, flags: Mapping[str, Any]) -> list[str]:
    """Where data were tokenized with other added tokens than the flags say: what they were tokenized with counts."""
    from megatron.data.instruction.pair import text_prefix
    from megatron.data.provenance import read_provenance
    from megatron.tokenizer import load_tokenizer

    known = load_tokenizer(choice.path)
    expected = [token for token in choice.extra_tokens if known.token_id(token) is None]
    notices = []
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        words = flags.get(name, ())
        for prefix in words if len(words) == 1 else words[1::2]:
            conversations = flags.get("data_type") == "instruction"
            provenance = read_provenance(text_prefix(prefix) if conversations else prefix)
            if provenance is not None and provenance.added_tokens != expected:
                notices.append(
                    f"--{name} {prefix} was tokenized with the added tokens {provenance.added_tokens}, and the flags "
                    f"say {expected}: the data count"
                )
    return notices


def _words_of_evaluate(flags: Mapping[str, Any], facts: Facts, done: Translation) -> list[str]:
    test = done.keys.get("data.test")
    if not isinstance(test, str) or facts.load is None:
        raise ConfigError("--eval_only evaluates one prefix of --test_data_path by the model of --load; give both")
    words = ["evaluate", "--load", facts.load, "--data", test, "--megatron-llm"]
    words += ["--precision", done.keys["train.precision"], "--micro-batch", str(done.keys["train.micro_batch"])]
    length = done.keys.get("data.sequence_length")
    words += [] if length is None else ["--sequence-length", str(length)]
    for axis in ("tensor", "pipeline"):
        words += [f"--{axis}", str(done.keys.get(f"parallel.{axis}", 1))]
    as_in_training = ("data.prompt_loss_weight", "data.pad_token_id", "data.document_mask", "evaluate.metrics")
    return words + [f"--{key}={show(done.keys[key])}" for key in as_in_training if key in done.keys]


if __name__ == "__main__":
    sys.exit(run_tool(words_of_verb))
