"""Megatron-LLM's `tools/push_to_hub.py`: write a model in Hugging Face's format, and upload it to its hub."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file it sees only its own folder

from megatron.checkpoint.convert import DTYPES, convert
from megatron.checkpoint.hub import upload_model
from megatron.checkpoint.huggingface import MODEL_CONFIG, is_huggingface
from megatron.utils.errors import ConfigError, MegatronError
from megatron.utils.files import write_atomically
from megatron.utils.hub import named
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
    parser.add_argument("--max_shard_size", help="accepted, without effect: files are cut at a size of our own")
    parser.add_argument("--rope_scaling_type", default="linear", choices=["linear", "dynamic"])
    parser.add_argument("--rope_scaling_factor", type=float, help="write it into config.json")
    parser.add_argument("--unsafe", action="store_true", help="refused: weights are written as safetensors")
    parser.add_argument("--trust_remote_code", action="store_true", help="refused: no code of a model is run")
    arguments = parser.read(words)
    if arguments.unsafe or arguments.trust_remote_code:
        raise ConfigError("--unsafe, --trust_remote_code: safetensors are written, and no code of a model is ever run")
    if arguments.hf_repo_name is None and arguments.output_folder is None:
        raise ConfigError("give --hf_repo_name, to upload, or --output_folder, to write")
    return arguments


def prepare(arguments: argparse.Namespace, destination: Path) -> Path:
    """The folder to upload: the one that is there, where nothing of it is to change."""
    factor = arguments.rope_scaling_factor
    changes = factor is not None or arguments.dtype != "auto" or arguments.output_folder is not None
    if not changes and is_huggingface(arguments.folder):
        return Path(arguments.folder)
    dtype = DTYPES.get(_DTYPES.get(arguments.dtype, arguments.dtype))
    convert(arguments.folder, destination, to="huggingface", dtype=dtype)
    if factor is not None:
        path = destination / MODEL_CONFIG
        scaling = {"type": arguments.rope_scaling_type, "rope_type": arguments.rope_scaling_type, "factor": factor}
        content = {**json.loads(path.read_text(encoding="utf-8")), "rope_scaling": scaling}
        write_atomically(path, json.dumps(content, indent=2) + "\n")
    return destination


def main(words: Sequence[str]) -> int:
    """Write and upload; the exit code."""
    try:
        arguments = parse(words)
        repository = None if arguments.hf_repo_name is None else named(arguments.hf_repo_name)
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
