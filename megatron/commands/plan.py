"""`megatron plan`: what a run will need and how long it will take, on GPUs that are not here."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "predict memory, time and communication of a run on GPUs that are not here"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("--config", metavar="FILE", help="configuration file, or the name of a preset (see docs)")
    parser.add_argument("--gpus", type=int, required=True, help="how many GPUs in all")
    parser.add_argument("--gpu", default="a100-80gb", help="name or YAML file of the GPU (default %(default)s)")
    parser.add_argument("--interconnect", help="name or YAML file; default: the usual one of the GPU (see docs)")
    parser.add_argument("--search", action="store_true", help="try other layouts, and list the best that fit")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--html", metavar="FILE", help="write a page with pictures there")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan. Raises ConfigError for what cannot be run."""
    from megatron.config.load import load_config
    from megatron.plan.estimate import estimate
    from megatron.plan.hardware import default_interconnect, load_gpu, load_interconnect
    from megatron.plan.page import to_page
    from megatron.plan.report import layouts_to_text, to_json, to_text
    from megatron.plan.search import search
    from megatron.train.origin import describe_model
    from megatron.utils.files import write_atomically

    unrecognized = " ".join(arguments.unrecognized)
    problems = [f"unrecognized arguments: {unrecognized}; see megatron plan --help"] if unrecognized else []
    # What a run reads is not needed to plan it.
    overrides = ["--data.train=synthetic", *arguments.overrides]
    config = load_config(arguments.config, overrides, problems=problems)
    model, title = describe_model(config)
    gpu = load_gpu(arguments.gpu)
    interconnect = load_interconnect(arguments.interconnect or default_interconnect(arguments.gpu))
    if arguments.search:
        found = search(config, model, arguments.gpus, gpu, interconnect, title)
        if arguments.json:
            print(json.dumps([to_json(result) for result in found]))
        else:
            print(layouts_to_text(found), end="")
        results = found[:1]
    else:
        results = [estimate(config, model, arguments.gpus, gpu, interconnect, title)]
        print(
            json.dumps(to_json(results[0])) if arguments.json else to_text(results[0]),
            end="\n" if arguments.json else "",
        )
    if arguments.html and results:
        write_atomically(Path(arguments.html), to_page(results[0]))
    return 0
