"""`megatron evaluate`: the mean loss of a model over a token stream, as one JSON line."""

from __future__ import annotations

import argparse

HELP = "measure a model's loss and perplexity on a .bin/.idx pair"

_CURE = "Make --micro-batch or --sequence-length smaller, or use more processes with --tensor, --context or --pipeline."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--load", required=True, metavar="FOLDER", help="a checkpoint or a Hugging Face model, here or hf://owner/name"
    )
    parser.add_argument("--data", required=True, metavar="PREFIX", help="prefix of the .bin/.idx pair")
    parser.add_argument(
        "--sequence-length",
        type=_positive,
        metavar="N",
        help="tokens per window (default: the model's max_position_embeddings)",
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
    grid.add_argument("--tensor", "--parallel.tensor", dest="tensor", type=_positive, default=1, metavar="N")
    grid.add_argument("--context", "--parallel.context", dest="context", type=_positive, default=1, metavar="N")
    grid.add_argument("--pipeline", "--parallel.pipeline", dest="pipeline", type=_positive, default=1, metavar="N")


def run(arguments: argparse.Namespace) -> int:
    import json
    import math
    import sys

    from megatron.evaluate.run import evaluate_folder
    from megatron.parallel.world import start_world
    from megatron.train.megatron_lines import evaluation_lines
    from megatron.utils.device import explain_out_of_memory

    with start_world(timeout_s=1800) as world, explain_out_of_memory(world.device, world.launch.rank, _CURE):
        result = evaluate_folder(
            world,
            load=arguments.load,
            data=arguments.data,
            sequence_length=arguments.sequence_length,
            micro_batch=arguments.micro_batch,
            precision=arguments.precision,
            tensor=arguments.tensor,
            context=arguments.context,
            pipeline=arguments.pipeline,
            document_mask=arguments.document_mask,
        )
        if world.launch.rank == 0:
            if arguments.megatron_llm:
                sys.stdout.write(evaluation_lines(result, "the end of training for test data"))
            line = {"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens}
            # JSON has no word for a figure that is not finite
            finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
            sys.stdout.write(json.dumps(finite) + "\n")
            sys.stdout.flush()
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number
