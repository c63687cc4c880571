"""How long a run is and how its rate goes, from Megatron-LLM's flags to steps.

There a schedule is read in samples: warm-up W and horizon H, at n samples seen. Here it is read in steps, which is the
same where the batch is: n = step · batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.config.batches import GlobalBatch, Ramp


@dataclass
class Length:
    """Keys of the configuration, what to tell, and what is wrong."""

    keys: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def ramp_of(start: int, increment: int, samples: int, batch: int, sequence_length: int) -> GlobalBatch:
    """`train.global_batch` of `--rampup_batch_size start increment samples` up to `batch`.

    The k-th increment counts from sample k · samples / increments on.
    """
    count = (batch - start) // increment
    stages = [(0, start)]
    for number in range(1, count + 1):
        first = -(-number * samples // count)
        stages.append((first * sequence_length, start + number * increment))
    return tuple(stages)


def length_of_run(flags: Mapping[str, Any], batch: GlobalBatch, sequence_length: int) -> Length:
    """`train.steps` and the optimizer's steps. `batch` is the batch or its ramp, in tokens."""
    length = Length()
    by_samples = "train_samples" in flags
    _check_units(flags, length.problems)
    if length.problems:
        return length
    ramp = Ramp.of(batch, sequence_length)
    if not isinstance(batch, int):
        if not by_samples:
            length.problems.append("--rampup_batch_size needs --train_samples: it counts samples")
            return length
        length.notices.append(
            "--rampup_batch_size: while the batch grows, the learning rate goes by steps, not by samples"
        )
    steps = ramp.steps_within(flags["train_samples"]) if by_samples else flags["train_iters"]
    if steps < 1:
        length.problems.append(f"--train_samples {flags['train_samples']} is not enough for one step")
        return length
    length.keys["train.steps"] = steps

    def in_steps(samples: float, flag: str) -> int:
        whole = ramp.steps_within(int(samples))
        if ramp.position_after(whole) != samples:
            whole = round(samples / batch) if isinstance(batch, int) else whole
            length.notices.append(f"{flag} is {samples:g} samples, taken as {whole} steps")
        return whole

    horizon = steps
    horizon_samples = float(flags["train_samples"] if by_samples else ramp.position_after(steps))
    if "lr_decay_iters" in flags:
        horizon = flags["lr_decay_iters"]
        horizon_samples = float(ramp.position_after(horizon))
    elif "lr_decay_samples" in flags:
        horizon_samples = float(flags["lr_decay_samples"])
        horizon = in_steps(horizon_samples, "--lr_decay_samples")
    length.keys["optimizer.decay_steps"] = horizon
    if "lr_warmup_fraction" in flags:
        warmup = in_steps(flags["lr_warmup_fraction"] * horizon_samples, "--lr_warmup_fraction")
    elif "lr_warmup_samples" in flags:
        warmup = in_steps(flags["lr_warmup_samples"], "--lr_warmup_samples")
    else:
        warmup = flags.get("lr_warmup_iters", 0)
    length.keys["optimizer.warmup_steps"] = warmup
    return length


def _check_units(flags: Mapping[str, Any], problems: list[str]) -> None:
    """A run is counted in iterations or in samples, and so is its schedule."""
    given = [name for name in ("train_iters", "train_samples") if name in flags]
    if len(given) != 1:
        both = "both are given" if given else "neither is given"
        problems.append(f"a run needs --train_iters or --train_samples, and {both}")
        return
    wrong = "samples" if given == ["train_iters"] else "iters"
    problems += [
        f"--{name} goes with --train_{wrong}, but --{given[0]} is given"
        for name in (f"lr_decay_{wrong}", f"lr_warmup_{wrong}")
        if flags.get(name)
    ]
    warmups = [name for name in ("lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples") if flags.get(name)]
    if len(warmups) > 1:
        problems.append(f"--{' and --'.join(warmups)} say the same; leave one out")
    fraction = flags.get("lr_warmup_fraction", 0.0)
    if not 0.0 <= fraction <= 1.0:
        problems.append(f"--lr_warmup_fraction {fraction} is not a part of the horizon; give 0 to 1")
    problems += [
        f"--{name} {flags[name]} must be above 0"
        for name in ("train_iters", "train_samples", "lr_decay_iters", "lr_decay_samples")
        if name in flags and flags[name] < 1
    ]
