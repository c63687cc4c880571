"""Megatron-LLM's `verify_correctness.py`: the logits of a checkpoint against transformers' on tokenized data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file it sees only its own folder

from megatron.config.megatron_llm.table import read_flags
from megatron.utils.errors import ConfigError
from tools.finetune import gather_facts
from tools.hf_to_megatron import find_model
from tools.megatron_llm_flags import run_tool

_STEPS = 10
_OWN = ("huggingface_cache", "huggingface_device", "model_size")


def words_of_verb(words: Sequence[str]) -> list[str]:
    """The words of `megatron diff --logits` that mean the same."""
    own, rest = _take_own(words)
    flags = read_flags(rest)
    if "load" not in flags or "huggingface_cache" not in own or not flags.get("data_path"):
        raise ConfigError(
            "give --load (the checkpoint), --huggingface_cache (the model to compare with) and --data_path"
        )
    facts = gather_facts(flags, None)
    data = tuple(str(word) for word in flags["data_path"])  # type: ignore[union-attr]
    if len(data) != 1:
        raise ConfigError(f"--data_path {' '.join(data)}: give one prefix to compare on")
    length = flags.get("seq_length", facts.model["max_position_embeddings"])
    return [
        "diff",
        str(facts.load),
        find_model(str(flags.get("model_name", "")), own.get("model_size", "7"), None, own["huggingface_cache"]),
        *("--logits", data[0], "--sequence-length", str(length)),
        *("--micro-batch", str(flags.get("micro_batch_size", 1)), "--batches", str(flags.get("train_iters", _STEPS))),
        *("--device", own.get("huggingface_device", "cuda:1")),
    ]


def _take_own(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The flags that the trainer does not have, and the other words."""
    own: dict[str, str] = {}
    rest: list[str] = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in _OWN:
            rest.append(word)
            continue
        if not equals and not remaining:
            raise ConfigError(f"--{name} takes one value, but none follows it")
        own[name] = value if equals else remaining.pop(0)
    return own, rest


if __name__ == "__main__":
    sys.exit(run_tool(words_of_verb))
