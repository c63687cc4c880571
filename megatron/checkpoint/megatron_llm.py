"""Megatron-LLM's checkpoint folders, of any tensor × pipeline grid: the trainer's dialect and the converter's.

    DIR/latest_checkpointed_iteration.txt        "release" or a number
        release/  or  iter_0000100/mp_rank_00[_000]/model_optim_rng.pt   (model_rng.pt: the optimizer is elsewhere)

A `config.json` in DIR (ours, or copied there by hand) says what the model is; without one it is told from the saved
arguments, among which their resharder loses the rotary base, its scaling and the eps.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.huggingface import MODEL_CONFIG, read_config
from megatron.checkpoint.index import StoredPiece, StoredTensor, collect_index
from megatron.checkpoint.layout import FileTensor
from megatron.checkpoint.megatron_layout import Dialect, MegatronGrid, chunk_tensors
from megatron.checkpoint.megatron_optimizer import distributed_state, find_optimizer_files, plain_state, updates_of
from megatron.checkpoint.pickled import Instance, Name, TensorRef
from megatron.checkpoint.torch_file import TorchReader
from megatron.checkpoint.torch_writer import nested
from megatron.model.config import ModelConfig
from megatron.utils.errors import CheckpointError, ConfigError

LATEST = "latest_checkpointed_iteration.txt"
MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")

_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_FAMILIES = ("llama", "mistral", "falcon", "gpt2", "gpt_neox")
_TOKENIZERS = {"falcon": "FalconTokenizer", "gpt2": "GPT2BPETokenizer", "gpt_neox": "GPT2BPETokenizer"}
# What Megatron-LLM's layers do not do besides, and the value under which they need not.
_ONLY = {"query_key_norm": False, "full_attention_layers": (), "partial_rotary_factor": 1.0, "alibi": False}
_LEAST_VERSION = 2.0  # before, rows of queries, keys and values lay in other orders


@dataclass(frozen=True)
class MegatronFolder:
    """What was found: `root` is the folder that users name, `files` the file of each (tensor rank, stage)."""

    root: Path
    folder: Path
    files: Mapping[tuple[int, int], Path]

    @property
    def grid(self) -> tuple[int, int]:
        return 1 + max(rank for rank, _ in self.files), 1 + max(stage for _, stage in self.files)


def find_megatron(path: Path) -> MegatronFolder | None:
    """The checkpoint that a folder holds or is; None where it is not Megatron-LLM's. Raises CheckpointError."""
    if (path / LATEST).is_file():
        folder = path / newest_folder(path)
        files = _rank_files(folder)
        if not files:
            raise CheckpointError(f"{path / LATEST} names {folder}, which holds no mp_rank_…/{MODEL_FILES[0]}.")
        return _complete(MegatronFolder(path, folder, files))
    files = _rank_files(path)
    root = path.parent if (path.parent / LATEST).is_file() else path
    return _complete(MegatronFolder(root, path, files)) if files else None


def newest_folder(path: Path) -> str:
    """The folder within `path` that `latest_checkpointed_iteration.txt` names; raises CheckpointError."""
    try:
        word = (path / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path / LATEST} cannot be read ({error}).") from error
    if word != "release" and not word.isdecimal():
        raise CheckpointError(f"{path / LATEST} says {word!r}: neither an iteration nor 'release'.")
    return word if word == "release" else f"iter_{int(word):07d}"


def states_vocabulary(found: MegatronFolder) -> bool:
    """Whether it is said how many rows of the vocabulary are tokens; where not, the last may be padding."""
    if (found.root / MODEL_CONFIG).is_file():
        return True
    with TorchReader(found.files[0, 0]) as reader:
        return bool(_arguments(reader).get("true_vocab_size"))


