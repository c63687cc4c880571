"""transformers' models as the reference: as shipped in float32, or made float64 throughout."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    modeling_rope_utils,
)
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
    """Rotary tables from float64 angles: as shipped they are float32. Scaled ones are by transformers' own rules."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config, length = self.config, int(position_ids.max()) + 1
        part = config.rope_parameters.get("partial_rotary_factor", 1.0)
        dim = int(part * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads))
        kind = config.rope_parameters["rope_type"]
        if kind == "default":
            frequencies, factor = config.rope_parameters["rope_theta"] ** -(torch.arange(0, dim, 2).double() / dim), 1.0
        else:
            with float32_is_float64():
                frequencies, factor = modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](config, x.device, seq_len=length)
        assert frequencies.dtype is torch.float64
        angles = position_ids[..., None].double() * frequencies
        both = torch.cat((angles, angles), dim=-1)
        return (both.cos() * factor).to(x.dtype), (both.sin() * factor).to(x.dtype)


@contextmanager
def float32_is_float64() -> Iterator[None]:
    """Within it, transformers' rules for rotary frequencies compute in float64 where they say float32."""
    wide = types.SimpleNamespace(**vars(torch))
    wide.float = wide.float32 = torch.float64
    modeling_rope_utils.torch = wide
    try:
        yield
    finally:
        modeling_rope_utils.torch = torch


def widened(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64, nothing of it in float32 any more (in place)."""
    model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.__class__ = WideNorm
        elif type(module).__name__.endswith("RotaryEmbedding"):
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
    return with_random_vectors(LlamaForCausalLM(LlamaConfig(**{**sizes, **fields})).eval())


def random_gpt2(seed: int = 0, **fields: Any) -> GPT2LMHeadModel:
    """A tiny GPT-2 of transformers in float32, without dropout."""
    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "initializer_range": 0.15}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(seed)
    return with_random_vectors(GPT2LMHeadModel(GPT2Config(**{**sizes, **ends, **fields})).eval())


def random_gpt_neox(seed: int = 0, **fields: Any) -> GPTNeoXForCausalLM:
    """A tiny GPT-NeoX of transformers in float32, with the function that is built here."""
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "use_parallel_residual": False,
        "rotary_pct": 1.0,
    }
    torch.manual_seed(seed)
    return with_random_vectors(GPTNeoXForCausalLM(GPTNeoXConfig(**{**sizes, **fields})).eval())


def with_random_vectors(model: PreTrainedModel) -> PreTrainedModel:
    """The model with norm weights and biases that matter, instead of ones and zeros (in place)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def random_tokens(vocab_size: int, batch: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    """i64[batch, length]"""
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def compare_with_reference(folder: Path, reference: PreTrainedModel) -> None:
    """Save the reference to a folder; our model from there has its logits, loss and every gradient, in float64."""
    reference.save_pretrained(folder)
    reference = widened(reference)
    model = ours(folder, torch.float64)
    tokens = random_tokens(reference.config.vocab_size)
    labels = random_tokens(reference.config.vocab_size, seed=2)
    labels[0, 5:9] = -1

    theirs = reference(tokens).logits
    loss = F.cross_entropy(theirs.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="sum")
    loss.backward()
    assert (our_logits(model, tokens) - theirs).abs().max() <= 1e-10
    own_loss = model(tokens, labels=labels)
    own_loss.backward()
    assert abs(own_loss.item() / loss.item() - 1) <= 1e-13

    expected = {_stored_name(name, reference): parameter.grad for name, parameter in reference.named_parameters()}
    found = canonical_gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert (found[name] - gradient).abs().max() <= 1e-11 * gradient.abs().max(), name


def _stored_name(name: str, model: PreTrainedModel) -> str:
    """The name in files: transformers 5 renames GPT-NeoX's output layer when it reads and writes them."""
    return name.replace("lm_head", "embed_out") if model.config.model_type == "gpt_neox" else name


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
            whole = gradients.setdefault(region.name, torch.full(region.shape, torch.nan, dtype=view.dtype))
            assert whole[region.slices].isnan().all(), region
            whole[region.slices] = view
    assert not any(gradient.isnan().any() for gradient in gradients.values())
    return gradients
