"""The `model` section: where the weights come from, and the shape of a model made at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.key import key


@dataclass(frozen=True)
class ModelSettings:
    """What a run says about its model. Fields are named as in Hugging Face's `config.json`.

    null means: as in the source (`init_from` or a checkpoint). Without a source the first five sizes must be given, as
    a preset does (`intermediate_size` may be left to `gpt2`, where it is 4 hidden sizes), and null is the family's
    default. A value that contradicts the source is an error, so a preset may state
    the shape that it expects.
    """

    init_from: str | None = key(
        None,
        "Hugging Face folder, model on its hub (hf://owner/name or hf://owner/name@revision) or one of our checkpoints "
        "to take the weights from, at step 0. Without it the weights are random.",
    )
    model_type: Literal["llama", "mistral", "qwen2", "qwen3", "falcon", "gpt2", "gpt_neox"] | None = key(
        None,
        "Family of a model made at random: `llama` (the default); `mistral`; `qwen2` and `qwen3`; `falcon`, as of 40B; "
        "`gpt2`: GPT with learned positions; `gpt_neox`: GPT with rotary positions. See docs/families.md.",
    )
    vocab_size: int | None = key(None, "Number of token ids the embedding knows, before any padding.", minimum=1)
    hidden_size: int | None = key(None, "Width of the residual stream.", minimum=1)
    intermediate_size: int | None = key(None, "Width of the feed-forward layer.", minimum=1)
    num_hidden_layers: int | None = key(None, "Number of decoder layers.", minimum=1)
    num_attention_heads: int | None = key(None, "Number of query heads.", minimum=1)
    num_key_value_heads: int | None = key(
        None, "Number of key/value heads (grouped-query attention when below the query heads).", minimum=1
    )
    head_dim: int | None = key(
        None, "Size of one attention head; usually hidden_size / num_attention_heads.", minimum=2
    )
    max_position_embeddings: int | None = key(None, "Longest sequence the model is made for, in tokens.", minimum=1)
    rms_norm_eps: float | None = key(None, "Epsilon of RMSNorm.", above=0.0)
    layer_norm_eps: float | None = key(None, "Epsilon of LayerNorm, which `gpt2` and `gpt_neox` have.", above=0.0)
    hidden_act: Literal["silu", "gelu", "gelu_new"] | None = key(
        None, "Activation: `silu` is Llama's SwiGLU; `gelu` and its tanh approximation `gelu_new` are for the others."
    )
    rope_theta: float | None = key(None, "Base of the rotary angles.", above=0.0)
    tie_word_embeddings: bool | None = key(None, "Whether the output layer is the embedding.")
    initializer_range: float | None = key(None, "Standard deviation of random initial weights.", above=0.0)
