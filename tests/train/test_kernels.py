"""A run says which kernels it uses, and uses what libraries contribute."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from megatron.config.kernels import KernelsConfig
from megatron.config.load import load_config
from megatron.config.optimizer import OptimizerConfig
from megatron.kernels import native
from megatron.kernels.attention import causal_attention, compiled_causal_attention
from megatron.kernels.eager_attention import eager_causal_attention
from megatron.kernels.vendor.select import VendorKernels
from megatron.model.attention import Attention
from megatron.model.initialize import initialize
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import single_rank
from megatron.parallel.world import World
from megatron.train.kernels import choose_kernels, install
from megatron.train.step import TrainingStep
from megatron.utils.environment import Launch
from megatron.utils.errors import ConfigError

from .conftest import MODEL, random_batch


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    """Whatever a test selects, the next finds what was in use."""
    before = dict(native._in_use)
    yield
    native._in_use.clear()
    native._in_use.update(before)


def test_the_backend_is_selected_and_said(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "megatron")
    assert choose_kernels(KernelsConfig(backend="reference"), MODEL, 1, world) == VendorKernels()
    assert not native.in_use("cpu")
    assert [record.getMessage() for record in caplog.records] == ["reference kernels, as kernels.backend says"]
    assert caplog.records[0].levelno == logging.INFO


def test_references_for_want_of_compiled_kernels_are_one_notice(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    monkeypatch.setattr(native, "find", lambda kind: (None, "they were not built"))
    caplog.set_level(logging.INFO, "megatron")
    choose_kernels(KernelsConfig(), MODEL, 1, world)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "reference kernels, slower: they were not built; see `megatron doctor`"
    caplog.clear()
    other = World(Launch(1, 2, 1, 2), world.device, world.control)
    choose_kernels(KernelsConfig(), MODEL, 1, other)
    assert not caplog.records, "rank 0 has said it"
    with pytest.raises(ConfigError, match=r"kernels.backend=native, but there are no compiled kernels for cpu"):
        choose_kernels(KernelsConfig(backend="native"), MODEL, 1, world)


def test_a_library_for_gpus_is_refused_on_the_cpu(world: World) -> None:
    with pytest.raises(ConfigError, match=r"kernels.flash_attention=true, but this process runs on cpu"):
        choose_kernels(KernelsConfig(flash_attention=True), MODEL, 1, world)


def test_eager_attention_is_chosen_once_and_said(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "megatron")
    vendor = choose_kernels(KernelsConfig(attention="eager"), MODEL, 1, world)
    assert "eager attention" in caplog.records[-1].getMessage()
    fused, eager = make_step(), make_step()
    install(vendor, eager.model)
    attentions = [module for module in eager.model.modules() if isinstance(module, Attention)]
    assert len(attentions) == MODEL.num_hidden_layers
    assert all(module.attend is eager_causal_attention for module in attentions)
    outcomes = [step(random_batch(2, seed=1), 1) for step in (fused, eager)]
    torch.testing.assert_close(outcomes[0].loss, outcomes[1].loss, rtol=1e-2, atol=0)


def test_runs_on_the_cpu_use_the_compiled_attention(world: World) -> None:
    vendor = choose_kernels(KernelsConfig(), MODEL, 1, world)
    assert vendor.attend is (compiled_causal_attention if native.in_use("cpu") else None)
    assert choose_kernels(KernelsConfig(backend="reference"), MODEL, 1, world).attend is None


def make_step() -> TrainingStep:
    model = Transformer(MODEL, single_rank(), torch.bfloat16)
    initialize(model, MODEL, 3)
    return TrainingStep(model, single_rank(), OptimizerConfig(), micro_batches=2, zero=0, decay_steps=10)


def test_contributions_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a GPU, and on some CPUs
    monkeypatch.setattr("megatron.kernels.products.cpu_multiplies_bfloat16", lambda: True)
    calls = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        calls.append("attend")
        return causal_attention(query, key, value)

    def accumulate(total: torch.Tensor, grad_output: torch.Tensor, inputs: torch.Tensor) -> None:
        calls.append("accumulate")
        total += grad_output.to(inputs.dtype).t() @ inputs

    native.select("auto", "cpu")
    plain, fitted = make_step(), make_step()
    install(VendorKernels(attend, accumulate), fitted.model)
    # Twice, so that a buffer holds something that the first product has to forget.
    for number in (1, 2):
        outcomes = [step(random_batch(2, seed=number), number) for step in (plain, fitted)]
        assert torch.equal(outcomes[0].loss, outcomes[1].loss)
        torch.testing.assert_close(outcomes[0].grad_norm, outcomes[1].grad_norm, rtol=1e-5, atol=0)
    layers, steps, micro_batches = MODEL.num_hidden_layers, 2, 2
    assert calls.count("attend") == layers * steps * micro_batches
    assert calls.count("accumulate") >= (4 * layers + 1) * steps * micro_batches


@pytest.mark.parametrize(
    ("words", "hint", "cure"),
    [
        (
            ["--kernels.attention=eager", "--kernels.flash_attention=true", "--train.precision=bf16"],
            "kernels.attention=eager with kernels.flash_attention=true",
            ["--kernels.attention=auto"],
        ),
        (["--kernels.fp8=true"], "kernels.fp8=true is refused: FP8 products", ["--kernels.fp8=false"]),
        (
            ["--kernels.apex=true", "--train.precision=fp32"],
            "kernels.apex=true with train.precision=fp32",
            ["--train.precision=bf16"],
        ),
        (
            ["--kernels.flash_attention=true", "--train.precision=fp64"],
            "kernels.flash_attention=true with train.precision=fp64",
            ["--kernels.flash_attention=false"],
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_configuration(words: list[str], hint: str, cure: list[str]) -> None:
    with pytest.raises(ConfigError, match=hint):
        load_config(None, words)
    load_config(None, words + cure)
