"""No step waits for the device: nothing in it reads a tensor on the host. On a GPU each such read would be a stall."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config.optimizer import OptimizerConfig
from megatron.kernels import native, operation
from megatron.model.initialize import initialize
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import single_rank
from megatron.train.step import TrainingStep

from .conftest import MODEL, random_batch

BATCH = random_batch(2, seed=1)


class HostSync(Exception):
    """A tensor's content, or a shape that depends on it, is wanted on the host; or content comes from there."""


# A value for the host, or a shape that depends on values.
_SYNCS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_dim",
    "_unique2",
}
# On the CPU dispatch would see nothing of these; those that make a tensor of the host's values wait for its copy.
_READS = {
    torch.tensor,
    torch.as_tensor,
    torch.from_numpy,
    *(
        getattr(torch.Tensor, name)
        for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")
    ),
}


class NoReads(TorchFunctionMode):
    """Refuses what reads a tensor, or makes one of values of the host, as Python calls it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        to_cpu = func is torch.Tensor.to and any(str(one) == "cpu" for one in (*args[1:], *(kwargs or {}).values()))
        if func in _READS or to_cpu:
            raise HostSync(func.__name__)
        return func(*args, **(kwargs or {}))


class NoSyncs(TorchDispatchMode):
    """Refuses operations that read a tensor, whoever calls them; also inside our operations."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in _SYNCS or any(index is not None and index.dtype is torch.bool for index in indices):
            raise HostSync(str(func))
        if func.namespace == operation.NAMESPACE:
            kernel = torch.library.get_kernel(func, "CPU")
            with self:
                return kernel.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["auto", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """With what is compiled and with the references."""
    native.select(request.param, "cpu")
    yield request.param
    native.select("auto", "cpu")


def make_step(dtype: torch.dtype) -> TrainingStep:
    model = Transformer(MODEL, single_rank(), dtype)
    initialize(model, MODEL, 3)
    step = TrainingStep(model, single_rank(), OptimizerConfig(), micro_batches=2, zero=0, decay_steps=10)
    step(random_batch(2), 1)  # what is made once and kept is made now
    return step


def watched_step(step: TrainingStep) -> torch.Tensor:
    with NoReads(), NoSyncs():
        return step(BATCH, 2).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_has_no_host_sync(dtype: torch.dtype) -> None:
    assert torch.isfinite(watched_step(make_step(dtype)))


READS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda norm: norm.item(),
    "bool": lambda norm: bool(norm > 1),
    "float": float,
    "cpu": lambda norm: norm.cpu(),
    "to": lambda norm: norm.to(device="cpu"),
    "tolist": lambda norm: norm.tolist(),
    "nonzero": lambda norm: norm.reshape(1).nonzero(),
    "mask": lambda norm: norm.reshape(1)[norm.reshape(1) > 0],
    "from the host": lambda norm: norm + torch.tensor([1.0]),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_a_planted_read_is_caught(monkeypatch: pytest.MonkeyPatch, read: Callable[[torch.Tensor], object]) -> None:
    step = make_step(torch.float32)
    compute = step.norm.compute

    def with_read() -> torch.Tensor:
        norm = compute()
        read(norm)
        return norm

    monkeypatch.setattr(step.norm, "compute", with_read)
    with pytest.raises(HostSync):
        watched_step(step)


def test_a_read_in_a_backward_pass_is_caught() -> None:
    step = make_step(torch.float32)
    norm = step.model.final_norm
    forward = norm.forward

    def with_hook(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, normed = forward(*inputs)
        normed.register_hook(lambda gradient: None if gradient.sum().item() else gradient)
        return hidden, normed

    norm.forward = with_hook
    with pytest.raises(HostSync):
        watched_step(step)


def test_a_read_inside_an_operation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations of ours hide what they call from dispatch modes, unless these follow them."""
    native.select("reference", "cpu")
    step = make_step(torch.float32)
    formula = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *inputs, **options: _read(formula(*inputs, **options)))
    with pytest.raises(HostSync):
        watched_step(step)


def _read(tensor: torch.Tensor) -> torch.Tensor:
    torch.ops.aten._local_scalar_dense(tensor)  # past the functions of Python
    return tensor
