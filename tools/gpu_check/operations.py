"""Every compiled operation: its error against float64 beside the reference's, and its speed beside a copy's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron.kernels import adamw, attention, cross_entropy, rms_norm, rotary, squared_norm, swiglu, varlen
from megatron.kernels.numerics import statistics_dtype
from megatron.utils.device import synchronize

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EPS, HEAD_DIM, VOCABULARY = 1e-5, 128, 32000
# As the tests on the host demand it: hardly more than the reference's own error, or a few roundings.
_SLACK, _ROUNDINGS = 1.1, 4.0


@dataclass(frozen=True)
class Operation:
    """`native` returns None where there is no kernel; `in_place` are the inputs that an operation changes."""

    name: str
    native: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: list[Any]
    in_place: tuple[int, ...] = ()

    def results(self, function: Callable[..., Any], dtype: torch.dtype | None = None) -> list[torch.Tensor] | None:
        """What a function makes of fresh copies of the inputs, widened to `dtype` if given."""
        inputs = [_copy(each, dtype) for each in self.inputs]
        output = function(*inputs)
        if output is None and function is self.native:
            return None
        if self.in_place:
            return [inputs[index] for index in self.in_place if inputs[index] is not None]
        return [output] if isinstance(output, torch.Tensor) else list(output)

    def bytes_moved(self) -> int:
        """Each input read once, each output written once."""
        outputs = self.results(self.native)
        tensors = [each for each in (*self.inputs, *(outputs or [])) if isinstance(each, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _copy(value: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(dtype, copy=True) if dtype is not None and value.is_floating_point() else value.clone()


def operations(device: torch.device, dtype: torch.dtype, size: int) -> Iterator[Operation]:
    """All of them at size x size elements, one at a time."""
    wide = statistics_dtype(dtype)

    def random(*shape: int, dtype: torch.dtype = dtype, seed: int = 1) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    hidden, branch, weight = random(size, size), random(size, size, seed=2), random(size, seed=3) + 1
    yield Operation("rms_norm", rms_norm._native, rms_norm.rms_norm_reference, [hidden, weight, EPS])
    yield Operation(
        "add_rms_norm", rms_norm._native_add, rms_norm.add_rms_norm_reference, [hidden, branch, weight, EPS]
    )
    rstd = rms_norm.rms_norm_reference(hidden, weight, EPS)[1]
    yield Operation(
        "rms_norm_backward",
        rms_norm._native_backward,
        rms_norm.rms_norm_backward_reference,
        [branch, hidden, hidden, weight, rstd],
    )
    yield Operation("swiglu", swiglu._native, swiglu.swiglu_reference, [hidden])
    half = random(size, size // 2, seed=4)
    yield Operation("swiglu_backward", swiglu._native_backward, swiglu.swiglu_backward_reference, [half, hidden])
    yield from _rotary(random, size, dtype, device)
    yield from _cross_entropy(random, size, wide, device)
    if device.type == "cuda" and dtype is torch.bfloat16:
        yield from within_documents(random, size, device)
    flat = random(size * size, dtype=wide)
    yield Operation("squared_norm", squared_norm._native, squared_norm.squared_norm_reference, [flat])
    one, zero = torch.ones((), device=device), torch.zeros((), device=device)
    state = [random(size * size, dtype=torch.float32, seed=seed) for seed in (5, 6, 7)]
    square = random(size * size, dtype=torch.float32, seed=8).square()
    weights = random(size * size) if dtype is torch.bfloat16 else None
    yield Operation(
        "adamw",
        adamw._native,
        _adamw_formula,
        [*state, square, weights, one * 3, zero, one * 10, 3e-4, 0.9, 0.95, 1e-8, 0.1],
        in_place=(0, 2, 3, 4),
    )


def _rotary(
    random: Callable[..., torch.Tensor], size: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Operation]:
    kv, b = max(1, size // 1024), 2
    heads = 4 * kv
    s = max(1, size * size // (b * (heads + 2 * kv) * HEAD_DIM))
    cos, sin = rotary.rotary_tables(s, HEAD_DIM, 1e4, dtype, device)
    qkv = random(s, b, (heads + 2 * kv) * HEAD_DIM)
    inputs = [qkv, cos, sin, heads, kv]
    yield Operation("rotary_split", rotary._native, rotary.rotary_split_reference, inputs)
    query, key, value = rotary.rotary_split_reference(*inputs)
    yield Operation("rotary_join", rotary._native_join, rotary.rotary_join_reference, [query, key, value, cos, sin])


def within_documents(random: Callable[..., torch.Tensor], size: int, device: torch.device) -> Iterator[Operation]:
    """Attention within documents by the library that torch brings (no kernel of ours is behind it): causal, and as a
    ring meets the keys of another rank, of which the early queries see some and the late ones none."""
    b, heads, kv, d, s = 2, 4, 2, 64, size
    query, key, value, grad = (
        random(b, count, s, d, seed=seed) for count, seed in ((heads, 1), (kv, 2), (kv, 3), (heads, 4))
    )
    place = torch.arange(s, dtype=torch.int32, device=device).expand(b, -1)
    length = s // 3 + 1
    causal = place // length * length, place + 1
    ring = (place >= s // 2).to(torch.int32) * (s - 7) + 7, torch.full_like(place, s)
    for name, (start, stop), is_causal in (("documents", causal, True), ("ring_step", ring, False)):
        documents = 3 if is_causal else 2

        def forward(*tensors: torch.Tensor, most: int = documents, is_causal: bool = is_causal) -> Any:
            return _finite(*varlen.varlen_attention(*tensors, most, is_causal))

        def backward(*tensors: torch.Tensor, most: int = documents, is_causal: bool = is_causal) -> Any:
            return varlen.varlen_attention_backward(*tensors, most, is_causal)

        runs = [start.contiguous(), stop.contiguous()]
        inputs = [query, key, value, *runs]
        yield Operation(
            f"attention_{name}",
            forward,
            lambda *tensors: _finite(*attention.ranged_attention_reference(*tensors)),
            inputs,
        )
        mixed, total = attention.ranged_attention_reference(*inputs)
        total = total.logaddexp(torch.zeros_like(total))  # as if there were more keys elsewhere: none is infinite
        yield Operation(
            f"attention_{name}_backward",
            backward,
            attention.ranged_attention_backward_reference,
            [grad, query, key, value, mixed, total, *runs],
        )


def _finite(mixed: torch.Tensor, log_sum_exp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For comparing: queries without keys, whose log-sum-exp is −∞, get 0."""
    return mixed, log_sum_exp.masked_fill(log_sum_exp.isneginf(), 0.0)


