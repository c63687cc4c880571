"""Adapters in the format of PEFT: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

Tensors have the canonical names of ours behind a prefix. What would make another function of them is refused, never
ignored. It must not know what the adapters are put on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.huggingface import open_file
from megatron.checkpoint.index import StoredPiece, StoredTensor
from megatron.parallel.layout import Region
from megatron.utils.errors import CheckpointError
from megatron.utils.hub import parse_address

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS, ADAPTER_PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

# What says nothing of the function that trained adapters compute.
_SILENT = {
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "fan_in_fan_out",
    "init_lora_weights",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "loftq_config",
    "eva_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
}
# Ways to begin under which PEFT changes the weights of the model too.
_CHANGES_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class StoredAdapter:
    """What a folder of adapters says of them; `base` is where the model lies that they were trained on, `fingerprint`
    tells it from others (None: nobody took it)."""

    rank: int
    alpha: float
    rslora: bool
    base: str | None
    fingerprint: str | None = None

    def to_state(self) -> dict[str, Any]:
        """As a checkpoint of ours keeps it."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], origin: Path) -> StoredAdapter:
        """The inverse of `to_state`; raises CheckpointError, naming `origin`."""
        try:
            return cls(
                int(state["rank"]),
                float(state["alpha"]),
                bool(state["rslora"]),
                None if state["base"] is None else str(state["base"]),
                None if state["fingerprint"] is None else str(state["fingerprint"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{origin} does not say what its adapters are ({error!r}).") from error


def is_peft(folder: Path) -> bool:
    """Whether the folder holds adapters in PEFT's format."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_peft(folder: Path) -> tuple[StoredAdapter, dict[str, StoredTensor], list[str]]:
    """(what the adapters are, where their tensors are by canonical name, the weight files). Raises CheckpointError."""
    config = _read_config(folder / ADAPTER_CONFIG)
    problems = list(_other_functions(config))
    if problems:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} asks for what is not supported: {'; '.join(problems)}.")
    base = config.get("base_model_name_or_path")
    adapter = StoredAdapter(
        config["r"], float(config["lora_alpha"]), bool(config.get("use_rslora")), str(base) if base else None
    )
    file = next((name for name in (ADAPTER_WEIGHTS, ADAPTER_PICKLE) if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{folder} is incomplete: it holds {ADAPTER_CONFIG}, but neither {ADAPTER_WEIGHTS} nor {ADAPTER_PICKLE}."
        )
    with open_file(folder / file) as reader:
        tensors: dict[str, StoredTensor] = {}
        for key, entry in reader.entries.items():
            name = key.removeprefix(PREFIX)
            if name in tensors:
                raise CheckpointError(f"{folder / file} holds {name} twice: with {PREFIX} before it and without.")
            piece = StoredPiece(Region.whole(name, entry.shape), entry.dtype, file, key)
            tensors[name] = StoredTensor(entry.shape, (piece,))
    return adapter, tensors, [file]


def peft_config_text(adapter: StoredAdapter, base: str | None, targets: Sequence[str], *, transposed: bool) -> str:
    """The content of `adapter_config.json`. `targets` are names that end those of the adapted layers, `transposed`
    tells whether the model keeps their weights as [in, out]."""
    alpha, repository = adapter.alpha, None if base is None else parse_address(base)
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base if repository is None else repository.name,
        "r": adapter.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "use_rslora": adapter.rslora,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None if repository is None else repository.revision,
    }
    return json.dumps(content, indent=2) + "\n"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    return config


def _other_functions(config: Mapping[str, Any]) -> Iterator[str]:
    """Every setting under which the adapters are not plain ones of one rank and one scale."""
    if config.get("peft_type") != "LORA":
        yield f"peft_type={config.get('peft_type')} (only LORA)"
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        yield f"r={rank!r} (a whole number from 1 on)"
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        yield f"lora_alpha={alpha!r} (a number above 0)"
    for name, usual in (("rank_pattern", rank), ("alpha_pattern", alpha)):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or any(value != usual for value in pattern.values()):
            yield f"{name}={pattern} (one value for all layers)"
    begun = str(config.get("init_lora_weights", True)).lower()
    if begun.startswith(_CHANGES_THE_MODEL):
        yield f"init_lora_weights={begun}, which changes the model's own weights (convert it with PEFT to plain LoRA)"
    for name, value in config.items():
        if name not in _SILENT and value and value != "none":
            yield f"{name}={value}"
