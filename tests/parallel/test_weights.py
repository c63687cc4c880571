"""When weights are gathered, and when they are freed: behind the layer before the one that needs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from megatron.config.optimizer import OptimizerConfig
from megatron.config.train import Recompute
from megatron.data.loader import MicroBatch
from megatron.model.config import ModelConfig
from megatron.model.initialize import initial_values
from megatron.model.transformer import Transformer
from megatron.parallel.buckets import Bucket, has_storage
from megatron.parallel.collectives import Done
from megatron.parallel.mesh import Axis, single_rank
from megatron.plan.memory import peak_memory
from megatron.plan.recorder import Recorder as Recording
from megatron.train.step import TrainingStep

from .recorder import Recorder

LAYERS = 3
MODEL = ModelConfig(64, 24, 40, LAYERS, 4, 2, 6)
LAST = LAYERS + 1  # the number of the head, where the embedding is 0


def make(events: list[str], zero: int, micro_batches: int = 1) -> TrainingStep:
    """The step of one of two data ranks, with a bucket for each parameter under ZeRO-1. Messages are recorded with the
    unit whose parameters they are for, and so is where each unit's forward and backward passes begin."""
    buckets: list[Bucket] = []

    def unit(tensor: torch.Tensor) -> str:
        for bucket in buckets:
            if tensor.data_ptr() in (bucket.owned_weights.data_ptr(), bucket.gradients.data_ptr()):
                (number,) = {unit_of(slot.name) for slot in bucket.slots}
                return str(number)
        return "?"

    context = dataclasses.replace(single_rank(), shard=Axis("shard", 0, 2, (0, 1), Recorder(events, unit)))
    model = Transformer(MODEL, context, torch.float64, device="meta")
    for number, module in enumerate([model.embedding, *model.blocks, model.head]):
        module.register_forward_hook(announce_backward(events, module, number))
    step = TrainingStep(
        model,
        context,
        OptimizerConfig(learning_rate=1e-2, decay_style="constant", eps=1e-4),
        micro_batches=micro_batches,
        zero=zero,
        decay_steps=9,
        bucket_elements=1,
        device=torch.device("cpu"),
    )
    buckets += step.buckets
    step.fill(initial_values(MODEL, 5))
    for number, module in enumerate([model.embedding, *model.blocks, model.final_norm]):
        module.register_forward_pre_hook(announce_forward(events, number))
    return step


class Copies:
    """As if all ranks had the same, at once and without memory of its own."""

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> Done:
        output.view(-1, tensor.numel()).copy_(tensor)
        return Done()

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor) -> Done:
        output.copy_(tensor[: output.numel()])
        return Done()


def announce_forward(events: list[str], number: int) -> Callable[..., None]:
    def hook(module: nn.Module, _: object) -> None:
        assert all(parameter.isfinite().all() for parameter in module.parameters()), f"{number} runs without weights"
        events.append(f"forward {number}")

    return hook


