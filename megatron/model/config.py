"""What a model is: the sizes and functions that its layers are made from, whatever family it belongs to.

Fields have the names that Hugging Face's `config.json` most often uses. Reading and writing one is the families' part
(`megatron.model.families`): what would change the function and is not built here is refused, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron.model.families import FAMILIES, family_of
from megatron.model.families.family import Family
from megatron.model.families.scaling import RotaryScaling
from megatron.utils.errors import ConfigError

# Matrix products with odd extents (a vocabulary of 32,017) run several times slower on tensor cores.
_VOCAB_SHARE_MULTIPLE = 64
# Past these a configuration is damaged, and would take all memory before anything else shows it.
_LARGEST = 2**31 - 1
_MOST = {"num_hidden_layers": 100_000}


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one model (sizes in elements); the defaults are Llama's.

    One of the two eps is set: it says which norm the layers have. Without a `rope_theta` positions are learned, or with
    `alibi` a bias of scores (Press et al., 2022). With `silu` the feed-forward layer is gated (SwiGLU). With
    `parallel_norms`, 1 or 2, attention and feed-forward read the same sum through so many norms; else one follows the
    other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 4096
    rms_norm_eps: float | None = 1e-5
    rope_theta: float | None = 10000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    model_type: str = "llama"
    layer_norm_eps: float | None = None
    hidden_act: str = "silu"
    query_key_value_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: RotaryScaling | None = None
    query_key_norm: bool = False
    sliding_window: int | None = None  # how many keys a query attends to, itself included
    full_attention_layers: tuple[int, ...] = ()  # those without the window
    partial_rotary_factor: float = 1.0  # which part of a head's elements is turned
    alibi: bool = False
    parallel_norms: int | None = None

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        problems = [
            f"{name}={value} must be positive"
            for name, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not value > 0
        ]
        problems += [
            f"{name}={value} is more than {largest:,}"
            for name, value, largest in ((name, values[name], _MOST.get(name, _LARGEST)) for name in values)
            if isinstance(value, int) and value > largest
        ]
        if not problems and self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}: each key/value head serves as many query heads"
            )
        if not problems and self.head_dim % 2:
            problems.append(f"head_dim={self.head_dim} is odd: rotary embedding turns pairs of elements")
        if not problems and not (0 < self.rotary_dim <= self.head_dim):
            problems.append(
                f"partial_rotary_factor={self.partial_rotary_factor} turns {self.rotary_dim} of head_dim="
                f"{self.head_dim} elements; it must turn one at least and all at most"
            )
        if not problems and self.rope_scaling and self.rope_scaling.rope_type == "dynamic" and self.rotary_dim < 4:
            problems.append(f"head_dim={self.head_dim} is too small for rope_scaling of type dynamic; it needs 4")
        if problems:
            raise ConfigError("The model is impossible: " + "; ".join(problems) + ".")
        assert (self.rms_norm_eps is None) != (self.layer_norm_eps is None), self
        assert (self.rope_theta is None) == (self.alibi or self.family.positions is not None), self

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read the content of a `config.json`, in the spelling of transformers 4 or 5.

        Raises ConfigError where a size is missing or a setting asks for a function that is not built.
        """
        family = family_of(config)
        return cls(**family.fields(config), model_type=family.model_type)

    @classmethod
    def from_settings(cls, stated: Mapping[str, Any]) -> ModelConfig:
        """A model of the stated fields, the others being the family's defaults.

        Raises ConfigError where a size is missing, or a field is stated that the family has no use for.
        """
        family = family_of(stated)
        own = {family.own_names.get(name, name): value for name, value in stated.items()}
        model = cls.from_huggingface({**family.own_defaults, **own})
        contradictions = model.contradictions(stated)
        if contradictions:
            listed = "; ".join(
                f"model.{name}={value} (would be {getattr(model, name)})" for name, value in contradictions
            )
            raise ConfigError(f"A model of model_type={family.model_type} cannot have {listed}. Leave these keys out.")
        return model

    def contradictions(self, stated: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """The stated fields, with their values, that this model has otherwise."""
        return [(name, value) for name, value in stated.items() if getattr(self, name) != value]

    def to_huggingface(self, dtype: str = "float32") -> dict[str, Any]:
        """The content of a `config.json` that transformers 4 and 5 both read; `dtype` is torch's name, as
        `bfloat16`.
        """
        return spell_for_both(self.family.write(self), dtype)

    @property
    def family(self) -> Family:
        """Where the canonical weights lie."""
        return FAMILIES[self.model_type]

    @property
    def rotary_dim(self) -> int:
        """How many elements of a head are turned by its position: the first."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def norm_eps(self) -> float:
        """Epsilon of whichever norm the layers have."""
        eps = self.layer_norm_eps if self.rms_norm_eps is None else self.rms_norm_eps
        assert eps is not None
        return eps

    def window_of(self, layer: int) -> int | None:
        """The sliding window of layer number `layer`, None where it attends to all tokens before."""
        return None if layer in self.full_attention_layers else self.sliding_window

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layer is a product of two."""
        return self.hidden_act == "silu"

    @property
    def num_parameters(self) -> int:
        """Number of weights, a tied embedding counted once."""
        hidden, inner, inputs = self.hidden_size, self.intermediate_size, 2 if self.is_gated else 1
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        norm = hidden * (1 if self.layer_norm_eps is None else 2)
        layer = 2 * (queries + keys) * hidden + (inputs + 1) * hidden * inner + (self.parallel_norms or 2) * norm
        layer += self.query_key_value_bias * (queries + 2 * keys) + self.attention_output_bias * hidden
        layer += self.query_key_norm * 2 * self.head_dim + self.mlp_bias * (inputs * inner + hidden)
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * hidden
        positions = self.max_position_embeddings * hidden if self.family.positions is not None else 0
        return embeddings + positions + self.num_hidden_layers * layer + norm

    def padded_vocab_size(self, tensor: int) -> int:
        """The vocabulary as `tensor` ranks hold it: rounded up to equal shares that suit the matrix units."""
        unit = _VOCAB_SHARE_MULTIPLE * tensor
        return math.ceil(self.vocab_size / unit) * unit


def spell_for_both(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The content of a `config.json` with everything spelled for transformers 4 and 5 alike, and the dtype and the
    class of the model stated, by which vLLM and llama.cpp's converter choose theirs.

    Every other key stays as it was. A reader that finds only the other's spelling takes its default instead, silently.
    """
    family = family_of(config)
    return {**family.spell(config), "architectures": [family.architecture], "torch_dtype": dtype, "dtype": dtype}
