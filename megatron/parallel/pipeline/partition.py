"""Which layers each pipeline stage holds."""

from __future__ import annotations


def layers_of_stage(num_layers: int, stages: int, stage: int) -> range:
    """The layers of one stage: even shares, the earlier stages taking one more where they do not come out even.

    The last stage has the output product besides its layers, so it is the last to get an extra one.
    """
    share, extra = divmod(num_layers, stages)
    start = stage * share + min(stage, extra)
    return range(start, start + share + (1 if stage < extra else 0))


def describe_partition(num_layers: int, stages: int) -> str:
    """The number of layers of each stage, as `3 + 2`."""
    return " + ".join(str(len(layers_of_stage(num_layers, stages, stage))) for stage in range(stages))
