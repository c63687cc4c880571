"""The peer that a user would pick first: transformers' Llama with SDPA, eager or compiled, with DDP or its own tensor
parallelism. Its loss is the model's own: float32 logits, cross-entropy.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

from harness.contestants import Contestant, Workload
from harness.trainer import Trainer, torch_trainer
from megatron.data.loader import MicroBatch


def build(contestant: Contestant, workload: Workload, dtype: torch.dtype) -> Trainer:
    """Weights, gradients and moments all in `dtype`."""
    if contestant.world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    torch.manual_seed(1)
    config = LlamaConfig(**(workload.model.to_huggingface() | {"use_cache": False}))
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if contestant.tensor > 1:
        model = _tensor_parallel(model, dtype)
    model.train()
    parameters = list(model.parameters())
    if contestant.data > 1:
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if contestant.compiled:
        model = torch.compile(model)

    def compute_loss(batch: MicroBatch) -> torch.Tensor:
        return model(input_ids=batch.tokens, labels=batch.labels, shift_labels=batch.labels).loss

    return torch_trainer(parameters, compute_loss, workload.micro_batches)


def _tensor_parallel(model: Any, dtype: torch.dtype) -> Any:
    """The model again, loaded with transformers' own plan for tensor parallelism, which only loading applies."""
    folder = [tempfile.mkdtemp(prefix="benchmark-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        model.save_pretrained(folder[0])
    dist.barrier()
    plan: dict[str, Any] = {"tp_plan": "auto"}
    with suppress(ImportError, TypeError):
        from transformers.distributed import DistributedConfig  # from 5 on; before, the bare argument

        plan = {"distributed_config": DistributedConfig(tp_plan="auto")}
    parallel = AutoModelForCausalLM.from_pretrained(folder[0], dtype=dtype, attn_implementation="sdpa", **plan)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])
    return parallel