def index_megatron(
    found: MegatronFolder,
) -> tuple[dict[str, dict[str, StoredTensor]], list[str], dict[str, Any], dict[str, Any] | None]:
    """Where every canonical tensor is, the weight files, `config.json`'s content, and the state of the run, where all
    of it is there.

    Files are named relative to the checkpoint's folder. Raises CheckpointError for ranks that are damaged, disagree, or
    do not hold what the model has.
    """
    names = {place: str(path.relative_to(found.folder)) for place, path in found.files.items()}
    with ExitStack() as stack:
        readers = {place: stack.enter_context(TorchReader(path)) for place, path in found.files.items()}
        first = readers[0, 0]
        arguments = _arguments(first)
        tensor, pipeline = found.grid
        stated = arguments.get("tensor_model_parallel_size"), arguments.get("pipeline_model_parallel_size")
        if any(size is not None and size != have for size, have in zip(stated, (tensor, pipeline), strict=True)):
            raise CheckpointError(
                f"{found.folder} is incomplete: its arguments say {stated[0]} tensor ranks and {stated[1]} stages, "
                f"there are files of {tensor} and {pipeline}."
            )
        grid = MegatronGrid(tensor, pipeline, _virtual_chunks(first))
        dialect: Dialect = "trainer" if any("/encoder/" in name for name in first.entries) else "converter"
        config = _config(found, arguments, readers)
        pieces: list[tuple[str, StoredPiece]] = []
        try:
            model = ModelConfig.from_huggingface(config)
            grid.check(model)
        except ConfigError as error:
            raise CheckpointError(f"{found.folder} does not hold a model that is built here: {error}") from error
        padded = tensor * _vocabulary_rows(readers[0, 0])
        for place, reader in readers.items():
            expected = rank_chunks(model, grid, place, padded, _Unknown(), dialect)
            _check(reader, [item for chunk in expected for item in chunk])
            chunks = [[_as_found(item, reader) for item in chunk] for chunk in expected]
            pieces += [pair for chunk in chunks for item in chunk for pair in item.stored(names[place])]
            pieces += _optimizer(found, place, reader, chunks)
    index, problems = collect_index(pieces)
    if problems:
        raise CheckpointError(f"The ranks in {found.folder} do not make whole tensors: {'; '.join(problems[:5])}.")
    return index, sorted(names.values()), config, _run_state(first, arguments) if "exp_avg" in index else None


def _as_found(item: FileTensor, reader: TorchReader) -> FileTensor:
    return replace(item, dtype=reader.entries[item.key].dtype)


def _optimizer(
    found: MegatronFolder, place: tuple[int, int], reader: TorchReader, chunks: Sequence[Sequence[FileTensor]]
) -> list[tuple[str, StoredPiece]]:
    """The optimizer state of one rank, wherever it is; nothing where there is none."""
    path = found.files[place]
    files = find_optimizer_files(found.folder, path.parent.name) if path.name != MODEL_FILES[0] else []
    if not files:
        return list(plain_state(reader, str(path.relative_to(found.folder)), chunks))
    with ExitStack() as stack:
        readers = [stack.enter_context(TorchReader(file)) for file in files]
        return list(distributed_state(readers, [str(file.relative_to(found.folder)) for file in files], chunks))


