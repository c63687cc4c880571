"""The main job from end to end on a tiny model: text and a Hugging Face folder in, a better Hugging Face folder out.

    make quickstart            or, once set up, from anywhere:
    .venv/bin/python examples/quickstart/quickstart.py

Everything is written to `quickstart/` at the root of the project, which each start empties. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import statistics
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner import Command, QuickstartError, Runner, clean_folder, interrupt_on_termination, table

ROOT = Path(__file__).resolve().parents[2]
HERE = "examples/quickstart"
STEPS = 200
# One thread for each process, no GPU even where there are some (two processes cannot share one), nothing downloaded.
VARIABLES = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
FILES = (
    ("loss.png", "the loss curve"),
    ("export/", "the trained model in Hugging Face's format"),
    ("checkpoints/", "the run's checkpoints: the same command with a larger --train.steps goes on from there"),
    ("log/metrics.jsonl", "the figures of every logged step"),
    ("output/", "all that the commands said"),
)
NEEDED = ("megatron", "torch", "sentencepiece", "transformers", "matplotlib")


def plan(steps: int = STEPS) -> list[Command]:
    """All commands, in order, as they are typed at the root of the project."""
    return [*_preparation(), *_training(steps), *_harvest(steps)]


def _preparation() -> list[Command]:
    preprocess = "megatron preprocess --input {0}/data/{1}.jsonl --output-prefix quickstart/data/{1} --tokenizer {2}"
    return [
        _command(
            "Make a tiny Llama", f"python {HERE}/make_model.py {HERE}/data/train.jsonl quickstart/model", "quickstart"
        ),
        _command(
            "Tokenize the training text", preprocess.format(HERE, "train", "quickstart/model --append-eod"), "^wrote"
        ),
        _command(
            "Tokenize the held-out text", preprocess.format(HERE, "heldout", "quickstart/model --append-eod"), "^wrote"
        ),
        _command("Convert to a sharded checkpoint", "megatron convert quickstart/model quickstart/start --tensor 2"),
        _evaluate("before", "start", "heldout", "held-out"),
        _evaluate("before", "start", "train", "training"),
    ]


def _training(steps: int) -> list[Command]:
    train = f"-m megatron train --config {HERE}/config.yaml --parallel.tensor 2"
    shrunk = "" if steps == STEPS else f" --optimizer.decay_steps {steps} --optimizer.warmup_steps 1 --log.interval 1"
    last = "" if steps == STEPS else f" --train.steps {steps}"
    shown = "^(model|grid|warning)|validation|^megatron [a-z]+: error"
    return [
        _command(
            "Train on 2 processes: tensor 2",
            f"torchrun --standalone --nproc-per-node 2 {train} --train.steps {steps // 2}{shrunk}",
            shown,
        ),
        _command(
            "Go on with 4 processes: tensor 2 x pipeline 2",
            f"torchrun --standalone --nproc-per-node 4 {train} --parallel.pipeline 2{last}{shrunk}",
            shown,
        ),
    ]


def _harvest(steps: int) -> list[Command]:
    held_out = f"quickstart/data/heldout_text_document {HERE}/data/heldout.jsonl"
    phases = f"--phase 0 'tensor 2 on 2 processes' --phase {steps // 2} 'tensor 2 × pipeline 2 on 4 processes'"
    return [
        _evaluate("after", "checkpoints", "heldout", "held-out"),
        _evaluate("after", "checkpoints", "train", "training"),
        _command(
            "Export to Hugging Face's format", "megatron convert quickstart/checkpoints quickstart/export --to hf"
        ),
        _command(
            "Load it with transformers and compare",
            f"python {HERE}/compare.py quickstart/checkpoints quickstart/export {held_out}",
            "agree|Error",
            output="quickstart/results/transformers.json",
        ),
        _command(
            "Draw the loss curve",
            f"python {HERE}/plot_loss.py quickstart/log/metrics.jsonl quickstart/loss.png "
            f"--start quickstart/results/before-heldout.json {phases}",
            "quickstart",
        ),
    ]


def _evaluate(when: str, model: str, data: str, name: str) -> Command:
    text = f"megatron evaluate --load quickstart/{model} --data quickstart/data/{data}_text_document --micro-batch 16"
    title = f"Measure the loss on the {name} text, {when} training"
    return _command(title, text, "error:|^warning", output=f"quickstart/results/{when}-{data}.json")


def _command(title: str, text: str, show: str = ".", output: str | None = None) -> Command:
    return Command(title, tuple(shlex.split(text)), output, show)


def main(words: Sequence[str] | None = None) -> int:
    """Run the plan and sum it up; the exit code."""
    parser = argparse.ArgumentParser(description="The main job from end to end on a tiny model, in a few minutes.")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"training steps, half on each grid (default {STEPS}, at least 2)"
    )
    arguments = parser.parse_args(words)
    if arguments.steps < 2:
        parser.error(f"--steps {arguments.steps}: at least 2, one on each grid")
    interrupt_on_termination()
    try:
        _check_set_up()
        with clean_folder(ROOT / "quickstart"):
            _run(arguments.steps)
    except QuickstartError as error:
        print(f"\nquickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nquickstart: interrupted; the next start begins anew", file=sys.stderr)
        return 130
    return 0


def _check_set_up() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise QuickstartError(
            f"{sys.executable} has no {', '.join(missing)}: start with `make quickstart`, which sets up all it needs, "
            f"or with {ROOT / '.venv' / 'bin' / 'python'} if that was done."
        )


def _run(steps: int) -> None:
    began = time.monotonic()
    for name in ("data", "results", "output"):
        (ROOT / "quickstart" / name).mkdir()
    commands = plan(steps)
    print("\n".join(["To type the commands below yourself, begin with", *(f"  {line}" for line in preamble())]))
    runner = Runner(ROOT, ROOT / "quickstart" / "output", VARIABLES, len(commands))
    for command in commands:
        runner.run(command)
    print(summary(ROOT / "quickstart", steps, time.monotonic() - began))


def preamble() -> list[str]:
    """What the shell has to know before the commands."""
    exports = " ".join(f"{name}={value}" for name, value in VARIABLES.items())
    lines = [f"cd {shlex.quote(str(ROOT))}", f"export {exports}", "mkdir -p quickstart/results"]
    if sys.prefix != sys.base_prefix:
        lines.insert(1, f"source {shlex.quote(os.path.relpath(sys.prefix, ROOT))}/bin/activate")
    return lines


def summary(folder: Path, steps: int, seconds: float) -> str:
    """The closing tables, from the files that the commands wrote."""
    metrics = [json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]
    results = {path.stem: json.loads(path.read_text()) for path in (folder / "results").iterdir()}
    compared = results["transformers"]
    losses = [
        (name, *(f"{results[f'{when}-{data}']['loss']:.3f}" for when in ("before", "after")))
        for name, data in (("held-out text", "heldout"), ("training text", "train"))
    ]
    speeds = [
        ("2 processes: tensor 2", _speed(metrics, 0, steps // 2)),
        ("4 processes: tensor 2 x pipeline 2", _speed(metrics, steps // 2, steps)),
    ]
    agreement = [
        ("held-out loss by this project", f"{compared['loss']:.6f}"),
        ("held-out loss by transformers", f"{compared['loss_transformers']:.6f}"),
        ("largest difference of a logit", f"{compared['largest_logit_difference']:.1e}"),
    ]
    parts = (
        table([("Loss (nats per token)", "before", "after"), *losses]),
        table([("Training speed", "tokens/s"), *speeds]),
        table([("The exported model", ""), *agreement]),
        "What it writes by itself, having read so little\n" + textwrap.indent(compared["sample"], "  "),
        f"Files in {folder}\n" + "\n".join(f"  {name:<20}{what}" for name, what in FILES),
        f"Done in {seconds:.0f} s.",
    )
    return "\n" + "\n\n".join(parts)


def _speed(metrics: list[dict[str, Any]], after: int, until: int) -> str:
    rates = [line["tokens_per_second"] for line in metrics if after < line["step"] <= until]
    return f"{statistics.median(rates):,.0f}"


if __name__ == "__main__":
    sys.exit(main())
