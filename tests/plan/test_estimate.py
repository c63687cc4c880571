"""The whole plan: what is left out of a recording changes nothing, and its figures are the textbook's."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron.config.lora import LoraConfig
from megatron.config.run import RunConfig
from megatron.model.config import ModelConfig
from megatron.model.flops import model_flops_per_token
from megatron.model.lora import make_lora
from megatron.model.specs import count_adapters
from megatron.plan import estimate as module
from megatron.plan.estimate import estimate, price, record
from megatron.plan.hardware import load_gpu, load_interconnect
from megatron.plan.result import Result
from megatron.utils.errors import ConfigError
from tests.plan.settings import MODEL, config

LAYERS = dataclasses.replace(MODEL, num_hidden_layers=8)


def plan(run: RunConfig, gpus: int, model: ModelConfig = LAYERS) -> Result:
    return estimate(run, model, gpus, load_gpu("a100-80gb"), load_interconnect("dgx-a100"))


@pytest.mark.parametrize(
    "parallel",
    [
        {"pipeline": 4},
        {"pipeline": 4, "schedule": "interleaved", "chunks": 2},
        {"pipeline": 4, "schedule": "zero_bubble"},
        {"pipeline": 2, "schedule": "gpipe"},
        {"pipeline": 4, "tensor": 2},
    ],
    ids=str,
)
def test_few_recorded_micro_batches_give_what_all_of_them_give(
    parallel: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, gpus = config(global_batch=16, **parallel), parallel["pipeline"] * parallel.get("tensor", 1)
    few = plan(run, gpus)
    monkeypatch.setattr(module, "recorded_micro_batches", lambda plan, chunks: plan.micro_batches)
    monkeypatch.setattr(module, "representatives", lambda parts, stages: list(range(stages)))
    everything = plan(run, gpus)
    assert few.step_s == pytest.approx(everything.step_s, rel=1e-3)
    assert few.hardware_flops == pytest.approx(everything.hardware_flops, rel=1e-9)
    for ours, theirs in zip(few.stages, everything.stages, strict=True):
        assert ours.live_micro_batches == theirs.live_micro_batches
        assert ours.peak_bytes == pytest.approx(theirs.peak_bytes, rel=0.01), ours.stage
        assert ours.seconds == pytest.approx(theirs.seconds, rel=0.02, abs=1e-5)
    assert sorted(map(str, few.traffic)) == sorted(map(str, everything.traffic))


def test_a_window_leaves_a_band_of_attention() -> None:
    """The FLOPs of the program, per token, lose what lies outside of it; memory stays about as it was."""
    length, window = LAYERS.max_position_embeddings, 16
    whole, narrow = plan(config(), 1), plan(config(), 1, dataclasses.replace(LAYERS, sliding_window=window))
    lost = length / 2 - (window - window**2 / (2 * length))  # keys that a query does not see, on average
    products = 4.0 * LAYERS.num_attention_heads * LAYERS.head_dim * lost * LAYERS.num_hidden_layers
    # forward two products, backward five for their gradients
    assert whole.hardware_flops - narrow.hardware_flops == pytest.approx(products * (1 + 2.5), rel=1e-9)
    assert narrow.stages[0].peak_bytes == pytest.approx(whole.stages[0].peak_bytes, rel=0.01)


def test_flops_of_the_program_are_the_models() -> None:
    """Without recomputation: products forward and backward, and attention's backward has five products for two."""
    result = plan(config(), 1)
    length, width = LAYERS.max_position_embeddings, LAYERS.num_attention_heads * LAYERS.head_dim
    padded = dataclasses.replace(LAYERS, vocab_size=LAYERS.padded_vocab_size(1))
    scores_again = 2.0 * LAYERS.num_hidden_layers * width * length / 2
    assert result.hardware_flops == pytest.approx(model_flops_per_token(padded, length) + scores_again, rel=1e-6)
    full = plan(config(recompute="full"), 1)
    layers = model_flops_per_token(dataclasses.replace(padded, vocab_size=1), length) / 3
    assert full.hardware_flops - result.hardware_flops == pytest.approx(layers, rel=1e-2)


def test_time_is_accounted_for() -> None:
    result = plan(config(global_batch=16, pipeline=4, tensor=2), 8)
    for stage in result.stages:
        assert sum(stage.seconds.values()) == pytest.approx(result.step_s, rel=1e-6)
    assert result.timeline and max(bar.stop for bar in result.timeline) <= result.step_s
    assert 0.1 < result.bubble < 0.5


def test_what_does_not_fit_is_said() -> None:
    gpu = dataclasses.replace(load_gpu("a100-80gb"), memory_bytes=10e6, reserved_bytes=0.0)
    result = estimate(config(), LAYERS, 1, gpu, load_interconnect("dgx-a100"))
    assert not result.fits
    with pytest.raises(ConfigError, match="3 processes"):
        plan(config(tensor=2), 3)


def test_a_rank_that_sends_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last stage reduces its norm twice: on a cluster all others would wait for ever."""
    from megatron.optim import clip

    assert not plan(config(pipeline=2), 2).problems
    original = clip.all_reduce

    def twice(tensor: Any, axis: Any) -> Any:
        if axis.rank == 1:
            original(tensor, axis)
        return original(tensor, axis)

    monkeypatch.setattr(clip, "all_reduce", twice)
    (problem,) = plan(config(pipeline=2), 2).problems
    assert "stages 0 and 1 differ on axis model" in problem


@pytest.mark.parametrize(
    "parallel", [{}, {"schedule": "interleaved", "chunks": 2}, {"schedule": "zero_bubble"}], ids=str
)
def test_a_long_schedule_is_its_beginning_drawn_out(parallel: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(config(global_batch=48, pipeline=4, **parallel), LAYERS, 4)
    hardware = load_gpu("a100-80gb"), load_interconnect("dgx-a100")
    whole = price(run, *hardware)
    monkeypatch.setattr(module, "_MOST_ACTIONS", 0)
    short = price(run, *hardware)
    assert len(short.timeline) < len(whole.timeline)
    assert short.step_s == pytest.approx(whole.step_s, rel=1e-3)
    assert short.bubble == pytest.approx(whole.bubble, rel=1e-2)


def test_what_is_not_trained_has_neither_gradients_nor_optimizer_state() -> None:
    run = config(precision="bf16", tensor=2)
    adapted = dataclasses.replace(run, lora=LoraConfig(rank=2))
    plain, found = plan(run, 2), plan(adapted, 2)
    trained = count_adapters(LAYERS, make_lora(adapted.lora, LAYERS))
    assert trained is not None and trained < LAYERS.num_parameters / 20
    for before, after in zip(plain.stages, found.stages, strict=True):
        assert after.memory_bytes["weights"] == pytest.approx(before.memory_bytes["weights"], rel=0.06)
        # Gradient, master and two moments in float32, of which a rank has at most what one rank alone has.
        assert 0 < after.memory_bytes["gradients"] <= 4.4 * trained
        assert 0 < after.memory_bytes["optimizer"] <= 12.3 * trained
        assert after.memory_bytes["optimizer"] < before.memory_bytes["optimizer"] / 12
    assert 0.6 < found.hardware_flops / plain.hardware_flops < 0.75
    assert 0.6 < found.model_flops_causal / plain.model_flops_causal < 0.75
    assert found.problems == ()
