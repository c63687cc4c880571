"""One training run as data: a model, a grid, batches; and the job that runs it and returns everything it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from megatron.config.lora import LoraConfig, TargetName
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ContextAttention, LayerSplit, ScheduleName
from megatron.config.train import Recompute
from megatron.data.loader import MicroBatch
from megatron.kernels import native
from megatron.kernels.runs import Documents
from megatron.model.config import ModelConfig
from megatron.model.initialize import fill_region, initial_values
from megatron.model.lora import adapt, adapter_of, make_lora
from megatron.model.transformer import build_stage
from megatron.parallel.layers import ShardedParameter
from megatron.parallel.layout import Region
from megatron.parallel.mesh import Grid, connect
from megatron.parallel.pipeline.partition import cut
from megatron.train.step import TrainingStep
from tests.dist.strict import Communicators, Log

SEQUENCE_LENGTH = 16
STEPS = 2

# What `config.json` says of a model, besides its sizes.
VARIATIONS: dict[str, dict[str, Any]] = {
    "llama3": {
        "model_type": "llama",
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 12,
        },
    },
    "llama-dynamic": {
        "model_type": "llama",
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 8,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    "qwen3": {"model_type": "qwen3", "attention_bias": True},
    "falcon-7b": {"model_type": "falcon", "ffn_hidden_size": 48},
    "falcon-40b": {
        "model_type": "falcon",
        "ffn_hidden_size": 48,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "falcon-11b": {
        "model_type": "falcon",
        "ffn_hidden_size": 48,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
    },
    "falcon-alibi": {
        "model_type": "falcon",
        "ffn_hidden_size": 48,
        "parallel_attn": False,
        "alibi": True,
        "multi_query": False,
        "bias": True,
    },
    "pythia": {"model_type": "gpt_neox"},
    "llama-yarn": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12},
    },
}


@dataclass(frozen=True)
class Case:
    """A grid and what else may differ; `micro_batches` per data rank, of `micro_batch` sequences."""

    name: str
    tensor: int = 1
    context: int = 1
    context_attention: ContextAttention = "ring"
    documents: bool = False
    weighted: bool = False
    varied: bool = False
    data: int = 1
    pipeline: int = 1
    sequence: bool = False
    zero: int = 0
    zero_within: int | None = None
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    vocabulary: int = 67  # divisible by nothing
    tied: bool = False
    family: str = "llama"
    micro_batches: int = 4
    micro_batch: int = 1
    ragged: bool = True
    clip: float = 0.5
    bucket_elements: int = 3000
    recompute: Recompute = "none"
    recompute_layers: int | None = None
    schedule: ScheduleName = "1f1b"
    chunks: int = 1
    split: LayerSplit = "even"
    lora_rank: int = 0
    lora_targets: tuple[TargetName, ...] | None = None

    @property
    def grid(self) -> Grid:
        return Grid(self.tensor, self.context, self.data, self.pipeline)

    @property
    def shard(self) -> int:
        return (self.zero_within or self.data * self.context) if self.zero else 1

    @property
    def model(self) -> ModelConfig:
        if self.family in VARIATIONS:
            return ModelConfig.from_huggingface(
                {
                    "vocab_size": self.vocabulary,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": self.layers,
                    "num_attention_heads": self.heads,
                    "num_key_value_heads": self.key_value_heads,
                    "head_dim": 10,
                    "tie_word_embeddings": self.tied,
                    "initializer_range": 0.2,
                    **VARIATIONS[self.family],
                }
            )
        if self.family != "llama":
            return ModelConfig.from_settings(
                {
                    "model_type": self.family,
                    "vocab_size": self.vocabulary,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": self.layers,
                    "num_attention_heads": self.heads,
                    "max_position_embeddings": SEQUENCE_LENGTH + 3,  # learned positions that no sample has
                    "tie_word_embeddings": self.tied,
                    "initializer_range": 0.2,
                }
            )
        return ModelConfig(
            vocab_size=self.vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            head_dim=8,
            tie_word_embeddings=self.tied,
            initializer_range=0.2,
        )

    @property
    def one_rank(self) -> Case:
        """The same samples on one rank, all micro-batches of all data ranks in their order."""
        return Case(
            **{
                **asdict(self),
                "name": f"{self.name} on one rank",
                "tensor": 1,
                "context": 1,
                "context_attention": "ring",
                "data": 1,
                "pipeline": 1,
                "sequence": False,
                "zero": 0,
                "zero_within": None,
                "recompute": "none",
                "recompute_layers": None,
                "schedule": "1f1b",
                "chunks": 1,
                "split": "even",
                "micro_batches": self.micro_batches * self.data,
            }
        )


@dataclass
class Result:
    """What one rank saw: per step loss and gradient norm; reduced gradients of the first step and weights after the
    last, as canonical regions; and what a strict communicator logged."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[tuple[Region, np.ndarray]] = field(default_factory=list)
    weights: list[tuple[Region, np.ndarray]] = field(default_factory=list)
    padding: float = 0.0
    log: dict[str, list[str]] = field(default_factory=dict)
    open_works: int = 0