def _cross_entropy(
    random: Callable[..., torch.Tensor], size: int, wide: torch.dtype, device: torch.device
) -> Iterator[Operation]:
    valid, columns = VOCABULARY - 17, VOCABULARY
    rows = max(1, size * size // columns)
    logits = random(rows, columns)
    targets = torch.arange(rows, device=device) * 7919 % valid
    yield Operation(
        "cross_entropy_statistics",
        cross_entropy._native_statistics,
        cross_entropy.local_statistics_reference,
        [logits, targets, valid],
    )
    log_sum_exp = logits[:, :valid].to(wide).logsumexp(dim=-1)
    yield Operation(
        "cross_entropy_gradient",
        cross_entropy._native_gradient,
        cross_entropy.logits_gradient_reference_,
        [logits, targets, log_sum_exp, torch.ones_like(log_sum_exp), valid],
        in_place=(0,),
    )


def _adamw_formula(
    master: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    weights: torch.Tensor | None,
    divisor: torch.Tensor,
    not_finite: torch.Tensor,
    updates: torch.Tensor,
    *numbers: float,
) -> None:
    """The formula itself, since torch's fused update wants its own dtypes."""
    learning_rate, beta1, beta2, eps, decay = numbers
    gradient.div_(divisor)
    exp_avg.mul_(beta1).add_(gradient, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    correction1, correction2 = (1 - beta ** float(updates) for beta in (beta1, beta2))
    master.mul_(1 - learning_rate * decay)
    master.addcdiv_(exp_avg, (exp_avg_sq / correction2).sqrt_().add_(eps), value=-learning_rate / correction1)
    if weights is not None:
        weights.copy_(master)


def check(operation: Operation, copy_bytes_per_s: float) -> dict[str, Any]:
    """Figures of one operation; `problem` says what is wrong with it, if anything is."""
    row: dict[str, Any] = {"operation": operation.name, "problem": None}
    found = operation.results(operation.native)
    if found is None:
        return row | {"problem": "no compiled kernel took it"}
    usual, exact = operation.results(operation.reference), operation.results(operation.reference, torch.float64)
    assert usual is not None and exact is not None
    errors = [[error(side, true) for side, true in zip(one, exact, strict=True)] for one in (found, usual)]
    roundings = [_ROUNDINGS * torch.finfo(side.dtype).eps for side in found]
    row["error"], row["error_of_reference"] = max(errors[0]), max(errors[1])
    if any(not ours <= _SLACK * theirs + few for ours, theirs, few in zip(*errors, roundings, strict=True)):
        row["problem"] = "farther from float64 than the reference"
    device = exact[0].device
    inputs = [_copy(each, None) for each in operation.inputs]
    row["seconds"] = seconds(lambda: operation.native(*inputs), device)
    row["bytes"] = operation.bytes_moved()
    row["bytes_per_s"] = row["bytes"] / row["seconds"]
    row["share_of_copy"] = row["bytes_per_s"] / copy_bytes_per_s
    return row


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest |found − exact|, relative to the largest |exact|."""
    if found.shape != exact.shape:
        return float("inf")
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def copy_rate(device: torch.device, size_bytes: int) -> float:
    """Bytes per second, read and written, of a copy much larger than the caches: the floor of all that moves memory."""
    source = torch.ones(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / seconds(lambda: target.copy_(source), device)


def seconds(call: Callable[[], object], device: torch.device, rounds: int = 5, calls: int = 10) -> float:
    """Of one call in the best of some rounds, each of many calls between two waits for the device."""
    call()
    best = float("inf")
    for _ in range(rounds):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        best = min(best, (time.perf_counter() - begin) / calls)
    return best
