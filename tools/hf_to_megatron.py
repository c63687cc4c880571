"""Megatron-LLM's `weights_conversion/hf_to_megatron.py`: its flags, carried out by `megatron convert`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file it sees only its own folder

from megatron.utils.errors import ConfigError
from megatron.utils.logging import get_logger
from tools.megatron_llm_flags import Parser, run_tool
from tools.weights import find_on_hub, read_model

_logger = get_logger("megatron.hf_to_megatron")

MODELS = ("falcon", "llama", "llama2", "codellama", "mistral")
# Where a model is when no folder is named; the first Llama was never published on the hub.
_NAMES = {
    "falcon": "tiiuae/falcon-{size}b",
    "llama2": "meta-llama/Llama-2-{size}b-hf",
    "codellama": "codellama/CodeLlama-{size}b-hf",
    "mistral": "mistralai/Mistral-{size}B-v0.1",
}


def words_of_verb(words: Sequence[str]) -> list[str]:
    """The words of `megatron convert` that mean the same."""
    parser = Parser("write a model of Hugging Face's or Meta's format in Megatron-LLM's")
    parser.add_argument("model", choices=MODELS, help="family of the model")
    parser.add_argument("--size", type=int, default=7, choices=(7, 13, 30, 34, 40, 65, 70), help="billions")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--model_path", help="Hugging Face folder, or a name on its hub")
    parser.add_argument("--cache_dir", help="Hugging Face cache, or Meta's folder with consolidated.00.pth")
    arguments = parser.read(words)
    source = find_model(arguments.model, arguments.size, arguments.model_path, arguments.cache_dir)
    model = read_model(source)
    family = "llama" if arguments.model in ("llama2", "codellama") else arguments.model
    if model.model_type != family:
        raise ConfigError(f"{source} holds a model of the family {model.model_type}, not {arguments.model}")
    if not 0.75 < model.num_parameters / (arguments.size * 1e9) < 1.25:
        _logger.info(
            "--size %d: %s has %s parameters, which count", arguments.size, source, f"{model.num_parameters:,}"
        )
    return ["convert", source, arguments.out, "--to", "megatron-llm"]


def find_model(model: str, size: int | str, path: str | None, cache: str | None) -> str:
    """The folder of the weights."""
    if path is not None and Path(path).is_dir():
        return path
    if path is None and cache is not None and any((Path(cache) / name).is_file() for name in _MARKS):
        return cache
    name = path or _NAMES.get(model, "").format(size=size)
    if not name:
        raise ConfigError(f"{model} is not on the Hugging Face hub: name Meta's folder with --cache_dir")
    return find_on_hub(name, cache)


_MARKS = ("params.json", "config.json")

if __name__ == "__main__":
    sys.exit(run_tool(words_of_verb))
