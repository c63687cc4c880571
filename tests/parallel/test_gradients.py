"""When gradients are reduced: bucket by bucket while the backward pass still runs, the head's first."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron.data.loader import MicroBatch
from megatron.model.config import ModelConfig
from megatron.model.initialize import initialize
from megatron.model.stage import run_micro_batches
from megatron.model.transformer import Transformer
from megatron.parallel.buckets import Bucket, build_buckets
from megatron.parallel.gradients import GradientReducer
from megatron.parallel.mesh import Axis, single_rank
from megatron.parallel.pipeline.schedule import one_forward_one_backward
from megatron.parallel.weight_gradient import sink_of

from .recorder import Recorder

MODEL = ModelConfig(64, 24, 40, 3, 4, 2, 6)


def make(events: list[str], zero: int, tied: bool = False) -> tuple[Transformer, list[Bucket], GradientReducer]:
    """A model of one of two data ranks in small buckets; reductions are recorded with their bucket's number."""
    buckets: list[Bucket] = []

    def number(tensor: torch.Tensor) -> str:
        return str([bucket.gradients.data_ptr() for bucket in buckets].index(tensor.data_ptr()))

    config = dataclasses.replace(MODEL, tie_word_embeddings=tied)
    over = "shard" if zero else "replica"
    context = dataclasses.replace(single_rank(), **{over: Axis(over, 0, 2, (0, 1), Recorder(events, number))})
    model = Transformer(config, context, torch.float64)
    initialize(model, config, 5)
    buckets += build_buckets(model, context.shard, zero=zero, gradient_dtype=torch.float64, bucket_elements=2000)
    return model, buckets, GradientReducer(buckets, context)


def watch(model: Transformer, events: list[str]) -> None:
    """Record when the gradient of each module's output is known: what lies below has not begun then."""

    def announce(depth: int) -> object:
        def watch_output(_: object, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            last = output if isinstance(output, torch.Tensor) else output[-1]
            last.register_hook(lambda _: events.append(f"depth {depth}"))

        return watch_output

    for depth, module in enumerate([model.embedding, *model.blocks]):
        module.register_forward_hook(announce(depth))


def depth_of(name: str) -> int:
    """Of a parameter, counted from the embedding."""
    if name.startswith("embedding."):
        return 0
    return 1 + int(name.split(".")[1]) if name.startswith("blocks.") else 1 + MODEL.num_hidden_layers


def batch(count: int) -> list[MicroBatch]:
    tokens = torch.randint(0, MODEL.vocab_size, (count, 2, 9), generator=torch.Generator().manual_seed(1))
    return [MicroBatch(one[:, :-1], one[:, 1:]) for one in tokens]


def step(model: Transformer, reducer: GradientReducer, events: list[str], micro_batches: int) -> None:
    reducer.begin(micro_batches)
    plan = one_forward_one_backward(1, micro_batches)
    run_micro_batches(model, batch(micro_batches), plan[0])
    events.append("backward ended")
    reducer.finish()


@pytest.mark.parametrize(("zero", "kind"), [(0, "all_reduce"), (1, "reduce_scatter")])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_buckets_are_reduced_as_soon_as_they_are_ready(zero: int, kind: str, micro_batches: int) -> None:
    events: list[str] = []
    model, buckets, reducer = make(events, zero)
    assert len(buckets) > 5
    assert any(slot.name == "head.weight" for slot in buckets[0].slots)
    assert any(slot.name == "embedding.weight" for slot in buckets[-1].slots)
    watch(model, events)
    step(model, reducer, events, micro_batches)
    starts = [event for event in events if event.startswith("start")]
    assert starts == [f"start {kind} {number}" for number in range(len(buckets))]
    ends = [at for at, event in enumerate(events) if event == "depth 0"]  # what each backward pass knows last
    assert len(ends) == micro_batches
    final = events[ends[-2] + 1 :] if micro_batches > 1 else events
    assert not any(event.startswith("start") for event in events[: len(events) - len(final)])
    for number, bucket in enumerate(buckets):
        lowest = min(depth_of(slot.name) for slot in bucket.slots)
        below = f"depth {lowest - 1}" if lowest else "backward ended"
        assert final.index(f"start {kind} {number}") < final.index(below), f"bucket {number} came late: {final}"
        assert final.index(f"wait {kind} {number}") > final.index("backward ended"), f"{number} held up the backward"


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_whole_when_their_bucket_is_reduced(zero: int, tied: bool) -> None:
    """The other rank has the same ones, so each owned gradient is twice what autograd finds for one."""
    events: list[str] = []
    model, buckets, reducer = make(events, zero, tied)
    for _ in range(2):  # the second step begins with what the first one left
        step(model, reducer, events, 2)
    plain = Transformer(model.config, single_rank(), torch.float64)
    initialize(plain, model.config, 5)
    run_micro_batches(plain, batch(2), one_forward_one_backward(1, 2)[0])
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    seen = 0
    for bucket in buckets:
        for slot, start, stop in bucket.owned_slots():
            offset = bucket.owned[0] + start - slot.start
            gradient = expected[slot.name]
            assert gradient is not None
            wanted = 2 * gradient.flatten()[offset : offset + stop - start]
            torch.testing.assert_close(bucket.owned_gradients[start:stop], wanted, rtol=1e-10, atol=1e-12)
            seen += stop - start
    assert seen > 0.3 * sum(parameter.numel() for parameter in plain.parameters())


def test_the_order_of_reductions_is_fixed_whatever_is_ready_first() -> None:
    events: list[str] = []
    _, buckets, reducer = make(events, 0)
    reducer.begin(1)
    for bucket in reversed(buckets):
        assert not events
        for slot in bucket.slots:
            sink = sink_of(slot.parameter)
            assert sink is not None
            sink.add(torch.ones(slot.spec.shape, dtype=torch.float64))
    assert events == [f"start all_reduce {number}" for number in range(len(buckets))]
    reducer.finish()
