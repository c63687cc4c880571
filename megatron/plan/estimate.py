"""From recordings of single ranks to the step of the whole run.

Each kind of stage is recorded once, with a few micro-batches. Actions of one kind take the same time and leave the same
activations, so the schedule simulator spreads them over all micro-batches, and counts how many are alive. What a stage
does after its last action (the rest of the reduction, norm, update) is played event by event, and ends the step.
"""

from __future__ import annotations

import collections
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron.config.batches import largest_batch
from megatron.config.run import RunConfig
from megatron.model.config import ModelConfig
from megatron.model.flops import model_flops_per_token
from megatron.model.specs import count_adapters
from megatron.parallel.pipeline.partition import Part, parts_of_stage
from megatron.parallel.pipeline.schedule import (
    LETTERS,
    Action,
    Channel,
    Schedule,
    label,
    live_micro_batches,
    make_schedule,
)
from megatron.parallel.pipeline.simulate import Simulation, simulate
from megatron.plan.costs import Costs, ring_bytes
from megatron.plan.hardware import Gpu, Interconnect
from megatron.plan.match import mismatches
from megatron.plan.memory import ACTIVATIONS, Peak, peak_memory
from megatron.plan.operations import Operation
from megatron.plan.rank import RankRecord, run_rank
from megatron.plan.result import Bar, Result, StageResult, Traffic
from megatron.plan.timeline import Timeline
from megatron.train.adapters import plan_lora
from megatron.train.build import Plan, make_plan

# A schedule with more forward actions than this is simulated for so many rounds of the pipeline, and one more.
_MOST_ACTIONS, _FULL_ROUNDS = 20_000, 4
_RECORDED = 3  # micro-batches: the first, the last, and one between


@dataclass(frozen=True)
class _Played:
    """A recorded stage on the hardware: its actions' seconds by kind and chunk, in the order of micro-batches."""

    record: RankRecord
    timeline: Timeline
    peak: Peak
    live: int
    seconds: Mapping[tuple[str, int], list[float]]
    update_s: float

    @property
    def recorded(self) -> int:
        """How many micro-batches were recorded."""
        return len(next(iter(self.seconds.values())))


@dataclass(frozen=True)
class RecordedRun:
    """A run as recorded, without hardware: the ranks of each kind of stage, and the kind of every stage."""

    config: RunConfig
    model: ModelConfig
    plan: Plan
    world_size: int
    schedule: Schedule
    records: Mapping[int, list[RankRecord]]
    like: list[int]


def estimate(
    config: RunConfig, model: ModelConfig, world_size: int, gpu: Gpu, interconnect: Interconnect, title: str = "model"
) -> Result:
    """Plan a run. Raises ConfigError for what cannot be run on so many GPUs."""
    return price(record(config, model, world_size), gpu, interconnect, title)


def record(config: RunConfig, model: ModelConfig, world_size: int, *, both_ends: bool = True) -> RecordedRun:
    """Run the step as each kind of rank. With `both_ends` the first and the last tensor rank of a stage are recorded,
    so that they can be compared. Raises ConfigError for what cannot be run on so many GPUs."""
    plan = make_plan(config, model, world_size)
    stages, chunks = plan.grid.pipeline, config.parallel.chunks
    schedule = make_schedule(config.parallel.schedule, stages, plan.micro_batches, chunks)
    like = representatives(plan.parts, stages)
    tensor_ranks = sorted({0, plan.grid.tensor - 1}) if both_ends else [0]
    micro_batches = recorded_micro_batches(plan, chunks)
    records = {
        stage: [
            run_rank(config, plan, model, stage=stage, tensor_rank=rank, micro_batches=micro_batches)
            for rank in tensor_ranks
        ]
        for stage in sorted(set(like))
    }
    return RecordedRun(config, model, plan, world_size, schedule, records, like)


def price(run: RecordedRun, gpu: Gpu, interconnect: Interconnect, title: str = "model") -> Result:
    """Put a recorded run on hardware."""
    config, plan = run.config, run.plan
    costs = Costs(gpu, interconnect, config.train.precision)
    played = {stage: _play(ranks[0], costs) for stage, ranks in run.records.items()}
    stages = [played[kind] for kind in run.like]
    pipelined = _run_schedule(run, stages, costs)
    step_s = max(end + stage.update_s for end, stage in zip(pipelined.ends, stages, strict=True))
    tokens = largest_batch(config.train.global_batch) * plan.sequence_length
    adapters = count_adapters(run.model, plan_lora(config.lora, run.model))
    return Result(
        title=title,
        layout=_layout(config, plan),
        gpus=run.world_size,
        gpu=gpu.description,
        interconnect=interconnect.description,
        peak_flops_per_s=gpu.peak_flops_per_s(config.train.precision),
        gpu_memory_bytes=gpu.memory_bytes,
        power_w=gpu.power_w,
        tokens_per_step=tokens,
        steps=config.train.steps,
        step_s=step_s,
        bubble=pipelined.idle_share(step_s),
        model_flops_causal=model_flops_per_token(run.model, plan.sequence_length, adapters=adapters),
        model_flops_full=model_flops_per_token(run.model, plan.sequence_length, causal=False, adapters=adapters),
        hardware_flops=sum(_flops(stage, plan) for stage in stages) * run.world_size / plan.grid.pipeline / tokens,
        stages=tuple(
            _stage_result(number, stage, run.schedule[number], plan, gpu, step_s) for number, stage in enumerate(stages)
        ),
        traffic=tuple(entry for number, stage in enumerate(stages) for entry in _traffic(number, stage, plan, costs)),
        timeline=tuple(
            Bar(bar.stage, label(bar.action), bar.start, bar.stop) for bars in pipelined.simulation.bars for bar in bars
        ),
        problems=tuple(mismatches(run.records, run.like)),
    )


