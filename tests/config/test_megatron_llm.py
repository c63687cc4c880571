"""Megatron-LLM's flags: every one of its list has a treatment, and those that map do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron.config.batches import Ramp
from megatron.config.load import load_config
from megatron.config.megatron_llm.flag import Flag
from megatron.config.megatron_llm.page import main as write_page
from megatron.config.megatron_llm.schedule import length_of_run, ramp_of
from megatron.config.megatron_llm.table import FLAGS, GROUPS, read_flags
from megatron.config.megatron_llm.translate import Facts, Translation, translate
from megatron.config.optimizer import OptimizerConfig
from megatron.config.schema import all_keys
from megatron.optim.learning_rate import learning_rate
from megatron.utils.errors import ConfigError

LOADED = Facts(
    load="folder",
    model={
        "model_type": "llama", "num_hidden_layers": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
    },
    schedule={"learning_rate": 9.0}, vocabulary=40, pad_token=2, tokenizer="t.model",
)  # fmt: skip
WORDS = ["--micro_batch_size", "1", "--lr", "1e-4", "--train_iters", "10", "--data_path", "a", "--load", "x"]
# What the list takes for mapped and is not: each is refused or ignored with its reason, or needs no key.
NOT_MAPPED = {
    "skip_iters", "no_save_optim", "eod_mask_loss", "log_params_norm",
    "log_num_zeros_in_grad", "timing_log_level", "timing_log_option", "make_vocab_size_divisible_by",
    "distributed_backend", "num_workers", "variable_seq_lengths", "merge_file", "tensorboard_log_interval",
    "tensorboard_queue_size", "no_save_rng", "no_load_rng", "fp8_e4m3", "fp8_hybrid", "no_fp8_wgrad", "fp8_margin",
    "fp8_interval", "fp8_amax_history_len", "fp8_amax_compute_algo", "transformer_impl",
}  # fmt: skip


def run(words: str = "", facts: Facts = LOADED, base: list[str] = WORDS) -> Translation:
    return translate(read_flags([*base, *words.split()]), facts)


def listed_flags(shared: Path) -> dict[str, str]:
    """Every flag of the list of facts with the treatment that it proposes."""
    text = (shared / "facts/flags.md").read_text()
    part = text[text.index("## 1.") : text.index("## 2.")]
    rows = [line.split("|")[1:-1] for line in part.splitlines() if line.startswith("|")]
    return {
        name: row[-1].strip()
        for row in rows
        for name in re.findall(r"--(\w+)", row[0])
        if "**" not in row[0] and set(row[0]) - set("- ")
    }


def test_every_flag_of_the_list_has_a_treatment(shared: Path) -> None:
    listed = listed_flags(shared)
    assert len(listed) > 200 and {"model_name", "metrics", "dino_norm_last_layer"} <= listed.keys()
    assert sorted(listed.keys() - FLAGS.keys()) == []
    mapped = {name for name, proposed in listed.items() if proposed.startswith("maps")}
    assert len(mapped) > 80
    assert {name for name in mapped if FLAGS[name].treatment != "maps"} - NOT_MAPPED == set()


def test_no_flag_is_there_twice_and_each_says_what_becomes_of_it() -> None:
    assert sum(len(group) for group in GROUPS.values()) == len(FLAGS)
    for flag in FLAGS.values():
        assert flag.about and (flag.key is None or flag.key in all_keys()), flag
        if flag.treatment == "refused":
            assert re.search(r"leave it out|use |give |tokenize|send SIGTERM|set |megatron_to_hf", flag.about), flag


# What has to stand beside a flag for it to mean something.
BESIDE = {
    "recompute_num_layers": "--recompute_granularity full --recompute_method block",
    "recompute_method": "--recompute_granularity full --recompute_num_layers 2",
    **{f"wandb_{name}": "--wandb_logger" for name in ("project", "entity", "name", "id", "resume")},
    "save": "--save_interval 5",
    "sequence_parallel": "--tensor_model_parallel_size 2",
    "scalar_loss_mask": "--data_type instruction",
    "no_new_tokens": "--data_type instruction",
    "eval_interval": "--split 9,1",
    "eval_iters": "--split 9,1",
}
RANDOM = Facts(vocabulary=40, tokenizer="t.model")
OF_RANDOM = {
    "max_position_embeddings",
    "init_method_std",
    "model_name",
    "position_embedding_type",
    "no_tie_embed_logits",
}
SHAPE = "--num_layers 4 --hidden_size 64 --num_attention_heads 4 --seq_length 32 --micro_batch_size 1 --lr 1e-4"
# These say what must be so, or which files are looked at: translate() gets to know of it by its facts.
CHECKED = {
    "use_bias", "glu_activation", "rope_scaling_factor", "parallel_attn", "parallel_layernorm", "use_multiquery_attn",
    "sliding_window_size", "layernorm_epsilon", "rope_theta", "load_iters", "load", "no_load_optim", "vocab_file",
    "tokenizer_type", "tokenizer_model", "vocab_extra_ids", "vocab_extra_ids_list", "finetune", "reset_position_ids",
    "eval_only", "train_data_path", "valid_data_path", "test_data_path", "train_samples", "lr_decay_samples",
    "lr_warmup_samples", "recompute_activations", "train_iters", "num_layers", "encoder_num_layers",
    "rampup_batch_size", "save_interval",
}  # fmt: skip


@pytest.mark.parametrize("flag", [flag for flag in FLAGS.values() if flag.treatment == "maps"], ids=lambda f: f.name)
def test_a_flag_that_maps_changes_the_configuration(flag: Flag) -> None:
    if flag.name in CHECKED:
        assert flag.about  # each has a test of its own below
        return
    random = flag.name in OF_RANDOM
    base = [*SHAPE.split(), "--train_iters", "10", "--data_path", "a", "--no_tie_embed_logits"] if random else WORDS
    if flag.name == "no_tie_embed_logits":
        base = base[:-1]
    beside = BESIDE.get(flag.name, "")
    facts = RANDOM if random else LOADED
    without, given = run(beside, facts, base), run(f"{beside} {flag.option} {flag.example}", facts, base)
    assert (without.keys, without.environment) != (given.keys, given.environment)
    if flag.key is not None and flag.kind == "whole":
        assert given.keys[flag.key] == int(flag.example)


@pytest.mark.parametrize("flag", [flag for flag in FLAGS.values() if flag.treatment == "refused"], ids=lambda f: f.name)
def test_a_refused_flag_says_why(flag: Flag) -> None:
    value = {"switch": [], "whole": ["3"], "number": ["0.5"], "wholes": ["3", "4"]}.get(flag.kind, ["something"])
    with pytest.raises(ConfigError, match=re.escape(flag.about)):
        read_flags([flag.option, *value])
    for neutral in flag.neutral:
        read_flags([flag.option, *([] if neutral == () else [str(neutral)])])


def test_the_documented_pretraining_gives_a_whole_configuration() -> None:
    done = run(
        "--tensor_model_parallel_size 8 --bf16 --global_batch_size 12 --sequence_parallel --lr_decay_style cosine "
        "--lr_warmup_fraction 0.1 --min_lr=1e-4 --weight-decay 0.1 --adam_beta2=0.95 --adam_eps 1e-5 --train_iters "
        "1000 --save out --save_interval 800 --eval_interval 200 --eval_iters 10 --metrics perplexity count_loss_mask "
        "--vocab_file a --vocab_file=b --attention_dropout 0.0 --hidden_dropout 0.0 --rope_scaling_factor 1.0"
    )
    config = load_config(None, [f"--{name}={str(value).replace(chr(39), chr(34))}" for name, value in done.keys.items()
                                if value is not None])  # fmt: skip
    assert (config.parallel.tensor, config.parallel.sequence, config.parallel.zero) == (8, True, 0)
    assert (config.optimizer.warmup_steps, config.optimizer.decay_steps, config.optimizer.beta2) == (100, 1000, 0.95)
    assert (config.data.split, config.evaluate.interval, config.evaluate.batches) == ("969, 30, 1", 200, 10)
    assert config.evaluate.metrics == ("perplexity", "count_loss_mask") and config.log.interval == 100
    assert done.notices == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--microbatch_size 3", "unrecognized arguments: --microbatch_size; did you mean --micro_batch_size?"),
        ("--lr_decay_style cosine 5", "--lr_decay_style takes one value, but 'cosine 5' follows it"),
        ("--lr_decay_style cosin", "did you mean cosine?"),
        ("--bf16 yes", "--bf16 takes no value"),
        ("--seq_length=long", "--seq_length long is not a whole number"),
        ("--train_samples 8", "--train_iters or --train_samples, and both are given"),
        ("--lr_warmup_samples 8", "--lr_warmup_samples goes with --train_samples, but --train_iters is given"),
        ("--lr_warmup_fraction 0.1 --lr_warmup_iters 3", "say the same"),
        ("--train_data_path b", "--data_path with --train_data_path"),
        ("--data_path 0.5 a 0.5", "give one prefix, or weight prefix"),
        ("--save out", "--save needs --save_interval"),
        ("--layernorm_epsilon 1e-6", "but --load says 1e-05"),
        ("--rope_theta 1e6", "--load says 10000.0"),
        ("--model_name mistral", "but --load holds a model of the family llama"),
        ("--parallel_attn", "--parallel_attn is for Falcon, and the model is llama"),
        ("--use_bias", "llama has no biases"),
        ("--glu_activation geglu", "the gated activation of llama is swiglu"),
        ("--rope_scaling_factor 4", '"rope_scaling": {"type": "linear", "factor": 4.0}'),
        ("--sliding_window_size 9", "--sliding_window_size 9, but the config.json of --load says None"),
        ("--reset_position_ids", "goes with --reset_attention_mask"),
        ("--seq_length 8 --encoder_seq_length 8", "are the same; leave one out"),
        ("--tokenizer_type BertWordPieceCase", "masked language models"),
        ("--start_weight_decay 0.1 --end_weight_decay 0.2", "weight decay is constant"),
        ("--num_layers_per_virtual_pipeline_stage 3", "does not divide the layers (4)"),
        ("--rampup_batch_size 4 3 8 --global_batch_size 8 --seq_length 8", "does not reach --global_batch_size 8"),
        ("--model_type encoder_and_decoder", "must be one of encoder_or_decoder"),
    ],
)
def test_what_is_wrong_is_one_error(words: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        run(words)


def test_all_problems_come_together() -> None:
    with pytest.raises(ConfigError, match="the command line has 3 problems"):
        read_flags(["--fp16", "--num_layer", "3", "--seq_length", "x"])


def test_where_a_run_starts() -> None:
    assert run().keys["model.init_from"] == "folder"
    a_run = Facts(load="folder", holds="run", save_has_run=True)
    assert run(facts=a_run).keys["checkpoint.load"] == "folder"
    assert run("--finetune --save out --save_interval 5", a_run).keys["model.init_from"] == "folder"
    for words in ("--load_iters 3 --save out --save_interval 5", "--finetune --save x --save_interval 5"):
        with pytest.raises(ConfigError, match="which holds checkpoints of a run"):
            run(words, a_run)
    with pytest.raises(ConfigError, match="--finetune starts from its weights"):
        run("--no_load_optim", a_run)


def test_data_of_each_part() -> None:
    base = ["--micro_batch_size", "1", "--lr", "1e-4", "--train_iters", "10", "--load", "x"]
    keys = run("--train_data_path 1 a 3 b --valid_data_path v --test_data_path=t", base=base).keys
    assert keys["data.train"] == [[1.0, "a"], [3.0, "b"]]
    assert (keys["data.validation"], keys["data.test"], keys["evaluate.interval"]) == ("v", "t", 1000)
    assert "data.split" not in keys
    without = run("--train_data_path a --valid_data_path v --eval_iters 0", base=base).keys
    assert "evaluate.interval" not in without and "data.validation" not in without
    assert "evaluate.interval" not in run("--split 1").keys


def test_samples_become_steps() -> None:
    base = [*WORDS, "--global_batch_size", "8", "--train_samples", "85"]
    base = [word for word in base if word not in ("--train_iters", "10")]
    keys = run("--lr_decay_samples 160 --lr_warmup_samples 16", base=base).keys
    names = ("train.global_batch", "train.steps", "optimizer.decay_steps", "optimizer.warmup_steps")
    assert [keys[name] for name in names] == [8, 10, 20, 2]
    ramp = run("--rampup_batch_size 4 2 16 --seq_length 10", base=base)
    assert [ramp.keys[name] for name in names[:2]] == [((0, 4), (80, 6), (160, 8)), 12]
    assert any("the learning rate goes by steps" in notice for notice in ramp.notices)


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root"])
@pytest.mark.parametrize(
    "flags",
    [
        {"train_iters": 40, "lr_warmup_fraction": 0.1},
        {"train_iters": 40, "lr_decay_iters": 30, "lr_warmup_iters": 5},
        {"train_samples": 320, "lr_decay_samples": 400, "lr_warmup_fraction": 0.2},
        {"train_samples": 320},
    ],
)
def test_rates_are_those_of_the_rule_in_samples(style: str, flags: dict[str, Any]) -> None:
    """The rule of the facts, written out in samples: the rate of the step that begins after n of them."""
    import math

    batch, peak, floor = 8, 3e-4, 1e-5
    length = length_of_run(flags, batch, 16)
    assert length.problems == [] and length.notices == []
    config = OptimizerConfig(
        learning_rate=peak, min_learning_rate=floor, warmup_steps=length.keys["optimizer.warmup_steps"],
        decay_style=style.replace("-", "_"),
    )  # fmt: skip
    train = flags.get("train_samples", flags.get("train_iters", 0) * batch)
    horizon = flags.get("lr_decay_samples", flags["lr_decay_iters"] * batch if "lr_decay_iters" in flags else train)
    warmup = flags["lr_warmup_fraction"] * horizon if "lr_warmup_fraction" in flags else (
        flags.get("lr_warmup_iters", 0) * batch
    )  # fmt: skip
    for step in range(1, 60):
        n = (step - 1) * batch
        done = (n - warmup) / (horizon - warmup)
        if warmup > 0 and n <= warmup:
            expected = peak * n / warmup
        elif style == "constant":
            expected = peak
        elif n > horizon:
            expected = floor
        else:
            expected = {
                "cosine": floor + 0.5 * (1 + math.cos(math.pi * done)) * (peak - floor),
                "linear": floor + (1 - done) * (peak - floor),
                # there in samples: √(W / n) is the same in steps, except that W is at least one of either
                "inverse-square-root": max(floor, peak * math.sqrt(max(warmup / batch, 1) / max(n / batch, 1))),
            }[style]
        assert learning_rate(config, step, length.keys["optimizer.decay_steps"]) == pytest.approx(expected), step


def test_a_warmup_of_broken_steps_is_told() -> None:
    length = length_of_run({"train_iters": 15, "lr_warmup_fraction": 0.1}, 8, 16)
    assert length.keys["optimizer.warmup_steps"] == 2
    assert length.notices == ["--lr_warmup_fraction is 12 samples, taken as 2 steps"]


def test_the_ramp_is_that_of_the_rule() -> None:
    """Batch of the step at sample n: start + increment · (n // (samples / increments)), then the full one."""
    start, increment, samples, batch, length = 4, 2, 50, 12, 16
    ramp = Ramp.of(ramp_of(start, increment, samples, batch, length), length)
    per = samples / ((batch - start) / increment)
    for n in range(80):
        expected = batch if n > samples else start + increment * int(n / per)
        assert ramp.batch_at(n) == expected, n


def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs/megatron_llm.md"
    assert write_page([str(page), "--check"]) == 0
    text = page.read_text()
    assert all(f"`{flag.option}`" in text for flag in FLAGS.values())
    old = tmp_path / "page.md"
    old.write_text(text.replace("| sets |", "| does |", 1))
    assert write_page([str(old), "--check"]) == 1 and "is out of date" in capsys.readouterr().err
    assert write_page([str(old)]) == 0 and old.read_text() == text


INSTRUCT = "--data_type instruction --variable_seq_lengths --metrics all --finetune --scalar_loss_mask=0.0"
EXAMPLE = (
    "--tensor_model_parallel_size 8 --pipeline_model_parallel_size 1 --save out --tensorboard_dir out/logging "
    "--tokenizer_type SentencePieceTokenizer --bf16 --global_batch_size 12 --micro_batch_size 1 --num_workers=2 "
    "--use_rms_norm --glu_activation swiglu --no_tie_embed_logits --vocab_extra_ids_list [bib_ref],[/bib_ref] "
    "--vocab_file=tokenizer.model --use_flash_attn --no_bias_gelu_fusion --log_interval 1 --save_interval 800 "
    "--eval_interval 200 --eval_iters 10 --hidden_dropout 0.0 --position_embedding_type rotary "
    "--no_bias_dropout_fusion --use_checkpoint_args --attention_dropout 0.0 --adam_beta1 0.9 --adam_beta2 0.95 "
    "--adam_eps 1e-5 --lr_decay_style cosine --lr_warmup_fraction 0.1 --weight_decay 0.1 --sequence_parallel "
    "--recompute_granularity selective --log_timers_to_tensorboard --rope_scaling_factor 1.0 --train_iters "
    "1000 --load x"
)


@pytest.mark.parametrize(
    ("variant", "model"),
    [
        ("--model_name llama --layernorm_epsilon 1e-6 --seq_length 2048 --data_path d --lr 3e-4 --min_lr 3e-4",
         {"rms_norm_eps": 1e-6}),
        ("--model_name codellama --rope_theta 1e6 --seq_length 16384 --data_path d --lr 3e-4 --min_lr 3e-4",
         {"rope_theta": 1e6}),
        ("--model_name llama2 --train_data_path d --valid_data_path v --lr 1.5e-4 --min_lr 1.5e-4 --wandb_logger "
         "--wandb_project P --wandb_id I --wandb_entity E", {}),
        ("--model_name mistral --seq_length 8192 --sliding_window_size 4096 --data_path d --lr 2e-5 --min_lr 2e-6 "
         f"{INSTRUCT}", {"model_type": "mistral", "sliding_window": 4096}),
        ("--model_name llama2 --data_path d --lr 2e-5 --min_lr 2e-6 --eval_interval 100 --load_iteration 20 "
         f"{INSTRUCT}", {}),
    ],
    ids=["llama", "codellama", "files apart, wandb", "mistral instruct", "meditron's fine-tuning"],
)  # fmt: skip
def test_the_variants_of_the_examples_are_accepted(variant: str, model: dict[str, Any]) -> None:
    """examples/finetune.sh and Meditron's finetune.sh for each model and kind of data: nothing is refused."""
    facts = Facts(world_size=8, load="x", model={**LOADED.model, "max_position_embeddings": 32768, **model},
                  vocabulary=40, pad_token=2, tokenizer="t.model")  # fmt: skip
    done = translate(read_flags([*EXAMPLE.split(), *variant.split()]), facts)
    words = [f"--{name}={json.dumps(value)}" for name, value in done.keys.items() if value is not None]
    config = load_config(None, words)
    assert (config.train.steps, config.train.global_batch, config.parallel.tensor) == (1000, 12, 8)
    assert config.data.kind == ("instruction" if INSTRUCT in variant else "pretraining")
