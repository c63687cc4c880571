"""Meta's own folders: `params.json` and `consolidated.NN.pth`, one file for each rank of their tensor parallelism.

Rows of query and key heads lie in interleaved rotary order there, and are half-split here. Meta's files exist for Llama
alone: 1 to 3, Code Llama included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.index import StoredPiece, StoredTensor, collect_index
from megatron.checkpoint.layout import FileTensor, Placed, interleave, stored_piece
from megatron.checkpoint.torch_file import TorchReader
from megatron.model.config import ModelConfig
from megatron.parallel.layout import Region
from megatron.utils.errors import CheckpointError, ConfigError
from megatron.utils.files import parse_json

PARAMS = "params.json"

_FILE = re.compile(r"consolidated\.(\d{2,})\.pth")
_COPIED = None  # of a dim along which shards are cut
_COLUMNS_OR_ROWS = -1  # Llama 1 and 2 cut the embedding by columns, Llama 3 by rows: the shapes tell


@dataclass(frozen=True)
class _Rule:
    """What a tensor of Meta's is here, and along which dim it is cut; `rotary` rows are interleaved."""

    canonical: str
    dim: int | None
    rotary: bool = False


_RULES = {
    "tok_embeddings.weight": _Rule("model.embed_tokens.weight", _COLUMNS_OR_ROWS),
    "norm.weight": _Rule("model.norm.weight", _COPIED),
    "output.weight": _Rule("lm_head.weight", 0),
}
_LAYER_RULES = {
    "attention.wq.weight": _Rule("self_attn.q_proj.weight", 0, rotary=True),
    "attention.wk.weight": _Rule("self_attn.k_proj.weight", 0, rotary=True),
    "attention.wv.weight": _Rule("self_attn.v_proj.weight", 0),
    "attention.wo.weight": _Rule("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": _Rule("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": _Rule("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": _Rule("mlp.up_proj.weight", 0),
    "attention_norm.weight": _Rule("input_layernorm.weight", _COPIED),
    "ffn_norm.weight": _Rule("post_attention_layernorm.weight", _COPIED),
}
_BUFFERS = ("rope.freqs",)
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA3_VOCABULARY = 128_000  # from which on a model is Llama 3, and its embedding is cut by rows


def is_meta(folder: Path) -> bool:
    """Whether the folder holds a model in Meta's form."""
    return (folder / PARAMS).is_file() and bool(_files(folder))


def is_meta_file(name: str) -> bool:
    """Whether a file of this name holds weights in Meta's form."""
    return _FILE.fullmatch(name) is not None


def index_meta(folder: Path) -> tuple[dict[str, StoredTensor], list[str], dict[str, Any]]:
    """Where every canonical tensor is, the weight files, and the model as a `config.json` would describe it.

    Raises CheckpointError for shards that are missing, damaged, or do not fit each other or `params.json`.
    """
    files = _files(folder)
    if [number for number, _ in files] != list(range(len(files))):
        raise CheckpointError(
            f"{folder} is incomplete: it holds {', '.join(name for _, name in files)}. Download or copy it again."
        )
    params = _read_params(folder / PARAMS)
    names = [name for _, name in files]
    with ExitStack() as stack:
        readers = [stack.enter_context(TorchReader(folder / name)) for name in names]
        keys = [name for name in readers[0].entries if name not in _BUFFERS]
        for reader in readers[1:]:
            odd = set(keys) ^ (reader.entries.keys() - set(_BUFFERS))
            if odd:
                raise CheckpointError(f"{reader.path} and {readers[0].path} hold different tensors: {sorted(odd)[:5]}.")
        config = config_of(params, {key: [reader.entries[key].shape for reader in readers] for key in keys}, folder)
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        pieces: list[tuple[str, StoredPiece]] = []
        for key in keys:
            shapes = [reader.entries[key].shape for reader in readers]
            for number, placed in enumerate(_placed(key, shapes, config["hidden_size"], head_dim, folder)):
                dtype = readers[number].entries[key].dtype
                pieces += [
                    ("weights", stored_piece(piece, dtype, names[number], key)) for piece in placed if not piece.copy
                ]
    index, problems = collect_index(pieces)
    if problems:
        raise CheckpointError(f"The shards in {folder} do not make whole tensors: {'; '.join(problems[:5])}.")
    return index["weights"], names, config


def config_of(
    params: Mapping[str, Any], shapes: Mapping[str, Sequence[tuple[int, ...]]], folder: Path
) -> dict[str, Any]:
    """The content of a `config.json` for a `params.json` and each tensor's shapes in the shards."""
    try:
        hidden, heads = int(params["dim"]), int(params["n_heads"])
        inner = sum(shape[0] for shape in shapes["layers.0.feed_forward.w1.weight"])
        vocabulary = sum(shape[0] for shape in shapes["output.weight"])
        config = {
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": int(params["n_layers"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(params.get("n_kv_heads") or heads),
            "max_position_embeddings": _max_positions(params, vocabulary),
            "rms_norm_eps": float(params["norm_eps"]),
            "rope_theta": float(params.get("rope_theta") or 10000.0),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 128_000 if vocabulary >= _LLAMA3_VOCABULARY else 1,
            "eos_token_id": 128_001 if vocabulary >= _LLAMA3_VOCABULARY else 2,
        }
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{folder / PARAMS} and its weights do not describe a Llama ({error!r}).") from error
    if hidden < 1 or heads < 1 or hidden % heads:
        raise CheckpointError(f"{folder / PARAMS} says dim={hidden} and n_heads={heads}: heads must divide it.")
    if params.get("use_scaled_rope"):
        factor = float(params.get("rope_scaling_factor") or 8.0)
        high = float(params.get("rope_high_freq_factor") or 4.0)
        config["rope_scaling"] = {
            "rope_type": "llama3", "factor": factor, **_LLAMA3_SCALING, "high_freq_factor": high,
        }  # fmt: skip
    return config


def _max_positions(params: Mapping[str, Any], vocabulary: int) -> int:
    """The longest sequence that the model was trained for; `params.json` does not say it, but which Llama it is."""
    if params.get("use_scaled_rope"):
        return 131_072
    if vocabulary >= _LLAMA3_VOCABULARY:
        return 8192
    if float(params.get("rope_theta") or 10000.0) > 10000.0:
        return 16_384  # Code Llama
    return 2048 if float(params["norm_eps"]) == 1e-6 else 4096


def meta_files(config: ModelConfig, shards: int, dtypes: Mapping[str, torch.dtype]) -> dict[str, list[FileTensor]]:
    """The tensors of each file of a model cut into `shards`; raises ConfigError where that cannot be."""
    problems = [
        f"{name}={value} is not divisible by {shards}"
        for name, value in (
            ("num_key_value_heads", config.num_key_value_heads),
            ("intermediate_size", config.intermediate_size),
            ("vocab_size", config.vocab_size),
        )
        if value % shards
    ]
    if problems:
        raise ConfigError(f"--tensor {shards} cannot cut this model into Meta's files: {'; '.join(problems)}.")
    files: dict[str, list[FileTensor]] = {f"consolidated.{number:02d}.pth": [] for number in range(shards)}
    for key, rule in _all_rules(config.num_hidden_layers):
        shape = _canonical_shape(config, rule.canonical)
        dim = rule.dim
        if dim == _COLUMNS_OR_ROWS:
            dim = 0 if config.vocab_size >= _LLAMA3_VOCABULARY else 1
        shapes = [tuple(n // shards if d == dim else n for d, n in enumerate(shape)) for _ in range(shards)]
        placed = _placed(key, shapes, config.hidden_size, config.head_dim, Path(PARAMS))
        for tensors, local, pieces in zip(files.values(), shapes, placed, strict=True):
            tensors.append(FileTensor(key, local, dtypes[rule.canonical], tuple(pieces)))
    return files


def params_of(config: ModelConfig) -> dict[str, Any]:
    """The content of `params.json`. Raises ConfigError for a model that Meta's code cannot be told of."""
    scaling = config.rope_scaling
    kind = scaling.rope_type if scaling else "default"
    others = {
        "model_type": (config.model_type, "llama"),
        "tie_word_embeddings": (config.tie_word_embeddings, False),
        "attention_bias": (config.query_key_value_bias or config.attention_output_bias, False),
        "mlp_bias": (config.mlp_bias, False),
        "head_dim": (config.head_dim, config.hidden_size // config.num_attention_heads),
        "rotary scaling": (kind, kind if kind in ("default", "llama3") else "default"),
    }
    problems = [f"{name}={found} (only {wanted})" for name, (found, wanted) in others.items() if found != wanted]
    if scaling and kind == "llama3":
        problems += [
            f"{name}={getattr(scaling, name)} (only {value})"
            for name, value in _LLAMA3_SCALING.items()
            if name != "high_freq_factor" and getattr(scaling, name) != value
        ]
    if problems:
        raise ConfigError(f"Meta's files cannot hold this model: {'; '.join(problems)}.")
    multiple_of, multiplier = _inner_rule(config.hidden_size, config.intermediate_size)
    params: dict[str, Any] = {"dim": config.hidden_size, "multiple_of": multiple_of}
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    params |= {"n_heads": config.num_attention_heads, "n_layers": config.num_hidden_layers}
    if config.num_key_value_heads != config.num_attention_heads:
        params["n_kv_heads"] = config.num_key_value_heads
    params |= {"norm_eps": config.norm_eps, "vocab_size": config.vocab_size}
    if config.rope_theta != 10000.0:
        params["rope_theta"] = config.rope_theta
    if scaling and kind == "llama3":
        params["use_scaled_rope"] = True
        params["rope_scaling_factor"] = scaling.factor
        params["rope_high_freq_factor"] = scaling.high_freq_factor
    return params


def _inner_rule(hidden: int, inner: int) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` by which Meta's code arrives at a feed-forward size."""
    for multiplier in (None, 1.3, 1.5, 1.4, 1.2):
        for multiple_of in (256, 1024, 4096, 512, 128, 64, 32):
            if _inner_size(hidden, multiple_of, multiplier) == inner:
                return multiple_of, multiplier
    return 1, (inner + 0.5) / (8 * hidden // 3)


def _inner_size(hidden: int, multiple_of: int, multiplier: float | None) -> int:
    size = 8 * hidden // 3
    size = size if multiplier is None else int(multiplier * size)
    return multiple_of * -(-size // multiple_of)


def _files(folder: Path) -> list[tuple[int, str]]:
    """Number and name of the shards."""
    found = ((_FILE.fullmatch(path.name), path.name) for path in folder.glob("consolidated.*.pth"))
    return sorted((int(match[1]), name) for match, name in found if match)


def _read_params(path: Path) -> dict[str, Any]:
    try:
        params = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from error
    if not isinstance(params, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    return params


def _all_rules(layers: int) -> Iterator[tuple[str, _Rule]]:
    yield "tok_embeddings.weight", _RULES["tok_embeddings.weight"]
    for layer in range(layers):
        for key in _LAYER_RULES:
            name = f"layers.{layer}.{key}"
            rule = _rule(name)
            assert rule is not None
            yield name, rule
    for name in ("norm.weight", "output.weight"):
        yield name, _RULES[name]


def _rule(key: str) -> _Rule | None:
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", key)
    if match is None:
        return _RULES.get(key)
    rule = _LAYER_RULES.get(match[2])
    return rule and _Rule(f"model.layers.{match[1]}.{rule.canonical}", rule.dim, rule.rotary)


def _canonical_shape(config: ModelConfig, name: str) -> tuple[int, ...]:
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (config.vocab_size, hidden),
        "q_proj": (config.num_attention_heads * config.head_dim, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, config.num_attention_heads * config.head_dim),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    return shapes.get(name.split(".")[-2], (hidden,))


def _placed(
    key: str, shapes: Sequence[tuple[int, ...]], hidden: int, head_dim: int, where: Path
) -> Iterator[list[Placed]]:
    """Of a tensor whose shards have these shapes, what each of them is made of."""
    rule = _rule(key)
    if rule is None:
        raise CheckpointError(f"{where} holds {key}, which no Llama of Meta's has.")
    dim = rule.dim
    if dim == _COLUMNS_OR_ROWS:
        dim = 0 if len(shapes[0]) == 2 and shapes[0][1] == hidden else 1
    rank = 1 if dim is None else 2
    if any(len(shape) != rank for shape in shapes):
        raise CheckpointError(f"{key} in {where} has the shapes {shapes}: {rank} dims were expected.")
    if rule.rotary and any(shape[0] % head_dim for shape in shapes):
        raise CheckpointError(f"{key} in {where} has the shapes {shapes}: no whole heads of {head_dim} rows.")
    extent = sum(shape[dim or 0] for shape in shapes) if dim is not None else shapes[0][0]
    whole = tuple(extent if d == dim else n for d, n in enumerate(shapes[0]))
    start = 0
    for number, shape in enumerate(shapes):
        begin = tuple(start if d == dim else 0 for d in range(rank))
        try:
            region = Region(rule.canonical, whole, begin, shape)
        except AssertionError as error:
            raise CheckpointError(f"{key} in {where} has shapes that do not fit each other: {shapes}.") from error
        piece = Placed(region, (0,) * rank, copy=dim is None and number > 0)
        yield list(interleave(piece, head_dim)) if rule.rotary else [piece]
        start += 0 if dim is None else shape[dim]
