"""Training steps of each precision: their figures against float64 on the CPU, host syncs, memory and time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron.config.optimizer import OptimizerConfig
from megatron.data.loader import MicroBatch
from megatron.model.config import ModelConfig
from megatron.model.initialize import initialize
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import single_rank
from megatron.train.step import StepOutcome, TrainingStep
from tools.gpu_check.operations import seconds

# How far loss and gradient norm may be from those in float64, relatively: some roundings of the precision.
DTYPES = {"bf16": (torch.bfloat16, 3e-2), "fp32": (torch.float32, 1e-3), "fp64": (torch.float64, 1e-9)}
SMALL = ModelConfig(500, 128, 176, 2, 4, 2, 32)
LARGE = ModelConfig(32000, 2048, 5504, 8, 16, 4, 128)


def check_step(device: torch.device, precision: str) -> dict[str, Any]:
    """Two steps of a small model here and on the CPU in float64; `problem` says where they part."""
    dtype, allowed = DTYPES[precision]
    row: dict[str, Any] = {"precision": precision, "problem": None, "allowed": allowed}
    sides = [_run(device, dtype), _run(torch.device("cpu"), torch.float64)]
    for name in ("loss", "grad_norm"):
        found, exact = (float(getattr(outcome, name)) for outcome in sides)
        row[f"{name}_error"] = abs(found - exact) / abs(exact)
        if not row[f"{name}_error"] <= allowed:
            row["problem"] = f"{name} is {found:.6g}, in float64 {exact:.6g}"
    return row


def _run(device: torch.device, dtype: torch.dtype) -> StepOutcome:
    step = make_step(SMALL, device, dtype)
    for number in (1, 2):
        outcome = step(random_batch(SMALL, device, number, rows=2, length=96), number)
    return outcome


def measure_step(
    device: torch.device, precision: str, model: ModelConfig = LARGE, length: int = 2048
) -> dict[str, Any]:
    """Host syncs, peak memory and tokens per second of a step of two micro-batches."""
    step = make_step(model, device, DTYPES[precision][0])
    batch = random_batch(model, device, 0, rows=2, length=length)
    step(batch, 1)  # what is made once is made now
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with counted_syncs(device) as syncs:
        step(batch, 2)
    row: dict[str, Any] = {"precision": precision, "host_syncs": len(syncs), "where": sorted(set(syncs))}
    row["problem"] = f"{len(syncs)} host syncs in a step" if syncs else None
    if device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    tokens = sum(micro_batch.tokens.numel() for micro_batch in batch)
    row["tokens_per_s"] = tokens / seconds(lambda: step(batch, 3), device, rounds=3, calls=3)
    return row


@contextmanager
def counted_syncs(device: torch.device) -> Iterator[list[str]]:
    """Where the host waited for the device, as torch warns of it. On a CPU there is nothing to wait for."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            found += [f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]


def make_step(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> TrainingStep:
    """A step over two micro-batches of a model with seeded random weights."""
    transformer = Transformer(model, single_rank(), dtype, device)
    initialize(transformer, model, 1)
    config = OptimizerConfig(decay_style="constant", learning_rate=1e-3)
    return TrainingStep(transformer, single_rank(), config, micro_batches=2, zero=0, decay_steps=10)


def random_batch(model: ModelConfig, device: torch.device, seed: int, rows: int, length: int) -> list[MicroBatch]:
    """Two micro-batches of random tokens, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randint(0, model.vocab_size, (2, rows, length + 1), generator=generator).to(device)
    return [MicroBatch(sample[:, :-1], sample[:, 1:].clone()) for sample in samples]
