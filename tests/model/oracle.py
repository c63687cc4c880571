"""transformers' Llama as the reference: as shipped in float32, or made float64 throughout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from megatron.checkpoint.source import open_source
from megatron.checkpoint.weights import load_weights
from megatron.model.config import ModelConfig
from megatron.model.transformer import Transformer
from megatron.parallel.layers import ShardedParameter
from megatron.parallel.mesh import single_rank


class WideNorm(LlamaRMSNorm):
    """RMSNorm whose statistics have the dtype of its input: as shipped they are float32."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        mean_square = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states / torch.sqrt(mean_square + self.variance_epsilon))


class WideRotary(LlamaRotaryEmbedding):
    """Rotary tables from float64 angles: as shipped they are float32."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        dim = config.head_dim or config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        angles = position_ids[..., None].double() * config.rope_parameters["rope_theta"] ** -exponents
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


def widened(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model in float64, nothing of it in float32 any more (in place)."""
    model.double()
    for module in model.modules():
        if type(module) is LlamaRMSNorm:
            module.__class__ = WideNorm
        elif type(module) is LlamaRotaryEmbedding:
            module.__class__ = WideRotary
    return model


def random_llama(seed: int = 0, **fields: Any) -> LlamaForCausalLM:
    """A tiny Llama of transformers in float32, with weights large enough that every part of it matters."""
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def ours(folder: Path, dtype: torch.dtype) -> Transformer:
    """Our model with the weights of a Hugging Face folder, as training loads them."""
    with open_source(folder) as source:
        model = Transformer(ModelConfig.from_huggingface(source.model_config), single_rank(), dtype)
        load_weights(model, source)
    return model


def our_logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """tokens [b, s] → logits [b, s, v], without the padding columns."""
    return model(tokens).transpose(0, 1)[..., : model.config.vocab_size]


def canonical_gradients(model: Transformer) -> dict[str, torch.Tensor]:
    """Canonical name → gradient, put together from the fused parameters' gradients."""
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, ShardedParameter) and parameter.grad is not None, name
        for region, view in parameter.spec.regions(parameter.grad):
            assert region.is_whole and region.name not in gradients, region
            gradients[region.name] = view
    return gradients
