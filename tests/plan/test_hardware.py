"""Hardware files are read strictly, and costs are the sums that their figures say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron.plan.costs import Costs, ring_bytes
from megatron.plan.hardware import default_interconnect, load_gpu, load_interconnect, names
from megatron.plan.operations import Operation
from megatron.plan.recorder import Message
from megatron.utils.errors import ConfigError

NODE = tuple(range(8))


def message(kind: str, ranks: tuple[int, ...], payload: int = 10**9) -> Message:
    return Message(kind, "tp", ranks, payload)


@pytest.fixture
def costs() -> Costs:
    """A machine of round figures: nothing is lost anywhere."""
    gpu = dataclasses.replace(
        load_gpu("a100-80gb"),
        product_efficiency=1.0,
        product_half_depth=0.0,
        memory_efficiency=1.0,
        attention_efficiency=0.5,
        launch_s=0.0,
        bf16_flops_per_s=1e14,
        memory_bytes_per_s=1e12,
        multiprocessors=100,
    )
    wires = dataclasses.replace(
        load_interconnect("dgx-a100"),
        link_bytes_per_s=1e11,
        link_efficiency=1.0,
        link_latency_s=0.0,
        network_bytes_per_s=8e10,
        network_efficiency=1.0,
        network_latency_s=0.0,
    )
    return Costs(gpu, wires, "bf16")


def test_every_file_that_comes_along_is_whole() -> None:
    assert {"a100-80gb", "h100-80gb"} <= set(names("gpu"))
    for name in names("gpu"):
        gpu = load_gpu(name)
        assert 0.0 < gpu.product_efficiency <= 1.0 and gpu.memory_bytes > 1e10
        assert load_interconnect(default_interconnect(name)).gpus_per_node == 8
    for name in names("interconnect"):
        assert load_interconnect(name).link_bytes_per_s > load_interconnect(name).network_bytes_per_s / 8


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "megatron/plan/hardware/gpu/a100-80gb.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("power_w: 400", "power_w: 300"))
    assert load_gpu(str(path)).power_w == 300
    path.write_text(text.replace("power_w: 400", "power: 300").replace("108", "many"))
    with pytest.raises(ConfigError, match=r"power_w is missing; power is unknown; multiprocessors='many' is not a"):
        load_gpu(str(path))
    with pytest.raises(ConfigError, match="did you mean a100-80gb"):
        load_gpu("a100-80g")
    with pytest.raises(ConfigError, match="--interconnect is needed"):
        default_interconnect(str(path))


def test_products_fill_whole_waves(costs: Costs) -> None:
    """100 multiprocessors: 100 tiles of 128 x 256 take one wave, 101 take two."""
    one = Operation("mm", 1e12, 0.0, (1, 1280, 2560, 4096))
    two = Operation("mm", 1e12, 0.0, (1, 12928, 256, 4096))
    assert costs.operation_s(one) == pytest.approx(0.01)
    assert costs.operation_s(two) == pytest.approx(0.01 * 200 / 101)


def test_what_moves_more_than_it_computes_is_bound_by_memory(costs: Costs) -> None:
    assert costs.operation_s(Operation("add", 0.0, 2e9)) == pytest.approx(2e-3)
    assert costs.operation_s(Operation("mm", 1e9, 5e9, (1, 1280, 2560, 64))) == pytest.approx(5e-3)
    assert costs.operation_s(Operation("ranged_attention", 1e12, 0.0, attention=True)) == pytest.approx(0.02)


def test_rings(costs: Costs) -> None:
    assert ring_bytes(message("all_reduce", NODE)) == 2e9 * 7 / 8
    assert ring_bytes(message("all_gather", NODE)) == 1e9 * 7 / 8
    assert ring_bytes(message("send", NODE)) == 1e9 and ring_bytes(message("receive", NODE)) == 0
    assert costs.message_s(message("all_reduce", NODE)) == pytest.approx(2e9 * 7 / 8 / 1e11)
    assert costs.link(message("all_reduce", NODE)) == "link"


def test_groups_of_a_node_share_its_network(costs: Costs) -> None:
    """One rank of each of two nodes has an eighth of the network; all ranks of both have all of it."""
    single, whole = message("all_gather", (0, 8)), message("all_gather", tuple(range(16)))
    assert costs.link(single) == costs.link(whole) == "network"
    assert costs.message_s(single) == pytest.approx(0.5e9 / 1e10)
    assert costs.message_s(whole) == pytest.approx(max(0.5e9 / 8e10, 1e9 * 15 / 16 / 1e11))
    assert costs.transfer_s(10**9, 0, 1) == pytest.approx(0.01)
    assert costs.transfer_s(10**9, 7, 8) == pytest.approx(0.1)
