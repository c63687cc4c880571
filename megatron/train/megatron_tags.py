"""Megatron-LLM's scalars under its tags, for dashboards that name those: beside the project's own figures.

As there, each step has its own, by step and by samples (`… vs samples`); they are written when a line is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.config.log import LogConfig
from megatron.evaluate.perplexity import Evaluation
from megatron.train.hooks import write_figures
from megatron.train.sinks import Sink, TensorBoard, WeightsAndBiases

_LARGEST_EXPONENT = 20.0
METRICS = {
    "perplexity": "ppl",
    "accuracy": "lm accuracy",
    "instruct_accuracy": "instruct accuracy",
    "count_loss_mask": "count loss mask",
    "count_instruct_mask": "count instruct mask",
}


class MegatronTags:
    """`boards` have an axis for each tag (TensorBoard); `others` have steps alone (Weights & Biases)."""

    def __init__(self, boards: Sequence[Sink], others: Sequence[Sink]) -> None:
        self.boards, self.others = boards, others

    def write(self, step: int, figures: Mapping[str, float], samples: int | None = None) -> None:
        """Figures after `step`; where `samples`, which are then consumed, are given, along these as well."""
        write_figures([*self.boards, *self.others], step, figures)
        if samples is not None:
            write_figures(self.boards, samples, {f"{tag} vs samples": figure for tag, figure in figures.items()})

    def evaluated(self, step: int, samples: int, evaluation: Evaluation) -> None:
        """The figures of a validation."""
        figures = {
            "lm loss validation": evaluation.loss,
            "lm loss validation ppl": perplexity(evaluation.loss),
            **{f"{METRICS[name]} validation": value for name, value in evaluation.metrics.items()},
        }
        self.write(step, figures, samples)

    def close(self) -> None:
        for board in self.boards:
            board.close()


def open_tags(config: LogConfig, sinks: Sequence[Sink]) -> MegatronTags | None:
    """Where the tags go: TensorBoard's files in `log.dir` itself, as there, and the Weights & Biases run among `sinks`;
    None where nobody asks for either. A run that goes on writes over what was written past its step, by step."""
    boards = [TensorBoard(Path(config.dir), None)] if config.dir is not None and config.tensorboard else []
    others = [sink for sink in sinks if isinstance(sink, WeightsAndBiases)]
    return MegatronTags(boards, others) if config.megatron_llm and (boards or others) else None


def perplexity(loss: float) -> float:
    """As Megatron-LLM has it: without overflow."""
    return math.exp(min(_LARGEST_EXPONENT, loss))