def announce_backward(events: list[str], module: nn.Module, number: int) -> Callable[..., None]:
    def begin(_: torch.Tensor) -> None:
        if number:
            assert all(parameter.isfinite().all() for parameter in module.parameters()), f"{number} without weights"
        events.append(f"backward {number}")

    def hook(_: object, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        last = output if isinstance(output, torch.Tensor) else output[-1]
        if last.requires_grad:
            last.register_hook(begin)

    return hook


def unit_of(name: str) -> int:
    """Of a parameter: counted from the embedding."""
    if name.startswith("embedding."):
        return 0
    return 1 + int(name.split(".")[1]) if name.startswith("blocks.") else LAST


def batch(count: int) -> list[MicroBatch]:
    tokens = torch.randint(0, MODEL.vocab_size, (count, 2, 9), generator=torch.Generator().manual_seed(1))
    return [MicroBatch(one[:, :-1], one[:, 1:]) for one in tokens]


def test_zero_1_gathers_behind_the_next_forward_pass() -> None:
    """All gathers start behind the update, in the order of the forward pass; each unit waits for its own alone, so most
    are under way when the first block computes."""
    events: list[str] = []
    step = make(events, zero=1)
    step(batch(1), 1)
    updated = max(at for at, event in enumerate(events) if event.startswith("wait reduce_scatter")) + 1
    gathers = [event.split()[-1] for event in events[updated:]]
    assert events[updated:] == [f"start all_gather {unit}" for unit in gathers], "the update waits for nothing"
    assert gathers == sorted(gathers) and set(gathers) == {str(unit) for unit in range(LAST + 1)}
    events.clear()
    step(batch(1), 2)
    for unit in range(LAST + 1):
        waits = [at for at, event in enumerate(events) if event == f"wait all_gather {unit}"]
        assert len(waits) == gathers.count(str(unit))
        assert max(waits) < events.index(f"forward {unit}"), "used before it is there"
        assert not unit or min(waits) > events.index(f"forward {unit - 1}"), "waited for before it is needed"


def test_what_is_under_way_is_waited_for_before_weights_are_read_elsewhere() -> None:
    step = make([], zero=1)
    step(batch(1), 1)
    assert not all(parameter.isfinite().all() for parameter in step.model.parameters())
    step.weights.gather()
    assert all(parameter.isfinite().all() for parameter in step.model.parameters())


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_full_sharding_works_one_layer_ahead_in_both_directions(micro_batches: int) -> None:
    """Each gather starts before the unit before it computes, each reduction ends after the unit behind it."""
    events: list[str] = []
    step = make(events, 3, micro_batches)
    step(batch(micro_batches), 1)
    expected: list[str] = []
    for number in range(micro_batches):
        expected += ["start all_gather 0", "wait all_gather 0"]
        for unit in range(LAST):
            expected += [f"start all_gather {unit + 1}", f"forward {unit}", f"wait all_gather {unit + 1}"]
        # The head's weights stay for the backward pass; the embedding's are not gathered for it: nothing reads them.
        expected += [f"forward {LAST}", f"start all_gather {LAST - 1}", f"backward {LAST}"]
        expected += ["wait reduce_scatter 0"] if number else []
        expected += [f"start reduce_scatter {LAST}"]
        for unit in range(LAST - 1, 0, -1):
            expected += [f"wait all_gather {unit}", f"start all_gather {unit - 1}"][: 2 if unit > 1 else 1]
            expected += [f"backward {unit}", f"wait reduce_scatter {unit + 1}", f"start reduce_scatter {unit}"]
        expected += ["backward 0", "wait reduce_scatter 1", "start reduce_scatter 0"]
    assert events == [*expected, "wait reduce_scatter 0"]


def test_full_sharding_keeps_nothing_whole_outside_a_layer() -> None:
    step = make([], 3)

    def whole() -> list[bool]:
        return [has_storage(flat) for bucket in step.buckets for flat in (bucket.weights, bucket.gradients)]

    for number in (1, 2):
        step(batch(1), number)
        assert not any(whole())
    with torch.no_grad():
        logits = step.model(batch(1)[0].tokens)
    assert logits.isfinite().all() and not any(whole())


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_full_sharding_holds_a_share_of_everything_and_two_layers(ranks: int, recompute: Recompute) -> None:
    """The fullest moment of a step, in bytes of live storages of any kind; activations are next to nothing here."""
    config = dataclasses.replace(MODEL, vocab_size=128, hidden_size=128, intermediate_size=352, num_hidden_layers=12)
    config = dataclasses.replace(config, num_attention_heads=4, num_key_value_heads=4, head_dim=32)
    recorder = Recording()
    with recorder.watching() as recording:
        shard = Axis("shard", 0, ranks, tuple(range(ranks)), Copies())
        context = dataclasses.replace(single_rank(), shard=shard)
        model = Transformer(config, context, torch.bfloat16, "meta", recompute)
        step = TrainingStep(
            model,
            context,
            OptimizerConfig(),
            micro_batches=2,
            zero=3,
            decay_steps=9,
            device=torch.device("cpu"),
        )
        step.fill(lambda _, out: out.fill_(0.01))
        tokens = torch.zeros((2, 1, 5), dtype=torch.int64)
        for number in (1, 2):
            step([MicroBatch(one[:, :-1], one[:, 1:]) for one in tokens], number)
    parameters = sum(slot.spec.numel for bucket in step.buckets for slot in bucket.slots)
    layer = max(bucket.weights.numel() for bucket in step.buckets)
    weights, gradients, state = 2, 4, 12  # bytes of each parameter
    share = (weights + gradients + state) * parameters / ranks
    # Beside whole weights and gradients of two layers: what a reduction gave and a matrix's product, not yet added.
    most = share + 2 * (weights + gradients) * layer + gradients * layer / ranks + weights * layer / 2
    peak = peak_memory(recording).total
    print(f"{peak} bytes, a share is {share:.0f}, with two layers {most:.0f}; whole {18 * parameters}")
    assert share < peak < 1.05 * most
    assert layer * len(step.buckets) > 0.9 * parameters
    # So a third layer would be seen.
    assert (weights + gradients) * layer > 0.03 * most
