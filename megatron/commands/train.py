"""`megatron train`: train a model, from the start or from where the last run of the same command stopped."""

from __future__ import annotations

import argparse

HELP = "train a model, alone or under torchrun"
TAKES_OVERRIDES = True

_CURE = (
    "Make train.micro_batch or data.sequence_length smaller, or spread the model over more devices with "
    "parallel.tensor, parallel.pipeline or, for the optimizer state, more data ranks with parallel.zero 1, for weights "
    "and gradients too with parallel.zero 3; train.recompute keeps fewer activations."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="configuration file, or the name of a preset (see docs)")


def run(arguments: argparse.Namespace) -> int:
    from megatron.config.load import load_config
    from megatron.utils.environment import read_launch

    unrecognized = " ".join(arguments.unrecognized)
    config = load_config(
        arguments.config,
        arguments.overrides,
        world_size=read_launch().world_size,
        problems=[f"unrecognized arguments: {unrecognized}; see megatron train --help"] if unrecognized else [],
    )

    from megatron.parallel.world import start_world
    from megatron.train.build import build_trainer
    from megatron.utils.device import explain_out_of_memory

    with (
        start_world(config.parallel.timeout_s) as world,
        explain_out_of_memory(world.device, world.launch.rank, _CURE),
        build_trainer(config, world) as trainer,
    ):
        trainer.fit()
    return 0
