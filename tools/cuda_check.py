"""How far CUDA can be proven on a machine without a GPU: `make cuda-check` runs this in an environment of its own.

There torch is a CUDA build, and the CUDA kernels were built beside this package. Checked are: the library loads, holds
code for every architecture that is promised, and has every kernel under the name that is called; and on fake CUDA
tensors the forward pass, the loss and the optimizer step of a real model run with every tensor where it belongs. A
tensor left on the CPU is an error; to show that it is, one is left there on purpose. Not checked: results, speed, and
the backward pass, which wants a driver even for fake tensors.

Exit codes: 0 all is well, 1 something is not, 2 this environment cannot tell (no CUDA build of torch).
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.config.optimizer import OptimizerConfig
from megatron.kernels import adamw, cross_entropy, native, rms_norm, rotary, squared_norm, swiglu
from megatron.kernels.native import Kernel, Library
from megatron.model.config import ModelConfig
from megatron.model.transformer import Transformer
from megatron.optim.clip import clip_divisor
from megatron.parallel.mesh import single_rank
from megatron.train.step import TrainingStep

ARCHITECTURES = ("sm_80", "sm_90")
# Llama-2-7B's shapes, with fewer key/value heads so that grouped attention is met as well.
MODEL = ModelConfig(32000, 4096, 11008, 4, 32, 8, 128)
DTYPES = (torch.bfloat16, torch.float32)
_CONTAINER = struct.pack("<I", 0xBA55ED50)


class SameDevice(TorchDispatchMode):
    """Demands of our own operations what fake tensors demand of torch's: that all tensors are on one device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "megatron":
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            devices = {tensor.device.type for tensor in tensors}
            if len(devices) > 1:
                raise RuntimeError(f"{func} was given tensors on {', '.join(sorted(devices))}")
        return func(*args, **(kwargs or {}))


def fake_step(device: torch.device, dtype: torch.dtype, spoil: Callable[[TrainingStep], None] | None = None) -> None:
    """A forward pass with its loss, then norm, clipping and update, all on fake tensors of `device`.

    `spoil` may put something in the wrong place first. Raises RuntimeError where tensors of two devices meet.
    """
    with FakeTensorMode(), SameDevice():
        context = single_rank()
        model = Transformer(MODEL, context, dtype, device)
        step = TrainingStep(model, context, OptimizerConfig(), micro_batches=1, zero=0, decay_steps=10)
        tokens = torch.zeros((2, 512), dtype=torch.int64, device=device)
        model(tokens, labels=tokens)
        if spoil is not None:
            spoil(step)
        step.gradients.begin(1)
        loss = model(tokens, labels=tokens)
        norm = step.norm.compute()
        not_finite = torch.isfinite(norm).logical_not().to(torch.float32)
        count = torch.ones_like(norm)
        step.optimizer.step(1e-4, clip_divisor(norm, count, 1.0), not_finite)
        step.weights.updated()
        for name, tensor in {"loss": loss, "norm": norm, "weights": step.buckets[0].weights}.items():
            if tensor.device.type != device.type:
                raise RuntimeError(f"the {name} ended on {tensor.device}, not on {device}")


def rotary_tables_on_the_cpu(step: TrainingStep) -> None:
    """A mistake that reaches an operation of ours."""
    assert step.model._tables is not None
    cos, sin = step.model._tables
    step.model._tables = cos.to("cpu"), sin.to("cpu")


def update_count_on_the_cpu(step: TrainingStep) -> None:
    """A mistake that reaches an operation of torch's."""
    step.optimizer._updates = step.optimizer._updates.to("cpu").expand(1)


MISTAKES = (rotary_tables_on_the_cpu, update_count_on_the_cpu)


def kernels() -> Iterator[Kernel]:
    """Every compiled kernel that an operation calls."""
    for module in (adamw, cross_entropy, rms_norm, rotary, squared_norm, swiglu):
        yield from (value for value in vars(module).values() if isinstance(value, Kernel))


def check_library(library: Library) -> list[str]:
    """What is wrong with the library of CUDA kernels."""
    problems = []
    for kernel in kernels():
        try:
            library.kernel(kernel.name, kernel.signature)
        except AttributeError:
            problems.append(f"{library.path.name} has no kernel megatron_{kernel.name}")
    missing = set(ARCHITECTURES).difference(architectures(library))
    return problems + [f"{library.path.name} has no code for {name}" for name in sorted(missing)]


def architectures(library: Library) -> list[str]:
    """The GPU architectures that the library holds machine code for, read from nvcc's containers inside it.

    A container is a header (magic, version, its own size, size of what follows) and entries (kind, 2 for machine code;
    version; size of their header; size of what follows; at byte 28 the architecture).
    """
    data = library.path.read_bytes()
    found, at = set(), data.find(_CONTAINER)
    while at >= 0:
        header, size = struct.unpack_from("<HQ", data, at + 6)
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, entry)
            if kind == 2:
                found.add(f"sm_{struct.unpack_from('<I', data, entry + 28)[0]}")
            entry += header + size
        at = data.find(_CONTAINER, end)
    return sorted(found)


def check_fake_steps(device: torch.device) -> list[str]:
    """Run the fake step as it is, which must work, and with each mistake, which must not."""
    problems = []
    for dtype in DTYPES:
        try:
            fake_step(device, dtype)
            say(f"fake step on {device}, {dtype}: forward pass, loss and optimizer step stay on the device")
        except RuntimeError as error:
            problems.append(f"fake step on {device}, {dtype}: {error}")
    for mistake in MISTAKES:
        try:
            fake_step(device, torch.bfloat16, mistake)
            problems.append(f"a planted mistake, {mistake.__name__}, was not noticed")
        except RuntimeError as error:
            say(f"planted mistake {mistake.__name__}: caught ({str(error).splitlines()[0]})")
    return problems


def main() -> int:
    """Check all of it."""
    if torch.version.cuda is None:
        say(f"torch {torch.__version__} is no CUDA build: run `make cuda-check`, which installs one elsewhere")
        return 2
    say(f"torch {torch.__version__}, CUDA {torch.version.cuda}, GPUs: {torch.cuda.device_count()}")
    library, reason = native.find("cuda")
    if library is None:
        problems = [f"no CUDA kernels: {reason}; is nvcc on the path?"]
    else:
        problems = check_library(library)
        say(f"{library.path.name} loads, with code for {', '.join(architectures(library))}")
        say(f"kernels: {', '.join(kernel.name for kernel in kernels())}")
    problems += check_fake_steps(torch.device("cuda", 0))
    for problem in problems:
        say(f"FAILED: {problem}")
    return 1 if problems else 0


def say(line: str) -> None:
    """One line of the result."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
