"""The operations of megatron/kernels/ beside what PyTorch offers for them, as a table of cases.

A case has inputs, a float64 reference, the bytes that must move (each input read once, each output written once), and
entries: who computes it, how. "formula" is the plain code that transformers runs; F.x and torch are PyTorch's kernels.
Operations for which there is no kernel of ours are here to see whether one could gain anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.optim.adamw import adamw

from megatron.kernels.adamw import Hyperparameters, adamw_update_
from megatron.kernels.cross_entropy import local_statistics, logits_gradient_
from megatron.kernels.rms_norm import add_rms_norm, rms_norm
from megatron.kernels.rotary import rotary_split, rotary_tables
from megatron.kernels.squared_norm import squared_norm
from megatron.kernels.swiglu import swiglu

OURS = "megatron-med"
EPS = 1e-5
NUMBERS = Hyperparameters(learning_rate=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)

Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., torch.Tensor | Tensors]


@dataclass(frozen=True)
class Entry:
    """`call` is timed; `result` gives what is compared with the reference (None: what `call` returns)."""

    who: str
    call: Callable[[], object]
    result: Callable[[], object] | None = None

    def tensors(self) -> Tensors:
        """The results as a tuple."""
        return _as_tuple((self.result or self.call)())


@dataclass(frozen=True)
class Case:
    """One operation in one precision. Later entries are compared with the first, where that is ours."""

    name: str
    bytes_moved: int
    reference: Callable[[], Tensors]
    entries: list[Entry]

    @property
    def rival(self) -> str | None:
        """The entry by PyTorch's own kernel, with which our error is compared; the formula where there is none."""
        others = [entry.who for entry in self.entries if entry.who != OURS]
        return next((who for who in others if who != "formula"), others[0] if others else None)


