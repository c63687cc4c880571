"""Runs two steps of the real training step as one rank of any world, on tensors without storage.

The first step shows what is made once; the second is the one that counts: it begins as every later one does, with what
the step before left under way.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron.config.run import RunConfig
from megatron.data.loader import MicroBatch
from megatron.kernels.eager_attention import eager_causal_attention
from megatron.kernels.vendor.select import VendorKernels
from megatron.model.config import ModelConfig
from megatron.parallel.mesh import ParallelContext, connect
from megatron.parallel.pipeline.schedule import Action, label
from megatron.plan.communicator import RecordingCommunicator
from megatron.plan.memory import GRADIENTS, OPTIMIZER, WEIGHTS
from megatron.plan.recorder import Message, Phase, Recorder, Recording, Start
from megatron.train.adapters import plan_lora
from megatron.train.build import Plan, build_step
from megatron.train.kernels import install
from megatron.train.step import TrainingStep

META = torch.device("meta")


@dataclass(frozen=True)
class RankRecord:
    """What one rank did. Its steps begin at the events `first_step`, before which it is built (a run builds a model
    without storage), and `second_step`."""

    context: ParallelContext
    recording: Recording
    first_step: int
    second_step: int
    actions: list[Action]
    layers: tuple[int, ...]
    parameters: int

    def phase(self, action: Action) -> Phase:
        """The stretch of events of an action of the second step."""
        return self._phases[label(action)]

    def messages(self, start: int, stop: int | None = None) -> list[Message]:
        """The messages started in a stretch of events, in order."""
        return [event.message for event in self.recording.events[start:stop] if isinstance(event, Start)]

    @cached_property
    def _phases(self) -> dict[str, Phase]:
        return {phase.name: phase for phase in self.recording.phases if phase.start >= self.second_step}


def run_rank(
    config: RunConfig,
    plan: Plan,
    model: ModelConfig,
    *,
    stage: int,
    tensor_rank: int = 0,
    micro_batches: int,
    device: torch.device = META,
) -> RankRecord:
    """Two steps of `micro_batches` micro-batches as the first data rank of a pipeline stage."""
    recorder = Recorder()
    plan = dataclasses.replace(plan, micro_batches=micro_batches)
    with recorder.watching() as recording:
        context = connect(
            plan.grid,
            plan.grid.rank(tensor_rank, 0, 0, stage),
            sequence=plan.sequence_parallel,
            num_key_value_heads=model.num_key_value_heads,
            wraps=config.parallel.chunks > 1,
            context_attention=config.parallel.context_attention,
            shard=plan.shard,
            make=lambda ranks: RecordingCommunicator(recorder, ranks),
        )
        for axis in context.axes():
            if isinstance(axis.communicator, RecordingCommunicator):
                axis.communicator.axis = axis.name
        step = build_step(config, plan, model, context, device, plan_lora(config.lora, model))
        if config.kernels.attention == "eager":
            install(VendorKernels(attend=eager_causal_attention), step.model)
        _label(recorder, step)
        batch = _batch(config, plan, device)
        first = len(recording.events)
        step(batch, 1)
        second = len(recording.events)
        step(batch, 2)
    return RankRecord(
        context,
        recording,
        first,
        second,
        step.actions,
        tuple(len(chunk.blocks) for chunk in step.model.chunks),
        sum(slot.spec.numel for flat in (*step.buckets, *step.frozen) for slot in flat.slots),
    )


def _batch(config: RunConfig, plan: Plan, device: torch.device) -> list[MicroBatch]:
    shape = (config.train.micro_batch, plan.sequence_length)
    tokens, labels = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
    return [MicroBatch(tokens.clone(), labels.clone()) for _ in range(plan.micro_batches)]


def _label(recorder: Recorder, step: TrainingStep) -> None:
    for bucket in step.buckets:
        recorder.label(bucket.gradients, GRADIENTS)
        recorder.label(bucket.owned_gradients, GRADIENTS)
    for tensor in step.optimizer.state_tensors():
        recorder.label(tensor, OPTIMIZER)
    for flat in (*step.buckets, *step.frozen):  # last: where masters are the weights themselves they count as weights
        recorder.label(flat.weights, WEIGHTS)
        recorder.label(flat.owned_weights, WEIGHTS)
