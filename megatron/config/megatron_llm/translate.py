"""From the flags that are given to the keys of the configuration that mean the same.

Where a flag is not given, Megatron-LLM's default counts, not ours. What the checkpoint of `--load` says comes as
`Facts`: this module reads no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron.config.megatron_llm.model_flags import translate_model
from megatron.config.megatron_llm.schedule import length_of_run, ramp_of
from megatron.config.megatron_llm.table import FLAGS, Value, raise_problems

# Megatron-LLM's defaults that are not ours.
_DEFAULTS: dict[str, Any] = {
    "optimizer.weight_decay": 0.01,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.999,
    "optimizer.eps": 1e-8,
    "optimizer.clip_grad": 1.0,
    "optimizer.min_learning_rate": 0.0,
    "log.interval": 100,
}
METRICS = ("perplexity", "accuracy", "instruct_accuracy", "count_loss_mask", "count_instruct_mask")
_WANDB = {"entity": "WANDB_ENTITY", "name": "WANDB_NAME", "id": "WANDB_RUN_ID", "resume": "WANDB_RESUME"}
_NO_PROJECT = "uncategorized"  # where wandb itself puts runs of no project


@dataclass(frozen=True)
class Facts:
    """What the run starts from and works with.

    `load` is the folder to start from (a certain checkpoint, where one is asked for) and `holds` what it has: all state
    of a run, or weights. `model` is its config.json, `schedule` the `optimizer` section that the run was saved with.
    `save_has_run`: whether `--save` holds checkpoints. `tokenizer` is the tokenizer's file, `vocabulary`
    counts its tokens with those added, `pad_token` is what it pads with.
    """

    world_size: int = 1
    load: str | None = None
    holds: Literal["run", "weights"] = "weights"
    model: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] | None = None
    save_has_run: bool = False
    vocabulary: int | None = None
    pad_token: int | None = None
    tokenizer: str | None = None


@dataclass
class Translation:
    """Keys of the configuration, environment variables, what to tell the user, and what is wrong."""

    keys: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def translate(flags: Mapping[str, Value], facts: Facts) -> Translation:
    """The keys that a command line means. Raises one ConfigError for everything that is wrong with it."""
    done = Translation(dict(_DEFAULTS))
    for name, value in flags.items():
        flag = FLAGS[name]
        if flag.key is not None:
            done.keys[flag.key] = flag.sets if flag.kind == "switch" else value
        elif flag.treatment == "ignored" and value not in (0, ()):
            done.notices.append(f"{flag.option}: {flag.about}")
    for rules in _RULES:
        rules(flags, facts, done)
    translate_model(flags, facts.model if facts.load else None, facts.vocabulary, done)
    raise_problems(done.problems)
    done.keys["log.megatron_llm"] = True
    return done


def _exclusive(flags: Mapping[str, Any], done: Translation) -> None:
    for first, second in (("num_layers", "encoder_num_layers"), ("seq_length", "encoder_seq_length")):
        if first in flags and second in flags:
            done.problems.append(f"--{first} and --{second} are the same; leave one out")


def _basic(flags: Mapping[str, Any], facts: Facts, done: Translation) -> None:
    _exclusive(flags, done)
    if "micro_batch_size" not in flags:
        done.problems.append("--micro_batch_size is missing: sequences that a rank computes at a time")
    if "lr" not in flags:
        done.problems.append("--lr is missing: the peak of the learning rate")
    decay = {flags[name] for name in ("start_weight_decay", "end_weight_decay") if name in flags}
    if len(decay) > 1:
        done.problems.append("--start_weight_decay differs from --end_weight_decay: weight decay is constant here")
    elif decay:
        done.keys["optimizer.weight_decay"] = decay.pop()
    if not {"attention_dropout", "hidden_dropout"} <= flags.keys():
        done.notices.append("models here train without dropout, where Megatron-LLM's default is 0.1")
    done.keys["train.precision"] = "bf16" if "bf16" in flags else "fp32"
    done.keys["train.seed"] = done.keys["data.seed"] = flags.get("seed", 1234)


def _parallel(flags: Mapping[str, Any], facts: Facts, done: Translation) -> None:
    tensor = flags.get("tensor_model_parallel_size", 1)
    done.keys["parallel.sequence"] = "sequence_parallel" in flags and tensor > 1
    done.keys["parallel.zero"] = 1 if "use_distributed_optimizer" in flags else 0
    virtual = flags.get("num_layers_per_virtual_pipeline_stage")
    if virtual is None:
        return
    layers = flags.get("num_layers", flags.get("encoder_num_layers", facts.model.get("num_hidden_layers")))
    pipeline = flags.get("pipeline_model_parallel_size", 1)
    if not layers or virtual < 1 or layers % (pipeline * virtual):
        done.problems.append(
            f"--num_layers_per_virtual_pipeline_stage {virtual} does not divide the layers ({layers}) of "
            f"{pipeline} stages"
        )
        return
    chunks = layers // (pipeline * virtual)
    done.keys["parallel.chunks"] = chunks
    done.keys["parallel.schedule"] = "interleaved" if chunks > 1 else "1f1b"


def _recompute(flags: Mapping[str, Any], facts: Facts, done: Translation) -> None:
    granularity = flags.get("recompute_granularity", "selective" if "recompute_activations" in flags else None)
    if granularity == "selective":
        done.notices.append("selective recomputation: no attention here keeps its scores, so there is nothing to do")
    if granularity != "full":
        if "recompute_method" in flags:
            done.problems.append("--recompute_method goes with --recompute_granularity full")
        return
    done.keys["train.recompute"] = "full"
    layers = flags.get("recompute_num_layers", 1)
    if flags.get("recompute_method") == "block":
        done.keys["train.recompute_layers"] = layers
    elif layers > 1:
        done.notices.append(f"--recompute_num_layers {layers}: each layer is computed again by itself")


def _batch_and_length(flags: Mapping[str, Any], facts: Facts, done: Translation) -> None:
    grid = flags.get("tensor_model_parallel_size", 1) * flags.get("pipeline_model_parallel_size", 1)
    micro_batch = flags.get("micro_batch_size", 1)
    batch = flags.get("global_batch_size", micro_batch * max(1, facts.world_size // max(1, grid)))
    sequence = flags.get("seq_length", flags.get("encoder_seq_length", facts.model.get("max_position_embeddings")))
    ramp = batch
    if "rampup_batch_size" in flags:
        numbers = flags["rampup_batch_size"]
        if len(numbers) != 3 or min(numbers) < 1 or not sequence:
            done.problems.append("--rampup_batch_size takes three numbers: start, increment, samples")
            return
        start, increment, samples = numbers
        if start > batch or (batch - start) % increment:
            done.problems.append(
                f"--rampup_batch_size {start} {increment} {samples} does not reach --global_batch_size {batch} in "
                f"steps of {increment}"
            )
            return
        ramp = ramp_of(start, increment, samples, batch, sequence) if start < batch else batch
    if "eval_only" in flags:
        return
    length = length_of_run(flags, ramp, sequence or 1)
    done.keys |= length.keys
    done.keys["train.global_batch"] = ramp
    done.notices += length.notices
    done.problems += length.problems


def _schedule(flags: Mapping[str, Any], facts: Facts, done: Translation) -> None:
    done.keys["optimizer.decay_style"] = flags.get("lr_decay_style", "linear").replace("-", "_")
    if "use_checkpoint_opt_param_scheduler" not in flags:
        return
    names = ("learning_rate", "min_learning_rate", "warmup_steps", "decay_steps", "decay_style")
    if facts.schedule is None:
        done.notices.append("--use_checkpoint_opt_param_scheduler: --load holds no schedule, so the flags count")
    else:
        done.keys |= {f"optimizer.{name}": facts.schedule[name] for name in names if name in facts.schedule}


def _checkpoints(flags: Mapping[str, Any], facts: Facts, done: Translation) -> None:
    if ("save" in flags) != ("save_interval" in flags):
        missing = "save" if "save_interval" in flags else "save_interval"
        if missing == "save_interval":
            done.problems.append("--save needs --save_interval: steps between checkpoints")
        else:
            done.keys.pop("checkpoint.interval")
            done.notices.append("--save_interval without --save: nothing is saved")
    if "load_iters" in flags and facts.load is None:
        done.problems.append("--load_iters needs --load")
    if facts.load is None or "eval_only" in flags:
        return
    if facts.save_has_run:
        if "load_iters" in flags or ("finetune" in flags and flags.get("load") == flags.get("save")):
            which = "--load_iters" if "load_iters" in flags else "--finetune"
            done.problems.append(
                f"{which} with --save {flags['save']}, which holds checkpoints of a run: the newest of these would be "
                "gone on with. Name another --save, or move them away."
            )
        elif "finetune" in flags:
            done.notices.append(f"--finetune: {flags['save']} holds checkpoints of this run, which goes on")
    if facts.holds == "run" and "finetune" not in flags:
        if "no_load_optim" in flags:
            done.problems.append(
                "--no_load_optim: a run goes on with its optimizer; --finetune starts from its weights"
            )
        done.keys["checkpoint.load"] = facts.load
    else:
        done.keys["model.init_from"] = facts.load


def _data(flags: Mapping[str, Any], facts: Facts, done: Translation) -> None:
    parts = [name for name in ("train_data_path", "valid_data_path", "test_data_path") if name in flags]
    if "data_path" in flags and parts:
        done.problems.append(f"--data_path with --{parts[0]}: the first is divided by --split, the others are not")
        return
    if "data_path" not in flags and "train_data_path" not in flags and "eval_only" not in flags:
        done.problems.append("there is no training data: give --data_path or --train_data_path")
    if "data_path" in flags:
        done.keys["data.train"] = blend(flags["data_path"], "data_path", done)
        done.keys["data.split"] = flags.get("split", "969, 30, 1")
    for name, dotted in zip(("train_data_path", "valid_data_path", "test_data_path"),
                            ("data.train", "data.validation", "data.test"), strict=True):  # fmt: skip
        if flags.get(name):
            done.keys[dotted] = blend(flags[name], name, done)
    cyclic = flags.get("dataloader_type") == "cyclic"
    done.keys["data.order"] = "stable" if cyclic else "megatron"
    if cyclic:
        done.notices.append("--dataloader_type cyclic: samples come in an order of our own (data.order=stable)")
    if "reset_attention_mask" in flags:
        done.keys["data.document_mask"] = True
    elif "reset_position_ids" in flags:
        done.problems.append("--reset_position_ids goes with --reset_attention_mask here; give both or neither")
    _conversations(flags, facts, done)


def _conversations(flags: Mapping[str, Any], facts: Facts, done: Translation) -> None:
    if flags.get("data_type", "gpt") == "gpt":
        if flags.get("scalar_loss_mask"):
            done.notices.append("--scalar_loss_mask: every token carries loss in --data_type gpt")
        return
    done.keys["data.kind"] = "instruction"
    done.keys["data.prompt_loss_weight"] = flags.get("scalar_loss_mask", 0.0)
    if "no_new_tokens" in flags and facts.pad_token is not None:
        done.keys["data.pad_token_id"] = facts.pad_token


def blend(words: tuple[str, ...], name: str, done: Translation) -> Any:
    """A prefix, or weights and prefixes in turns."""
    if len(words) == 1:
        return words[0]
    pairs = []
    for weight, prefix in zip(words[::2], words[1::2], strict=False):
        try:
            pairs.append([float(weight), prefix])
        except ValueError:
            pairs.clear()
            break
    if len(words) % 2 or not pairs:
        done.problems.append(f"--{name} {' '.join(words)}: give one prefix, or weight prefix weight prefix ...")
        return None
    return pairs if len(pairs) > 1 else pairs[0][1]


def _evaluation(flags: Mapping[str, Any], facts: Facts, done: Translation) -> None:
    metrics = flags.get("metrics", ())
    done.keys["evaluate.metrics"] = list(METRICS if "all" in metrics else dict.fromkeys(metrics))
    batches = flags.get("eval_iters", 100)
    if batches < 1:
        done.keys.pop("data.test", None)
        done.keys.pop("data.validation", None)
        return
    done.keys["evaluate.batches"] = batches
    split = str(done.keys.get("data.split", "")).replace("/", ",").split(",")
    shares = [float(part) for part in split if _is(part)]
    if "data.validation" in done.keys or (len(shares) > 1 and shares[1] > 0):
        done.keys["evaluate.interval"] = flags.get("eval_interval", 1000)


def _is(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _logging(flags: Mapping[str, Any], facts: Facts, done: Translation) -> None:
    if "tensorboard_dir" in flags:
        done.keys["log.dir"] = flags["tensorboard_dir"]
        done.keys["log.tensorboard"] = "wandb_logger" not in flags
    if "wandb_logger" in flags:
        done.keys["log.wandb_project"] = flags.get("wandb_project", _NO_PROJECT)
        for name, variable in _WANDB.items():
            if f"wandb_{name}" in flags:
                done.environment[variable] = flags[f"wandb_{name}"]


def _tokenizer(flags: Mapping[str, Any], facts: Facts, done: Translation) -> None:
    if facts.tokenizer is not None:
        done.keys["tokenizer.path"] = facts.tokenizer
    if str(flags.get("tokenizer_type", "")).startswith("Bert"):
        done.problems.append(
            f"--tokenizer_type {flags['tokenizer_type']}: BERT's tokenizers are for masked language models, which are "
            "not here"
        )


_RULES: tuple[Callable[[Mapping[str, Any], Facts, Translation], None], ...] = (
    _basic,
    _parallel,
    _recompute,
    _batch_and_length,
    _schedule,
    _checkpoints,
    _data,
    _evaluation,
    _logging,
    _tokenizer,
)
