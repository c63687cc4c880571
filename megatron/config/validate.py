"""The rules that tie keys to each other, and to the number of processes.

Each rule yields a `Problem`: the values, the rule and what would work. Types and ranges of single keys are checked
where values are converted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron.config.batches import Ramp, batch_sizes
from megatron.config.data import SYNTHETIC, DataConfig, blends_of
from megatron.config.lora import lora_problems
from megatron.config.run import RunConfig
from megatron.config.values import show
from megatron.utils.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """What is wrong, and which keys (dotted) it depends on."""

    keys: tuple[str, ...]
    text: str


def validate(config: RunConfig) -> None:
    """Check the rules that need nothing but the configuration. Raises one ConfigError with every problem."""
    report(static_problems(config))


def validate_grid(config: RunConfig, world_size: int, model: Mapping[str, Any] | None = None) -> None:
    """Check what a training run of `world_size` processes needs. Raises one ConfigError with every problem.

    `model` holds the fields of the resolved model (Hugging Face's names), where it is known; else the fields that the
    configuration states are used.
    """
    report([*static_problems(config, model), *grid_problems(config, world_size)])


def report(problems: Iterable[Problem]) -> None:
    """Raise one ConfigError for all problems together; return where there are none."""
    texts = list(dict.fromkeys(problem.text for problem in problems))
    if len(texts) == 1:
        raise ConfigError(texts[0])
    if texts:
        listed = "".join(f"\n  - {text}" for text in texts)
        raise ConfigError(f"the configuration has {len(texts)} problems:{listed}")


def static_problems(config: RunConfig, model: Mapping[str, Any] | None = None) -> Iterator[Problem]:
    """Every broken rule that does not depend on the number of processes."""
    fields = {name: value for name, value in asdict(config.model).items() if value is not None} | dict(model or {})
    yield from (Problem(*found) for found in lora_problems(config.lora))
    yield from _batch_problems(config, fields)
    yield from _data_problems(config)
    yield from _schedule_problems(config)
    yield from _output_problems(config)
    yield from _kernel_problems(config)
    yield from _zero_problems(config)
    yield from _recompute_problems(config, fields)
    yield from _shape_problems(fields)
    yield from _division_problems(config, fields)
    yield from _sequence_problems(config, fields)


def _batch_problems(config: RunConfig, model: Mapping[str, Any]) -> Iterator[Problem]:
    train, data = config.train, config.data
    for batch in batch_sizes(train.global_batch):
        if batch % train.micro_batch:
            yield Problem(
                ("train.global_batch", "train.micro_batch"),
                f"train.global_batch={batch} is not divisible by train.micro_batch={train.micro_batch}; "
                f"use a micro batch of {_or(_divisors(batch))}, "
                f"or a global batch of {_or(_multiples_near(batch, train.micro_batch))}",
            )
    length = data.sequence_length or model.get("max_position_embeddings")
    if data.samples is None or (length is None and not isinstance(train.global_batch, int)):
        return
    ramp = Ramp.of(train.global_batch, length or 1)
    needed = ramp.position_after(train.steps)
    if data.samples < needed:
        yield Problem(
            ("train.global_batch", "train.steps", "data.samples"),
            f"data.samples={data.samples} is fewer than the run reads: train.steps={train.steps} x "
            f"train.global_batch={show(train.global_batch)} = {needed}; use data.samples={needed} or more, or "
            f"train.steps={ramp.steps_within(data.samples)} or fewer",
        )


def _data_problems(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if data.split is not None and data.validation is not None:
        yield Problem(
            ("data.split", "data.validation"),
            f"data.split={data.split} with data.validation={show(data.validation)}: the split takes validation data "
            "from data.train; leave one of them out",
        )
    for name, source in (("validation", data.validation), ("test", data.test)):
        if source is not None and len(blends_of(source)) > 1:
            yield Problem(
                (f"data.{name}",),
                f"data.{name} has blends that follow each other, but it is the same set each time; give one blend",
            )
    yield from _kind_problems(data)


def _kind_problems(data: DataConfig) -> Iterator[Problem]:
    """What goes with one kind of data and not with the other."""
    if data.kind == "pretraining":
        given = {"packing": data.packing, "prompt_loss_weight": data.prompt_loss_weight != 0,
                 "pad_token_id": data.pad_token_id is not None}  # fmt: skip
        for name in (name for name in given if given[name]):
            yield Problem(
                ("data.kind", f"data.{name}"),
                f"data.{name}={show(getattr(data, name))} with data.kind=pretraining: it is for conversations; use "
                f"data.kind=instruction, or leave data.{name} out",
            )
        return
    if data.samples is not None:
        yield Problem(
            ("data.kind", "data.samples"),
            f"data.samples={data.samples} with data.kind=instruction: no order of conversations depends on it; leave "
            "it out",
        )
    if data.document_mask:
        yield Problem(
            ("data.kind", "data.document_mask"),
            "data.document_mask=true with data.kind=instruction: conversations never see each other; leave it out",
        )
    for name in ("train", "validation", "test"):
        if getattr(data, name) == SYNTHETIC:
            yield Problem(
                ("data.kind", f"data.{name}"),
                f"data.{name}=synthetic with data.kind=instruction: random tokens have no roles; name the prefix of "
                "conversations, or use data.kind=pretraining",
            )
    if data.train is not None and len(blends_of(data.train)) > 1:
        yield Problem(
            ("data.kind", "data.train"),
            "data.train has blends that follow each other, which data.kind=instruction does not offer; give one blend, "
            "or train in several runs, each from the weights of the one before",
        )


def _schedule_problems(config: RunConfig) -> Iterator[Problem]:
    optimizer = config.optimizer
    horizon = config.train.steps if optimizer.decay_steps is None else optimizer.decay_steps
    horizon_name = "train.steps" if optimizer.decay_steps is None else "optimizer.decay_steps"
    if optimizer.min_learning_rate > optimizer.learning_rate:
        yield Problem(
            ("optimizer.min_learning_rate", "optimizer.learning_rate"),
            f"optimizer.min_learning_rate={optimizer.min_learning_rate} is above optimizer.learning_rate="
            f"{optimizer.learning_rate}; the rate falls to the minimum: exchange them or lower the minimum",
        )
    if optimizer.decay_style == "constant":
        return
    keys = (horizon_name, "optimizer.warmup_steps", "optimizer.decay_style", "optimizer.decay_fraction")
    if optimizer.warmup_steps >= horizon:
        yield Problem(
            keys[:3],
            f"optimizer.warmup_steps={optimizer.warmup_steps} leaves nothing of the schedule, which ends at "
            f"{horizon_name}={horizon} with warm-up included; use a warm-up of {horizon - 1} or fewer, or "
            f"optimizer.decay_steps={optimizer.warmup_steps + 1} or more",
        )
    elif optimizer.decay_style == "wsd" and horizon * (1 - optimizer.decay_fraction) < optimizer.warmup_steps:
        largest = 1 - optimizer.warmup_steps / horizon
        yield Problem(
            keys,
            f"optimizer.decay_fraction={optimizer.decay_fraction} of {horizon_name}={horizon} begins to decay before "
            f"optimizer.warmup_steps={optimizer.warmup_steps} are over; use a fraction of {largest:.4g} or less",
        )


def _output_problems(config: RunConfig) -> Iterator[Problem]:
    checkpoint = config.checkpoint
    for name, value in (("interval", checkpoint.interval), ("keep_last", checkpoint.keep_last)):
        if value is not None and checkpoint.save is None:
            yield Problem(
                (f"checkpoint.{name}", "checkpoint.save"),
                f"checkpoint.{name}={value} without checkpoint.save: nothing would be saved; name a folder there",
            )
    if config.evaluate.interval is not None and config.data.validation is None and config.data.split is None:
        yield Problem(
            ("evaluate.interval", "data.validation", "data.split"),
            f"evaluate.interval={config.evaluate.interval} without data.validation: there is nothing to evaluate on; "
            "name a prefix there, or set data.split",
        )
    if config.log.tensorboard and config.log.dir is None:
        yield Problem(
            ("log.tensorboard", "log.dir"),
            "log.tensorboard=true without log.dir: TensorBoard files go there; name a folder",
        )


def _kernel_problems(config: RunConfig) -> Iterator[Problem]:
    kernels, precision = config.kernels, config.train.precision
    if kernels.fp8:
        yield Problem(
            ("kernels.fp8",),
            "kernels.fp8=true is refused: FP8 products by Transformer Engine could not be proven right without a GPU, "
            "and unproven they are not offered; use kernels.fp8=false, and train.precision=bf16 for speed",
        )
    if kernels.attention == "eager" and kernels.flash_attention:
        yield Problem(
            ("kernels.attention", "kernels.flash_attention"),
            "kernels.attention=eager with kernels.flash_attention=true: attention is computed in one way; use "
            "kernels.attention=auto, or kernels.flash_attention=false",
        )
    yield from _run_attention_problems(config)
    for name in ("flash_attention", "apex"):
        if getattr(kernels, name) and precision != "bf16":
            yield Problem(
                (f"kernels.{name}", "train.precision"),
                f"kernels.{name}=true with train.precision={precision}: the library computes in bf16; use "
                f"kernels.{name}=false or train.precision=bf16",
            )


def _run_attention_problems(config: RunConfig) -> Iterator[Problem]:
    """What cannot compute attention within documents or over split sequences."""
    masks = [(f"data.{name}", "true") for name in ("document_mask", "packing") if getattr(config.data, name)]
    if config.parallel.context > 1:
        masks.append(("parallel.context", str(config.parallel.context)))
    others = [("kernels.attention", "eager", "auto")] if config.kernels.attention == "eager" else []
    if config.kernels.flash_attention:
        others.append(("kernels.flash_attention", "true", "false"))
    for key, value in masks:
        for other, wrong, right in others:
            yield Problem(
                (other, key),
                f"{other}={wrong} with {key}={value}: it knows the plain causal mask alone; use {other}={right} (on a "
                "GPU in bf16 that is the flash attention which torch brings)",
            )


def _zero_problems(config: RunConfig) -> Iterator[Problem]:
    zero, within = config.parallel.zero, config.parallel.zero_within
    if zero == 2:
        yield Problem(
            ("parallel.zero",),
            "parallel.zero=2 is not offered: it would divide gradients but not weights; use 1, or 3 to divide both",
        )
    if zero == 0 and within is not None:
        yield Problem(
            ("parallel.zero", "parallel.zero_within"),
            f"parallel.zero_within={within} with parallel.zero=0: nothing is divided; use parallel.zero=1 or 3, or "
            "parallel.zero_within=null",
        )


def _recompute_problems(config: RunConfig, model: Mapping[str, Any]) -> Iterator[Problem]:
    some, layers = config.train.recompute_layers, model.get("num_hidden_layers")
    if some is not None and config.train.recompute == "none":
        yield Problem(
            ("train.recompute_layers", "train.recompute"),
            f"train.recompute_layers={some} with train.recompute=none: nothing is computed again; use "
            "train.recompute=selective or full, or train.recompute_layers=null",
        )
    if some is not None and layers and some > layers:
        yield Problem(
            ("train.recompute_layers", "model.num_hidden_layers"),
            f"train.recompute_layers={some} is above model.num_hidden_layers={layers}; use {layers} or fewer, or null "
            "for all",
        )


def _shape_problems(model: Mapping[str, Any]) -> Iterator[Problem]:
    """Rules within the model's shape; those with an unknown field are left to the model."""
    hidden, heads, key_heads, head_dim = (
        model.get(name) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    if heads and key_heads and heads % key_heads:
        yield Problem(
            ("model.num_attention_heads", "model.num_key_value_heads"),
            f"model.num_attention_heads={heads} is not divisible by model.num_key_value_heads={key_heads}; "
            f"use {_or(_divisors(heads))} key/value heads",
        )
    if head_dim is not None:
        if head_dim % 2:
            yield Problem(
                ("model.head_dim",), f"model.head_dim={head_dim} is odd; rotary angles need an even size of head"
            )
    elif hidden and heads and hidden % heads:
        yield Problem(
            ("model.hidden_size", "model.num_attention_heads"),
            f"model.hidden_size={hidden} is not divisible by model.num_attention_heads={heads}; "
            f"use {_or(_divisors(hidden))} heads, or state model.head_dim",
        )
    elif hidden and heads and (hidden // heads) % 2:
        yield Problem(
            ("model.hidden_size", "model.num_attention_heads"),
            f"model.hidden_size={hidden} / model.num_attention_heads={heads} gives heads of size {hidden // heads}; "
            "rotary angles need an even size of head",
        )


def _division_problems(config: RunConfig, model: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether the tensor ranks and pipeline stages can share the model."""
    tensor = config.parallel.tensor
    for name in ("num_attention_heads", "intermediate_size"):
        size = model.get(name)
        if size and size % tensor:
            yield Problem(
                (f"model.{name}", "parallel.tensor"),
                f"model.{name}={size} is not divisible by parallel.tensor={tensor}; use {_or(_divisors(size))}",
            )
    heads, key_heads = model.get("num_attention_heads"), model.get("num_key_value_heads")
    if key_heads and tensor % key_heads and key_heads % tensor:
        fitting = [n for n in _divisors(heads or key_heads) if n % key_heads == 0 or key_heads % n == 0]
        yield Problem(
            ("model.num_key_value_heads", "model.num_attention_heads", "parallel.tensor"),
            f"model.num_key_value_heads={key_heads} can neither be divided among parallel.tensor={tensor} ranks nor "
            f"copied to them evenly (one must divide the other); use {_or(fitting)}",
        )
    window, length = model.get("sliding_window"), config.data.sequence_length or model.get("max_position_embeddings")
    split = config.parallel.context > 1 and config.parallel.context_attention == "ring"
    if split and window and length and window < length:
        yield Problem(
            ("parallel.context_attention", "parallel.context"),
            f"parallel.context_attention=ring meets keys a part at a time, which the model's sliding_window={window} "
            "cuts; use parallel.context_attention=all_gather, or parallel.context=1",
        )
    yield from _layer_problems(config, model)


def _layer_problems(config: RunConfig, model: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether the layers can be dealt out to the parts of the pipeline."""
    parallel, layers = config.parallel, model.get("num_hidden_layers")
    pipeline, parts, counts = parallel.pipeline, parallel.pipeline * parallel.chunks, parallel.layers
    if (parallel.schedule == "interleaved") != (parallel.chunks > 1):
        cure = "parallel.schedule=1f1b" if parallel.chunks == 1 else "parallel.chunks=1"
        yield Problem(
            ("parallel.schedule", "parallel.chunks"),
            f"parallel.schedule={parallel.schedule} with parallel.chunks={parallel.chunks}: interleaved is the "
            f"schedule of 2 or more chunks a stage, the others have one; use interleaved and 2 chunks or more, or "
            f"{cure}",
        )
    elif parallel.chunks > 1 and pipeline == 1:
        yield Problem(
            ("parallel.chunks", "parallel.pipeline"),
            f"parallel.chunks={parallel.chunks} with parallel.pipeline=1: one stage has nothing to interleave; use "
            "parallel.schedule=1f1b with parallel.chunks=1, or 2 stages or more",
        )
    if isinstance(counts, tuple):
        if len(counts) != parts:
            yield Problem(
                ("parallel.layers", "parallel.pipeline", "parallel.chunks"),
                f"parallel.layers has {len(counts)} numbers, but parallel.pipeline={pipeline} x parallel.chunks="
                f"{parallel.chunks} gives {parts} parts; write one number for each part, or use even",
            )
        elif layers and sum(counts) != layers:
            yield Problem(
                ("parallel.layers", "model.num_hidden_layers"),
                f"parallel.layers adds up to {sum(counts)}, but model.num_hidden_layers={layers}; "
                f"{'take away' if sum(counts) > layers else 'add'} {abs(sum(counts) - layers)}, or use even",
            )
    elif layers and pipeline <= layers < parts:
        yield Problem(
            ("model.num_hidden_layers", "parallel.pipeline", "parallel.chunks"),
            f"model.num_hidden_layers={layers} is fewer than parallel.pipeline={pipeline} x parallel.chunks="
            f"{parallel.chunks} = {parts}: each part needs a layer; use {layers // pipeline} chunks or fewer",
        )
    if layers and layers < pipeline:
        yield Problem(
            ("model.num_hidden_layers", "parallel.pipeline"),
            f"model.num_hidden_layers={layers} is fewer than parallel.pipeline={pipeline}: each stage needs a layer; "
            f"use {layers} stages or fewer",
        )


def _sequence_problems(config: RunConfig, model: Mapping[str, Any]) -> Iterator[Problem]:
    longest = model.get("max_position_embeddings")
    length, length_key = config.data.sequence_length, "data.sequence_length"
    if length is None:
        length, length_key = longest, "model.max_position_embeddings"
    elif longest is not None and length > longest:
        yield Problem(
            ("data.sequence_length", "model.max_position_embeddings"),
            f"data.sequence_length={length} is above model.max_position_embeddings={longest}, for which the model is "
            f"made; use {longest} or fewer",
        )
    if length is not None:
        yield from _split_problems(config, length, length_key)


def _split_problems(config: RunConfig, length: int, length_key: str) -> Iterator[Problem]:
    """Whether the context's ranks, and under sequence parallelism those of the tensor axis, can share a sequence."""
    tensor, context, sequence = config.parallel.tensor, config.parallel.context, config.parallel.sequence
    split_again = tensor if sequence is not False else 1
    unit = math.lcm(2 * context, context * split_again) if context > 1 else split_again
    if context > 1 and length % unit:
        among = f", x parallel.tensor={tensor} for sequence parallelism" if split_again > 2 else ""
        yield Problem(
            (length_key, "parallel.context", "parallel.tensor", "parallel.sequence"),
            f"{length_key}={length} is not divisible by {unit}: each of parallel.context={context} ranks holds two "
            f"equal parts of it{among}; use a length of {_or(_multiples_near(length, unit))}, or a smaller "
            "parallel.context",
        )
    elif length % unit:
        yield Problem(
            (length_key, "parallel.tensor", "parallel.sequence"),
            f"{length_key}={length} is not divisible by parallel.tensor={tensor}, among whose ranks sequence "
            f"parallelism divides it; use a length of {_or(_multiples_near(length, tensor))}, "
            "or parallel.sequence=false",
        )


def grid_problems(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Every broken rule of a training run of `world_size` processes that needs no more of the model."""
    parallel = config.parallel
    if config.data.train is None:
        yield Problem(
            ("data.train",), "data.train is not set; name the prefix of a .bin/.idx pair, or use data.train=synthetic"
        )
    ranks = parallel.tensor * parallel.context * parallel.pipeline
    axes = ("tensor", "context", "pipeline") if parallel.context > 1 else ("tensor", "pipeline")
    keys = tuple(f"parallel.{axis}" for axis in axes)
    if world_size % ranks:
        product = " x ".join(f"{key}={getattr(parallel, axis)}" for key, axis in zip(keys, axes, strict=True))
        yield Problem(
            keys,
            f"{world_size} processes cannot be divided by {product} = {ranks}; start "
            f"{_or(_multiples_near(world_size, ranks))} processes, "
            f"or choose {' x '.join(axes)} = {_or(_divisors(world_size))}",
        )
        return
    data_ranks = world_size // ranks
    yield from _division_among_ranks(config, data_ranks)
    for batch in batch_sizes(config.train.global_batch):
        yield from _shared_batch_problems(config, world_size, data_ranks, batch)


def _shared_batch_problems(config: RunConfig, world_size: int, data_ranks: int, batch: int) -> Iterator[Problem]:
    """Whether the data ranks, and the chunks of the pipeline, can share a global batch of this size."""
    parallel, train = config.parallel, config.train
    axes = ("tensor", "context", "pipeline") if parallel.context > 1 else ("tensor", "pipeline")
    keys = tuple(f"parallel.{axis}" for axis in axes)
    together = data_ranks * train.micro_batch
    if batch % together:
        shared = " / ".join(f"{axis} {getattr(parallel, axis)}" for axis in axes)
        text = (
            f"train.global_batch={batch} is not divisible by {data_ranks} data ranks ({world_size} "
            f"processes / {shared}) x train.micro_batch="
            f"{train.micro_batch} = {together}; "
            f"use a global batch of {_or(_multiples_near(batch, together))}"
        )
        if batch % data_ranks == 0:
            text += f", or a micro batch of {_or(_divisors(batch // data_ranks))}"
        yield Problem(("train.global_batch", "train.micro_batch", *keys), text)
    elif parallel.chunks > 1 and batch // together % parallel.pipeline:
        yield Problem(
            ("train.global_batch", "train.micro_batch", *keys, "parallel.chunks"),
            f"train.global_batch={batch} gives each data rank {batch // together} "
            f"micro-batches, which go through the chunks in groups of parallel.pipeline={parallel.pipeline}; use a "
            f"global batch of {_or(_multiples_near(batch, together * parallel.pipeline))}, or "
            "parallel.schedule=1f1b with parallel.chunks=1",
        )


def _division_among_ranks(config: RunConfig, data_ranks: int) -> Iterator[Problem]:
    """Whether what ZeRO divides can be divided within groups of the ranks that gradients are summed over."""
    within, ranks = config.parallel.zero_within, data_ranks * config.parallel.context
    if within is not None and ranks % within:
        yield Problem(
            ("parallel.zero_within",),
            f"parallel.zero_within={within} does not divide the {ranks} ranks that gradients are summed over (data x "
            f"context); use {_or(_divisors(ranks))}, or null for all",
        )


def _divisors(number: int) -> list[int]:
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})


def _multiples_near(number: int, unit: int) -> list[int]:
    """The multiples of `unit` just below and above `number`, which is not one itself."""
    below = number // unit * unit
    return [candidate for candidate in (below, below + unit) if candidate > 0]


def _or(numbers: list[int], most: int = 12) -> str:
    """`1, 2, 4 or 8`; of many, the first ones and the last."""
    words = [str(number) for number in numbers]
    if len(words) > most:
        words = [*words[: most - 2], "...", words[-1]]
        return ", ".join(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
