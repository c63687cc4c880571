"""What a checkpoint or Hugging Face folder holds, for people and for machines. Only `verify` reads tensors."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.checkpoint.adapted import with_base
from megatron.checkpoint.check import check_weights
from megatron.checkpoint.checksums import compare_checksums, damage
from megatron.checkpoint.manager import whole_checkpoints
from megatron.checkpoint.safetensors_file import DTYPE_NAMES
from megatron.checkpoint.source import Source
from megatron.model.config import ModelConfig
from megatron.model.lora import adapter_of
from megatron.model.specs import canonical_shapes
from megatron.utils.errors import CheckpointError, ConfigError
from megatron.utils.units import format_bytes, format_count

_FORMAT_NAMES = {
    "native": "checkpoint of this program",
    "huggingface": "Hugging Face",
    "meta": "Meta",
    "megatron-llm": "Megatron-LLM",
    "peft": "PEFT",
}


def describe(source: Source, path: Path) -> dict[str, Any]:
    """All there is to say about a model that was opened from `path`, as JSON values."""
    model, problem = _describe_model(source)
    weights = source.index.get("weights", {})
    state = source.state or {}
    return {
        "folder": str(source.folder),
        "format": source.format,
        "steps_in_save_folder": [step for step, _ in whole_checkpoints(path)],
        "step": source.step,
        "consumed_tokens": state.get("consumed_tokens"),
        "consumed_samples": state.get("consumed_samples"),
        "saved_with": _saved_with(source),
        "model": model,
        "adapters": _describe_adapters(source),
        "problem": problem,
        "parameters": sum(math.prod(stored.shape) for stored in weights.values()),
        "tensors": len(weights),
        "dtypes": sorted({DTYPE_NAMES[piece.dtype] for stored in weights.values() for piece in stored.pieces}),
        "weight_files": source.weight_files,
        "weight_bytes": sum(stored.size_bytes for stored in weights.values()),
        "optimizer_bytes": {
            kind: sum(stored.size_bytes for stored in tensors.values())
            for kind, tensors in source.index.items()
            if kind != "weights"
        },
        "other_files": [file.name for file in source.tokenizer_files],
    }


def table(description: dict[str, Any]) -> list[tuple[str, str]]:
    """The description as (label, text) in reading order, without what does not apply."""
    native = description["format"] == "native"
    files, parameters = description["weight_files"], description["parameters"]
    grid, model = description["saved_with"] or {}, description["model"] or {}
    optimizer = description["optimizer_bytes"]
    kinds = f"{', '.join(optimizer)}, {format_bytes(sum(optimizer.values()))}" if optimizer else "none"
    rows = [
        ("folder", description["folder"]),
        ("format", _FORMAT_NAMES[description["format"]]),
        ("steps there", ", ".join(map(str, description["steps_in_save_folder"]))),
        ("step", str(description["step"]) if native or description["step"] else ""),
        ("consumed tokens", _count(description["consumed_tokens"])),
        ("consumed samples", _count(description["consumed_samples"])),
        ("saved with", ", ".join(f"{name} {value}" for name, value in grid.items() if value is not None)),
        *((name.replace("_", " "), str(value)) for name, value in model.items() if value is not None),
        ("adapters", _adapters_line(description["adapters"])),
        ("parameters", f"{parameters:,} ({format_count(parameters)})"),
        ("weights", f"{description['tensors']} tensors in {' and '.join(description['dtypes'])}"),
        ("weight files", f"{len(files)}, {format_bytes(description['weight_bytes'])}: {_ends(files)}"),
        ("optimizer state", kinds),
        ("other files", ", ".join(description["other_files"]) or "none: there is no tokenizer"),
        ("problem", description["problem"] or ""),
    ]
    return [(label, text) for label, text in rows if text]


def list_tensors(source: Source) -> list[dict[str, Any]]:
    """Every stored tensor: its kind, name, shape, dtype and in how many pieces and files it lies."""
    return [
        {
            "kind": kind,
            "name": name,
            "shape": list(stored.shape),
            "dtype": DTYPE_NAMES[stored.pieces[0].dtype],
            "pieces": len(stored.pieces),
            "files": sorted({piece.file for piece in stored.pieces}),
        }
        for kind, tensors in source.index.items()
        for name, stored in tensors.items()
    ]


def verify(source: Source) -> str:
    """Read everything and compare checksums; returns what was found right, raises CheckpointError naming the rest."""
    compared = dict(compare_checksums(source))
    damaged = [name for name, is_damaged in compared.items() if is_damaged]
    if damaged:
        raise damage(source, damaged)
    if not compared:
        return f"{len(source.weight_files)} file(s) are whole; a Hugging Face folder has no checksums to compare"
    return f"the checksums of all {len(compared)} files are right"


def _saved_with(source: Source) -> dict[str, Any] | None:
    """The grid of the run that saved it, and how it shared the optimizer state; None for what no run has saved."""
    parallel = (source.run_config or {}).get("parallel") or {}
    found = {name: parallel[name] for name in ("tensor", "context", "pipeline", "zero") if name in parallel}
    data = (source.state or {}).get("grid", {}).get("data")
    if data is not None:
        found["data"] = data
        if found.get("zero") is None:  # left to what the grid makes of it
            found["zero"] = int(data * found.get("context", 1) > 1)
    return found or None


def _describe_adapters(source: Source) -> dict[str, Any] | None:
    """What adapters are in the place of a model's weights, and where that model is; None where it is a model itself."""
    if source.adapter is None:
        return None
    layers = {(adapter_of(name) or name).rpartition(".")[2]: None for name in source.shapes()}
    described = asdict(source.adapter)
    del described["fingerprint"]
    return {**described, "layers": list(layers)}


def _adapters_line(adapters: dict[str, Any] | None) -> str:
    if adapters is None:
        return ""
    scale = f"alpha {adapters['alpha']:g}{' (rslora)' if adapters['rslora'] else ''}"
    base = adapters["base"] or "a model that is not named"
    return f"rank {adapters['rank']}, {scale}, for {', '.join(adapters['layers'])} of {base}"


def _describe_model(source: Source) -> tuple[dict[str, Any] | None, str | None]:
    """The architecture, and why the model could not be used here, where that is so."""
    if source.adapter is not None:
        try:
            with with_base(source) as adapted:
                return _describe_model(adapted)
        except CheckpointError as error:
            return None, str(error)
    try:
        config = ModelConfig.from_huggingface(source.model_config)
    except ConfigError as error:
        return None, str(error)
    try:
        check_weights(source, canonical_shapes(config))
    except CheckpointError as error:
        return asdict(config), str(error)
    return asdict(config), None


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,} ({format_count(number)})"


def _ends(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} … {names[-1]}"
