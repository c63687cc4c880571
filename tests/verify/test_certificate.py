"""The certificate holds for what is right, fails for what is wrong, and says in words what cannot be tried."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from megatron.__main__ import main
from megatron.config.load import load_config
from megatron.parallel.layout import Region
from megatron.train.origin import shrunk_model
from megatron.utils.errors import ConfigError
from megatron.verify import certificate
from megatron.verify.certificate import certify, parse_grid
from megatron.verify.compare import RankResult, assemble, deviations
from megatron.verify.report import to_json, to_text

SMALL = ["--data.train=synthetic", "--data.sequence_length=16", "--train.global_batch=8", "--train.micro_batch=1"]


def run(grid: str, *overrides: str, mutate: bool = False) -> certificate.Certificate:
    config, world_size = parse_grid(grid, load_config("tiny", [*SMALL, *overrides]))
    return certify(config, shrunk_model(config), world_size, mutate=mutate, say=lambda _: None)


def test_every_message_that_is_left_out_is_noticed() -> None:
    found = run("tp=2,dp=2", "--parallel.zero=1", mutate=True)
    assert found.holds and found.largest.value < 1e-12
    uses = {mutation.use for mutation in found.mutations}
    assert {("tp", "all_gather"), ("tp", "reduce_scatter"), ("loss", "all_reduce")} <= uses
    assert ("shard", "all_gather") in uses
    assert all(mutation.caught for mutation in found.mutations)
    assert "EQUIVALENT" in to_text(found, "megatron verify") and to_json(found)["equivalent"]


def test_full_sharding_within_groups_is_certified_too() -> None:
    found = run("dp=4", "--parallel.zero=3", "--parallel.zero_within=2", mutate=True)
    assert found.holds and found.largest.value < 1e-12
    uses = {mutation.use for mutation in found.mutations}
    assert {("shard", "all_gather"), ("shard", "reduce_scatter"), ("replica", "all_reduce")} <= uses
    assert all(mutation.caught for mutation in found.mutations)


def test_adapters_are_certified() -> None:
    found = run("tp=2", "--lora.rank=2", "--lora.targets=[k_proj, down_proj]", "--model.num_hidden_layers=1")
    assert found.holds and found.largest.value < 1e-12
    gradients = {deviation.name for deviation in found.deviations if deviation.what == "gradients"}
    assert len(gradients) == 4 and all(".lora_" in name for name in gradients)
    with pytest.raises(ConfigError, match="names c_attn, which a layer of model_type=llama has not"):
        run("tp=2", "--lora.rank=2", "--lora.targets=[c_attn]")


def test_a_mutation_that_is_not_noticed_spoils_the_certificate() -> None:
    found = run("pp=2")
    unnoticed = certificate.Mutation(("tp", "all_reduce"), 0.0)
    spoilt = dataclasses.replace(found, mutations=[unnoticed])
    assert found.holds and not spoilt.holds
    assert "NOT NOTICED" in to_text(spoilt, "")


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", "--config", "tiny", "--grid", "pp=2", "--json", *SMALL[1:], "--parallel.schedule=zero_bubble"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["equivalent"] and result["grid"]["pipeline"] == 2
    assert {entry["what"] for entry in result["deviations"]} == {"losses", "norms", "gradients", "weights"}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("tp=x", "'tp=x' is not an axis with a size"),
        ("sp=2", "'sp=2' is not an axis with a size"),
        ("tp=3", "num_attention_heads=4 is not divisible by parallel.tensor=3"),
        ("dp=3", "train.global_batch=8 is not divisible by 3 data ranks"),
    ],
)
def test_what_cannot_be_run_is_said(grid: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(grid)


def test_a_model_that_is_too_large_is_refused_before_it_fills_the_machine() -> None:
    with pytest.raises(ConfigError, match="Shrink it"):
        config, world_size = parse_grid("tp=2", load_config("llama2-70b", ["--data.train=synthetic"]))
        certify(config, shrunk_model(config), world_size, mutate=False, say=lambda _: None)


def result(values: list[float]) -> RankResult:
    region = Region.whole("w", (len(values),))
    return RankResult([1.0], [2.0], [(region, np.array(values))], [(region, np.array(values))])


def test_deviations_are_relative_to_the_largest_element() -> None:
    found = {d.what: d.value for d in deviations([result([1.0, 4.0])], result([1.0, 5.0]))}
    assert found == {"losses": 0.0, "norms": 0.0, "gradients": 0.2, "weights": 0.2}


def test_ranks_that_differ_are_infinitely_far_off() -> None:
    odd = result([1.0, 5.0])
    odd.losses = [1.0000001]
    found = deviations([result([1.0, 5.0]), odd], result([1.0, 5.0]))
    assert found[0].what == "losses" and found[0].value == float("inf")


def test_parts_that_no_rank_holds_and_copies_that_differ_are_not_numbers() -> None:
    left, right = Region("w", (3,), (0,), (2,)), Region("w", (3,), (1,), (1,))
    whole = assemble([(left, np.array([1.0, 2.0])), (right, np.array([2.5]))])["w"]
    assert whole[0] == 1.0 and np.isnan(whole[1]) and np.isnan(whole[2])
