"""What a Llama model is, as its `config.json` says it.

Fields have Hugging Face's names. What would change the function and is not built here is refused, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron.utils.errors import ConfigError

# Matrix products with odd extents (a vocabulary of 32,017) run several times slower on tensor cores.
_VOCAB_SHARE_MULTIPLE = 64


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one Llama model (sizes in elements)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        problems = [
            f"{field.name}={getattr(self, field.name)} must be positive"
            for field in fields(self)
            if field.name != "tie_word_embeddings" and not getattr(self, field.name) > 0
        ]
        if not problems and self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}: each key/value head serves as many query heads"
            )
        if not problems and self.head_dim % 2:
            problems.append(f"head_dim={self.head_dim} is odd: rotary embedding turns pairs of elements")
        if problems:
            raise ConfigError("The model is impossible: " + "; ".join(problems) + ".")

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read the content of a `config.json`, in the spelling of transformers 4 or 5.

        Raises ConfigError where a size is missing or a setting asks for a function that is not Llama's.
        """
        _refuse_wrong_types(config)
        _refuse_other_functions(config)
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [name for name in required if config.get(name) is None]
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)}: a Llama model cannot be built without.")
        heads = int(config["num_attention_heads"])
        if config.get("head_dim") is None and int(config["hidden_size"]) % max(heads, 1):
            raise ConfigError(
                f"hidden_size={config['hidden_size']} is not divisible by num_attention_heads={heads}; "
                "set head_dim if the heads are of another size."
            )
        defaults = {field.name: field.default for field in fields(cls)}

        def optional(name: str) -> Any:
            return defaults[name] if config.get(name) is None else config[name]

        return cls(
            vocab_size=int(config["vocab_size"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_hidden_layers=int(config["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // max(heads, 1)),
            # transformers' own defaults for LlamaConfig, for files that leave these out
            max_position_embeddings=int(config.get("max_position_embeddings") or 2048),
            rms_norm_eps=float(1e-6 if config.get("rms_norm_eps") is None else config["rms_norm_eps"]),
            rope_theta=_rope_theta(config),
            tie_word_embeddings=bool(optional("tie_word_embeddings")),
            initializer_range=float(optional("initializer_range")),
        )

    def to_huggingface(self, dtype: str = "float32") -> dict[str, Any]:
        """The content of a `config.json` that transformers 4 and 5 both read; `dtype` is torch's name, as
        `bfloat16`.
        """
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pretraining_tp": 1,
            "use_cache": True,
        }
        return spell_for_both(config, dtype)

    @property
    def num_parameters(self) -> int:
        """Number of weights, a tied embedding counted once."""
        attention = self.head_dim * (self.num_attention_heads + self.num_key_value_heads) * 2 * self.hidden_size
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return embeddings + self.num_hidden_layers * layer + self.hidden_size

    def padded_vocab_size(self, tensor: int) -> int:
        """The vocabulary as `tensor` ranks hold it: rounded up to equal shares that suit the matrix units."""
        unit = _VOCAB_SHARE_MULTIPLE * tensor
        return math.ceil(self.vocab_size / unit) * unit


def spell_for_both(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The content of a `config.json` with the rotary base and the dtype as transformers 4 and 5 each spell them.

    Every other key stays as it was. A reader that finds only the other's spelling takes its default instead, silently.
    """
    theta = _rope_theta(config)
    return {
        **config,
        "rope_theta": theta,
        "rope_scaling": None,
        "rope_parameters": {**(config.get("rope_parameters") or {}), "rope_type": "default", "rope_theta": theta},
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The rotary base: transformers 4 writes `rope_theta`, transformers 5 `rope_parameters.rope_theta`.

    transformers also reads one inside `rope_scaling`.
    """
    stated = {"rope_theta": config.get("rope_theta")}
    for name in ("rope_parameters", "rope_scaling"):
        stated[f"{name}.rope_theta"] = (config.get(name) or {}).get("rope_theta")
    found = {name: float(base) for name, base in stated.items() if base is not None}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name}={base}" for name, base in found.items())
        raise ConfigError(f"config.json contradicts itself: {listed}; remove the wrong one.")
    return next(iter(found.values()), 10000.0)


def _refuse_wrong_types(config: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming every value that is not of the kind that its name asks for."""
    numbers = (field.name for field in fields(ModelConfig) if field.name != "tie_word_embeddings")
    kinds: dict[str, tuple[type, ...]] = dict.fromkeys(numbers, (int, float))
    kinds |= {"tie_word_embeddings": (bool,), "rope_parameters": (dict,), "rope_scaling": (dict,)}
    wrong = [
        f"{name}={config[name]!r}"
        for name, kind in kinds.items()
        if config.get(name) is not None and type(config[name]) not in kind
    ]
    if wrong:
        raise ConfigError(f"config.json holds values of the wrong kind: {', '.join(wrong)}.")


def _refuse_other_functions(config: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming every setting under which this would not be the function of a plain Llama."""
    problems = []
    if config.get("model_type", "llama") != "llama":
        problems.append(f"model_type={config['model_type']!r} (only 'llama' is built)")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"hidden_act={config['hidden_act']!r} (only 'silu')")
    problems += [f"{name}=true" for name in ("attention_bias", "mlp_bias") if config.get(name)]
    if config.get("attention_dropout"):
        problems.append(f"attention_dropout={config['attention_dropout']} (models here train without dropout)")
    for name in ("rope_scaling", "rope_parameters"):
        scaling = config.get(name) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            problems.append(f"{name} of type {kind!r} (only the default)")
    if (config.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0) != 1.0:
        problems.append("partial_rotary_factor (every element is turned)")
    if config.get("quantization_config"):
        problems.append("quantization_config (dequantize the model first)")
    if problems:
        raise ConfigError("config.json asks for what is not supported: " + "; ".join(problems) + ".")
