"""`megatron evaluate`: the mean loss of a model over token streams or conversations, as one JSON line."""

from __future__ import annotations

import argparse
import math
import typing
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron.utils.errors import ConfigError

if TYPE_CHECKING:
    from megatron.config.run import RunConfig
    from megatron.evaluate.perplexity import Evaluation

HELP = "measure a model's loss, perplexity and accuracy on held-out data"
TAKES_OVERRIDES = True

_CURE = "Make --micro-batch or --sequence-length smaller, or use more processes with --tensor, --context or --pipeline."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    from megatron.config.evaluate import MetricName

    parser.add_argument(
        "--load", required=True, metavar="FOLDER", help="a checkpoint or a Hugging Face model, here or hf://owner/name"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data", metavar="PREFIX", help="all of a .bin/.idx pair, or of conversations (PREFIX-text, -role)"
    )
    what.add_argument(
        "--split",
        choices=("validation", "test"),
        help="all that a run holds out: data.validation or data.test, or that part of data.split",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="the run's configuration, or the name of a preset (default: of --split the one in the checkpoint)",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=typing.get_args(MetricName),
        help="figures besides the loss (default: evaluate.metrics of the configuration)",
    )
    parser.add_argument(
        "--sequence-length",
        type=_positive,
        metavar="N",
        help="tokens per window (default: data.sequence_length, or else the model's max_position_embeddings)",
    )
    parser.add_argument("--micro-batch", type=_positive, default=1, metavar="N", help="windows at a time (default 1)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp64"), default="fp32", help="arithmetic (default fp32)"
    )
    parser.add_argument(
        "--document-mask",
        action="store_true",
        help="keep attention and positions within documents, as data.document_mask",
    )
    parser.add_argument(
        "--megatron-llm", action="store_true", help="also print the lines that Megatron-LLM prints for test data"
    )
    grid = parser.add_argument_group("grid under torchrun (what is left of the processes shares the windows)")
    for axis in ("tensor", "context", "pipeline"):
        grid.add_argument(f"--{axis}", type=_positive, metavar="N", help=f"also --parallel.{axis} (default 1)")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print. Raises MegatronError for what does not fit each other."""
    import json
    import sys

    from megatron.config.load import load_config

    if arguments.unrecognized:
        raise ConfigError(f"unrecognized arguments: {' '.join(arguments.unrecognized)}; see megatron evaluate --help")
    of_grid, others = _divide(arguments.overrides)
    parallel = load_config(None, of_grid).parallel  # a run's own grid is not that of its evaluation
    config = _configuration(arguments, others)

    from megatron.data.build import TEST, VALIDATION
    from megatron.evaluate.run import evaluate_folder
    from megatron.parallel.world import start_world
    from megatron.train.megatron_lines import evaluation_lines
    from megatron.utils.device import explain_out_of_memory

    data = config.data
    if arguments.data is not None:
        data = replace(data, train=None, validation=arguments.data, test=None, split=None)
    with start_world(timeout_s=1800) as world, explain_out_of_memory(world.device, world.launch.rank, _CURE):
        result = evaluate_folder(
            world,
            load=arguments.load,
            data=data,
            part=TEST if arguments.split == "test" else VALIDATION,
            sequence_length=arguments.sequence_length or data.sequence_length,
            micro_batch=arguments.micro_batch,
            precision=arguments.precision,
            tensor=arguments.tensor or parallel.tensor,
            context=arguments.context or parallel.context,
            pipeline=arguments.pipeline or parallel.pipeline,
            document_mask=arguments.document_mask or data.document_mask,
            metrics=arguments.metrics or config.evaluate.metrics,
            tokenizer=config.tokenizer.path,
        )
        if world.launch.rank == 0:
            if arguments.megatron_llm:
                sys.stdout.write(evaluation_lines(result, "the end of training for test data"))
            sys.stdout.write(json.dumps(_to_json(result)) + "\n")
            sys.stdout.flush()
    return 0


def _configuration(arguments: argparse.Namespace, overrides: Sequence[str]) -> RunConfig:
    """The configuration that is named, that of the run in the checkpoint, or the defaults, with the overrides."""
    from megatron.config.load import load_config

    if arguments.data is not None:
        from megatron.data.instruction.pair import holds_conversations

        kind = "instruction" if holds_conversations(arguments.data) else "pretraining"
        return load_config(arguments.config, [*overrides, f"--data.kind={kind}"])
    if arguments.config is not None:
        return load_config(arguments.config, overrides)

    from megatron.checkpoint.native import RUN_CONFIG
    from megatron.checkpoint.source import open_source
    from megatron.utils.hub import parse_address

    if parse_address(arguments.load) is not None:  # what is on the hub has no run of its own
        return load_config(None, overrides)
    with open_source(arguments.load) as source:
        saved = source.folder / RUN_CONFIG
    return load_config(str(saved) if saved.exists() else None, overrides)


def _divide(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that set keys of the grid, and the others."""
    of_grid: list[str] = []
    others: list[str] = []
    into = others
    for word in overrides:
        if word.startswith("--"):
            into = of_grid if word.startswith("--parallel.") else others
        into.append(word)
    return of_grid, others


def _to_json(result: Evaluation) -> dict[str, Any]:
    line = {"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens, **result.metrics}
    # JSON has no word for a figure that is not finite
    known: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in line.items()}
    return known | ({"sources": {name: _to_json(part) for name, part in result.parts.items()}} if result.parts else {})


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number