def cases(dtype: torch.dtype, size: int, vocab_size: int) -> Iterator[Case]:
    """All cases at size x size elements; one at a time, since each holds its tensors."""
    for make in (_norms, _rotary, _swiglu, _other_family):
        for name, functions, inputs, reference, moved in make(dtype, size):
            yield _forward_case(name, functions, inputs, reference, moved[0])
            yield _backward_case(name, functions, inputs, reference, moved[1])
    yield from _cross_entropy(dtype, size * size // vocab_size, vocab_size)
    yield _adamw_case(dtype, size * size)
    yield _squared_norm_case(dtype, size * size)


_Row = tuple[str, dict[str, Function], list[torch.Tensor], Function, tuple[int, int]]


def _norms(dtype: torch.dtype, size: int) -> Iterator[_Row]:
    hidden, branch, weight = _random(dtype, size, size), _random(dtype, size, size), _random(dtype, size) + 1
    n = hidden.numel() * hidden.element_size()

    def exact(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + EPS) * weight

    def formula(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(hidden.dtype)

    def torchs(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, (size,), weight, EPS)

    functions: dict[str, Function] = {OURS: lambda *x: rms_norm(*x, EPS), "formula": formula, "F.rms_norm": torchs}
    yield "rms_norm", functions, [hidden, weight], exact, (2 * n, 3 * n)

    def after_sum(norm: Callable[..., torch.Tensor]) -> Function:
        def run(residual: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor) -> Tensors:
            total = residual + branch
            return total, norm(total, weight)

        return run

    functions = {
        OURS: lambda *x: add_rms_norm(*x, EPS),
        "formula": after_sum(formula),
        "F.rms_norm": after_sum(torchs),
    }
    yield "add_rms_norm", functions, [hidden, branch, weight], after_sum(exact), (4 * n, 4 * n)


def _rotary(dtype: torch.dtype, size: int) -> Iterator[_Row]:
    batch, head_dim = 2, 128
    length, kv = size // batch, size // head_dim // 4
    heads = 2 * kv  # heads + 2 kv fill the row
    qkv = _random(dtype, length, batch, (heads + 2 * kv) * head_dim)
    cos, sin = rotary_tables(length, head_dim, 10000.0, dtype, torch.device("cpu"))

    def formula(qkv: torch.Tensor) -> Tensors:
        """As transformers: tables in the heads' dtype, value a view."""
        split = qkv.unflatten(-1, (heads + 2 * kv, head_dim)).permute(1, 2, 0, 3)
        query, key, value = split.split([heads, kv, kv], dim=1)
        table_cos, table_sin = cos.to(qkv.dtype), sin.to(qkv.dtype)
        if qkv.dtype == torch.float64:
            table_cos, table_sin = cos.double(), sin.double()
        return _turn(query, table_cos, table_sin), _turn(key, table_cos, table_sin), value

    functions: dict[str, Function] = {OURS: lambda x: rotary_split(x, cos, sin, heads, kv), "formula": formula}
    n = qkv.numel() * qkv.element_size()
    yield "rotary_split", functions, [qkv], formula, (2 * n, 2 * n)


def _swiglu(dtype: torch.dtype, size: int) -> Iterator[_Row]:
    gate_up = _random(dtype, size, 2 * size)

    def formula(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    n = gate_up.numel() * gate_up.element_size() // 2
    yield "swiglu", {OURS: swiglu, "formula": formula}, [gate_up], formula, (3 * n, 5 * n)


def _other_family(dtype: torch.dtype, size: int) -> Iterator[_Row]:
    """What Falcon uses, by PyTorch's kernels alone."""
    hidden, weight, bias = _random(dtype, size, size), _random(dtype, size) + 1, _random(dtype, size)
    n = hidden.numel() * hidden.element_size()

    def layer_norm(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(hidden, (size,), weight, bias, EPS)

    yield "layer_norm", {"F.layer_norm": layer_norm}, [hidden, weight, bias], layer_norm, (2 * n, 3 * n)
    yield "gelu", {"F.gelu": F.gelu}, [hidden], F.gelu, (2 * n, 3 * n)


def _cross_entropy(dtype: torch.dtype, rows: int, vocab_size: int) -> Iterator[Case]:
    logits = _random(dtype, rows, vocab_size)
    targets = torch.randint(vocab_size, (rows,), generator=torch.Generator().manual_seed(2))
    n = logits.numel() * logits.element_size()

    def ours(logits: torch.Tensor) -> torch.Tensor:
        largest, total, target = local_statistics(logits, targets, vocab_size)
        return largest + total.log() - target

    def torchs(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets, reduction="none")

    def formula(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float(), targets, reduction="none")

    functions: dict[str, Function] = {OURS: ours, "F.cross_entropy": torchs}
    if dtype != torch.float32:
        functions = {OURS: ours, "formula": formula, "F.cross_entropy": torchs}
    yield _forward_case("cross_entropy statistics", functions, [logits], torchs, n)

    others = {who: function for who, function in functions.items() if who != OURS}
    case = _backward_case("cross_entropy gradient", others, [logits], torchs, 2 * n)
    entries = [_logits_gradient_entry(logits, targets), *case.entries]
    yield dataclasses.replace(case, entries=entries)


def _logits_gradient_entry(logits: torch.Tensor, targets: torch.Tensor) -> Entry:
    """Ours works in place: what it is timed on soon is a gradient itself, which costs the same."""
    vocab_size = logits.shape[1]
    largest, total, _ = local_statistics(logits, targets, vocab_size)
    log_sum_exp, ones = largest + total.log(), torch.ones_like(total)
    scratch = logits.clone()
    return Entry(
        OURS,
        lambda: logits_gradient_(scratch, targets, log_sum_exp, ones, vocab_size),
        lambda: logits_gradient_(logits.clone(), targets, log_sum_exp, ones, vocab_size),
    )


def _adamw_case(dtype: torch.dtype, count: int) -> Case:
    """Float32 masters and moments; for bf16, the weights are written from the masters as well."""
    start = [_random(torch.float32, count, seed=seed) for seed in range(3)] + [
        _random(torch.float32, count, seed=3).square()
    ]
    one, zero = torch.ones(()), torch.zeros(())
    bf16 = dtype == torch.bfloat16

    def ours(state: list[torch.Tensor]) -> Tensors:
        master, gradient, exp_avg, exp_avg_sq, *weights = state
        adamw_update_(
            master, gradient, exp_avg, exp_avg_sq, weights[0] if weights else None, one, zero, 10.0 * one, NUMBERS
        )
        return (master, exp_avg, exp_avg_sq, *weights)

    def torchs(state: list[torch.Tensor]) -> Tensors:
        """A pass for clipping, the fused update, a pass for rounding."""
        master, gradient, exp_avg, exp_avg_sq, *weights = state
        gradient.mul_(one)
        _torch_adamw(master, gradient, exp_avg, exp_avg_sq)
        if weights:
            weights[0].copy_(master)
        return (master, exp_avg, exp_avg_sq, *weights)

    def fresh() -> list[torch.Tensor]:
        return [each.clone() for each in start] + ([start[0].to(dtype)] if bf16 else [])

    def reference() -> Tensors:
        master, gradient, exp_avg, exp_avg_sq = (each.double() for each in start)
        exp_avg.mul_(NUMBERS.beta1).add_(gradient, alpha=1 - NUMBERS.beta1)
        exp_avg_sq.mul_(NUMBERS.beta2).addcmul_(gradient, gradient, value=1 - NUMBERS.beta2)
        denominator = (exp_avg_sq / (1 - NUMBERS.beta2**10)).sqrt_().add_(NUMBERS.eps)
        master.mul_(1 - NUMBERS.learning_rate * NUMBERS.weight_decay)
        master.addcdiv_(exp_avg, denominator, value=-NUMBERS.learning_rate / (1 - NUMBERS.beta1**10))
        return (master, exp_avg, exp_avg_sq, *([master] if bf16 else []))

    scratch = fresh()
    entries = [
        Entry(who, lambda run=run: run(scratch), lambda run=run: run(fresh()))
        for who, run in ((OURS, ours), ("torch fused", torchs))
    ]
    return Case("adamw", (28 + 2 * bf16) * count, reference, entries)


def _torch_adamw(master: torch.Tensor, gradient: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor) -> None:
    """The tenth update."""
    adamw(
        [master],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.tensor(9.0)],
        fused=True,
        amsgrad=False,
        maximize=False,
        lr=NUMBERS.learning_rate,
        beta1=NUMBERS.beta1,
        beta2=NUMBERS.beta2,
        weight_decay=NUMBERS.weight_decay,
        eps=NUMBERS.eps,
    )


def _squared_norm_case(dtype: torch.dtype, count: int) -> Case:
    flat = _random(dtype, count)
    entries = [
        Entry(OURS, lambda: squared_norm(flat)),
        Entry("vector_norm", lambda: torch.linalg.vector_norm(flat).square()),
        Entry("foreach_norm", lambda: torch._foreach_norm([flat])[0].square()),
    ]
    return Case("squared_norm", flat.numel() * flat.element_size(), lambda: (flat.double().square().sum(),), entries)


def _forward_case(
    name: str, functions: dict[str, Function], inputs: list[torch.Tensor], reference: Function, moved: int
) -> Case:
    """Under grad mode, as in training: what the backward pass needs is kept."""
    leaves = [each.detach().requires_grad_() for each in inputs]

    def exact() -> Tensors:
        return _as_tuple(reference(*(each.double() for each in inputs)))

    entries = [Entry(who, lambda function=function: function(*leaves)) for who, function in functions.items()]
    return Case(name, moved, exact, entries)


def _backward_case(
    name: str, functions: dict[str, Function], inputs: list[torch.Tensor], reference: Function, moved: int
) -> Case:
    """Gradients of all inputs, for random gradients of all outputs (ones for losses)."""

    def prepare(function: Function, leaves: list[torch.Tensor]) -> Callable[[], Tensors]:
        for leaf in leaves:
            leaf.requires_grad_()
        outputs = _as_tuple(function(*leaves))
        gradients = [
            torch.ones_like(output) if output.dim() == 1 else _random(inputs[0].dtype, *output.shape, seed=7 + index)
            for index, output in enumerate(outputs)
        ]
        wide = [gradient.to(output.dtype) for gradient, output in zip(gradients, outputs, strict=True)]
        return lambda: torch.autograd.grad(outputs, leaves, wide, retain_graph=True)

    entries = [Entry(who, prepare(function, [each.detach() for each in inputs])) for who, function in functions.items()]
    label = name if name.endswith("gradient") else f"{name} backward"
    return Case(label, moved, lambda: prepare(reference, [each.double() for each in inputs])(), entries)


def _turn(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def _random(dtype: torch.dtype, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _as_tuple(value: object) -> Tensors:
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)  # type: ignore[arg-type]
