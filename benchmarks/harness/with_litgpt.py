"""The peer litgpt: its model class alone, with the loss of its `pretrain`.

`import litgpt` would need lightning and what that brings. The model's file needs none of it, so two empty modules stand
in for the package's `__init__` and for a helper that only reads old checkpoints.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F

from harness.contestants import Contestant, Workload
from harness.trainer import Trainer, torch_trainer
from megatron.data.loader import MicroBatch

_CHUNK = 128  # rows of logits per call of cross_entropy, as in litgpt.utils.chunked_cross_entropy


def build(contestant: Contestant, workload: Workload, dtype: torch.dtype) -> Trainer:
    """Weights, gradients and moments all in `dtype` (litgpt's precision "bf16-true")."""
    assert contestant.world == 1 and not contestant.compiled, contestant
    model_class, config_class = _import_model()
    torch.manual_seed(1)
    config = config_class(
        block_size=workload.sequence_length,
        n_layer=workload.layers,
        n_embd=workload.hidden_size,
        n_head=workload.heads,
        n_query_groups=workload.key_value_heads,
        vocab_size=workload.vocab_size,
        padded_vocab_size=workload.vocab_size,
        intermediate_size=workload.intermediate_size,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=workload.model.rms_norm_eps,
        mlp_class_name="LLaMAMLP",
    )
    model = model_class(config).to(dtype)
    parameters = list(model.parameters())
    for parameter in parameters:
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)

    def compute_loss(batch: MicroBatch) -> torch.Tensor:
        logits, labels = model(batch.tokens).flatten(0, 1), batch.labels.flatten()
        pairs = zip(logits.split(_CHUNK), labels.split(_CHUNK), strict=True)
        return torch.cat([F.cross_entropy(chunk, part, reduction="none") for chunk, part in pairs]).sum() / len(labels)

    return torch_trainer(parameters, compute_loss, workload.micro_batches)


def _import_model() -> tuple[Any, Any]:
    if "litgpt" not in sys.modules:
        spec = importlib.util.find_spec("litgpt")
        assert spec is not None and spec.submodule_search_locations is not None, "litgpt is not installed"
        for name in ("litgpt", "litgpt.scripts", "litgpt.scripts.convert_hf_checkpoint"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["litgpt"].__dict__["__path__"] = list(spec.submodule_search_locations)
        sys.modules["litgpt.scripts.convert_hf_checkpoint"].__dict__["qkv_reassemble"] = None
    return importlib.import_module("litgpt.model").GPT, importlib.import_module("litgpt.config").Config
