"""Attention over runs of keys: the reference against torch's own with a full mask, the compiled kernel against both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron.kernels import attention, native
from megatron.kernels.attention import (
    compiled_causal_attention,
    ranged_attention,
    ranged_attention_backward,
    ranged_attention_backward_reference,
    ranged_attention_reference,
)

from .reference import DTYPES

LIBRARY, REASON = native.find("cpu")
needs_library = pytest.mark.skipif(LIBRARY is None, reason=f"needs the compiled kernels: {REASON}")

Tensors = tuple[torch.Tensor, ...]


@pytest.fixture(params=["reference", pytest.param("native", marks=needs_library)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    native.select(request.param, "cpu")
    yield request.param
    native.select("auto", "cpu")


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has."""
    library = native._in_use.get("cpu")
    if library is None:
        pytest.skip(f"needs the compiled kernels: {REASON}")
    usual = library.instruction_set()
    if not library.use_instruction_set(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    library.use_instruction_set(usual)


@pytest.fixture
def threads() -> Iterator[None]:
    """The test may change their number."""
    usual = torch.get_num_threads()
    yield
    torch.set_num_threads(usual)


def _inputs(
    queries: int, keys: int, heads: int = 4, kv: int = 2, d: int = 8, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = [(2, heads, queries, d), (2, kv, keys, d), (2, kv, keys, d)]
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [draw.to(dtype).requires_grad_() for draw in draws]


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def _runs(queries: int, keys: int) -> Tensors:
    """Random runs of keys, each with at least one."""
    generator = torch.Generator().manual_seed(queries + keys)
    ends = torch.randint(0, keys, (2, 2, queries), generator=generator).sort(dim=0).values
    return ends[0].to(torch.int32), (ends[1] + 1).to(torch.int32)


def _masks(length: int) -> dict[str, Tensors]:
    """Runs of every kind, i32[2, length] each."""
    place = torch.arange(length, dtype=torch.int32).expand(2, -1)
    generator = torch.Generator().manual_seed(length)
    random = torch.randint(0, length + 1, (2, 2, length), generator=generator, dtype=torch.int32)
    return {
        "causal": (torch.zeros_like(place), place + 1),
        "documents": (torch.stack((place[0] // 20 * 20, place[0] // 33 * 33)), place + 1),
        "window": ((place - 40).clamp(min=0), place + 1),
        "random, half of them empty": (random[0], random[1]),
        "the other keys": (place + 1, torch.full_like(place, length)),
    }


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 9), (128, 128), (129, 40), (300, 300)])
def test_runs_equal_a_mask(backend: str, queries: int, keys: int) -> None:
    inputs, (start, stop) = _inputs(queries, keys), _runs(queries, keys)
    place = torch.arange(keys)
    mask = (place >= start.unsqueeze(-1)) & (place < stop.unsqueeze(-1))
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask.unsqueeze(1), enable_gqa=True)
    mixed, _ = ranged_attention(*inputs, start, stop)
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(mixed)
    for ours, theirs in zip(
        torch.autograd.grad(mixed, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_parts_of_the_keys_add_up(backend: str) -> None:
    """Two halves of the keys, put together by their log-sum-exps, are the whole; so are their gradients."""
    with torch.no_grad():
        query, key, value = _inputs(70, 50)
        start, stop = _runs(70, 50)
        mixed, total = ranged_attention(query, key, value, start, stop)
        upstream = torch.randn_like(mixed)
        whole = ranged_attention_backward(upstream, query, key, value, mixed, total, start, stop)
        results, gradients = [], []
        for half in (slice(0, 20), slice(20, 50)):
            bounds = [(bound - half.start).clamp(0, half.stop - half.start) for bound in (start, stop)]
            results.append(ranged_attention(query, key[:, :, half], value[:, :, half], *bounds))
            gradients.append(
                ranged_attention_backward(upstream, query, key[:, :, half], value[:, :, half], mixed, total, *bounds)
            )
        torch.testing.assert_close(torch.logaddexp(results[0][1], results[1][1]), total)
        assert torch.isneginf(results[0][1]).any(), "no query is without keys: the case proves less than it should"
        shares = [(part - total).exp().unsqueeze(-1) for _, part in results]
        torch.testing.assert_close(sum(w * m for w, (m, _) in zip(shares, results, strict=True)), mixed)
        torch.testing.assert_close(gradients[0][0] + gradients[1][0], whole[0])
        for which in (1, 2):
            torch.testing.assert_close(torch.cat([part[which] for part in gradients], dim=2), whole[which])


def test_a_query_without_keys_gets_nothing(backend: str) -> None:
    query, key, value = _inputs(3, 4)
    start, stop = torch.tensor([[0, 2, 4], [0, 0, 0]], dtype=torch.int32), torch.tensor([[4, 2, 4], [1, 1, 1]]).int()
    mixed, total = ranged_attention(query, key, value, start, stop)
    assert (mixed[0, :, 1:] == 0).all() and torch.isneginf(total[0, :, 1:]).all()
    gradients = torch.autograd.grad(mixed.sum(), (query, key, value))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_mixed_values_lie_as_the_heads_are_joined(backend: str) -> None:
    mixed = ranged_attention(*_inputs(5, 9), *_runs(5, 9))[0]
    assert mixed.shape == (2, 4, 5, 8) and mixed.permute(2, 0, 1, 3).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [20, 300])
def test_compiled_causal_attention_is_torchs(backend: str, dtype: torch.dtype, d: int) -> None:
    """Also with heads for which there is no compiled kernel."""
    inputs = _inputs(70, 70, 6, 2, d, dtype)
    expected = F.scaled_dot_product_attention(*(each.double() for each in inputs), is_causal=True, enable_gqa=True)
    mixed = compiled_causal_attention(*inputs)
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(mixed.double(), expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(mixed, inputs, upstream.to(mixed.dtype)),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=4 * tolerance, atol=4 * tolerance)


@needs_library
def test_torch_computes_bfloat16_where_there_are_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(attention, "_ATTENTION", lambda query, *rest: seen.append(query.dtype) or (query,))
    for multiplies in (False, True):
        monkeypatch.setattr(attention, "cpu_multiplies_bfloat16", lambda multiplies=multiplies: multiplies)
        for dtype in (torch.bfloat16, torch.float32):
            compiled_causal_attention(*_inputs(3, 3, dtype=dtype))
    assert seen == [torch.bfloat16, torch.float32, torch.float32]


KINDS = {
    1: ["causal", "the other keys"],
    63: ["documents", "the other keys"],
    65: ["window", "causal"],
    300: ["random, half of them empty", "causal"],
}
SHAPES = [(1, 2, 2), (5, 4, 1), (8, 7, 1), (64, 2, 2), (64, 4, 1), (80, 7, 1), (128, 2, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "heads", "kv"), SHAPES)
def test_compiled_kernel_is_as_near_to_exact(
    instruction_set: str, threads: None, dtype: torch.dtype, d: int, heads: int, kv: int
) -> None:
    """To float64, as the reference; for lengths on both sides of a tile's."""
    torch.set_num_threads(1)  # small products are faster so, above all where others use the machine
    for length, kinds in KINDS.items():
        for kind in kinds:
            with torch.no_grad():
                _compare(dtype, _inputs(length, length, heads, kv, d, dtype), kind)


def _compare(dtype: torch.dtype, inputs: list[torch.Tensor], kind: str) -> None:
    """Forward, then backward from the exact forward's results."""
    runs = _masks(inputs[0].shape[2])[kind]
    given = (None, None) if kind == "causal" else runs
    wide = [each.double() for each in inputs]
    exact = ranged_attention_reference(*wide, *runs)
    found = attention._native(*inputs, *given)
    assert found is not None
    _assert_no_worse(found, ranged_attention_reference(*inputs, *runs), exact, kind)
    upstream = _random(exact[0].shape).to(dtype)
    kept = (exact[0].to(dtype), exact[1].to(found[1].dtype))
    found = attention._native_backward(upstream, *inputs, *kept, *given)
    assert found is not None
    expected = ranged_attention_backward_reference(upstream, *inputs, *kept, *runs)
    wide_kept = (kept[0].double(), exact[1])
    exact = ranged_attention_backward_reference(upstream.double(), *wide, *wide_kept, *runs)
    _assert_no_worse(found, expected, exact, kind)


def _assert_no_worse(found: Tensors, reference: Tensors, exact: Tensors, kind: str) -> None:
    """The largest error is at most that of the reference, and some roundings of terms as large as the largest."""
    for ours, theirs, true in zip(found, reference, exact, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        finite = torch.isfinite(true)
        assert torch.equal(ours[~finite].double(), true[~finite]), kind
        scale = max(1.0, _largest(true[finite]))
        error, allowed = (_largest((one.double() - true)[finite]) for one in (ours, theirs))
        slack = 64 if ours.dtype is torch.float64 else 16  # there the reference is what is taken for exact
        assert error <= 1.1 * allowed + slack * torch.finfo(ours.dtype).eps * scale, (
            kind,
            tuple(true.shape),
            error,
            allowed,
        )


def _largest(values: torch.Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


@needs_library
@pytest.mark.parametrize("length", [64, 512])
@pytest.mark.parametrize("d", [8, 64, 128])
def test_errors_are_no_larger_than_torchs(length: int, d: int) -> None:
    """In float32, of all results together."""
    inputs = _inputs(length, length, 4, 2, d, torch.float32)
    wide = [each.detach().double().requires_grad_() for each in inputs]
    upstream = _random((2, 4, length, d)).float()

    def run(leaves: list[torch.Tensor], compiled: bool) -> Tensors:
        if compiled:
            mixed = compiled_causal_attention(*leaves)
        else:
            mixed = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        return mixed, *torch.autograd.grad(mixed, leaves, upstream.to(mixed.dtype))

    exact = run(wide, False)
    for ours, theirs, true in zip(run(inputs, True), run(inputs, False), exact, strict=True):
        error, allowed = ((one.double() - true).square().mean().sqrt() for one in (ours, theirs))
        assert error <= 1.1 * allowed


@needs_library
@pytest.mark.parametrize(("batch", "kv"), [(1, 1), (1, 3), (2, 2)])
def test_the_number_of_threads_changes_no_bit(threads: None, batch: int, kv: int) -> None:
    """Though with fewer heads of keys than threads the backward pass divides its work in another way."""
    query, key, value = (each[:batch] for each in _inputs(450, 450, 3 * kv, kv, 16, torch.float32))
    grad, bounds = torch.randn_like(query), tuple(bound[:batch] for bound in _masks(450)["random, half of them empty"])
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        with torch.no_grad():
            kept = ranged_attention(query, key, value, *bounds)
            results.append((*kept, *ranged_attention_backward(grad, query, key, value, *kept, *bounds)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@needs_library
def test_parts_may_be_put_together_in_a_wider_dtype() -> None:
    """Then the gradients are those of the wider arithmetic, rounded."""
    with torch.no_grad():
        inputs, runs = _inputs(70, 50, dtype=torch.bfloat16), _runs(70, 50)
        wide = [each.float() for each in inputs]
        kept = ranged_attention(*wide, *runs)
        grad = torch.randn_like(kept[0]).bfloat16()
        found = ranged_attention_backward(grad, *inputs, *kept, *runs)
        expected = ranged_attention_backward(grad.float(), *wide, *kept, *runs)
        assert all(torch.equal(ours, theirs.bfloat16()) for ours, theirs in zip(found, expected, strict=True))


def test_what_is_not_finite_reaches_those_that_attend_to_it(instruction_set: str) -> None:
    with torch.no_grad():
        query, key, value = _inputs(100, 100, dtype=torch.float32)
        key[0, 0, 50, 3] = torch.nan
        value[1, 1, 70, 2] = torch.inf
        mixed, total = ranged_attention(query, key, value, *_masks(100)["causal"])
    assert mixed[0, :2, 50:].isnan().all() and total[0, :2, 50:].isnan().all() and mixed[1, 2:, 70:, 2].isinf().all()
    assert torch.isfinite(mixed[:, :, :50]).all() and torch.isfinite(mixed[1, :, :, :2]).all()


def test_signatures_are_those_of_the_header() -> None:
    """A call with a wrong number or kind of arguments would not be noticed by anything else."""
    text = (Path(__file__).parents[2] / "csrc" / "cpu" / "attention.h").read_text().replace("\\\n", "")
    for kernel in (attention._FORWARD, attention._BACKWARD):
        found = re.search(rf"X\({kernel.name},\s*\(int dtype,([^)]*), void\* stream\)", re.sub(r"\s+", " ", text))
        assert found is not None, kernel.name
        assert kernel.signature == "".join("p" if "*" in one else "i" for one in found[1].split(",")), kernel.name


@pytest.mark.parametrize("runs", ["given", "causal"])
def test_torch_finds_the_operation_well_defined(backend: str, runs: str) -> None:
    bounds = _runs(6, 6) if runs == "given" else (None, None)
    torch.library.opcheck(torch.ops.megatron.ranged_attention.default, (*_inputs(6, 6), *bounds))