def recorded_micro_batches(plan: Plan, chunks: int) -> int:
    """How many micro-batches a recording has: enough for some in the middle, which are like all others."""
    stages = plan.grid.pipeline
    unit = stages if chunks > 1 else 1
    return min(plan.micro_batches, math.ceil(_RECORDED / unit) * unit)


def representatives(parts: Sequence[Part], stages: int) -> list[int]:
    """For each stage the first one with as many layers in each chunk, and embedding and head alike: it is recorded in
    the place of all of them. How many micro-batches a stage holds is counted in its memory."""
    shapes = [
        [(len(part.layers), part.first, part.last) for part in parts_of_stage(parts, stages, stage)]
        for stage in range(stages)
    ]
    return [shapes.index(shape) for shape in shapes]


def peak_bytes_of_first_stage(config: RunConfig, model: ModelConfig, world_size: int, gpu: Gpu) -> int:
    """The fullest moment of the first stage, which holds most micro-batches, reserved memory included.

    Raises ConfigError for what cannot be run on so many GPUs.
    """
    plan = make_plan(config, model, world_size)
    stages = plan.grid.pipeline
    schedule = make_schedule(config.parallel.schedule, stages, plan.micro_batches, config.parallel.chunks)
    few = recorded_micro_batches(plan, config.parallel.chunks)
    record = run_rank(config, plan, model, stage=0, micro_batches=few)
    memory = _memory(peak_memory(record.recording, record.first_step), live_micro_batches(record.actions), schedule[0])
    return sum(memory.values()) + _reserved(memory, gpu)


def _memory(peak: Peak, recorded_live: int, actions: list[Action]) -> dict[str, int]:
    """The peak by category, with the activations of as many micro-batches as these actions keep alive."""
    memory = dict(peak.bytes)
    memory[ACTIVATIONS] = round(memory[ACTIVATIONS] * live_micro_batches(actions) / recorded_live)
    return memory


def _reserved(memory: Mapping[str, int], gpu: Gpu) -> int:
    return round(gpu.reserved_bytes + gpu.fragmentation * sum(memory.values()))


def _play(record: RankRecord, costs: Costs) -> _Played:
    timeline = Timeline(record.recording, costs)
    seconds: dict[tuple[str, int], list[float]] = collections.defaultdict(list)
    for action in sorted(record.actions, key=lambda action: action.micro_batch):
        phase = record.phase(action)
        seconds[LETTERS[type(action)], action.chunk].append(timeline.seconds(phase.start, phase.end))
    last = record.phase(record.actions[-1]).end
    update_s = timeline.seconds(last, len(record.recording.events))
    peak = peak_memory(record.recording, record.first_step)
    return _Played(record, timeline, peak, live_micro_batches(record.actions), dict(seconds), update_s)


def _durations(stages: Sequence[_Played], micro_batches: int) -> Callable[[int, Action], float]:
    """Seconds of any action: as recorded for the first and the last micro-batch, and the median of the others."""

    @functools.cache
    def seconds(stage: int, kind: str, chunk: int, place: int) -> float:
        recorded = stages[stage].seconds[kind, chunk]
        return recorded[place] if place in (0, -1) else statistics.median(recorded[1:-1] or recorded)

    def duration(stage: int, action: Action) -> float:
        place = {0: 0, micro_batches - 1: -1}.get(action.micro_batch, 1)
        return seconds(stage, LETTERS[type(action)], action.chunk, place)

    return duration


def _transfers(stages: Sequence[_Played], costs: Costs) -> Callable[[Channel], float]:
    """Seconds of one message between two stages."""
    sent = [
        message.payload_bytes
        for message in stages[0].record.messages(stages[0].record.second_step)
        if message.kind == "send"
    ]
    ranks = stages[0].record.context.pp.ranks

    @functools.cache
    def transfer(channel: Channel) -> float:
        return costs.transfer_s(max(sent), ranks[channel.sender], ranks[channel.receiver])

    return transfer