def batches_of(case: Case, step: int, data_rank: int) -> list[MicroBatch]:
    """This data rank's micro-batches of a step: the same samples, dealt in Megatron's order, on any grid.

    Ragged labels leave micro-batches with different numbers of loss-carrying tokens, one of them with none. Weighted,
    labels count differently; varied, each micro-batch is of another length.
    """
    count = case.micro_batches * case.data * case.micro_batch
    generator = torch.Generator().manual_seed(100 + step)
    rows = torch.randint(0, case.vocabulary, (count, SEQUENCE_LENGTH + 1), generator=generator)
    tokens, labels = rows[:, :-1].clone(), rows[:, 1:].clone()
    if case.ragged:
        for row in range(count):
            labels[row, SEQUENCE_LENGTH - (5 * row) % (SEQUENCE_LENGTH + 1) :] = -1
    starts = _document_starts(count, generator)
    weights = torch.rand((count, SEQUENCE_LENGTH), generator=generator) if case.weighted else None
    result = []
    for number in range(case.micro_batches):
        start = (number * case.data + data_rank) * case.micro_batch
        some = slice(start, start + case.micro_batch)
        length = SEQUENCE_LENGTH - 4 * ((number * case.data + data_rank) % 4) if case.varied else SEQUENCE_LENGTH
        part = (some, slice(length))
        documents = Documents(starts[part], SEQUENCE_LENGTH) if case.documents else None
        result.append(MicroBatch(tokens[part], labels[part], documents, None if weights is None else weights[part]))
    return result


def _document_starts(count: int, generator: torch.Generator) -> torch.Tensor:
    """i32[count, SEQUENCE_LENGTH]: a few documents of any lengths in each sample; the first sample is one document."""
    begins = torch.rand((count, SEQUENCE_LENGTH), generator=generator) < 0.2
    begins[0] = False
    return torch.where(begins, torch.arange(SEQUENCE_LENGTH), 0).cummax(dim=1).values.to(torch.int32)


def run_case(
    rank: int, case: Case, strict: bool = False, mutation: str | None = None, backend: native.Backend = "auto"
) -> Result:
    """Two training steps of a case in float64 on this rank; all ranks of its grid call it together."""
    from tests.dist.mutations import mutated

    native.select(backend, "cpu")

    log = Log()
    communicators = Communicators(log, strict)
    with mutated(mutation):
        context = connect(
            case.grid,
            rank,
            sequence=case.sequence,
            num_key_value_heads=case.model.num_key_value_heads,
            wraps=case.chunks > 1,
            context_attention=case.context_attention,
            shard=case.shard,
            make=communicators.make,
        )
        parts = cut(case.layers, case.pipeline * case.chunks, case.split, head_cost=1.7)
        model = build_stage(case.model, context, parts, torch.float64, "cpu", case.recompute, case.recompute_layers)
        if case.lora_rank:
            adapt(model, make_lora(LoraConfig(case.lora_rank, alpha=2.5, targets=case.lora_targets), case.model))
        step = TrainingStep(
            model,
            context,
            OptimizerConfig(learning_rate=1e-2, eps=1e-4, clip_grad=case.clip, decay_style="constant"),
            micro_batches=case.micro_batches,
            zero=case.zero,
            decay_steps=STEPS,
            schedule=case.schedule,
            bucket_elements=case.bucket_elements,
        )
        step.fill(first_values(case))
        result = Result()
        _record_gradients(step, result)
        for number in range(STEPS):
            outcome = step(batches_of(case, number, context.data.rank), number + 1)
            result.losses.append(outcome.loss.item())
            result.norms.append(outcome.grad_norm.item())
        step.weights.gather()
    result.weights = _weights(model)
    result.padding = _padding(model)
    result.log, result.open_works = log.issued, log.open_works
    communicators.close()
    return result


def first_values(case: Case) -> Callable[[Region, torch.Tensor], None]:
    """What a run begins with. Beside adapters, biases are random too, since nothing would change them, and adapters are,
    so that none of their gradients is zero."""
    model, seed = case.model, 7
    others = initial_values(model, seed)

    def fill(region: Region, out: torch.Tensor) -> None:
        if not case.lora_rank or (adapter_of(region.name) is None and not region.name.endswith(".bias")):
            others(region, out)
        elif len(region.shape) == 1:
            row = Region(region.name, (1, *region.shape), (0, *region.start), (1, *region.size))
            fill_region(row, out.unsqueeze(0), seed, model.initializer_range)
        else:
            fill_region(region, out, seed, model.initializer_range)

    return fill


def _record_gradients(step: TrainingStep, result: Result) -> None:
    """Keep the gradients that the first update is given, before the optimizer uses them up."""
    update = step.optimizer.step

    def record_and_update(rate: float, divisor: torch.Tensor, not_finite: torch.Tensor) -> None:
        result.gradients = result.gradients or _gradients(step, divisor)
        update(rate, divisor, not_finite)

    step.optimizer.step = record_and_update  # type: ignore[method-assign]


def _gradients(step: TrainingStep, divisor: torch.Tensor) -> list[tuple[Region, np.ndarray]]:
    """The owned ranges of the reduced gradients, divided by tokens and clipping."""
    found = []
    for bucket in step.buckets:
        for region, view in bucket.owned_regions(bucket.owned_gradients):
            found.append((region, (view / divisor).numpy()))
    return found


def _weights(model: torch.nn.Module) -> list[tuple[Region, np.ndarray]]:
    found: list[tuple[Region, Any]] = []
    for parameter in model.parameters():
        assert isinstance(parameter, ShardedParameter)
        for region, view in parameter.spec.regions(parameter.detach()):
            found.append((region, view.numpy().copy()))
    return found


def _padding(model: torch.nn.Module) -> float:
    """The largest weight that no canonical region covers: padding must stay zero."""
    largest = 0.0
    for parameter in model.parameters():
        assert isinstance(parameter, ShardedParameter)
        rest = parameter.detach().clone()
        for _, view in parameter.spec.regions(rest):
            view.zero_()
        largest = max(largest, float(rest.abs().max()))
    return largest