def _run_state(reader: TorchReader, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """How far the run was, as a trainer here keeps it; None where the checkpoint does not say."""
    step, samples = arguments.get("iteration"), arguments.get("consumed_train_samples")
    if type(step) is not int or type(samples) is not int:
        return None
    length = arguments.get("seq_length") or 0
    updates = updates_of(reader.content)
    return {
        "step": step,
        "consumed_samples": samples,
        "consumed_tokens": samples * int(length),
        "updates": step if updates is None else updates,
    }


def rank_chunks(
    model: ModelConfig,
    grid: MegatronGrid,
    place: tuple[int, int],
    padded: int,
    dtypes: Mapping[str, torch.dtype],
    dialect: Dialect,
) -> list[list[FileTensor]]:
    """The tensors of each model chunk in the file of one (tensor rank, stage)."""
    return [
        chunk_tensors(
            model, grid, rank=place[0], stage=place[1], chunk=chunk, padded=padded, dtypes=dtypes, dialect=dialect
        )
        for chunk in range(grid.virtual)
    ]


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """The model file of each (tensor rank, stage)."""
    files = {}
    for child in folder.glob("mp_rank_*") if folder.is_dir() else []:
        match = _RANK_FOLDER.fullmatch(child.name)
        present = [child / name for name in MODEL_FILES if (child / name).is_file()]
        if match and present:
            files[int(match[1]), int(match[2] or 0)] = present[0]
    return files


def _complete(found: MegatronFolder) -> MegatronFolder:
    tensor, pipeline = found.grid
    missing = [
        f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
        for stage in range(pipeline)
        for rank in range(tensor)
        if (rank, stage) not in found.files
    ]
    if missing:
        raise CheckpointError(f"{found.folder} is incomplete: {', '.join(missing[:5])} of {tensor * pipeline} missing.")
    return found


def _arguments(reader: TorchReader) -> dict[str, Any]:
    """The attributes of the saved `args`, those that are plain values."""
    content = reader.content
    if not isinstance(content, dict) or not isinstance(content.get("args"), Instance):
        raise CheckpointError(f"{reader.path} is not a checkpoint of Megatron-LLM: it holds no args.")
    version = content.get("checkpoint_version", 0)
    if not isinstance(version, (int, float)) or version < _LEAST_VERSION:
        raise CheckpointError(
            f"{reader.path} has checkpoint_version {version}: before 2 the rows of queries, keys and values had other "
            "orders. Load and save it once with Megatron-LLM itself."
        )
    return {**content["args"].values, "iteration": content.get("iteration", content["args"].values.get("iteration"))}


def _virtual_chunks(reader: TorchReader) -> int:
    return max(1, sum(bool(re.fullmatch(r"model\d+", str(name))) for name in reader.content))


def _vocabulary_rows(reader: TorchReader) -> int:
    for name, entry in reader.entries.items():
        if re.search(r"/embedding/word_embeddings[./]weight$", name) and len(entry.shape) == 2:
            return entry.shape[0]
    raise CheckpointError(f"{reader.path} holds no word embeddings, which the first stage has.")


class _Unknown(defaultdict[str, torch.dtype]):
    """A dtype for every name: what a file has is told by its entries."""

    def __missing__(self, name: str) -> torch.dtype:
        return torch.float32


def _check(reader: TorchReader, expected: list[FileTensor]) -> None:
    """Raise CheckpointError where a file does not hold just these tensors."""
    wanted = {item.key: item.shape for item in expected}
    found = {name: entry.shape for name, entry in reader.entries.items() if re.match(r"model\d*/", name)}
    extra = [name for name in found.keys() - wanted.keys() if not name.endswith(("inv_freq", "_extra_state"))]
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is unexpected" for name in extra]
    problems += [
        f"{name} has shape {list(found[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{reader.path} does not hold the model that its args describe: {'; '.join(sorted(problems)[:5])}{more}."
        )


def _config(
    found: MegatronFolder, arguments: Mapping[str, Any], readers: Mapping[tuple[int, int], TorchReader]
) -> dict[str, Any]:
    """The content of a `config.json` for the model: the one there, or what the arguments say."""
    padded = found.grid[0] * _vocabulary_rows(readers[0, 0])
    if (found.root / MODEL_CONFIG).is_file():
        config = read_config(found.root)
        if int(config.get("vocab_size", 0)) > padded:
            raise CheckpointError(
                f"{found.root / MODEL_CONFIG} says vocab_size={config['vocab_size']}, embeddings have {padded} rows."
            )
        return config
    try:
        return config_of_arguments(arguments, padded)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"The args in {found.folder} do not describe a model ({error!r}).") from error


