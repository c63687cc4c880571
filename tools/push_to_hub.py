"""Megatron-LLM's `tools/push_to_hub.py`: write a model in Hugging Face's format, and upload it to its hub."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file it sees only its own folder

from megatron.checkpoint.convert import DTYPES, convert
from megatron.checkpoint.hub import upload_model
from megatron.checkpoint.huggingface import MODEL_CONFIG, config_text, is_huggingface, read_config
from megatron.model.config import spell_for_both
from megatron.utils.errors import ConfigError, MegatronError
from megatron.utils.files import write_atomically
from megatron.utils.hub import check_may_upload, named
from megatron.utils.units import parse_bytes
from tools.megatron_llm_flags import Parser

_DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The flags of a command line. Raises ConfigError for what is not done."""
    parser = Parser("write a model in Hugging Face's format, and upload it")
    parser.add_argument("folder", type=Path, help="model of any format")
    parser.add_argument("--hf_repo_name", metavar="OWNER/NAME", help="repository to upload to")
    parser.add_argument("--output_folder", type=Path, help="folder to write")
    parser.add_argument("--auth_token", help="better in the environment variable HF_TOKEN")
    parser.add_argument("--dtype", default="auto", choices=["auto", *_DTYPES, *DTYPES], help="cast the weights")
    parser.add_argument("--max_shard_size", metavar="SIZE", help="most that a file holds, as 10GB (default: 4GB)")
    parser.add_argument("--rope_scaling_type", default="linear", choices=["linear", "dynamic"])
    parser.add_argument("--rope_scaling_factor", type=float, help="write it into config.json")
    parser.add_argument("--unsafe", action="store_true", help="refused: weights are written as safetensors")
    parser.add_argument("--trust_remote_code", action="store_true", help="refused: no code of a model is run")
    arguments = parser.read(words)
    if arguments.unsafe or arguments.trust_remote_code:
        raise ConfigError("--unsafe, --trust_remote_code: safetensors are written, and no code of a model is ever run")
    if arguments.max_shard_size is not None and parse_bytes(arguments.max_shard_size) is None:
        raise ConfigError(f"--max_shard_size {arguments.max_shard_size} is no size: give one such as 10GB")
    if arguments.hf_repo_name is None and arguments.output_folder is None:
        raise ConfigError("give --hf_repo_name, to upload, or --output_folder, to write")
    return arguments


def prepare(arguments: argparse.Namespace, destination: Path) -> Path:
    """The folder to upload: the one that is there, where nothing of it is to change."""
    factor, size = arguments.rope_scaling_factor, arguments.max_shard_size
    asked = (factor, size, arguments.output_folder)
    if arguments.dtype == "auto" and asked == (None, None, None) and is_huggingface(arguments.folder):
        return Path(arguments.folder)
    dtype = DTYPES.get(_DTYPES.get(arguments.dtype, arguments.dtype))
    file_bytes = None if size is None else parse_bytes(size)
    convert(arguments.folder, destination, to="huggingface", dtype=dtype, file_bytes=file_bytes)
    if factor is not None:
        scale_positions(destination, {"type": arguments.rope_scaling_type, "factor": factor})
    return destination


def scale_positions(folder: Path, scaling: dict[str, Any]) -> None:
    """Write another scaling of positions into `config.json`, wherever that says it."""
    content = read_config(folder)
    content.pop("rope_parameters", None)  # which says what was before, and is written anew
    content = spell_for_both({**content, "rope_scaling": scaling}, content["dtype"])
    write_atomically(folder / MODEL_CONFIG, config_text(content))


def main(words: Sequence[str]) -> int:
    """Write and upload; the exit code."""
    try:
        arguments = parse(words)
        repository = None if arguments.hf_repo_name is None else named(arguments.hf_repo_name)
        if repository is not None:
            check_may_upload(repository, arguments.auth_token)
        with tempfile.TemporaryDirectory() as temporary:
            folder = prepare(arguments, arguments.output_folder or Path(temporary) / "huggingface")
            if repository is not None:
                if arguments.auth_token is not None:
                    sys.stderr.write("--auth_token can be seen by everyone on this machine: better set HF_TOKEN\n")
                address = upload_model(folder, repository, arguments.auth_token)
                sys.stdout.write(f"{folder} -> {address}\n")
    except MegatronError as error:
        sys.stderr.write(f"push_to_hub.py: error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
