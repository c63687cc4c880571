"""AdamW on flat ranges against torch.optim.AdamW on the parameters, and what a rank keeps under ZeRO-1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron.config.optimizer import OptimizerConfig
from megatron.optim.adamw import AdamW
from megatron.parallel.buckets import Bucket

from .conftest import MakeBuckets, set_gradients, slots

CONFIG = OptimizerConfig(beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)
RATES = [0.0, 1e-2, 3e-2, 2e-2, 1e-3, 5e-3]
FINE, NOT_FINITE = torch.tensor(0.0), torch.tensor(1.0)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def torch_adamw(weights: list[torch.Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's AdamW with weight decay on matrices only."""
    groups = [
        {"params": [weight for weight in weights if weight.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [weight for weight in weights if weight.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps)


def reference_weights(buckets: list[Bucket], config: OptimizerConfig, divisor: float) -> dict[str, torch.Tensor]:
    """The weights after one step for each rate, by torch."""
    weights = {name: weight.detach().clone() for name, weight, _ in slots(buckets)}
    optimizer = torch_adamw(list(weights.values()), config)
    for step, rate in enumerate(RATES):
        set_gradients(buckets, step)
        for name, _, gradient in slots(buckets):
            weights[name].grad = gradient / divisor
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return weights


def train(buckets: list[Bucket], config: OptimizerConfig, divisor: float) -> AdamW:
    optimizer = AdamW(buckets, config)
    for step, rate in enumerate(RATES):
        set_gradients(buckets, step)
        optimizer.step(rate, scalar(divisor), FINE)
    return optimizer


def test_updates_are_those_of_torch(make_buckets: MakeBuckets) -> None:
    expected = reference_weights(make_buckets(), CONFIG, divisor=7.0)
    buckets = make_buckets()
    assert len(buckets) > 3, "several buckets, matrices and norms mixed in some"
    optimizer = train(buckets, CONFIG, divisor=7.0)
    assert optimizer.updates == len(RATES)
    for name, weight, _ in slots(buckets):
        torch.testing.assert_close(weight, expected[name], rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize(
    "wrong",
    [{"weight_decay": 0.0}, {"eps": 1e-5}, {"beta1": 0.81}, {"beta2": 0.91}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_each_setting_matters(make_buckets: MakeBuckets, wrong: dict[str, float]) -> None:
    expected = reference_weights(make_buckets(), replace(CONFIG, **wrong), divisor=7.0)
    buckets = make_buckets()
    train(buckets, CONFIG, divisor=7.0)
    assert max((weight - expected[name]).abs().max().item() for name, weight, _ in slots(buckets)) > 1e-6


def test_norms_do_not_decay(make_buckets: MakeBuckets) -> None:
    buckets = make_buckets()
    optimizer = AdamW(buckets, CONFIG)
    before = {name: weight.clone() for name, weight, _ in slots(buckets)}
    optimizer.step(0.1, scalar(1.0), FINE)  # gradients are zero, so only decay can move a weight
    for name, weight, _ in slots(buckets):
        expected = before[name] * (1 - 0.1 * 0.3) if weight.dim() > 1 else before[name]
        torch.testing.assert_close(weight, expected, rtol=1e-14, atol=0.0, msg=name)


def test_a_gradient_that_is_not_finite_changes_nothing(make_buckets: MakeBuckets) -> None:
    buckets, undisturbed = make_buckets(), make_buckets()
    optimizer, calm = AdamW(buckets, CONFIG), AdamW(undisturbed, CONFIG)
    for step, rate in enumerate(RATES):
        if step == 2:
            set_gradients(buckets, step)
            next(slots(buckets))[2][5] = torch.nan
            optimizer.step(rate, scalar(torch.nan), NOT_FINITE)
        for bucket, state in ((buckets, optimizer), (undisturbed, calm)):
            set_gradients(bucket, step)
            state.step(rate, scalar(1.0), FINE)
    assert optimizer.updates == calm.updates == len(RATES)
    for (name, weight, _), (_, expected, _) in zip(slots(buckets), slots(undisturbed), strict=True):
        assert torch.equal(weight, expected), name
    for kind in AdamW.STATE_KINDS:
        for (region, mine), (_, other) in zip(optimizer.state_regions(kind), calm.state_regions(kind), strict=True):
            assert torch.equal(mine, other), (kind, region)


def test_bf16_weights_follow_float32_masters(make_buckets: MakeBuckets) -> None:
    buckets, exact = make_buckets(torch.bfloat16), make_buckets(torch.float32)
    for (_, rounded, _), (_, weight, _) in zip(slots(buckets), slots(exact), strict=True):
        weight.copy_(rounded)
    optimizer = train(buckets, CONFIG, divisor=2.0)
    reference = train(exact, CONFIG, divisor=2.0)
    assert optimizer.has_masters and not reference.has_masters
    for (name, weight, _), (_, master, _) in zip(slots(buckets), slots(exact), strict=True):
        assert torch.equal(weight, master.bfloat16()), name
    for (region, master), (_, expected) in zip(
        optimizer.state_regions("master"), reference.state_regions("master"), strict=True
    ):
        assert torch.equal(master, expected), region


def test_masters_keep_what_bf16_cannot_hold(make_buckets: MakeBuckets) -> None:
    """Steps far below bf16's resolution add up in the masters."""
    buckets = make_buckets(torch.bfloat16)
    optimizer = AdamW(buckets, replace(CONFIG, weight_decay=0.0))
    before = {region: master.clone() for region, master in optimizer.state_regions("master")}
    for _ in range(10):
        for _, _, gradient in slots(buckets):
            gradient.fill_(1.0)
        optimizer.step(1e-5, scalar(1.0), FINE)
    for region, master in optimizer.state_regions("master"):
        torch.testing.assert_close(master, before[region] - 1e-4, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 8), (torch.bfloat16, 12), (torch.float64, 16)])
def test_zero_1_halves_the_state_of_two_ranks(make_buckets: MakeBuckets, dtype: torch.dtype, bytes_each: int) -> None:
    whole = AdamW(make_buckets(dtype), CONFIG)
    parameters = sum(bucket.weights.numel() for bucket in whole.buckets)
    assert whole.state_bytes == bytes_each * parameters == stored_bytes(whole)
    for rank in range(2):
        shared = AdamW(make_buckets(dtype, data=2, rank=rank, zero=1), CONFIG)
        unsharded = AdamW(make_buckets(dtype, data=2, rank=rank, zero=0), CONFIG)
        assert shared.state_bytes == stored_bytes(shared)
        assert shared.state_bytes * 2 == unsharded.state_bytes
        # Buckets are padded to even shares, which may add a little to small ones.
        assert whole.state_bytes / 2 <= shared.state_bytes <= 1.05 * whole.state_bytes / 2


def stored_bytes(optimizer: AdamW) -> int:
    """Bytes of the memory behind the state, the weights' own apart."""
    weights = {bucket.weights.untyped_storage().data_ptr() for bucket in optimizer.buckets}
    memory = {
        view.untyped_storage().data_ptr(): view.untyped_storage().nbytes()
        for kind in AdamW.STATE_KINDS
        for _, view in optimizer.state_regions(kind)
    }
    return sum(size for address, size in memory.items() if address not in weights)


@pytest.mark.parametrize("data", [2, 3, 4])
def test_sharded_updates_join_to_the_whole_one(make_buckets: MakeBuckets, data: int) -> None:
    alone = make_buckets()
    train(alone, CONFIG, divisor=3.0)
    expected = {name: weight for name, weight, _ in slots(alone)}
    ranks = [make_buckets(data=data, rank=rank, zero=1) for rank in range(data)]
    for buckets in ranks:
        untouched = [bucket.weights.clone() for bucket in buckets]
        train(buckets, CONFIG, divisor=3.0)
        for bucket, before in zip(buckets, untouched, strict=True):
            low, high = bucket.owned
            assert torch.equal(bucket.weights[:low], before[:low]), "another rank's range was touched"
            assert torch.equal(bucket.weights[high:], before[high:]), "another rank's range was touched"
    for parts in zip(*ranks, strict=True):
        joined = torch.cat([bucket.owned_weights for bucket in parts])
        for slot in parts[0].slots:
            weight = joined[slot.start : slot.stop].view(slot.spec.shape)[: len(expected[slot.name])]
            torch.testing.assert_close(weight, expected[slot.name], rtol=1e-14, atol=1e-15, msg=slot.name)


def test_state_regions_cover_every_weight_once(make_buckets: MakeBuckets) -> None:
    covered: dict[str, torch.Tensor] = {}
    for rank in range(3):
        optimizer = AdamW(make_buckets(data=3, rank=rank, zero=1), CONFIG)
        for region, view in optimizer.state_regions("exp_avg", copies=False):
            assert tuple(view.shape) == region.size
            covered.setdefault(region.name, torch.zeros(region.shape))[region.slices] += 1
    assert len(covered) == 2 * 9 + 3
    assert all((count == 1).all() for count in covered.values())


def test_updates_can_be_continued(make_buckets: MakeBuckets) -> None:
    """The count enters the bias correction, so a copy of the state that continues at another count goes elsewhere."""
    first = make_buckets()
    optimizer = train(first, CONFIG, divisor=1.0)
    results = []
    for updates in (len(RATES), 0):
        buckets = make_buckets()
        copy = AdamW(buckets, CONFIG)
        for kind in AdamW.STATE_KINDS:
            for (_, target), (_, source) in zip(copy.state_regions(kind), optimizer.state_regions(kind), strict=True):
                target.copy_(source)
        copy.set_updates(updates)
        assert copy.updates == updates
        set_gradients(buckets, 99)
        copy.step(1e-2, scalar(1.0), FINE)
        results.append([weight.clone() for _, weight, _ in slots(buckets)])
    set_gradients(first, 99)
    optimizer.step(1e-2, scalar(1.0), FINE)
    expected = [weight for _, weight, _ in slots(first)]
    assert all(map(torch.equal, results[0], expected))
    assert not any(map(torch.equal, results[1], expected))
