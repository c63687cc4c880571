"""`megatron convert`: a model from any format to any other, cut for a grid in the same pass."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.checkpoint.convert import Conversion
    from megatron.checkpoint.source import Format
    from megatron.checkpoint.vocabulary import Extension

HELP = "convert a model between Hugging Face's, Meta's, Megatron-LLM's and our own format"

_FORMATS: dict[str, Format] = {
    "hf": "huggingface",
    "native": "native",
    "meta": "meta",
    "megatron-llm": "megatron-llm",
    "peft": "peft",
}
_TITLES = {
    "huggingface": "Hugging Face",
    "native": "native",
    "meta": "Meta",
    "megatron-llm": "Megatron-LLM",
    "peft": "PEFT",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument(
        "source", metavar="SRC", help="folder of a model in any format, save folder, or hf://owner/name on the hub"
    )
    parser.add_argument("destination", metavar="DST", help="new folder to write, or hf://owner/name to upload to")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of SRC on the hub (default: main)")
    parser.add_argument(
        "--to",
        choices=tuple(_FORMATS),
        help="format to write (default: native; hf where the source is native or has adapters)",
    )
    parser.add_argument(
        "--tensor", type=int, metavar="N", help="cut the files for N tensor ranks (native ones load on any grid)"
    )
    parser.add_argument("--pipeline", type=int, metavar="N", help="and for N stages")
    parser.add_argument(
        "--verify",
        metavar="DATA",
        help="afterwards compare logits with transformers on a text file or a .bin/.idx pair; exit code 1 where they "
        "differ",
    )
    parser.add_argument("--layers", action="store_true", help="with --verify: compare behind each layer as well")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp16", "fp64"), help="cast the weights (default: keep)")
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="adapters to put into the weights: PEFT's, or those of a run"
    )
    parser.add_argument("--extra-tokens", metavar="A,B|FILE", help="tokens to add to the vocabulary, in this order")
    parser.add_argument(
        "--initialize",
        choices=("mean", "normal", "copy"),
        help="added rows: the mean of the model's (default), drawn around it, or copies of the last",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="rows of embedding and output layer (default: as many as there are, or as the added tokens need)",
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="most that a file holds, as 500MB or 5GiB (default: 4GB)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Convert, with a progress line on stderr and a summary at the end. Raises MegatronError."""
    from megatron.utils.hub import check_may_upload, parse_address

    upload_to = parse_address(arguments.destination)
    if upload_to is None:
        return _convert(arguments, Path(arguments.destination))
    from megatron.checkpoint.hub import upload_model
    from megatron.utils.errors import ConfigError

    if arguments.to not in (None, "hf", "peft"):
        raise ConfigError(
            f"--to {arguments.to}: what is uploaded to {upload_to} is in Hugging Face's format (--to hf) or PEFT's."
        )
    arguments.to = arguments.to or "hf"
    check_may_upload(upload_to)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / upload_to.name.rpartition("/")[2]
        code = _convert(arguments, folder)
        if code != 0:
            print(f"{upload_to}: not uploaded")
        else:
            # A new repository is private: what is public once cannot be taken back.
            print(f"{upload_to}: uploaded to {upload_model(folder, upload_to, private=True)}")
    return code


def _convert(arguments: argparse.Namespace, destination: Path) -> int:
    from megatron.checkpoint.convert import DTYPES, convert
    from megatron.utils.hub import with_revision
    from megatron.utils.progress import ProgressLine
    from megatron.utils.units import format_bytes, format_count, format_duration

    began = time.monotonic()
    line = ProgressLine()
    try:
        done = convert(
            with_revision(arguments.source, arguments.revision),
            destination,
            to=_FORMATS.get(arguments.to),
            tensor=arguments.tensor,
            pipeline=arguments.pipeline,
            dtype=DTYPES.get(arguments.dtype),
            extension=_extension(arguments),
            file_bytes=None if arguments.max_shard_size is None else _size(arguments.max_shard_size),
            adapter=_adapter(arguments),
            progress=line.show,
        )
    finally:
        line.clear()
    seconds = time.monotonic() - began
    print(
        f"{done.source} -> {done.destination} ({_TITLES[done.format]}): "
        f"{done.tensors} tensors, {format_count(done.parameters)} parameters, {format_bytes(done.size_bytes)} in "
        f"{done.files} {'file' if done.files == 1 else 'files'}, {format_duration(seconds)}"
    )
    for part in done.left_out:
        print(f"Not carried over: {part}.")
    return 0 if arguments.verify is None else _verify(done, arguments.verify, arguments.layers)


def _verify(done: Conversion, data: str, layers: bool) -> int:
    """Ours computes the one folder, transformers the other: that of its own format, else the source as it reads it."""
    from megatron.verify.logits import Wish, agreement_line, agreements, verdict

    pair = (done.source, done.destination) if done.format == "huggingface" else (done.destination, done.source)
    found = list(agreements(*pair, Wish(data, layers=layers)))
    if layers:
        print("\n".join(agreement_line(number, agreement) for number, agreement in enumerate(found)))
    print(verdict(found))
    return 0 if all(agreement.holds for agreement in found) else 1


def _adapter(arguments: argparse.Namespace) -> str | None:
    from megatron.utils.errors import ConfigError

    adapted = arguments.adapter is not None or arguments.to == "peft"
    if arguments.verify is not None and adapted:
        raise ConfigError(
            "--verify opens SRC and DST as models of the same weights, which they are not with --adapter or --to peft. "
            "Convert first; a run with adapters can be converted and verified without --adapter."
        )
    return arguments.adapter


def _extension(arguments: argparse.Namespace) -> Extension | None:
    from megatron.checkpoint.vocabulary import Extension
    from megatron.tokenizer import read_extra_tokens
    from megatron.utils.errors import ConfigError

    if arguments.extra_tokens is None and arguments.vocab_size is None:
        if arguments.initialize is not None:
            raise ConfigError("--initialize is for the rows of --extra-tokens or --vocab-size: give one of them.")
        return None
    if arguments.verify is not None:
        raise ConfigError(
            "--verify compares a model with the same model, and another vocabulary makes another: convert first, then "
            "verify a conversion of the result."
        )
    if arguments.vocab_size is not None and arguments.vocab_size < 1:
        raise ConfigError(f"--vocab-size {arguments.vocab_size} must be at least 1.")
    tokens = () if arguments.extra_tokens is None else tuple(read_extra_tokens(arguments.extra_tokens))
    return Extension(tokens, arguments.initialize or "mean", arguments.vocab_size)


def _size(text: str) -> int:
    from megatron.utils.errors import ConfigError
    from megatron.utils.units import parse_bytes

    count = parse_bytes(text)
    if count is None:
        raise ConfigError(f"--max-shard-size {text!r} is no size: give bytes, or a number with MB, GB, MiB or GiB.")
    return count
