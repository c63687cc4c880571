"""What the planner answers: plain values, which the reports print and JSON holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SECONDS_PER_DAY = 86_400.0


@dataclass(frozen=True)
class StageResult:
    """One pipeline stage, as its ranks see it.

    `memory_bytes` is the fullest moment by category (megatron.plan.memory), `reserved_bytes` what driver and libraries
    hold besides, with what the allocator loses; `seconds` where the time of a step goes: products, attention, memory
    (operations bound by it), wait:AXIS, update (from the end of the last backward pass), idle.
    """

    stage: int
    layers: tuple[int, ...]
    parameters: int
    live_micro_batches: int
    memory_bytes: Mapping[str, int]
    reserved_bytes: int
    seconds: Mapping[str, float]

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory_bytes.values()) + self.reserved_bytes


@dataclass(frozen=True)
class Traffic:
    """What one rank of a stage sends in a step over one axis by one kind of message: bytes in a ring, over `link`."""

    stage: int
    axis: str
    kind: str
    link: str
    count: int
    payload_bytes: int
    sent_bytes: float


@dataclass(frozen=True)
class Bar:
    """One action of a stage on the time axis, in seconds."""

    stage: int
    label: str
    start: float
    stop: float


@dataclass(frozen=True)
class Result:
    """A run on given hardware. FLOPs are per token: `model_flops` causal and full (megatron.model.flops), and
    `hardware_flops` all that the program computes, recomputation included."""

    title: str
    layout: Mapping[str, object]
    gpus: int
    gpu: str
    interconnect: str
    peak_flops_per_s: float
    gpu_memory_bytes: float
    power_w: float
    tokens_per_step: int
    steps: int
    step_s: float
    bubble: float
    model_flops_causal: float
    model_flops_full: float
    hardware_flops: float
    stages: tuple[StageResult, ...]
    traffic: tuple[Traffic, ...]
    timeline: tuple[Bar, ...]
    problems: tuple[str, ...]

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens_per_step / self.step_s / self.gpus

    @property
    def fits(self) -> bool:
        return all(stage.peak_bytes <= self.gpu_memory_bytes for stage in self.stages)

    @property
    def fullest(self) -> StageResult:
        return max(self.stages, key=lambda stage: stage.peak_bytes)

    @property
    def run_days(self) -> float:
        return self.steps * self.step_s / SECONDS_PER_DAY

    def utilization(self, flops_per_token: float) -> float:
        """Share of the hardware's peak, for FLOPs counted by some convention."""
        return flops_per_token * self.tokens_per_s_per_gpu / self.peak_flops_per_s