def config_of_arguments(arguments: Mapping[str, Any], padded: int) -> dict[str, Any]:
    """What a `config.json` says of a model with these arguments; raises KeyError, TypeError or ValueError."""
    hidden, heads = int(arguments["hidden_size"]), int(arguments["num_attention_heads"])
    layers = int(arguments.get("num_layers") or arguments["encoder_num_layers"])
    inner = int(arguments.get("ffn_hidden_size") or 4 * hidden)
    positions = int(arguments.get("max_position_embeddings") or arguments["seq_length"])
    vocabulary = int(arguments.get("true_vocab_size") or padded)
    eps = float(arguments.get("layernorm_epsilon") or 1e-5)
    if arguments.get("parallel_attn"):
        return _falcon(arguments, vocabulary, hidden, heads, layers, inner, positions, eps)
    if arguments.get("glu_activation") in (None, "None", ""):
        if arguments.get("use_rms_norm"):
            raise ValueError("use_rms_norm without glu_activation")
        return {
            "model_type": "gpt2",
            "vocab_size": vocabulary,
            "n_embd": hidden,
            "n_inner": inner,
            "n_layer": layers,
            "n_head": heads,
            "n_positions": positions,
            "layer_norm_epsilon": eps,
            "activation_function": "gelu_new" if arguments.get("bias_gelu_fusion", True) else "gelu",
            "tie_word_embeddings": bool(arguments.get("tie_embed_logits", True)),
        }
    if arguments["glu_activation"] != "swiglu" or not arguments.get("use_rms_norm"):
        raise ValueError(
            f"glu_activation={arguments['glu_activation']!r} with use_rms_norm={arguments.get('use_rms_norm')}"
        )
    window = arguments.get("sliding_window_size")
    scaling = float(arguments.get("rope_scaling_factor") or 1.0)
    config: dict[str, Any] = {
        "model_type": "mistral" if window else "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": int(arguments.get("num_attention_heads_kv") or heads),
        "head_dim": int(arguments.get("kv_channels") or hidden // heads),
        "max_position_embeddings": positions,
        "rms_norm_eps": eps,
        "rope_theta": float(arguments.get("rope_theta") or 10000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": bool(arguments.get("tie_embed_logits", False)),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if window:
        config["sliding_window"] = int(window)
    else:
        config |= {"attention_bias": False, "mlp_bias": False}
    if scaling != 1.0:
        config["rope_scaling"] = {"rope_type": "linear", "factor": scaling}
    return config


def _falcon(
    arguments: Mapping[str, Any],
    vocabulary: int,
    hidden: int,
    heads: int,
    layers: int,
    inner: int,
    positions: int,
    eps: float,
) -> dict[str, Any]:
    """Attention and feed-forward at once is what Falcon alone has there."""
    keys = int(arguments.get("num_attention_heads_kv") or heads)
    new = bool(arguments.get("parallel_layernorm")) or keys not in (1, heads)
    return {
        "model_type": "falcon",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "ffn_hidden_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_kv_heads": keys,
        "multi_query": keys == 1,
        "new_decoder_architecture": new,
        "parallel_attn": True,
        "num_ln_in_parallel_attn": (2 if arguments.get("parallel_layernorm") else 1) if new else None,
        "max_position_embeddings": positions,
        "layer_norm_epsilon": eps,
        "alibi": False,
        "rope_theta": float(arguments.get("rope_theta") or 10000.0),
        "tie_word_embeddings": bool(arguments.get("tie_embed_logits", True)),
        "activation": "gelu_new" if arguments.get("bias_gelu_fusion") else "gelu",
        "bias": bool(arguments.get("use_bias", False)),
        "bos_token_id": 11,
        "eos_token_id": 11,
    }


def megatron_files(
    config: ModelConfig, grid: MegatronGrid, dtypes: Mapping[str, torch.dtype], divisor: int = 128
) -> dict[str, list[FileTensor]]:
    """The tensors of each file of a `release`, in the trainer's dialect; raises ConfigError where that cannot be."""
    grid.check(config)
    padded = padded_rows(config.vocab_size, grid.tensor, divisor)
    files = {}
    for stage in range(grid.pipeline):
        for rank in range(grid.tensor):
            ending = f"_{stage:03d}" if grid.pipeline > 1 else ""
            name = f"release/mp_rank_{rank:02d}{ending}/{MODEL_FILES[0]}"
            (files[name],) = rank_chunks(config, grid, (rank, stage), padded, dtypes, "trainer")
    return files


def padded_rows(vocabulary: int, tensor: int, divisor: int) -> int:
    """The smallest multiple of divisor · tensor that holds the vocabulary."""
    unit = divisor * tensor
    return unit * -(-vocabulary // unit)


def arguments_of(config: ModelConfig, grid: MegatronGrid, dtype: torch.dtype, divisor: int = 128) -> dict[str, Any]:
    """The arguments to save with a model's weights.

    Raises ConfigError for a model whose function Megatron-LLM has not.
    """
    scaling = config.rope_scaling
    biases = {config.query_key_value_bias, config.attention_output_bias, config.mlp_bias}
    problems = [] if config.model_type in _FAMILIES else [f"model_type={config.model_type!r}"]
    problems += ["biases in some layers only"] if len(biases) > 1 else []
    problems += [f"rotary scaling of type {scaling.rope_type!r}"] if scaling and scaling.rope_type != "linear" else []
    problems += [f"{name}={getattr(config, name)}" for name, built in _ONLY.items() if getattr(config, name) != built]
    problems += ["parallel layers"] if config.parallel_norms is not None and config.model_type != "falcon" else []
    if config.sliding_window is not None and config.model_type != "mistral":
        problems.append(f"sliding_window={config.sliding_window} of a {config.model_type}")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        problems.append(f"head_dim={config.head_dim}")
    if problems:
        raise ConfigError(f"Megatron-LLM cannot compute this model: {'; '.join(problems)}.")
    arguments = {
        "num_layers": config.num_hidden_layers,
        "encoder_num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_attention_heads_kv": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "ffn_hidden_size": config.intermediate_size,
        "parallel_attn": config.parallel_norms is not None,
        "parallel_layernorm": config.parallel_norms == 2,
        "use_bias": biases == {True},
        "make_vocab_size_divisible_by": divisor,
        "glu_activation": "swiglu" if config.is_gated else None,
        "padded_vocab_size": padded_rows(config.vocab_size, grid.tensor, divisor),
        "true_vocab_size": config.vocab_size,
        "use_rms_norm": config.rms_norm_eps is not None,
        "tie_embed_logits": config.tie_word_embeddings,
        "tokenizer_type": _TOKENIZERS.get(config.model_type, "SentencePieceTokenizer"),
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "layernorm_epsilon": config.norm_eps,
        "tensor_model_parallel_size": grid.tensor,
        "pipeline_model_parallel_size": grid.pipeline,
        "params_dtype": dtype,
        "iteration": "release",
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "bias_gelu_fusion": config.hidden_act == "gelu_new",
        "bias_droput_fusion": False,  # as their converter spells it
        "position_embedding_type": "absolute" if config.rope_theta is None else "rotary",
    }
    if config.rope_theta is not None:
        arguments["rope_theta"] = config.rope_theta
        arguments["rope_scaling_factor"] = scaling.factor if scaling else 1.0
    if config.sliding_window is not None:
        arguments["sliding_window_size"] = config.sliding_window
    return arguments


def file_content(arguments: Mapping[str, Any], references: Mapping[str, TensorRef]) -> dict[str, Any]:
    """All that one file of a `release` holds, around its tensors."""
    return {
        "args": Instance(Name("argparse", "Namespace"), (), dict(arguments)),
        "checkpoint_version": 3.0,
        "iteration": "release",
        **nested(references),
    }
