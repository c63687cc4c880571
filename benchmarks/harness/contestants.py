"""Who competes in the training step, and at what."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from megatron.config.train import Recompute
from megatron.data.loader import MicroBatch
from megatron.model.config import ModelConfig

PIPELINE_MICRO_BATCHES = 8


@dataclass(frozen=True)
class Contestant:
    """A way to train: `module` of this package builds it; the sizes say over how many processes it goes."""

    name: str
    module: str
    packages: tuple[str, ...]
    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    compiled: bool = False
    recompute: Recompute = "none"
    peers: tuple[str, ...] = ()  # whom the report compares it with
    note: str = ""

    @property
    def world(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def is_ours(self) -> bool:
        return self.module == "ours"


OURS = "megatron-med"
PURE = "transformers and litgpt in bf16: weights, gradients and moments all bf16, no float32 masters"
MASTERS = f"{OURS} in bf16: bf16 weights; gradients, masters and moments float32"

ONE_PROCESS = (
    Contestant(OURS, "ours", ("megatron",), peers=("transformers", "transformers-compiled", "litgpt")),
    Contestant(
        f"{OURS}-selective", "ours", ("megatron",), recompute="selective", peers=("transformers", "litgpt", OURS)
    ),
    Contestant("transformers", "with_transformers", ("transformers",)),
    Contestant("transformers-compiled", "with_transformers", ("transformers",), compiled=True),
    Contestant("litgpt", "with_litgpt", ("litgpt",)),
)
TWO_PROCESSES = (
    Contestant(f"{OURS}-dp2", "ours", ("megatron",), data=2, peers=("transformers-ddp", OURS)),
    Contestant("transformers-ddp", "with_transformers", ("transformers",), data=2),
    Contestant(f"{OURS}-tp2", "ours", ("megatron",), tensor=2, peers=("transformers-tp", OURS)),
    Contestant("transformers-tp", "with_transformers", ("transformers", "accelerate"), tensor=2),
    Contestant(f"{OURS}-pp2", "ours", ("megatron",), pipeline=2, peers=(OURS,)),
)


@dataclass(frozen=True)
class Workload:
    """The model and the batch of one data rank. The default model is a Llama of 56 M parameters."""

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1376
    layers: int = 8
    heads: int = 8
    key_value_heads: int = 4
    sequence_length: int = 512
    micro_batch: int = 2
    micro_batches: int = 1

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            head_dim=self.hidden_size // self.heads,
            max_position_embeddings=self.sequence_length,
        )

    def small(self) -> Workload:
        """The same in a size that costs nothing: two layers and short sequences."""
        return dataclasses.replace(
            self, vocab_size=1024, hidden_size=128, intermediate_size=320, layers=2, sequence_length=64
        )

    def of(self, contestant: Contestant) -> Workload:
        """What this contestant runs: a pipeline gets at least so many micro-batches that it fills."""
        least = PIPELINE_MICRO_BATCHES if contestant.pipeline > 1 else 1
        return dataclasses.replace(self, micro_batches=max(self.micro_batches, least))

    def tokens(self, contestant: Contestant) -> int:
        """Tokens that this contestant trains on in a step, over all of its data ranks."""
        here = self.of(contestant)
        return here.micro_batch * here.micro_batches * here.sequence_length * contestant.data

    def batches(self, data_rank: int, step: int) -> list[MicroBatch]:
        """Random micro-batches of one step."""
        generator = torch.Generator().manual_seed(1000 * step + data_rank)
        shape = (self.micro_batch, self.sequence_length + 1)
        samples = [torch.randint(self.vocab_size, shape, generator=generator) for _ in range(self.micro_batches)]
        return [MicroBatch(sample[:, :-1].contiguous(), sample[:, 1:].contiguous()) for sample in samples]


@dataclass(frozen=True)
class Job:
    """What a worker process is told: a contestant on a workload, or (no contestant) matrix products."""

    contestant: Contestant | None
    workload: Workload
    precision: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Job:
        contestant = values["contestant"]
        return cls(
            None if contestant is None else Contestant(**contestant),
            Workload(**values["workload"]),
            values["precision"],
        )
