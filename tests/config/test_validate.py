"""Rules that tie keys together: each error names the values and what would work, and what it recommends does work."""

from __future__ import annotations

import pytest

from megatron.config.load import load_config
from megatron.config.validate import validate, validate_grid
from megatron.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("wrong", "hint", "cures"),
    [
        (
            ["--train.global_batch=9", "--train.micro_batch=2"],
            "use a micro batch of 1, 3 or 9, or a global batch of 8 or 10",
            (["--train.micro_batch=3"], ["--train.global_batch=10"]),
        ),
        (
            ["--data.samples=100"],
            "use data.samples=800 or more, or train.steps=12 or fewer",
            (["--data.samples=800"], ["--train.steps=12"]),
        ),
        (
            ["--optimizer.warmup_steps=100"],
            "use a warm-up of 99 or fewer, or optimizer.decay_steps=101 or more",
            (["--optimizer.warmup_steps=99"], ["--optimizer.decay_steps=101"], ["--optimizer.decay_style=constant"]),
        ),
        (
            ["--optimizer.warmup_steps=60", "--optimizer.decay_style=wsd", "--optimizer.decay_fraction=0.5"],
            "use a fraction of 0.4 or less",
            (["--optimizer.decay_fraction=0.4"],),
        ),
        (["--optimizer.min_learning_rate=1"], "is above optimizer.learning_rate", (["--optimizer.learning_rate=1"],)),
        (["--checkpoint.interval=5"], "without checkpoint.save", (["--checkpoint.save=x"],)),
        (["--checkpoint.keep_last=5"], "without checkpoint.save", (["--checkpoint.save=x"],)),
        (
            ["--evaluate.interval=5"],
            "without data.validation",
            (["--data.validation=x"], ["--data.split=9,1", "--data.train=x"]),
        ),
        (
            ["--data.split=9,1", "--data.validation=x"],
            "the split takes validation data from data.train",
            (["--data.split=null"], ["--data.validation=null"]),
        ),
        (
            ["--data.validation=[{from_tokens: 0, blend: a}, {from_tokens: 9, blend: b}]"],
            "give one blend",
            (["--data.validation=[a, b]"],),
        ),
        (
            ["--lora.alpha=16"],
            "there are no adapters; set lora.rank, or leave lora.alpha out",
            (["--lora.rank=8"], ["--lora.init_from=x"], ["--lora.alpha=null"]),
        ),
        (["--lora.rank=8", "--lora.targets=[]"], "name some, or leave it out", (["--lora.targets=[q_proj]"],)),
        (
            ["--data.packing=true"],
            "data.packing=true with data.kind=pretraining: it is for conversations",
            (["--data.kind=instruction"], ["--data.packing=false"]),
        ),
        (
            ["--data.prompt_loss_weight=0.1"],
            "data.prompt_loss_weight=0.1 with data.kind=pretraining",
            (["--data.kind=instruction"], ["--data.prompt_loss_weight=0"]),
        ),
        (
            ["--data.pad_token_id=0"],
            "data.pad_token_id=0 with data.kind=pretraining",
            (["--data.kind=instruction"], ["--data.pad_token_id=null"]),
        ),
        (
            ["--data.kind=instruction", "--data.document_mask=true"],
            "conversations never see each other",
            (["--data.document_mask=false"], ["--data.kind=pretraining"]),
        ),
        (
            ["--data.kind=instruction", "--data.samples=9999"],
            "no order of conversations depends on it",
            (["--data.samples=null"], ["--data.kind=pretraining"]),
        ),
        (
            ["--data.kind=instruction", "--data.train=synthetic"],
            "random tokens have no roles",
            (["--data.train=x"], ["--data.kind=pretraining"]),
        ),
        (
            ["--data.kind=instruction", "--data.train=[{from_tokens: 0, blend: a}, {from_tokens: 9, blend: b}]"],
            "give one blend, or train in several runs",
            (["--data.train=[a, b]"], ["--data.kind=pretraining"]),
        ),
        (
            ["--data.kind=instruction", "--data.packing=true", "--kernels.attention=eager"],
            "kernels.attention=eager with data.packing=true",
            (["--kernels.attention=auto"], ["--data.packing=false"]),
        ),
        (
            ["--train.global_batch=[[0, 4], [1e6, 9]]", "--train.micro_batch=2"],
            "train.global_batch=9 is not divisible by train.micro_batch=2",
            (["--train.global_batch=[[0, 4], [1e6, 8]]"],),
        ),
        (
            ["--data.samples=500", "--data.sequence_length=10", "--train.global_batch=[[0, 4], [400, 8]]"],
            "[[0, 4], [400, 8]] = 760; use data.samples=760 or more, or train.steps=67 or fewer",
            (["--data.samples=760"], ["--train.steps=67"]),
        ),
        (["--log.tensorboard=true"], "without log.dir", (["--log.dir=x"],)),
        (["--parallel.zero=2"], "use 1, or 3 to divide both", (["--parallel.zero=1"], ["--parallel.zero=3"])),
        (
            ["--parallel.zero=0", "--parallel.zero_within=8"],
            "nothing is divided",
            (["--parallel.zero=1"], ["--parallel.zero=3"], ["--parallel.zero_within=null"]),
        ),
        (
            ["--train.recompute_layers=2"],
            "nothing is computed again",
            (["--train.recompute=full"], ["--train.recompute=selective"], ["--train.recompute_layers=null"]),
        ),
        (
            ["--train.recompute=full", "--train.recompute_layers=5", "--model.num_hidden_layers=4"],
            "use 4 or fewer, or null for all",
            (["--train.recompute_layers=4"], ["--train.recompute_layers=null"]),
        ),
        (
            ["--model.num_attention_heads=6", "--model.num_key_value_heads=4"],
            "use 1, 2, 3 or 6 key/value heads",
            (["--model.num_key_value_heads=3"],),
        ),
        (
            ["--model.hidden_size=10", "--model.num_attention_heads=3"],
            "use 1, 2, 5 or 10 heads, or state model.head_dim",
            (["--model.num_attention_heads=5"], ["--model.head_dim=4"]),
        ),
        (["--model.hidden_size=6", "--model.num_attention_heads=2"], "gives heads of size 3", ()),
        (["--model.head_dim=3"], "is odd", (["--model.head_dim=4"],)),
        (
            ["--model.num_attention_heads=30", "--parallel.tensor=4"],
            "model.num_attention_heads=30 is not divisible by parallel.tensor=4; use 1, 2, 3, 5, 6, 10, 15 or 30",
            (["--parallel.tensor=5"],),
        ),
        (
            ["--model.intermediate_size=6", "--parallel.tensor=4"],
            "use 1, 2, 3 or 6",
            (["--parallel.tensor=3"],),
        ),
        (
            ["--model.num_attention_heads=12", "--model.num_key_value_heads=4", "--parallel.tensor=6"],
            "use 1, 2, 4 or 12",
            (["--parallel.tensor=4"], ["--parallel.tensor=12"]),
        ),
        (
            ["--parallel.chunks=2", "--parallel.pipeline=2", "--model.num_hidden_layers=4"],
            "interleaved is the schedule of 2 or more chunks a stage",
            (["--parallel.schedule=interleaved"], ["--parallel.chunks=1"]),
        ),
        (
            ["--parallel.schedule=interleaved", "--parallel.pipeline=2", "--model.num_hidden_layers=4"],
            "use interleaved and 2 chunks or more, or parallel.schedule=1f1b",
            (["--parallel.chunks=2"], ["--parallel.schedule=1f1b"]),
        ),
        (
            ["--parallel.schedule=interleaved", "--parallel.chunks=2"],
            "one stage has nothing to interleave",
            (["--parallel.pipeline=2"], ["--parallel.schedule=1f1b", "--parallel.chunks=1"]),
        ),
        (
            [
                "--parallel.schedule=interleaved",
                "--parallel.chunks=3",
                "--parallel.pipeline=2",
                "--model.num_hidden_layers=4",
            ],
            "use 2 chunks or fewer",
            (["--parallel.chunks=2"],),
        ),
        (
            ["--parallel.layers=[2, 1, 1]", "--parallel.pipeline=2", "--model.num_hidden_layers=4"],
            "parallel.layers has 3 numbers, but parallel.pipeline=2 x parallel.chunks=1 gives 2 parts",
            (["--parallel.layers=[1, 3]"], ["--parallel.layers=even"]),
        ),
        (
            ["--parallel.layers=[2, 3]", "--parallel.pipeline=2", "--model.num_hidden_layers=4"],
            "take away 1, or use even",
            (["--parallel.layers=[2, 2]"], ["--parallel.layers=balanced"]),
        ),
        (
            ["--model.num_hidden_layers=3", "--parallel.pipeline=4"],
            "use 3 stages or fewer",
            (["--parallel.pipeline=3"],),
        ),
        (
            ["--data.sequence_length=200", "--model.max_position_embeddings=100"],
            "use 100 or fewer",
            (["--data.sequence_length=100"],),
        ),
        (
            ["--kernels.attention=eager", "--data.document_mask=true"],
            "use kernels.attention=auto",
            (["--kernels.attention=auto"], ["--data.document_mask=false"]),
        ),
        (
            ["--kernels.flash_attention=true", "--train.precision=bf16", "--parallel.context=2"],
            "use kernels.flash_attention=false",
            (["--kernels.flash_attention=false"], ["--parallel.context=1"]),
        ),
        (
            ["--data.sequence_length=20", "--parallel.context=4"],
            "use a length of 16 or 24, or a smaller parallel.context",
            (["--data.sequence_length=24"], ["--parallel.context=2"]),
        ),
        (
            ["--data.sequence_length=24", "--parallel.context=2", "--parallel.tensor=8"],
            "use a length of 16 or 32",
            (["--data.sequence_length=32"], ["--parallel.sequence=false"]),
        ),
        (
            ["--data.sequence_length=10", "--parallel.tensor=4"],
            "use a length of 8 or 12, or parallel.sequence=false",
            (["--data.sequence_length=12"], ["--parallel.sequence=false"]),
        ),
    ],
)
def test_each_rule_names_a_cure_that_cures(wrong: list[str], hint: str, cures: tuple[list[str], ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, wrong)
    assert hint in str(caught.value)
    assert "problems" not in str(caught.value)
    for cure in cures:
        validate(load_config(None, wrong + cure))


def test_uneven_stages_and_replicated_key_heads_are_allowed() -> None:
    load_config(None, ["--model.num_hidden_layers=5", "--parallel.pipeline=2"])
    load_config(None, ["--model.num_attention_heads=8", "--model.num_key_value_heads=2", "--parallel.tensor=8"])


def test_zero_is_divided_within_equal_groups() -> None:
    assert "use 1, 2 or 4, or null" in grid_failure(4, "--parallel.zero_within=3")
    assert "does not divide the 2 ranks" in grid_failure(4, "--parallel.tensor=2", "--parallel.zero_within=4")
    for within in ("1", "2", "4", "null"):
        validate_grid(load_config("tiny", ["--parallel.zero=3", f"--parallel.zero_within={within}"]), 4)


def grid_failure(world_size: int, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        validate_grid(load_config("tiny", overrides), world_size)
    return str(caught.value)


def test_a_sliding_window_needs_gathered_keys() -> None:
    words = ["--parallel.context=2", "--data.sequence_length=128"]
    with pytest.raises(ConfigError, match=r"context_attention=ring .*sliding_window=64.*use .*all_gather"):
        validate_grid(load_config("tiny", words), 2, {"sliding_window": 64})
    validate_grid(load_config("tiny", words), 2, {"sliding_window": 128})
    validate_grid(load_config("tiny", [*words, "--parallel.context_attention=all_gather"]), 2, {"sliding_window": 64})


def test_the_processes_must_fill_the_grid() -> None:
    message = grid_failure(6, "--parallel.tensor=2", "--parallel.pipeline=2")
    assert "6 processes cannot be divided by parallel.tensor=2 x parallel.pipeline=2 = 4" in message
    assert "start 4 or 8 processes, or choose tensor x pipeline = 1, 2, 3 or 6" in message
    for world_size in (4, 8):
        validate_grid(load_config("tiny", ["--parallel.tensor=2", "--parallel.pipeline=2"]), world_size)
    assert "start 4 processes" in grid_failure(2, "--parallel.tensor=4")
    split_sequences = grid_failure(6, "--parallel.tensor=2", "--parallel.context=2")
    assert "parallel.tensor=2 x parallel.context=2 x parallel.pipeline=1 = 4; start 4 or 8" in split_sequences


def test_the_batch_must_fill_the_data_ranks() -> None:
    message = grid_failure(4, "--train.global_batch=12", "--train.micro_batch=2")
    assert "train.global_batch=12 is not divisible by 4 data ranks" in message
    assert "use a global batch of 8 or 16, or a micro batch of 1 or 3" in message
    for cure in ("--train.global_batch=16", "--train.micro_batch=3"):
        words = ["--train.global_batch=12", "--train.micro_batch=2", cure]
        validate_grid(load_config("tiny", words), 4)
    assert "micro batch of" not in grid_failure(4, "--train.global_batch=6", "--train.micro_batch=2")


def test_what_concerns_the_processes_is_reported_with_the_rest() -> None:
    words = ["--parallel.tensor=3", "--train.micro_batch=3", "--optimizer.eps=x"]
    with pytest.raises(ConfigError) as caught:
        load_config(None, words, world_size=2)
    for problem in (
        "has 4 problems",
        "data.train is not set",
        "2 processes cannot be divided by parallel.tensor=3",
        "train.global_batch=8 is not divisible by train.micro_batch=3",
        "optimizer.eps=x",
    ):
        assert problem in str(caught.value)
    with pytest.raises(ConfigError) as caught:  # whatever is wrong with a key, nothing follows from its default
        load_config(None, ["--data.train=[[0, a]]", "--parallel.tensor=x"], world_size=2)
    assert "not set" not in str(caught.value) and "processes" not in str(caught.value)


def test_training_needs_data() -> None:
    assert "data.train is not set" in grid_failure(1, "--data.train=null")


def test_the_resolved_model_decides_where_it_is_known() -> None:
    config = load_config(None, ["--data.train=x", "--parallel.tensor=4"])
    validate_grid(config, 4)
    with pytest.raises(ConfigError, match=r"model\.num_attention_heads=6 is not divisible by parallel\.tensor=4"):
        validate_grid(config, 4, {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 4})
