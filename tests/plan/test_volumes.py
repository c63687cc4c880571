"""What a rank sends in a step is what the closed formulas of the literature say, to the byte, the small things listed.

Volumes are bytes sent by each rank of a ring (Patarasuk and Yuan, 2009): Narayanan et al. (arXiv 2104.04473, section
3.2) for tensor and pipeline, Korthikanti et al. (arXiv 2205.05198, section 4.2.2) for sequence parallelism, Rajbhandari
et al. (arXiv 1910.02054, section 7) for data ranks, Liu et al. (arXiv 2310.01889) for context. That planned messages
are those of real runs is for test_against_real_runs.py.
"""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron.model.config import ModelConfig
from megatron.parallel.buckets import ALIGNMENT
from megatron.plan.costs import ring_bytes
from megatron.plan.rank import RankRecord, run_rank
from megatron.train.build import make_plan
from tests.plan.settings import MODEL, config

E, FP32 = 2, 4  # bytes of an activation in bf16, of what is summed in fp32
MICRO_BATCHES = 4
TOKENS = MODEL.max_position_embeddings or 0  # of a micro-batch, which is one sequence


@dataclass(frozen=True)
class Layout:
    """A grid; c context ranks, g data ranks, v chunks of a stage."""

    t: int = 1
    p: int = 1
    c: int = 1
    g: int = 1
    v: int = 1
    sequence: bool = False
    zero: int = 0
    tied: bool = False
    recompute: str = "none"
    context_attention: str = "ring"

    @property
    def model(self) -> ModelConfig:
        return dataclasses.replace(MODEL, tie_word_embeddings=self.tied)

    @property
    def layers(self) -> int:
        """Layers of a stage."""
        return MODEL.num_hidden_layers // self.p

    @property
    def name(self) -> str:
        """What differs from one rank."""
        fields = {**dataclasses.asdict(self)}
        plain = dataclasses.asdict(Layout())
        return "-".join(f"{key}{value}" for key, value in fields.items() if value != plain[key])

    def weights(self, first: bool, last: bool) -> tuple[list[int], list[int]]:
        """Weights of a stage's layers, and of what comes before the first and after the last."""
        model, t = self.model, self.t
        heads = model.num_attention_heads // t + max(1, model.num_key_value_heads // t)
        attention = 2 * heads * model.head_dim * model.hidden_size
        layer = attention + 3 * model.intermediate_size // t * model.hidden_size + 2 * model.hidden_size
        vocabulary = model.padded_vocab_size(t) // t * model.hidden_size
        head = model.hidden_size + vocabulary * (not self.tied or self.p > 1)
        return [layer] * self.layers, [vocabulary] * first + [head] * last

    def record(self, stage: int) -> RankRecord:
        parallel: dict[str, Any] = {
            "tensor": self.t,
            "pipeline": self.p,
            "context": self.c,
            "sequence": self.sequence,
            "zero": self.zero,
            "context_attention": self.context_attention,
            "chunks": self.v,
            "schedule": "interleaved" if self.v > 1 else "1f1b",
        }
        run = config(precision="bf16", recompute=self.recompute, global_batch=MICRO_BATCHES * self.g, **parallel)
        plan = make_plan(run, self.model, self.t * self.p * self.c * self.g)
        return run_rank(
            run, plan, self.model, stage=stage, micro_batches=plan.micro_batches, device=torch.device("meta")
        )


def sent(record: RankRecord) -> dict[str, float]:
    """Bytes that the rank sends in a step over each axis, axes that carry nothing left out."""
    volumes: defaultdict[str, float] = defaultdict(float)
    for message in record.messages(record.second_step):
        volumes[message.axis.removesuffix("_even").removesuffix("_odd").removesuffix("_wrap")] += ring_bytes(message)
    return {axis: volume for axis, volume in volumes.items() if volume}


def expected(layout: Layout, stage: int) -> dict[str, float]:
    """The same by formula."""
    first, last = stage == 0, stage == layout.p - 1
    model, ranks = layout.t * layout.p, layout.c * layout.g
    sharded = layout.zero > 0 and ranks > 1
    volumes = {
        "tp": tensor_volume(layout, first, last),
        "kv": copied_heads_volume(layout),
        "forward": pipeline_volume(layout, layout.v - last),
        "backward": pipeline_volume(layout, layout.v - first),
        "embed": tied_volume(layout) if first or last else 0.0,
        "ring" if layout.context_attention == "ring" else "cp": context_volume(layout),
        "shard" if sharded else "replica": data_volume(layout, first, last),
        # The sum of the loss and its number of tokens; the squared norm, over the ranks that hold different weights.
        "loss": around(layout.p * ranks, 2 * FP32, 2),
        "world" if sharded else "model": around(model * ranks if sharded else model, FP32, 2),
    }
    return {axis: volume for axis, volume in volumes.items() if volume}


def around(ranks: int, payload: float, rounds: int) -> float:
    """Bytes that each rank of a ring sends: an all-gather or a reduce-scatter is one round, an all-reduce two."""
    return rounds * payload * (ranks - 1) / ranks


