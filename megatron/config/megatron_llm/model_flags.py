"""The flags of the model's shape: taken at their word without `--load`, held against the checkpoint's with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

_FALCON_FLAGS = ("parallel_attn", "parallel_layernorm", "use_multiquery_attn")
_SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads")
_RMS_NORM = ("llama", "mistral")


class Result(Protocol):
    """Where keys, notices and problems go."""

    keys: dict[str, Any]
    notices: list[str]
    problems: list[str]


def translate_model(
    flags: Mapping[str, Any], loaded: Mapping[str, Any] | None, vocabulary: int | None, done: Result
) -> None:
    """`model.*` of the flags. `loaded` is the config.json of the model to start from, None for random weights."""
    family = _family(flags) if loaded is None else str(loaded.get("model_type", "llama"))
    _check_family(flags, family, done)
    if "layernorm_epsilon" in flags:
        done.keys[f"model.{_epsilon(family)}"] = flags["layernorm_epsilon"]
    if "no_tie_embed_logits" in flags:
        done.keys["model.tie_word_embeddings"] = False
    if loaded is None:
        _random_model(flags, family, vocabulary, done)
    else:
        _check_loaded(flags, family, loaded, done)


def _family(flags: Mapping[str, Any]) -> str:
    """The `model_type` that a model without a checkpoint has."""
    name = flags.get("model_name", "gpt")
    if name == "gpt":
        return "gpt_neox" if flags.get("position_embedding_type") == "rotary" else "gpt2"
    return "llama" if name in ("llama", "llama2", "codellama") else str(name)


def _epsilon(family: str) -> str:
    return "rms_norm_eps" if family in _RMS_NORM else "layer_norm_eps"


def _check_family(flags: Mapping[str, Any], family: str, done: Result) -> None:
    falcon = [name for name in _FALCON_FLAGS if name in flags]
    if falcon and family != "falcon":
        done.problems.append(f"--{falcon[0]} is for Falcon, and the model is {family}; leave it out")
    gated = family in _RMS_NORM
    activation = flags.get("glu_activation")
    if activation is not None and not (gated and activation == "swiglu"):
        own = "swiglu" if gated else "none"
        done.problems.append(f"--glu_activation {activation}: the gated activation of {family} is {own}")
    if "use_bias" in flags and gated:
        done.problems.append(f"--use_bias: {family} has no biases; leave it out")
    absolute = flags.get("position_embedding_type") == "absolute"
    if absolute and family != "gpt2":
        done.problems.append(f"--position_embedding_type absolute: {family} has rotary positions")


def _random_model(flags: Mapping[str, Any], family: str, vocabulary: int | None, done: Result) -> None:
    keys = done.keys
    keys["model.model_type"] = family
    missing = [name for name in _SHAPE if f"model.{name}" not in keys]
    if missing:
        spelled = {"num_hidden_layers": "num_layers"}
        done.problems.append(
            f"without --load the model is made at random, and --{', --'.join(spelled.get(n, n) for n in missing)} "
            "must say its shape"
        )
        return
    if vocabulary is None:
        done.problems.append("without --load the size of the vocabulary is the tokenizer's: give --vocab_file")
    keys["model.vocab_size"] = vocabulary
    keys.setdefault("model.intermediate_size", 4 * keys["model.hidden_size"])
    keys.setdefault("model.num_key_value_heads", keys["model.num_attention_heads"])
    longest = flags.get("max_position_embeddings", keys.get("data.sequence_length"))
    if longest is None:
        done.problems.append(
            "without --load, --seq_length or --max_position_embeddings must say how long sequences are"
        )
    keys["model.max_position_embeddings"] = longest
    keys.setdefault("model.tie_word_embeddings", True)
    keys["model.initializer_range"] = flags.get("init_method_std", 0.02)
    if flags.get("rope_scaling_factor", 1.0) != 1.0 or "sliding_window_size" in flags:
        done.problems.append(
            "--rope_scaling_factor, --sliding_window_size: a model made at random has neither; begin with the "
            "config.json and weights of one that has"
        )


def _check_loaded(flags: Mapping[str, Any], family: str, loaded: Mapping[str, Any], done: Result) -> None:
    named = flags.get("model_name")
    if named is not None and named != "gpt" and _family({"model_name": named}) != family:
        done.problems.append(f"--model_name {named}, but --load holds a model of the family {family}")
    for flag, name in (("layernorm_epsilon", _epsilon(family)), ("rope_theta", "rope_theta")):
        if flag in flags and loaded.get(name) not in (None, flags[flag]):
            done.problems.append(
                f"--{flag} {flags[flag]}, but --load says {loaded[name]}; leave the flag out. Where --load was cut by "
                "Megatron-LLM's checkpoint_util.py, which loses it, put the model's config.json into that folder"
            )
    scaling = loaded.get("rope_scaling") or loaded.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    have = float(scaling.get("factor") or 1.0) if kind == "linear" else 1.0
    asked = flags.get("rope_scaling_factor", have if kind in ("linear", "default") else 1.0)
    if asked != have and not (asked == 1.0 and kind not in ("linear", "default")):
        done.problems.append(
            f"--rope_scaling_factor {asked}, but the config.json of --load says {have}: what scales positions belongs "
            'to the model; write "rope_scaling": {"type": "linear", "factor": ' + f"{asked}" + "} there, and a "
            "max_position_embeddings that is as much longer"
        )
    window = flags.get("sliding_window_size")
    if window is not None and window != loaded.get("sliding_window"):
        done.problems.append(
            f"--sliding_window_size {window}, but the config.json of --load says {loaded.get('sliding_window')}; "
            "change it there, or leave the flag out"
        )
    longest = flags.get("max_position_embeddings")
    if longest is not None and longest != loaded.get("max_position_embeddings", longest):
        done.notices.append(
            f"--max_position_embeddings {longest}: the model's are {loaded.get('max_position_embeddings')}, which stay"
        )
