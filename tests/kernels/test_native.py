"""The compiled CPU kernels against the references: the same bits where torch's order is kept, else as near to exact."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.kernels import adamw, cross_entropy, native, rms_norm, rotary, squared_norm, swiglu
from megatron.kernels.native import Kernel

from .reference import DTYPES

LIBRARY, REASON = native.find("cpu")
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=f"needs the compiled kernels: {REASON}")

COLUMNS = (1, 2, 31, 64, 65, 127, 172, 513, 4096, 5000)


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has."""
    assert LIBRARY is not None
    usual = LIBRARY.instruction_set()
    if not LIBRARY.use_instruction_set(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    LIBRARY.use_instruction_set(usual)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def follows_torch(instruction_set: str) -> bool:
    """Whether the kernels' vectors are as long as torch's, whose order of sums they keep."""
    return {"avx512": "AVX512", "avx2": "AVX2"}.get(instruction_set) == torch.backends.cpu.get_cpu_capability()


def assert_no_worse(found: Any, reference: Any, exact: Any, dtype: torch.dtype, slack: float = 4.0) -> None:
    """The largest error against float64 is at most that of the reference, or some roundings where that has none."""
    for ours, theirs, true in zip(found, reference, exact, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        scale = true.abs().max().clamp(min=1e-30)
        floor = slack * torch.finfo(ours.dtype if dtype is torch.float64 else dtype).eps
        error, allowed = ((one.double() - true).abs().max() / scale for one in (ours, theirs))
        assert error <= 1.1 * allowed + floor, (error, allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_norms_forward(instruction_set: str, dtype: torch.dtype, columns: int) -> None:
    hidden, branch, weight = random(7, columns, dtype=dtype), random(7, columns, dtype=dtype, seed=1), random(columns)
    weight = weight.to(dtype)
    for run, reference, inputs in (
        (rms_norm._native, rms_norm.rms_norm_reference, (hidden,)),
        (rms_norm._native_add, rms_norm.add_rms_norm_reference, (hidden, branch)),
    ):
        found, expected = run(*inputs, weight, 1e-5), reference(*inputs, weight, 1e-5)
        assert found is not None
        if follows_torch(instruction_set):
            assert all(map(torch.equal, found, expected))
        assert_no_worse(found, expected, reference(*(one.double() for one in inputs), weight.double(), 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("with_sum", [False, True])
def test_norm_backward(instruction_set: str, dtype: torch.dtype, columns: int, with_sum: bool) -> None:
    hidden, grad, grad_sum = (random(37, columns, dtype=dtype, seed=seed) for seed in range(3))
    weight = random(columns, dtype=dtype)
    rstd = rms_norm.rms_norm_reference(hidden, weight, 1e-5)[1]
    inputs = (grad, grad_sum if with_sum else None, hidden, weight)
    wide = [None if one is None else one.double() for one in inputs]
    exact = rms_norm.rms_norm_backward_reference(*wide, rms_norm.rms_norm_reference(wide[2], wide[3], 1e-5)[1])
    found = rms_norm._native_backward(*inputs, rstd)
    assert found is not None
    # With few columns the terms cancel, and what is left is their rounding.
    expected = rms_norm.rms_norm_backward_reference(*inputs, rstd)
    assert_no_worse(found, expected, exact, dtype, slack=4.0 if columns > 2 else 2000.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv", "d"), [(1, 1, 2), (8, 4, 64), (3, 1, 10), (6, 6, 18)])
def test_rotary(instruction_set: str, dtype: torch.dtype, heads: int, kv: int, d: int) -> None:
    tables = rotary.rotary_tables(19, d, 1e4, dtype, torch.device("cpu"))
    qkv = random(19, 3, (heads + 2 * kv) * d, dtype=dtype)
    found = rotary._native(qkv, *tables, heads, kv)
    expected = rotary.rotary_split_reference(qkv, *tables, heads, kv)
    assert found is not None and all(map(torch.equal, found, expected))
    gradients = [random(*one.shape, dtype=dtype, seed=seed) for seed, one in enumerate(expected)]
    joined = rotary._native_join(*gradients, *tables)
    assert joined is not None and torch.equal(joined, rotary.rotary_join_reference(*gradients, *tables))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_swiglu(instruction_set: str, dtype: torch.dtype, columns: int) -> None:
    gate_up = 4 * random(9, 2 * columns)
    gate_up[0, 0], gate_up[1, 0] = -90.0, 90.0
    gate_up, grad = gate_up.to(dtype), random(9, columns, dtype=dtype, seed=1)
    found, back = swiglu._native(gate_up), swiglu._native_backward(grad, gate_up)
    exact = swiglu.swiglu_reference(gate_up.double()), swiglu.swiglu_backward_reference(grad.double(), gate_up.double())
    expected = swiglu.swiglu_reference(gate_up), swiglu.swiglu_backward_reference(grad, gate_up)
    assert_no_worse((found, back), expected, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "valid"), [(1, 1), (33, 30), (512, 512), (32017, 32000), (64, 0)])
def test_cross_entropy(instruction_set: str, dtype: torch.dtype, columns: int, valid: int) -> None:
    logits = 5 * random(6, columns)
    targets = torch.tensor([0, max(valid - 1, 0), valid, -1, columns + 7, valid // 2])
    logits = logits.to(dtype)
    found = cross_entropy._native_statistics(logits, targets, valid)
    expected = cross_entropy.local_statistics_reference(logits, targets, valid)
    exact = cross_entropy.local_statistics_reference(logits.double(), targets, valid)
    assert found is not None and torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])
    assert_no_worse(found[1:2], expected[1:2], exact[1:2], torch.promote_types(dtype, torch.float32))
    log_sum_exp = (exact[1].clamp(min=1).log() + exact[0].clamp(min=-1)).to(found.dtype)
    grad = random(6, dtype=found.dtype, seed=2)
    arguments = (targets, log_sum_exp, grad, valid)
    ours, theirs, true = logits.clone(), logits.clone(), logits.double()
    assert cross_entropy._native_gradient(ours, *arguments)
    cross_entropy.logits_gradient_reference_(theirs, *arguments)
    cross_entropy.logits_gradient_reference_(true, targets, log_sum_exp.double(), grad.double(), valid)
    assert (ours[:, valid:] == 0).all()
    assert_no_worse([ours], [theirs], [true], dtype)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_cross_entropy_tells_what_is_not_finite(instruction_set: str, value: float) -> None:
    logits = random(2, 500, dtype=torch.float32)
    logits[1, 77] = value
    statistics = cross_entropy._native_statistics(logits, torch.tensor([0, 0]), 500)
    assert statistics is not None
    assert torch.isfinite(statistics[1, 0]) and not torch.isfinite(statistics[1, 1])


def test_a_row_may_begin_with_many_impossible_tokens(instruction_set: str) -> None:
    """Blocks in which nothing is possible come before the row's maximum is known."""
    logits = torch.full((2, 2000), -torch.inf)
    logits[0, 1500:] = random(500, dtype=torch.float32)
    logits[1, :3] = torch.tensor([-1e30, 2.0, -200.0])
    statistics = cross_entropy._native_statistics(logits, torch.tensor([1600, 1]), 2000)
    assert statistics is not None
    log_sum_exp = statistics[0] + statistics[1].log()
    torch.testing.assert_close(log_sum_exp.double(), logits.double().logsumexp(-1), rtol=1e-6, atol=0.0)
    assert cross_entropy._native_gradient(logits, torch.tensor([1600, 1]), log_sum_exp, torch.ones(2), 2000)
    assert (logits[0, :1500] == 0).all() and (logits[1, 3:] == 0).all() and logits[1, 2] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exponential_is_exact_to_its_limits(instruction_set: str, dtype: torch.dtype) -> None:
    """By way of a gradient whose log-sum-exp is 0 and whose target is elsewhere: exp of every logit."""
    logits = torch.linspace(-100.0, 90.0, 200_001).to(dtype).unsqueeze(0)
    found = logits.clone()
    assert cross_entropy._native_gradient(found, torch.tensor([-1]), torch.zeros(1), torch.ones(1), found.shape[1])
    exact = logits.double().exp()
    inside = (exact > 1e-38) & (exact < 2.3e38)
    allowed = (0.5 if dtype is torch.bfloat16 else 1.0) * 1.01 * torch.finfo(dtype).eps
    assert ((found.double() / exact - 1).abs()[inside] <= allowed).all()
    assert (found[exact < 5e-39] == 0).all() and (found[exact > 3.5e38] == torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("odd", [0, 1])
def test_large_results_are_those_of_their_rows(instruction_set: str, dtype: torch.dtype, odd: int) -> None:
    """Results of 16 MiB and more are stored past the caches; an odd width puts most rows beside the vectors."""
    rows, columns = 4, (1 << 23) // dtype.itemsize + odd
    hidden = random(rows, 64, dtype=dtype).repeat(1, columns // 64 + 1)[:, :columns].contiguous()
    weight = random(64, dtype=dtype).repeat(columns // 64 + 1)[:columns].contiguous()
    whole = rms_norm._native(hidden, weight, 1e-5)
    assert whole is not None
    grad = hidden.roll(1, dims=1)
    back = rms_norm._native_backward(grad, None, hidden, weight, whole[1])
    assert back is not None
    for row in range(rows):
        alone = rms_norm._native(hidden[row : row + 1], weight, 1e-5)
        assert alone is not None and torch.equal(alone[0][0], whole[0][row])
        alone = rms_norm._native_backward(
            grad[row : row + 1], None, hidden[row : row + 1], weight, whole[1][row : row + 1]
        )
        assert alone is not None and torch.equal(alone[0][0], back[0][row])


def test_large_heads_are_those_of_their_positions(instruction_set: str) -> None:
    tables = rotary.rotary_tables(2050, 64, 1e4, torch.float32, torch.device("cpu"))
    qkv = random(2050, 1, 48 * 64, dtype=torch.float32)
    found = rotary._native(qkv, *tables, 40, 4)
    expected = rotary.rotary_split_reference(qkv, *tables, 40, 4)
    assert found is not None and all(map(torch.equal, found, expected))
    joined = rotary._native_join(*found, *tables)
    assert joined is not None and torch.equal(joined, rotary.rotary_join_reference(*expected, *tables))


def test_a_nan_stays_one_in_bfloat16(instruction_set: str) -> None:
    """Also one with all bits set, which is what GPUs make: rounding it would give zero."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001] * 10, dtype=torch.int32)
    masters, zeros = bits.view(torch.float32).clone(), torch.zeros(4, 40)
    weights, one = torch.zeros(40, dtype=torch.bfloat16), torch.ones(())
    assert adamw._native(masters, *zeros[:3], weights, one, 0 * one, one, 1e-2, 0.9, 0.95, 1e-8, 0.1)
    assert weights.isnan().all()


@pytest.mark.parametrize("count", [1, 63, 4096, 50_001])
@pytest.mark.parametrize("rounded", [False, True])
def test_adamw(instruction_set: str, count: int, rounded: bool) -> None:
    dtype = torch.float32 if rounded else torch.float64

    def state() -> list[torch.Tensor]:
        return [random(count, dtype=dtype), random(count, dtype=dtype, seed=1), *torch.zeros(2, count, dtype=dtype)]

    scalars = [torch.tensor(3.0, dtype=dtype), torch.tensor(0.0), torch.tensor(1.0)]
    weights = [torch.zeros(count, dtype=torch.bfloat16) if rounded else None for _ in range(2)]
    ours, theirs = state(), state()
    for step in range(1, 4):
        scalars[2].fill_(step)
        ours[1].copy_(random(count, dtype=dtype, seed=step))
        theirs[1].copy_(ours[1])
        assert adamw._native(*ours, weights[0], *scalars, 1e-2, 0.9, 0.95, 1e-8, 0.1)
        adamw.adamw_update_reference_(*theirs, weights[1], *scalars, 1e-2, 0.9, 0.95, 1e-8, 0.1)
    for at in (0, 2, 3):
        torch.testing.assert_close(
            ours[at], theirs[at], rtol=1e-5 if rounded else 1e-12, atol=1e-6 if rounded else 1e-15
        )
    if weights[0] is not None:
        assert torch.equal(weights[0], ours[0].bfloat16())
    before = [one.clone() for one in ours]
    scalars[1].fill_(1.0)
    assert adamw._native(*ours, weights[0], *scalars, 1e-2, 0.9, 0.95, 1e-8, 0.1)
    assert all(map(torch.equal, ours, before))


@pytest.mark.parametrize("count", [0, 1, 63, 64, 100_003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_norm(instruction_set: str, count: int, dtype: torch.dtype) -> None:
    flat = random(count, dtype=dtype)
    found = squared_norm._native(flat)
    assert found is not None and found.dtype == torch.promote_types(dtype, torch.float32)
    assert found.item() == pytest.approx(flat.double().square().sum().item(), rel=2e-7)


def test_what_has_no_kernel_runs_the_reference() -> None:
    half = random(4, 6, dtype=torch.float16)
    assert rms_norm._native(half, half[0], 1e-5) is None
    assert torch.equal(swiglu.swiglu(half), swiglu.swiglu_reference(half))


def test_signatures_are_those_of_the_header() -> None:
    """A call with a wrong number or kind of arguments would not be noticed by anything else."""
    text = (Path(__file__).parents[2] / "csrc" / "kernels.h").read_text().replace("\\\n", "")
    declared = {}
    for name, parameters in re.findall(r"X\((\w+),\s*\(([^)]*)\)", text):
        words = [re.sub(r"\s+", " ", one).strip() for one in parameters.split(",")]
        assert words[0] == "int dtype" and words[-1] == "void* stream"
        letters = ("p" if "*" in one else "d" if one.startswith("double") else "i" for one in words[1:-1])
        declared[name] = "".join(letters)
    modules = (adamw, cross_entropy, rms_norm, rotary, squared_norm, swiglu)
    used = {one.name: one.signature for module in modules for one in vars(module).values() if isinstance(one, Kernel)}
    assert used == declared


OPERATIONS: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (torch.ops.megatron.rms_norm.default, (random(3, 8).requires_grad_(), random(8).requires_grad_(), 1e-5)),
    (
        torch.ops.megatron.add_rms_norm.default,
        (random(3, 8).requires_grad_(), random(3, 8).requires_grad_(), random(8).requires_grad_(), 1e-5),
    ),
    (torch.ops.megatron.swiglu.default, (random(3, 8).requires_grad_(),)),
    (
        torch.ops.megatron.rotary_split.default,
        (random(5, 2, 16).requires_grad_(), *rotary.rotary_tables(5, 4, 1e4, torch.float64, torch.device("cpu")), 2, 1),
    ),
    (torch.ops.megatron.cross_entropy_statistics.default, (random(3, 8), torch.tensor([0, 7, -1]), 8)),
    (
        torch.ops.megatron.cross_entropy_gradient_.default,
        (random(3, 8), torch.tensor([0, 7, -1]), random(3), random(3), 6),
    ),
    (torch.ops.megatron.squared_norm.default, (random(9),)),
]


@pytest.mark.parametrize(("operation", "inputs"), OPERATIONS, ids=[str(operation) for operation, _ in OPERATIONS])
def test_torch_finds_each_operation_well_defined(operation: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
    """Schema, shapes for fake tensors, and autograd agree with what runs."""
    torch.library.opcheck(operation, inputs)


def test_every_operation_was_checked_or_is_a_backward() -> None:
    names = {name.removesuffix(".default") for name in map(str, dict(OPERATIONS))}
    defined = {name for name in torch.ops.megatron if not name.startswith("_")}
    backwards = {"rms_norm_backward", "swiglu_backward", "rotary_join", "adamw_"}
    elsewhere = {"ranged_attention", "ranged_attention_backward"}  # in test_attention.py
    assert {f"megatron.{name}" for name in defined - backwards - elsewhere} == names