def tensor_volume(layout: Layout, first: bool, last: bool) -> float:
    """Per layer and micro-batch 8 b·s·h·e (t − 1)/t, half as much again with full recomputation; with sequence
    parallelism the inputs of the two column-parallel products are gathered once more behind the backward."""
    t, hidden, tokens = layout.t, MODEL.hidden_size, TOKENS // layout.c
    rounds_of_layer = 8 + (4 if layout.recompute == "full" else 0) + (2 if layout.sequence else 0)
    # The embedding's output is summed, or scattered and its gradient gathered; the head's input is gathered and its
    # gradient scattered, or summed. The loss: the greatest logit, then the sum of exponentials with the target's logit.
    rounds_of_ends = 2 * (first + last)
    per_micro_batch = around(t, tokens * hidden * E, layout.layers * rounds_of_layer + rounds_of_ends)
    per_micro_batch += last * around(t, 3 * tokens * FP32, 2)
    volume = MICRO_BATCHES * per_micro_batch
    if layout.sequence:  # norms see a share of the sequence, so their gradients are summed once a step
        volume += around(t, (2 * layout.layers + last) * hidden * FP32, 2)
    return volume


def copied_heads_volume(layout: Layout) -> float:
    """With fewer key and value heads than tensor ranks, the gradients of their copies are summed once a step."""
    copies = max(1, layout.t // MODEL.num_key_value_heads)
    return around(copies, layout.layers * 2 * MODEL.head_dim * MODEL.hidden_size * FP32, 2)


def pipeline_volume(layout: Layout, boundaries: int) -> float:
    """b·s·h·e for each micro-batch and boundary, a share of it with sequence parallelism."""
    share = layout.c * (layout.t if layout.sequence else 1)
    return MICRO_BATCHES * boundaries * TOKENS * MODEL.hidden_size * E / share


def tied_volume(layout: Layout) -> float:
    """The gradients of an embedding that is also the output, on two stages; the first tensor rank has no padding."""
    rows = min(MODEL.padded_vocab_size(layout.t) // layout.t, MODEL.vocab_size)
    return around(2, rows * MODEL.hidden_size * FP32, 2) if layout.tied and layout.p > 1 else 0.0


def context_volume(layout: Layout) -> float:
    """Per layer keys and values forward, 2 b·s·k·d·e/t · (c − 1)/c; them again and their gradients in fp32
    backward; them once more where the forward is run again."""
    keys_and_values = 2 * TOKENS * MODEL.num_key_value_heads * MODEL.head_dim / layout.t
    return (
        MICRO_BATCHES
        * layout.layers
        * around(layout.c, keys_and_values, (3 if layout.recompute == "full" else 2) * E + FP32)
    )


def data_volume(layout: Layout, first: bool, last: bool) -> float:
    """An all-reduce of fp32 gradients; with ZeRO-1 a reduce-scatter of them and an all-gather of bf16 weights. Fully
    sharded, each micro-batch scatters gradients and gathers weights: those of a layer before its forward and before its
    backward, those of the embedding, whose backward reads none, and of the head, whose backward follows, once."""
    ranks = layout.c * layout.g
    layers, ends = layout.weights(first, last)
    if layout.zero == 0:
        return around(ranks, (sum(layers) + sum(ends)) * FP32, 2)
    if layout.zero == 1:
        return around(ranks, shared(ranks, sum(layers) + sum(ends)), FP32 + E)
    volume = sum(around(ranks, shared(ranks, elements), FP32 + 2 * E) for elements in layers)
    volume += sum(around(ranks, shared(ranks, elements), FP32 + E) for elements in ends)
    return MICRO_BATCHES * volume


def shared(ranks: int, elements: int) -> int:
    """Elements of a bucket that these ranks share, each an aligned range."""
    unit = ranks * ALIGNMENT
    return -(-elements // unit) * unit


LAYOUTS = [
    Layout(t=2),
    Layout(t=2, recompute="full"),
    Layout(t=2, recompute="selective", sequence=True),
    Layout(t=2, sequence=True, recompute="full"),
    Layout(t=4, sequence=True),
    Layout(p=2),
    Layout(p=4, tied=True),
    Layout(p=2, v=2),
    Layout(t=2, p=2, sequence=True, v=2),
    Layout(t=2, p=2, tied=True),
    Layout(c=2),
    Layout(c=4, zero=1),
    Layout(c=4, context_attention="all_gather"),
    Layout(t=2, c=2, p=2, sequence=True),
    Layout(g=2),
    Layout(g=4, zero=1),
    Layout(g=4, zero=3),
    Layout(t=2, p=2, g=2, zero=1),
    Layout(t=2, p=2, c=2, g=2, sequence=True, recompute="full"),
]


# Every second one in `make test`, for its time.
@pytest.mark.parametrize("layout", LAYOUTS[:: 1 if os.environ.get("THOROUGH") else 2], ids=lambda layout: layout.name)
def test_volumes_equal_the_formulas(layout: Layout) -> None:
    for stage in range(layout.p):
        assert sent(layout.record(stage)) == pytest.approx(expected(layout, stage), rel=1e-12, abs=0), f"stage {stage}"