@dataclass(frozen=True)
class _Pipelined:
    """When each stage ends its last action, and for how long it works; and the simulation, which may be of fewer
    micro-batches."""

    ends: list[float]
    busy: list[float]
    simulation: Simulation

    def idle_share(self, step_s: float) -> float:
        """The part of a step in which the mean stage waits for others."""
        return (max(self.ends) - statistics.mean(self.busy)) / step_s


def _run_schedule(run: RecordedRun, stages: Sequence[_Played], costs: Costs) -> _Pipelined:
    """The schedule on the hardware. Of a very long one two beginnings are simulated: once the pipeline is full, each
    round of it adds the same."""
    config, micro_batches = run.config.parallel, run.plan.micro_batches
    count, chunks = len(stages), config.chunks

    def simulated(number: int) -> _Pipelined:
        schedule = make_schedule(config.schedule, count, number, chunks)
        simulation = simulate(schedule, _durations(stages, number), _transfers(stages, costs), chunks)
        busy = [simulation.busy_s(stage) for stage in range(count)]
        return _Pipelined([bars[-1].stop for bars in simulation.bars], busy, simulation)

    short = _FULL_ROUNDS * count
    if micro_batches <= short + count or micro_batches * chunks * count <= _MOST_ACTIONS:
        return simulated(micro_batches)
    first, second = simulated(short), simulated(short + count)
    rounds = (micro_batches - short) / count
    longer = [
        [begin + rounds * (later - begin) for begin, later in zip(*pair, strict=True)]
        for pair in ((first.ends, second.ends), (first.busy, second.busy))
    ]
    return _Pipelined(longer[0], longer[1], first.simulation)


def _stage_result(
    number: int, stage: _Played, actions: list[Action], plan: Plan, gpu: Gpu, step_s: float
) -> StageResult:
    memory = _memory(stage.peak, stage.live, actions)
    seconds = _spending(stage, plan)
    seconds["idle"] = max(0.0, step_s - sum(seconds.values()))
    return StageResult(
        stage=number,
        layers=stage.record.layers,
        parameters=stage.record.parameters,
        live_micro_batches=live_micro_batches(actions),
        memory_bytes=memory,
        reserved_bytes=_reserved(memory, gpu),
        seconds=seconds,
    )


def _spending(stage: _Played, plan: Plan) -> dict[str, float]:
    """Seconds of a step by what they are spent on, all micro-batches; what follows the last action is `update`."""
    seconds: dict[str, float] = collections.defaultdict(float)
    record = stage.record
    scale = plan.micro_batches / stage.recorded
    for action in record.actions:
        phase = record.phase(action)
        for name, spent in stage.timeline.spending(phase.start, phase.end).items():
            seconds[name] += spent * scale
    seconds["update"] = stage.update_s
    return dict(seconds)


def _flops(stage: _Played, plan: Plan) -> float:
    """FLOPs of a step on one rank of the stage."""
    events = stage.record.recording.events[stage.record.second_step :]
    flops = sum(event.flops for event in events if isinstance(event, Operation))
    return flops * plan.micro_batches / stage.recorded


def _traffic(number: int, stage: _Played, plan: Plan, costs: Costs) -> list[Traffic]:
    """What one rank sends in a step: what was recorded, and for each micro-batch beyond what the second one sent."""
    record = stage.record
    counts = collections.Counter(record.messages(record.second_step))  # receives are others' sends
    more = plan.micro_batches - stage.recorded
    for action in record.actions:
        if action.micro_batch == 1 and more > 0:
            phase = record.phase(action)
            for message in record.messages(phase.start, phase.stop):
                counts[message] += more
    totals: dict[tuple[str, str, str], list[float]] = collections.defaultdict(lambda: [0, 0, 0.0])
    for message, count in counts.items():
        if message.kind == "receive":
            continue
        entry = totals[message.axis, message.kind, costs.link(message)]
        entry[0] += count
        entry[1] += count * message.payload_bytes
        entry[2] += count * ring_bytes(message)
    return [
        Traffic(number, axis, kind, link, int(count), int(payload), sent)
        for (axis, kind, link), (count, payload, sent) in totals.items()
    ]


def _layout(config: RunConfig, plan: Plan) -> dict[str, object]:
    grid, train = plan.grid, config.train
    schedule = config.parallel.schedule + (f" x {config.parallel.chunks} chunks" if config.parallel.chunks > 1 else "")
    return {
        "tensor": grid.tensor,
        **({"context": grid.context} if grid.context > 1 else {}),
        "data": grid.data,
        "pipeline": grid.pipeline,
        **({"schedule": schedule} if grid.pipeline > 1 else {}),
        "sequence parallel": "on" if plan.sequence_parallel else "off",
        "ZeRO": plan.zero,
        "precision": train.precision,
        "recompute": train.recompute,
        "micro batch": f"{train.micro_batch} x {plan.micro_batches}",
        "global batch": largest_batch(train.global_batch),
        "sequence length": plan.sequence_length,
    }
